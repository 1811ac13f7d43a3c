"""One vmapped call a bucket against compiling each sampler separately, from cold caches, in one process.

    python benchmarks/sweep.py [--separate 24] [--json benchmarks/results/sweep.json]

Ours: every cell of configs/bench/gmm.py at one seed, as `jaxdiff bench` runs it (stack, compile and run each bucket), without
references and metrics. Separately: a seeded random subset of the same tables, each with a fresh ``jax.jit`` of the same
``run``; its mean time a sampler, times the number of cells, is an extrapolation and is printed as one (``--separate 0`` runs
all cells). Both sides get tables that are already built and end with arrays on the host. The time that only runs, with
nothing left to compile, is given for both. No persistent cache is in use.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import time

import jax
import numpy as np

from jaxdiff import config as config_lib
from jaxdiff import solver
from jaxdiff.commands import bench as command
from jaxdiff.eval import bench, bench_plan, bench_problem
from jaxdiff.solver import device, stack

ROOT = pathlib.Path(__file__).resolve().parent.parent


def separately(table, d, z, key, index):
    """One sampler with a compiled function of its own, as a person compares samplers."""
    draw = jax.jit(lambda d, z, key, index: solver.run(table, d, table.blocks.start_scale * z, key, index=index))
    began = time.perf_counter()
    np.asarray(draw(d, z, key, index))
    first = time.perf_counter() - began
    began = time.perf_counter()
    np.asarray(draw(d, z, key, index))
    return first, time.perf_counter() - began


def buckets(tables, d, z, key, index, chunk):
    """All tables, one program a bucket, in calls of ``chunk``; returns their end points and the seconds it took."""
    began = time.perf_counter()
    for stacked in tables:
        count = np.shape(stacked.tau)[0]
        slim = bench._cast(dataclasses.replace(stacked, time=None, out=None, live=None))
        size = min(chunk, count)
        for first in range(0, count, size):
            pick = np.minimum(np.arange(first, first + size), count - 1)
            part = jax.tree_util.tree_map(lambda leaf, pick=pick: leaf[pick], slim)
            own = key if stacked.blocks.stochastic else None
            np.asarray(bench._program(part, d, z, own, index))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/bench/gmm.py"))
    parser.add_argument("--separate", type=int, default=24, help="samplers compiled one by one; 0: all")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    config = config_lib.load(args.config)
    problem = command.problem(config)
    d, key = problem.denoiser(None), jax.random.key(0)
    index = np.arange(config.samples, dtype=np.uint32)
    z = bench_problem.starts(problem.process, 0, index, problem.shape)

    with bench.Compiles() as building:
        began = time.perf_counter()
        solvers, grids = bench_plan.choices("solver", config.solvers), bench_plan.choices("grid", config.grids)
        cells = bench_plan.plan(problem.process, solvers, grids, config.nfe)
        planned = time.perf_counter() - began
        began = time.perf_counter()
        stacks = [stack([cells[i].table for i in group]) for group in bench_plan.buckets(cells).values()]
        stacking = time.perf_counter() - began
    ran = [cell for cell in cells if cell.table is not None]
    before = os.getloadavg()[0]
    with bench.Compiles() as together:
        ours = stacking + buckets(stacks, d, z, key, index, config.chunk)
    ours_run = buckets(stacks, d, z, key, index, config.chunk)

    chosen = np.random.default_rng(0).permutation(len(ran))[: args.separate or len(ran)]
    times = np.array(
        [
            separately(device(ran[i].table), d, z, key if bench_plan.stochastic(ran[i].table) else None, index)
            for i in chosen
        ]
    )
    each, each_run = times.mean(0)
    error = times[:, 0].std(ddof=1) / np.sqrt(len(times))
    result = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "load_before": round(before, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "solvers": len(solvers),
        "cells": len(ran),
        "samples": config.samples,
        "compiles_while_building_tables": building.count,
        "building_seconds": round(planned, 2),
        "buckets": len(stacks),
        "ours_programs": together.count,
        "ours_seconds": round(ours, 2),
        "ours_seconds_compiled": round(ours_run, 2),
        "separate_measured": len(chosen),
        "separate_seconds_each": round(float(each), 3),
        "separate_seconds_each_standard_error": round(float(error), 3),
        "separate_seconds_extrapolated": round(float(each) * len(ran), 1),
        "separate_seconds_compiled_extrapolated": round(float(each_run) * len(ran), 1),
        "ratio": round(float(each) * len(ran) / ours, 1),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
