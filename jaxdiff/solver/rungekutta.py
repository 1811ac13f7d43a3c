"""Heun's method on the probability-flow ODE, and EDM's stochastic Heun."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.build import NOISE, Rows, first_order, noise_step, require_gaussian, require_path
from jaxdiff.solver.grid import Grid, Point, as_grid
from jaxdiff.solver.onestep import check_clock, euler_row, velocity_form
from jaxdiff.solver.table import Table

__all__ = ["edm", "heun"]


def heun(process: Process, grid: Any, *, clock: str = "time") -> Table:
    """Heun's second-order method: an Euler step, then the average of both slopes. Order 2, 2N-1 evaluations.

    ``clock``: as in :func:`euler`. Steps that end at sigma = 0, and in the rho clock those that start at alpha = 0,
    are first-order (the slope there is not defined), which keeps the global order. With the stage state ``y1 = y + h f0``
    the corrected state is ``y1 + (h/2)(f1 - f0)``, so one state register is enough.
    """
    grid = as_grid(process, grid)
    check_clock(clock, grid, "heun")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        A, B, form = euler_row(process, grid, i, clock)
        corrected = to.sigma > 0 and not (clock == "rho" and at.alpha == 0)
        rows.add(at, A, B, form=form, out=not corrected)
        if corrected:
            half = B[0] / 2
            rows.add(to, [1.0], [half, -half], form=NOISE if clock == "rho" else velocity_form(process, to))
    return rows.table(grid[len(grid)])


def edm(
    process: Process,
    grid: Any,
    *,
    heun: bool = True,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    stochastic: bool | None = None,
) -> Table:
    """EDM's sampler (2206.00364): Euler or Heun in ``x/alpha`` over ``rho = sigma/alpha``, with churn.

    Before step i, noise is raised to ``rho_hat = rho (1 + gamma)``, ``gamma = min(s_churn/N, sqrt(2) - 1)`` if
    ``s_min <= rho <= s_max``, by adding ``s_noise sqrt(rho_hat^2 - rho^2) z``. N is the number of steps. Noise added before an
    evaluation is the C of the row before it; before the first, the table's ``start_noise``. On paths with alpha != 1 the
    first step has no churn and rho_hat stays within the grid's range (there the path has nothing beyond). Order 2
    (weak order 2 at fixed s_churn); ``s_noise != 1`` leaves a variance floor by design.
    """
    grid = as_grid(process, grid)
    if not (s_churn >= 0 and s_noise > 0 and s_min <= s_max):
        raise ValueError(
            f"s_churn, s_min, s_max, s_noise: {s_churn}, {s_min}, {s_max}, {s_noise} given; need s_churn >= 0, "
            "s_min <= s_max, s_noise > 0"
        )
    if s_churn > 0:
        require_gaussian(process, f"edm(s_churn={s_churn:g})")
        require_path(grid, f"edm(s_churn={s_churn:g})", "points between the grid's")
    hats = [_hat(process, grid, i, s_churn, s_min, s_max) for i in range(len(grid))]
    rows = Rows(process, grid[0])
    rows.start_noise = _added(grid[0], hats[0], s_noise)
    for i, at in enumerate(hats):
        to = grid[i + 1]
        after = hats[i + 1] if i + 1 < len(grid) else to
        gain = after.alpha / to.alpha if to.alpha > 0 else 1.0
        std = _added(to, after, s_noise)
        exact = to.sigma == 0 or at.alpha == 0
        A, B = first_order(at, to) if exact else noise_step(at, to)
        form = (1.0, 0.0) if exact else NOISE
        if heun and not exact:
            rows.add(at, A, B, form=form, out=False)
            half = B[0] / 2
            rows.add(to, [gain], [gain * half, -gain * half], C=std, form=NOISE)
        else:
            rows.add(at, [gain * A[0]], [gain * B[0]], C=std, form=form)
    return rows.table(grid[len(grid)], stochastic=s_churn > 0 if stochastic is None else stochastic or s_churn > 0)


def _hat(process: Process, grid: Grid, i: int, s_churn: float, s_min: float, s_max: float) -> Point:
    """The noisier point from which step i is taken; the grid point itself without churn."""
    point = grid[i]
    gamma = min(s_churn / len(grid), np.sqrt(2.0) - 1) if s_min <= point.rho <= s_max else 0.0
    if gamma == 0 or not np.isfinite(point.rho):
        return point
    rho = point.rho * (1 + gamma)
    if not np.all(grid.alpha == 1):
        if i == 0:
            return point
        rho = min(rho, grid[0].rho)
    time = float(process.time(-np.log(rho)))
    c = process.coefficients(np.float64(time))
    return Point(time, float(c.alpha), float(c.sigma))


def _added(point: Point, hat: Point, s_noise: float) -> float:
    """Std of the noise that raises ``point`` to ``hat``, in path coordinates at ``hat``."""
    if hat == point or point.sigma == 0:
        return 0.0
    return float(hat.alpha * s_noise * np.sqrt(max(hat.rho**2 - point.rho**2, 0.0)))
