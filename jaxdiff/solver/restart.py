"""Restart: noise back up, integrate down again, K times (2306.14878); tables end to end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.algebra import plain_block
from jaxdiff.solver.build import require_gaussian, require_path
from jaxdiff.solver.grid import Grid, as_grid
from jaxdiff.solver.rungekutta import heun
from jaxdiff.solver.table import AffineBlock, Table, freeze

__all__ = ["join", "restart"]

PUBLISHED = (3, 2, 0.06, 0.30)


def _heun(process: Process, grid: Grid) -> Table:
    return heun(process, grid, clock="rho")


def restart(
    process: Process,
    grid: Any,
    *,
    intervals: Sequence[Sequence[float]] | None = None,
    s_noise: float = 1.0,
    spacing: float = 7.0,
    solver: Callable[[Process, Grid], Table] = _heun,
) -> Table:
    """Restart sampling: at low noise, add noise back and integrate down again; the contraction sheds earlier errors
    (2306.14878).

    ``intervals``: ``(points, K, rho_min, rho_max)`` each, in units of ``rho = sigma/alpha``. When the main grid
    reaches the grid point nearest rho_min, K times: ``v <- v + s_noise sqrt(rho_max^2 - rho_min^2) z`` in ``v =
    x/alpha``, then the solver over ``points`` points (points - 1 steps) from rho_max back to it, equally spaced in
    ``rho^(1/spacing)``. Default: (3, 2, 0.06, 0.30), published for CIFAR-10, left
    out on grids without a point below 0.30. K = 0 leaves the solver's own table. ``solver``: the
    maker of every piece, by default Heun in x/alpha (EDM's); multistep makers start each piece afresh. Its pieces
    must not use churn.

    Weak order that of ``solver``: with an exact denoiser the law stays as ``points`` grows; ``s_noise`` != 1 (1.003
    was published) leaves the marginals by design. Needs the path between grid points. Raises ValueError naming the
    interval for bad entries.
    """
    grid = as_grid(process, grid)
    if not 0 <= s_noise < math.inf or not 0 < spacing < math.inf:
        raise ValueError(f"s_noise, spacing: {s_noise}, {spacing} given; restart() needs s_noise >= 0, spacing > 0")
    stops: dict[int, list[tuple[Grid, int]]] = {}
    if intervals is None:
        inside = (grid.sigma > 0) & (grid.sigma < PUBLISHED[3] * grid.alpha)
        intervals = [PUBLISHED] if np.any(inside[1:]) and grid[0].rho >= PUBLISHED[3] else []
    entries = [entry for entry in map(_entry, intervals) if entry[1]]
    if entries:
        require_gaussian(process, "restart")
        require_path(grid, "restart", "points between the grid's")
    for points, count, low, high in entries:
        stop, piece = _piece(process, grid, points, low, high, spacing)
        stops.setdefault(stop, []).append((piece, count))
    ends = sorted({*stops, len(grid)})
    table = solver(process, _slice(grid, 0, ends[0]))
    for stop, after in zip(ends, [*ends[1:], None]):
        for piece, count in stops.get(stop, ()):
            again = solver(process, piece)
            std = s_noise * piece[0].alpha * math.sqrt(max(piece[0].rho ** 2 - grid[stop].rho ** 2, 0.0))
            for _ in range(count):
                table = join(table, again, std=std)
        if after is not None:
            table = join(table, solver(process, _slice(grid, stop, after)))
    return table


def _slice(grid: Grid, first: int, last: int) -> Grid:
    """Points ``first`` to ``last``, both included; the whole grid is returned as it is."""
    if last - first == len(grid):
        return grid
    part = slice(first, last + 1)
    return Grid(grid.time[part], grid.alpha[part], grid.sigma[part], grid.on_path)


def _entry(interval: Sequence[float]) -> tuple[int, int, float, float]:
    if len(interval) != 4:
        raise ValueError(f"intervals: {tuple(interval)} given; need (points, K, rho_min, rho_max)")
    points, count, low, high = interval
    if points != int(points) or points < 2 or count != int(count) or count < 0:
        raise ValueError(f"intervals: {tuple(interval)} given; need whole points >= 2 and K >= 0")
    if not 0 < low < high < math.inf:
        raise ValueError(f"intervals: {tuple(interval)} given; need 0 < rho_min < rho_max")
    return int(points), int(count), float(low), float(high)


def _piece(process: Process, grid: Grid, points: int, low: float, high: float, spacing: float) -> tuple[int, Grid]:
    """(index of the grid point nearest rho_min, the way down to it from rho_max)."""
    rho = np.array([grid[i].rho for i in range(len(grid) + 1)])
    usable = (grid.sigma > 0) & np.isfinite(rho) & (np.arange(rho.size) > 0)
    if not np.any(usable):
        raise ValueError("grid: has no points inside; restart() needs one near each rho_min")
    stop = int(np.argmin(np.where(usable, np.abs(rho - low), np.inf)))
    start = grid[0].rho
    if not rho[stop] < high <= start * (1 + 1e-9):
        raise ValueError(
            f"intervals: rho_max={high:g} given; need it above the grid point {rho[stop]:g} nearest rho_min={low:g} "
            f"and at most the grid's start {start:g}"
        )
    unit = np.linspace(0.0, 1.0, points)
    root = high ** (1 / spacing) + unit * (rho[stop] ** (1 / spacing) - high ** (1 / spacing))
    time = np.array(process.time(-spacing * np.log(root)), np.float64)
    time[-1] = grid.time[stop]
    c = process.coefficients(time)
    piece = Grid(time, np.array(c.alpha, np.float64), np.array(c.sigma, np.float64), grid.on_path)
    piece.alpha[-1], piece.sigma[-1] = grid.alpha[stop], grid.sigma[stop]
    return stop, piece


def join(first: Table, second: Table, *, std: float = 0.0) -> Table:
    """``first``, then noise of ``std`` (path coordinates at the start of ``second``), then ``second``.

    The last row of ``first`` ends at the first point of ``second``: rescaled by the ratio of alphas, its noise joined
    with ``std``. ``second`` must not look behind its own first row (makers never do). Raises ValueError for start
    churn in ``second``.
    """
    a, b = plain_block(first), plain_block(second)
    if b.start_noise is not None and b.start_noise != 0:
        raise ValueError("solver: adds churn before its first evaluation; restart() needs a solver without churn")
    if (first.mode is None) != (second.mode is None):
        raise ValueError("solver: gives tables with and without a mode; restart() needs them alike")
    gain = 1.0 if std == 0 and b.alpha[0] == a.alpha[-1] else float(b.alpha[0] / a.alpha[-1])

    def column(name: str) -> np.ndarray | None:
        own, other = np.asarray(getattr(a, name), np.float64), np.asarray(getattr(b, name), np.float64)
        if own.ndim == 2:
            width = max(own.shape[1], other.shape[1])
            own, other = (np.pad(v, ((0, 0), (0, width - v.shape[1]))) for v in (own, other))
        if name in ("A", "B", "C", "E"):
            own = np.concatenate([own[:-1], own[-1:] * gain])
        if name == "C":
            own[-1] = math.hypot(own[-1], std)
        whole = np.concatenate([own, other])
        return whole if whole.ndim == 2 or np.any(whole != 0) else None

    columns = {name: column(name) for name in ("p", "q", "A", "B", "C", "E")}
    states = {name: np.concatenate([getattr(a, name)[:-1], getattr(b, name)]) for name in ("alpha", "sigma")}
    block: AffineBlock = dataclasses.replace(a, **columns, **states)
    glue = lambda name: np.concatenate([np.asarray(getattr(first, name)), np.asarray(getattr(second, name))])
    jumps = None
    if first.r is not None or second.r is not None:
        jumps = np.concatenate([np.asarray(t.tau if t.r is None else t.r) for t in (first, second)])
    return freeze(
        Table(
            blocks=block,
            tau=glue("tau"),
            time=np.concatenate([np.asarray(first.time)[:-1], np.asarray(second.time)]),
            out=glue("out"),
            live=glue("live"),
            r=jumps,
            mode=None if first.mode is None or second.mode is None else first.mode + second.mode,
        )
    )
