"""Solvers found by evolution: which points of a fine grid to stop at, and every step's order, form and corrector.

A :class:`Space` is a finite set of tables of :func:`jaxdiff.solver.usf`. :func:`evolve` breeds its genomes on the host,
from one seed; the tables of a generation are one stack and are scored by one call of one compiled program. Nothing is
differentiated, so the score may be any number. Sources: 2312.07243 [121] (the space and S^3), 2309.10438 [64] (times).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction as predictions
from jaxdiff.near import near
from jaxdiff.process.process import Process
from jaxdiff.solver.executor import run
from jaxdiff.solver.exponential import FORMS, VARIABLES, check_variable
from jaxdiff.solver.grid import Grid, as_grid
from jaxdiff.solver.learn import Learned
from jaxdiff.solver.table import Table, freeze, stack
from jaxdiff.solver.unipc import ESTIMATORS, Step, usf

__all__ = ["GENES", "Space", "endpoint", "evolve", "space"]

GENES = {
    "order": (1, 2, 3, 4),
    "prediction": tuple(FORMS),
    "variable": VARIABLES,
    "corrector": (False, True),
    "estimator": ESTIMATORS,
}
Genome = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """The tables of ``steps`` steps between points of ``grid``; build with :func:`space`.

    A genome is a dict of integer arrays: "points" (steps - 1,), the increasing interior indices of the grid's points, and
    for each gene of GENES (steps,) indices into ``choices[gene]``.
    """

    process: Process
    grid: Grid
    steps: int
    choices: dict[str, tuple]

    @property
    def size(self) -> int:
        """How many genomes there are; some give equal tables (an order above the history there is, say)."""
        subsets = math.comb(len(self.grid) - 1, self.steps - 1)
        return subsets * math.prod(len(allowed) for allowed in self.choices.values()) ** self.steps

    def decode(self, genome: Genome) -> tuple[Grid, list[Step]]:
        """The grid and the choices of :func:`jaxdiff.solver.usf` that a genome stands for."""
        at = np.array([0, *genome["points"], len(self.grid)])
        columns = {name: [allowed[i] for i in genome[name]] for name, allowed in self.choices.items()}
        steps = [Step(**dict(zip(columns, values))) for values in zip(*columns.values())]
        return Grid(self.grid.time[at], self.grid.alpha[at], self.grid.sigma[at], self.grid.on_path), steps

    def build(self, genome: Genome) -> Table:
        """The genome's table."""
        return usf(self.process, *self.decode(genome))

    def genomes(self) -> Iterator[Genome]:
        """All ``size`` genomes, for spaces small enough to try them all."""
        genes = [itertools.product(range(len(allowed)), repeat=self.steps) for allowed in self.choices.values()]
        subsets = itertools.combinations(range(1, len(self.grid)), self.steps - 1)
        for points, *values in itertools.product(subsets, *genes):
            named = {"points": points, **dict(zip(self.choices, values))}
            yield {name: np.array(v, np.int64) for name, v in named.items()}


def space(
    process: Process,
    grid: Any,
    steps: int,
    *,
    order: Sequence[int] = (1, 2, 3),
    prediction: Sequence[str] = ("data", "noise"),
    variable: Sequence[str] = ("lam",),
    corrector: Sequence[bool] = (False, True),
    estimator: Sequence[str] = ("lagrange",),
) -> Space:
    """The solvers of ``steps`` steps, one evaluation each, that stop at points of a finer ``grid``.

    ``grid``: a Grid of M >= steps steps, or decreasing times (M+1,); its ends are kept. M = steps leaves the times alone;
    the grid of all times that a network was trained at is a good choice for discrete ones. The others: what each step may
    choose, see :class:`jaxdiff.solver.Step`. Raises ValueError for too few points, unknown and missing choices.
    """
    grid = as_grid(process, grid)
    if isinstance(steps, bool) or int(steps) != steps or not 1 <= steps <= len(grid):
        raise ValueError(f"steps: {steps} given; need a whole number in 1..{len(grid)}, the steps of the grid")
    given = (order, prediction, variable, corrector, estimator)
    choices = {name: _choices(name, values) for name, values in zip(GENES, given)}
    for name in choices["variable"]:
        check_variable(name, grid, "search.space")
    return Space(process, grid, int(steps), choices)


def _choices(name: str, given: Any) -> tuple:
    given = (given,) if isinstance(given, (str, int)) else tuple(given)
    for value in given:
        if value not in GENES[name] or isinstance(value, bool) != (name == "corrector"):
            allowed = ", ".join(map(str, GENES[name]))
            raise ValueError(f"{name}: {value!r} given; allowed: {allowed}{near(value, GENES[name])}")
    if not given or len(set(given)) != len(given):
        raise ValueError(f"{name}: {given} given; need one or more different choices")
    return given


def evolve(
    tables: Space,
    score: Callable[[Table, Any], Any],
    starts: Any = None,
    *,
    generations: int = 40,
    population: int = 64,
    mutation: float = 0.1,
    tournament: int = 3,
    start: Sequence[Genome] = (),
    seed: int = 0,
    compiled: bool = True,
    progress: bool = True,
) -> Learned:
    """The table of a space with the smallest ``score`` that an evolution finds; ``population x generations`` are scored.

    Args:
        tables: the space.
        score: ``(stack, starts) -> (population,)``, smaller is better: ``stack`` has the tables of a generation on its
            leading axis. A random score should use the same randomness for all tables and generations. Values that are not
            finite are worst.
        starts: any pytree of arrays, handed to the score (an argument of the compiled program, not a constant).
        generations: the first is one homogeneous solver per combination of choices at evenly spaced points, as many as
            fit, filled up at random; each later one has as many children. Parents are chosen by tournament among the
            best ``population`` seen so far.
        mutation: chance of each point and choice of a child to change.
        start: genomes that come first, ``[found.parameters]`` to go on from an earlier result.
        compiled: trace the score once and compile it; False for scores that leave jax.
        progress: show a bar on a terminal.

    The same seed gives the same result, bitwise on one machine. Returns what :func:`jaxdiff.solver.learn.fit` does: the
    table, its genome as ``parameters``, the best score after each generation as ``losses`` (generations,), which never rise.
    ``learn.save`` writes the table, and ``learn.endpoint`` polishes it by gradients. Raises ValueError for settings out of
    range, for genomes of another space, for scores of another shape, and if no score was finite.
    """
    for name, value, least in (
        ("generations", generations, 1),
        ("population", population, 2),
        ("tournament", tournament, 1),
    ):
        if isinstance(value, bool) or int(value) != value or value < least:
            raise ValueError(f"{name}: {value} given; need a whole number of at least {least}")
    if not 0 < mutation <= 1:
        raise ValueError(f"mutation: {mutation} given; need 0 < mutation <= 1")
    if len(start) > population:
        raise ValueError(f"start: {len(start)} genomes given for a population of {population}")
    given = [_checked(tables, genome) for genome in start]
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()
    pool: list[tuple[float, Genome]] = []
    losses = []
    called: Any = jax.jit(score) if compiled else score

    def parent() -> Genome:
        return pool[min(rng.integers(len(pool), size=tournament))][1]  # the pool is sorted

    first = itertools.chain(given, _homogeneous(tables), (_random(tables, rng) for _ in itertools.count()))
    bred = (_child(tables, parent(), parent(), mutation, rng) for _ in itertools.count())
    for generation in _bar(generations, progress):
        genomes, made = _different(tables, bred if generation else first, population, seen)
        stacked = stack(made)
        if not generation and compiled:
            _check_scores(called.eval_shape(stacked, starts), population)  # the trace serves the call too
        values = called(stacked, starts)
        _check_scores(values, population)
        values = np.asarray(values, np.float64)
        pool += zip(np.where(np.isfinite(values), values, np.inf).tolist(), genomes)
        pool = sorted(pool, key=lambda member: member[0])[:population]
        if not generation and not np.isfinite(pool[0][0]):
            raise ValueError(f"score: no finite value among the first {population} tables")
        losses.append(pool[0][0])
    best = pool[0][1]
    return Learned(tables.build(best), best, np.array(losses))


def endpoint(tables: Space, d: Any, x: Any, target: Any, *, chunk: int | None = None, **options: Any) -> Learned:
    """Search for the table whose run from ``x`` ends nearest to ``target``, in root mean square.

    ``x``, ``target``, ``d``: as in :func:`jaxdiff.solver.learn.endpoint`. ``chunk``: tables run at a time within the one
    program, all by default (memory: chunk x N states). ``options``: those of :func:`evolve`.
    """
    x, target = jnp.asarray(x), jnp.asarray(target)
    if x.shape != target.shape:
        raise ValueError(f"target: shape {target.shape} given; need that of x, {x.shape}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: {chunk} given; need a whole number of at least 1, or None for all tables")

    def score(stacked: Table, starts: tuple) -> jax.Array:
        d, x, target = starts
        error = lambda table: jnp.sqrt(jnp.mean((run(table, d, x) - target) ** 2))
        return jax.vmap(error)(stacked) if chunk is None else jax.lax.map(error, stacked, batch_size=chunk)

    return evolve(tables, score, (predictions.lift(d), x, target), **options)


def _wide(tables: Space, genome: Genome) -> Table:
    """The genome's table with histories as wide as any table of the space needs: one shape for all."""
    table = tables.build(genome)
    width = min(max(tables.choices["order"]) + (True in tables.choices["corrector"]), tables.steps)
    states = width if "noise" in tables.choices["prediction"] else 1
    A, B = table.blocks.A, table.blocks.B
    A = np.pad(A, ((0, 0), (0, states - A.shape[1])))
    B = np.pad(B, ((0, 0), (0, width - B.shape[1])))
    return freeze(dataclasses.replace(table, blocks=dataclasses.replace(table.blocks, A=A, B=B)))


def _bar(generations: int, progress: bool) -> Any:
    import tqdm

    return tqdm.tqdm(range(generations), desc="search", unit="generation", disable=None if progress else True)


def _check_scores(values: Any, population: int) -> None:
    if np.shape(values) != (population,):
        raise ValueError(f"score: shape {np.shape(values)} returned; need ({population},), one number a table")


def _checked(tables: Space, genome: Genome) -> Genome:
    genome = {name: np.asarray(v) if np.size(v) else np.zeros(0, np.int64) for name, v in genome.items()}
    bounds = {"points": len(tables.grid), **{name: len(allowed) for name, allowed in tables.choices.items()}}
    if set(genome) != set(bounds):
        raise ValueError(
            f"start: genes {', '.join(sorted(genome))} given; this space has {', '.join(sorted(bounds))}"
        )
    for name, bound in bounds.items():
        values, count = genome[name], tables.steps - (name == "points")
        low = 1 if name == "points" else 0
        if (
            values.shape != (count,)
            or values.dtype.kind not in "iu"
            or np.any(values < low)
            or np.any(values >= bound)
        ):
            raise ValueError(f"start: {name} {values.tolist()} given; need ({count},) indices in {low}..{bound - 1}")
    if np.any(np.diff(genome["points"]) <= 0):
        raise ValueError(f"start: points {genome['points'].tolist()} given; need increasing indices")
    return genome


def _homogeneous(tables: Space) -> Iterator[Genome]:
    """The same choice at every step, at points evenly spaced by index."""
    K, M = tables.steps, len(tables.grid)
    points = _spread(np.rint(np.arange(1, K) * M / K), M)
    for picks in itertools.product(*(range(len(allowed)) for allowed in tables.choices.values())):
        yield {"points": points, **{name: np.full(K, i) for name, i in zip(tables.choices, picks)}}


def _random(tables: Space, rng: np.random.Generator) -> Genome:
    K, M = tables.steps, len(tables.grid)
    points = np.sort(rng.choice(np.arange(1, M), K - 1, replace=False))
    return {"points": points, **{name: rng.integers(len(v), size=K) for name, v in tables.choices.items()}}


def _child(tables: Space, a: Genome, b: Genome, mutation: float, rng: np.random.Generator) -> Genome:
    """Each step, with the point that ends it, from either parent; then mutations: points move by log-uniform distances."""
    K, M = tables.steps, len(tables.grid)
    mine = rng.random(K) < 0.5
    points = np.where(mine[:-1], a["points"], b["points"])
    jumps = np.rint(M ** rng.random(K - 1)) * rng.choice([-1, 1], K - 1)
    points = points + np.where(rng.random(K - 1) < mutation, jumps, 0)
    child = {"points": _spread(points, M)}
    for name, allowed in tables.choices.items():
        other = rng.integers(len(allowed), size=K)
        child[name] = np.where(rng.random(K) < mutation, other, np.where(mine, a[name], b[name]))
    return child


def _spread(points: np.ndarray, M: int) -> np.ndarray:
    """The nearest distinct interior indices, sorted: collisions are pushed up, then down from the end."""
    points = np.sort(points).astype(np.int64)
    room = np.arange(points.size)
    points = np.maximum.accumulate(np.maximum(points, 1) - room) + room
    return np.minimum(points, M - points.size + room)


def _different(
    tables: Space, source: Iterator[Genome], count: int, seen: set[bytes]
) -> tuple[list[Genome], list[Table]]:
    """``count`` genomes whose tables were not scored before, as far as twenty tries each find such."""
    genomes: list[Genome] = []
    made: list[Table] = []
    for _ in range(count):
        for _ in range(20):
            genome = next(source)
            table = _wide(tables, genome)
            # genomes that differ in what no step can use give one table, up to rounding
            numbers = np.concatenate([table.tau, table.blocks.A.ravel(), table.blocks.B.ravel()])
            key = (np.round(numbers, 12) + 0.0).tobytes()
            if key not in seen:
                break
        seen.add(key)
        genomes.append(genome)
        made.append(table)
    return genomes, made
