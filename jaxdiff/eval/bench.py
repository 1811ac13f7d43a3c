"""The solver benchmark: every solver x grid x budget, each bucket of tables in one vmapped, compiled call.

``benchmark(problem, ...)`` plans the cells on the host, stacks tables of one padded shape, and runs each stack as one program:
the number of compilations is the number of buckets, not of samplers. Guidance scales, seeds and chunks reuse the
program. Finished buckets are kept in ``out/parts`` and skipped by the next run with the same inputs. Tables and samples are
laid over the devices of this process (rows x samples).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdiff import prediction, solver
from jaxdiff.eval.bench_measure import METRICS, Yardstick, measure, yardstick
from jaxdiff.eval.bench_plan import Cell, buckets, choices, plan, stochastic
from jaxdiff.eval.bench_problem import Problem, Reference, starts
from jaxdiff.eval.whole_file import write_whole
from jaxdiff.process.coefficients import expand
from jaxdiff.solver.table import COLUMNS, AffineBlock, Table, device, stack

__all__ = ["Result", "benchmark", "load_table", "replay", "stack_arrays", "sweep"]


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a benchmark found.

    ``rows``: one dict a (cell, seed, scale): ``cell`` (index into ``cells``), ``seed``, ``scale`` and the metrics;
    refused cells have none. ``cells``: as planned, refused ones with their reason. ``bucket`` of each cell: (bucket,
    position) or None. ``stacks``: the stacked table of each bucket. ``facts``: counts, times, errors of the references, floors.
    ``seconds``: {solver label: (nfe, seconds of one separate run)}, empty unless asked for.
    """

    cells: list[Cell]
    rows: list[dict[str, Any]]
    bucket: list[tuple[int, int] | None]
    stacks: list[Table]
    facts: dict[str, Any]
    seconds: dict[str, tuple[int, float]]


def sweep(
    tables: Table, d: Any, z: jax.Array, key: jax.Array | None, index: jax.Array, cond: Any = None
) -> jax.Array:
    """End points (T, N, ...) of T stacked tables from unit-scale starts ``z`` (N, ...): the vmapped program.

    ``key`` None for deterministic stacks. Random rows draw noise per (key, global index, row), shared by all tables.
    """
    d = d if cond is None else prediction.condition(d, cond)
    one = lambda table: solver.run(table, d, expand(table.blocks.start_scale, z) * z, key, index=index)
    return jax.vmap(one)(tables)


_program = jax.jit(sweep)


class Compiles:
    """Counts what XLA compiles while it is entered."""

    def __enter__(self) -> Compiles:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)  # type: ignore[arg-type]
        return self

    def _heard(self, event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.count, self.seconds = self.count + 1, self.seconds + duration

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)  # type: ignore[arg-type]


def benchmark(
    problem: Problem,
    *,
    solvers: Sequence[Any],
    grids: Sequence[Any],
    nfe: Sequence[int],
    seeds: Sequence[int] = (0,),
    guidance_scales: Sequence[float] = (),
    samples: int = 1024,
    batch: int = 0,
    chunk: int = 32,
    projections: int = 64,
    reference_samples: int = 16384,
    timing: bool = False,
    out: Any = None,
) -> Result:
    """Run every solver x grid x budget x seed x guidance scale.

    ``solvers``, ``grids``: names or (name, options), see :func:`bench_plan.choices`; ``nfe``: budgets, each bought by the
    largest number of steps that costs no more. ``samples``: starts a cell, run ``batch`` at a time (0: all at once);
    ``chunk``: tables a call. ``reference_samples`` (a multiple of ``samples``): points of the true distribution for sliced W2.
    ``timing``: also time each solver on its own. ``out``: folder whose ``parts`` keep finished buckets. Raises ValueError
    naming the argument.
    """
    began = time.perf_counter()
    batch = batch or samples
    for name, value in {"samples": samples, "batch": batch, "chunk": chunk, "projections": projections}.items():
        if value < 1:
            raise ValueError(f"{name}: {value} given; need at least 1")
    if samples < 2 or samples % batch:
        raise ValueError(f"batch: {batch} given; need a divisor of samples = {samples}, itself at least 2")
    if reference_samples < samples or reference_samples % samples:
        raise ValueError(f"reference_samples: {reference_samples} given; need a multiple of samples = {samples}")
    for name, given in {"solvers": solvers, "grids": grids, "nfe": nfe, "seeds": seeds}.items():
        if not len(given):
            raise ValueError(f"{name}: none given; need at least one")
    scales: list[float | None] = list(guidance_scales) or [None]
    if scales != [None] and problem.labels is None:
        raise ValueError(f"guidance_scales: {scales} given, but problem {problem.name!r} has no labels")
    cells = plan(problem.process, choices("solver", solvers), choices("grid", grids), nfe)
    planned = time.perf_counter() - began
    groups = list(buckets(cells).values())
    place: list[tuple[int, int] | None] = [None] * len(cells)
    stacks = []
    for b, group in enumerate(groups):
        stacks.append(stack([cast(Table, cells[i].table) for i in group]))
        for position, i in enumerate(group):
            place[i] = (b, position)
    truth = _Truth(problem, samples, projections, reference_samples)
    known = _program._cache_size()  # type: ignore[attr-defined]
    rows: list[dict[str, Any]] = []
    references: dict[str, float] = {}
    floors: dict[str, Any] = {}
    fresh = 0
    parts = None if out is None else pathlib.Path(out) / "parts"
    calls = sum(-(-len(group) // chunk) for group in groups) * len(seeds) * len(scales) * (samples // batch)
    inputs = [problem.identity, list(seeds), scales, samples, projections, reference_samples, METRICS]
    with Compiles() as compiles, tqdm(total=calls, desc="bench", unit="call", disable=None) as bar:
        for group, tables in zip(groups, stacks):
            part = None if parts is None else parts / f"{_digest(tables, inputs)}.json"
            if part is not None and part.exists():
                kept = json.loads(part.read_text())
                found = kept["rows"]
                references |= kept["references"]
                floors |= kept["floors"]
                bar.update(-(-len(group) // chunk) * len(seeds) * len(scales) * (samples // batch))
            else:
                fresh += 1
                found = []
                for seed in seeds:
                    for scale in scales:
                        found += _run(problem, truth, tables, group, cells, seed, scale, batch, chunk, bar)
                references |= {f"seed {s}, scale {w}": each.error for (s, w), each in truth.known.items()}
                floors |= {str(w): each.floor for w, each in truth.yards.items()}
                if part is not None:
                    kept = {"rows": found, "references": references, "floors": floors}
                    write_whole(part, json.dumps(kept).encode())
            rows += [{**row, "cell": group[row["position"]]} for row in found]
        programs = _program._cache_size() - known  # type: ignore[attr-defined]
        seconds = _time_alone(problem, cells, batch, scales[0]) if timing else {}
    for row in rows:
        row.pop("position", None)
    rows.sort(key=lambda row: (row["cell"], row["seed"], -math.inf if row["scale"] is None else row["scale"]))
    facts = {
        "problem": problem.name,
        "cells": len(cells),
        "run": sum(cell.table is not None for cell in cells),
        "refused": sum(cell.table is None for cell in cells),
        "solvers": len({cell.solver.label for cell in cells}),
        "samples": samples,
        "buckets": len(groups),
        "buckets_run_now": fresh,
        "programs_compiled": programs,
        "all_xla_compiles": compiles.count,
        "compile_seconds": round(compiles.seconds, 2),
        "plan_seconds": round(planned, 2),
        "wall_seconds": round(time.perf_counter() - began, 2),
        "devices": len(jax.local_devices()),
        "backend": jax.default_backend(),
        "reference_rms_error": references,
        "sliced_w2_floor": floors,
    }
    return Result(cells, rows, place, stacks, facts, seconds)


class _Truth:
    """References and yardsticks, each made once and only when asked for."""

    def __init__(self, problem: Problem, samples: int, projections: int, reference_samples: int):
        self.problem, self.samples = problem, samples
        self.projections, self.reference_samples = projections, reference_samples
        self.known: dict[tuple, Reference] = {}
        self.yards: dict[float | None, Yardstick] = {}

    def labels(self, index: np.ndarray) -> Any:
        return None if self.problem.labels is None else self.problem.labels(index)

    def reference(self, seed: int, scale: float | None) -> Reference:
        if (seed, scale) not in self.known:
            index = np.arange(self.samples)
            z = np.asarray(starts(self.problem.process, seed, index, self.problem.shape))
            self.known[seed, scale] = self.problem.reference(z, self.labels(index), scale)
        return self.known[seed, scale]

    def yardstick(self, scale: float | None) -> Yardstick:
        if scale not in self.yards:
            self.yards[scale] = yardstick(self.problem, scale, self.samples, self.projections, self.reference_samples)
        return self.yards[scale]


def _layout(tables: int, batch: int) -> tuple[jax.sharding.Mesh, int]:
    """A mesh (table, sample) over this process's devices, and the number of rows tables are padded to a multiple of."""
    devices = jax.local_devices()
    rows = max(n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and n <= tables)
    columns = math.gcd(len(devices) // rows, batch)
    chosen = np.array(devices[: rows * columns]).reshape(rows, columns)
    return jax.sharding.Mesh(chosen, ("table", "sample"), axis_types=(jax.sharding.AxisType.Auto,) * 2), rows


def _run(
    problem: Problem,
    truth: _Truth,
    tables: Table,
    group: list[int],
    cells: list[Cell],
    seed: int,
    scale: float | None,
    batch: int,
    chunk: int,
    bar: Any,
) -> list[dict[str, Any]]:
    """Rows of one bucket at one seed and scale."""
    size = min(chunk, len(group))
    mesh, multiple = _layout(size, batch)
    size = -(-size // multiple) * multiple
    spread = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    random = tables.blocks.stochastic
    d = jax.device_put(prediction.lift(problem.denoiser(scale)), spread())
    key = jax.device_put(jax.random.key(seed), spread()) if random else None
    reference, yard, out = truth.reference(seed, scale), truth.yardstick(scale), []
    slim = dataclasses.replace(tables, time=None, out=None, live=None)
    for first in range(0, len(group), size):
        # the last chunk is filled up with its last table: one shape, one program
        pick = np.minimum(np.arange(first, first + size), len(group) - 1)
        part = jax.device_put(
            _cast(jax.tree_util.tree_map(lambda leaf, pick=pick: leaf[pick], slim)), spread("table")
        )
        pieces = []
        for start in range(0, truth.samples, batch):
            index = np.arange(start, start + batch, dtype=np.uint32)
            z = jax.device_put(starts(problem.process, seed, index, problem.shape), spread("sample"))
            cond = truth.labels(index)
            cond = None if cond is None else jax.device_put(jnp.asarray(cond), spread("sample"))
            ends = _program(part, d, z, key, jax.device_put(index, spread("sample")), cond)
            pieces.append(np.asarray(ends))
            bar.update(1)
        ends = np.concatenate(pieces, 1)
        for position in range(first, min(first + size, len(group))):
            exact = None if stochastic(cast(Table, cells[group[position]].table)) else reference.ends
            row = {"position": position, "seed": seed, "scale": scale}
            out.append(row | measure(ends[position - first], yard, exact))
    return out


def _cast(tables: Table) -> Table:
    """Float64 columns in float32, on the host: converting on the device would be one more compilation a shape."""
    return jax.tree_util.tree_map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, tables)


def _digest(tables: Table, inputs: Any) -> str:
    digest = hashlib.sha256(json.dumps(inputs).encode())
    for leaf in jax.tree_util.tree_leaves(tables):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:24]


def _time_alone(problem: Problem, cells: list[Cell], batch: int, scale: float | None) -> dict[str, tuple[int, float]]:
    """Seconds of one public ``sample`` call of each solver, median of five after a first one, at its largest budget."""
    largest: dict[str, Cell] = {}
    for cell in cells:
        if cell.table is not None and cell.nfe > getattr(largest.get(cell.solver.label), "nfe", 0):
            largest[cell.solver.label] = cell
    found = {}
    d = problem.denoiser(scale)
    cond = None if problem.labels is None else jnp.asarray(problem.labels(np.arange(batch)))
    for label, cell in tqdm(largest.items(), desc="time", unit="solver", disable=None):
        times = []
        for _ in range(6):
            began = time.perf_counter()
            draw = solver.sample(cell.table, d, jax.random.key(0), (batch, *problem.shape), cond=cond)
            jax.block_until_ready(draw)
            times.append(time.perf_counter() - began)
        found[label] = cell.nfe, float(np.median(times[1:]))
    return found


def stack_arrays(stacks: Sequence[Table]) -> dict[str, np.ndarray]:
    """Every column of every bucket's stack as ``{"bucket/column": (T, ...)}``, for ``np.savez``."""
    out: dict = {}
    for b, tables in enumerate(stacks):
        columns = {name: getattr(tables.blocks, name) for name in COLUMNS}
        columns |= {"tau": tables.tau, "time": tables.time, "out": tables.out, "live": tables.live, "r": tables.r}
        columns["mode"] = None if tables.mode is None else np.array(tables.mode)
        out |= {f"{b}/{name}": np.asarray(value) for name, value in columns.items() if value is not None}
    return out


def load_table(out: Any, bucket: int, position: int, law: Any) -> Table:
    """The table at ``position`` of ``bucket`` from a report folder's ``tables.npz``; padding rows included."""
    with np.load(pathlib.Path(out) / "tables.npz") as file:
        have = {name.partition("/")[2]: file[name] for name in file.files if name.partition("/")[0] == str(bucket)}
    mode = have.pop("mode", None)
    have = {name: value[position] for name, value in have.items()}
    block = AffineBlock(law=law, **{name: have.get(name) for name in COLUMNS})
    rest = {name: have.get(name) for name in ("tau", "time", "out", "live", "r")}
    return Table(blocks=block, mode=None if mode is None else tuple(int(m) for m in mode), **rest)


def replay(out: Any, problem: Problem, row: dict[str, Any]) -> np.ndarray:
    """The samples (N, ...) behind one row of a report's ``results.json``, drawn again by the public ``sample``."""
    table = load_table(out, row["bucket"], row["position"], problem.process.noise)
    index = np.arange(row["samples"])
    cond = None if problem.labels is None else jnp.asarray(problem.labels(index))
    d, key = problem.denoiser(row["scale"]), jax.random.key(row["seed"])
    return np.asarray(solver.sample(device(table), d, key, (len(index), *problem.shape), cond=cond))
