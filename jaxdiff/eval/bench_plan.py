"""What a solver benchmark runs: variants x grids x budgets as cells, tables built on the host, buckets of equal shape.

Nothing here compiles: makers are numpy float64. A cell is the largest number of steps whose cost is within the budget, so a
two-evaluation method gets half the steps of a one-evaluation method and pays for what it uses.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff.near import near
from jaxdiff.process.process import Process
from jaxdiff.solver import GRIDS, SOLVERS
from jaxdiff.solver.grid import Grid
from jaxdiff.solver.table import AffineBlock, Table, blocks_of

__all__ = ["Cell", "Choice", "buckets", "choices", "plan", "stochastic"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A named constructor with options; ``label`` is how reports call it, as ``ddim(eta=1)``."""

    name: str
    options: Mapping[str, Any]
    make: Callable

    @property
    def label(self) -> str:
        """Name and options on one line."""
        inside = ", ".join(f"{key}={_shown(value)}" for key, value in self.options.items())
        return f"{self.name}({inside})" if inside else self.name


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def choices(kind: str, given: Sequence[Any]) -> list[Choice]:
    """Choices of ``kind`` "solver" or "grid" from names, or (name, options) pairs, checked against the registry.

    "all" stands for every registered name with its default options. Raises ValueError naming the entry for names and options
    that do not exist, and for an entry given twice.
    """
    registry: dict[str, Any] = {"solver": SOLVERS, "grid": GRIDS}[kind]
    out: list[Choice] = []
    for entry in given:
        pair = isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[1], Mapping)
        if not isinstance(entry[0] if pair else entry, str):
            raise ValueError(f"{kind}s: {entry!r} given; an entry is a name, or (name, options)")
        name, options = (entry[0], dict(entry[1])) if pair else (entry, {})
        if name == "all":
            out += [Choice(each, {}, registry[each]) for each in registry]
            continue
        if name not in registry:
            raise ValueError(f"{kind}s: {name!r} is unknown; allowed: {', '.join(registry)}{near(name, registry)}")
        known = inspect.signature(registry[name]).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
        filled = ("process", "grid", "options") if kind == "solver" else ("process", "steps")
        allowed = [key for key in known if key not in filled]
        for key in options:
            if key not in allowed and not open_ended:
                raise ValueError(
                    f"{kind}s: {name!r} has no option {key!r}; allowed: {', '.join(allowed) or 'none'}"
                    f"{near(key, allowed)}"
                )
        out.append(Choice(name, options, registry[name]))
    labels = [choice.label for choice in out]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"{kind}s: {twice} is given twice; every entry needs other options")
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One solver on one grid under one budget. ``table`` None: refused, for the one-line ``reason``.

    ``steps`` of the grid and ``nfe`` are what the budget bought. ``key`` names the cell: solver, grid, budget.
    """

    solver: Choice
    grid: Choice
    budget: int
    steps: int = 0
    nfe: int = 0
    table: Table | None = None
    points: Grid | None = None
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """``(solver label, grid label, budget)``."""
        return self.solver.label, self.grid.label, self.budget


REFUSALS = 4  # grid sizes in a row that a maker may refuse (even steps only, ...) before its cell is refused


def plan(process: Process, solvers: Sequence[Choice], grids: Sequence[Choice], budgets: Sequence[int]) -> list[Cell]:
    """Every cell, in the order solver, grid, budget; refused ones keep their reason.

    ``budgets``: network evaluations >= 1. Raises ValueError for others.
    """
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 1:
            raise ValueError(f"nfe: {budget} given; a budget is a whole number of evaluations, at least 1")
    points: dict[tuple[str, int], Any] = {}

    def grid_of(grid: Choice, steps: int) -> Grid:
        at = grid.label, steps
        if at not in points:
            try:
                points[at] = grid.make(process, steps, **grid.options)
            except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
                points[at] = error
        if isinstance(points[at], Exception):
            raise points[at]
        return points[at]

    out = []
    for solver in solvers:
        for grid in grids:
            tried: dict[int, Any] = {}
            out += [_cell(process, solver, grid, int(budget), grid_of, tried) for budget in budgets]
    return out


def _cell(process: Process, solver: Choice, grid: Choice, budget: int, grid_of: Any, tried: dict[int, Any]) -> Cell:
    def attempt(steps: int) -> Any:
        """The table, or the error of the maker."""
        if steps not in tried:
            try:
                tried[steps] = solver.make(process, grid_of(grid, steps), **solver.options)
                blocks_of(tried[steps])
            except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
                tried[steps] = error
        return tried[steps]

    steps, best, refused, cheapest = budget, 0, 0, None
    reason = ""
    while steps >= 1 and refused < REFUSALS:
        found = attempt(steps)
        if isinstance(found, Exception):
            reason = reason or _line(found)
            refused, steps = refused + 1, steps - 1
            continue
        refused, cost = 0, int(found.nfe)
        if cost <= budget:
            best = steps
            break
        cheapest = cost if cheapest is None else min(cheapest, cost)
        # costs are close to proportional to steps: jump to just above the estimate, then go down one by one
        steps = min(steps - 1, steps * budget // cost + 1)
    while best:  # and up, for methods that cost less than one a step
        found = attempt(best + 1)
        if isinstance(found, Exception) or int(found.nfe) > budget or best >= 4 * budget:
            break
        best += 1
    if not best:
        if cheapest is not None and refused < REFUSALS:
            reason = f"needs at least {cheapest} evaluations, budget {budget}"
        return Cell(solver, grid, budget, reason=reason or "refused every number of steps")
    return Cell(solver, grid, budget, best, int(tried[best].nfe), tried[best], grid_of(grid, best))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def stochastic(table: Table) -> bool:
    """Whether a run of ``table`` uses randomness beyond its start."""
    return any(
        (block.C is not None and bool(np.any(np.asarray(block.C) != 0))) or block.start_noise is not None
        for block in blocks_of(table)
    )


def buckets(cells: Sequence[Cell]) -> dict[tuple, list[int]]:
    """Indices of runnable cells that share one compiled program: padded rows, randomness, width of the history.

    Padding rows cost an evaluation each, so rows are padded only within a budget's own range; wide histories are kept apart
    because every table in a stack carries the widest.
    """
    groups: dict[tuple, list[int]] = {}
    for i, cell in enumerate(cells):
        if cell.table is None:
            continue
        table = cell.table
        blocks = blocks_of(table)
        affine = [b for b in blocks if isinstance(b, AffineBlock)]
        width = max((np.shape(b.B)[1] for b in affine), default=1)
        states = max((np.shape(b.A)[1] for b in affine), default=1)
        key = (
            cell.budget,
            "stochastic" if any(getattr(b, "stochastic", True) for b in blocks) else "deterministic",
            1 << max(2, (width - 1).bit_length()),
            1 << max(1, (states - 1).bit_length()),
            tuple(type(b).__name__ for b in blocks),
            tuple(b.law.name for b in blocks),
            table.mode,
            table.r is None,
        )
        groups.setdefault(key, []).append(i)
    return groups
