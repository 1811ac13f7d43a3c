"""One evaluation, one state: DDIM with any eta, ancestral sampling, Euler."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.build import DATA, Rows, first_order, noise_step, require_gaussian, require_path
from jaxdiff.solver.grid import Grid, Point, as_grid
from jaxdiff.solver.rounding import steady
from jaxdiff.solver.table import Table

__all__ = ["ancestral", "ddim", "ddpm", "euler"]


def transition_std(at: Point, to: Point) -> float:
    """``sqrt(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2)``: std of x_t given x_s; ``sqrt(beta)`` on DDPM."""
    return float(np.sqrt(max(at.sigma**2 - (at.alpha / to.alpha) ** 2 * to.sigma**2, 0.0)))


def posterior_std(at: Point, to: Point) -> float:
    """``(sigma_s/sigma_t) transition_std``: std of x_s given x_t and x0, DDPM's fixed-small."""
    return to.sigma / at.sigma * transition_std(at, to)


def ddim(process: Process, grid: Any, *, eta: float = 0.0, stochastic: bool | None = None) -> Table:
    """DDIM: ``x_s = alpha_s x0_hat + sqrt(sigma_s^2 - c^2) eps_hat + c z``, ``c = eta posterior_std`` (2010.02502).

    eta 0 is the deterministic first-order exponential step (DPM-Solver-1), eta 1 DDPM's ancestral step. ``grid``: a
    Grid or decreasing times. ``stochastic=True`` keeps the noise column at eta 0 (so tables of all eta share one
    structure). Order 1. Raises ValueError for eta outside [0, 1] and for eta > 0 on a non-Gaussian process.
    """
    grid = as_grid(process, grid)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta} given; ddim() needs 0 <= eta <= 1")
    stochastic = eta > 0 if stochastic is None else stochastic or eta > 0
    if eta > 0:
        require_gaussian(process, f"ddim(eta={eta:g})")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        c = eta * posterior_std(grid[i], grid[i + 1])
        A, B = first_order(grid[i], grid[i + 1], c)
        rows.add(grid[i], A, B, C=c)
    return rows.table(grid[len(grid)], stochastic=stochastic)


def ancestral(process: Process, grid: Any, *, variance: str = "small") -> Table:
    """DDPM's ancestral sampling (2006.11239 [131]); on the full grid of ``ddpm`` its rows are the exact posterior.

    ``variance``: "small" (posterior variance given x0) or "large" (transition variance, beta on DDPM, with the same
    mean; not consistent on delta data by design). No noise on a step to sigma = 0.
    Weak order 1. Raises ValueError for another name.
    """
    grid = as_grid(process, grid)
    if variance not in ("small", "large"):
        raise ValueError(f"variance: {variance!r} given; allowed: small, large")
    require_gaussian(process, "ancestral")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        A, B = first_order(at, to, posterior_std(at, to))
        std = posterior_std(at, to) if variance == "small" else transition_std(at, to)
        rows.add(at, A, B, C=std if to.sigma > 0 else 0.0)
    return rows.table(grid[len(grid)], stochastic=True)


ddpm = ancestral  # the sampler's other name


def velocity_form(process: Process, at: Point) -> tuple[float, float]:
    """Weights (p, q) with which data and noise make the velocity at ``at``."""
    c = process.coefficients(np.float64(at.time))
    return float(c.da / c.pace), float(c.ds / c.pace)


def euler(process: Process, grid: Any, *, clock: str = "time") -> Table:
    """Explicit Euler on the probability-flow ODE. Order 1.

    ``clock="time"``: ``x_s = x_t + (s - t) velocity``, the flow-matching sampler; equal to DDIM on the linear path and
    on edm. ``clock="rho"``: Euler of ``d(x/alpha)/d rho = eps_hat``, rho = sigma/alpha, k-diffusion's euler, equal to
    DDIM on every path. A step that ends at sigma = 0 is the exact jump to x0_hat in either clock. With churn
    this is ``edm(heun=False)``.
    """
    grid = as_grid(process, grid)
    check_clock(clock, grid, "euler")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        A, B, form = euler_row(process, grid, i, clock)
        rows.add(grid[i], A, B, form=form)
    return steady(process, rows.table(grid[len(grid)]))


def euler_row(
    process: Process, grid: Grid, i: int, clock: str
) -> tuple[list[float], list[float], tuple[float, float]]:
    """(A, B, stored form) of the Euler step from point i to i+1; ends that the clock cannot reach use data form."""
    at, to = grid[i], grid[i + 1]
    if to.sigma == 0 or (clock == "rho" and at.alpha == 0):
        return (*first_order(at, to), DATA)
    if clock == "rho":
        return (*noise_step(at, to), (0.0, 1.0))
    return [1.0], [to.time - at.time], velocity_form(process, at)


def check_clock(clock: str, grid: Grid, solver: str) -> None:
    """Validate ``clock`` and what it needs of the grid."""
    if clock not in ("time", "rho"):
        raise ValueError(f"clock: {clock!r} given; allowed: time, rho")
    if clock == "time":
        require_path(grid, f"{solver}(clock='time')", "the path's tangent (use clock='rho')")
