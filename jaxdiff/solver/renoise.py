"""Step below the next level, then noise back up to it: k-diffusion's ancestral family on any Gaussian path.

In ``v = x/alpha`` over ``rho = sigma/alpha``, a step from rho_t to rho_s is a deterministic step of the probability
flow to ``rho_down``, followed by fresh noise of std ``rho_up``, with ``rho_down^2 + rho_up^2 = rho_s^2`` and ``rho_up
= min(rho_s, eta rho_s sqrt(1 - rho_s^2/rho_t^2))``. Flow paths need no formulas of their own: the rescaling by alpha
is what the published VE forms lack on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxdiff.process.process import Process
from jaxdiff.solver.build import DATA, NOISE, Rows, first_order, require_gaussian, require_path
from jaxdiff.solver.exponential import point_at
from jaxdiff.solver.grid import Grid, Point, as_grid
from jaxdiff.solver.rounding import steady
from jaxdiff.solver.table import Table

__all__ = ["dpm2_ancestral", "dpmpp_2s_ancestral", "euler_ancestral", "split"]


def split(at: Point, to: Point, eta: float) -> tuple[float, float]:
    """``(down, up)``: std left by the deterministic part and std of fresh noise, in path coordinates at ``to``.

    ``down = sigma_s sqrt(1 - eta^2 + (eta rho_s/rho_t)^2)``, ``up = sqrt(sigma_s^2 - down^2)``; alpha_t = 0 is rho_t
    = inf.
    """
    ratio = to.sigma * at.alpha / (to.alpha * at.sigma)
    left = (1 - eta) * (1 + eta) + (eta * ratio) ** 2
    if left <= 0:
        return 0.0, to.sigma
    gone = eta * math.sqrt((1 - ratio) * (1 + ratio))
    return to.sigma * math.sqrt(left), to.sigma * min(gone, 1.0)


def check_noise(eta: float, s_noise: float, solver: str) -> None:
    """Validate the two noise options shared by the stochastic makers."""
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta: {eta} given; {solver}() needs 0 <= eta < inf")
    if not 0 <= s_noise < math.inf:
        raise ValueError(f"s_noise: {s_noise} given; {solver}() needs 0 <= s_noise < inf")


def euler_ancestral(
    process: Process, grid: Any, *, eta: float = 1.0, s_noise: float = 1.0, stochastic: bool | None = None
) -> Table:
    """Euler to rho_down, then noise, k-diffusion's euler_ancestral.

    ``x_s = alpha_s x0_hat + down eps_hat + s_noise up z``, ``down, up`` from :func:`split`; equal to ``ddim(eta)`` on
    every path for eta <= 1. No noise on a step to sigma = 0, which returns x0_hat. ``s_noise`` != 1 scales the noise
    and leaves the marginals by design. Weak order 1, one evaluation a step. ``stochastic=True`` keeps the noise
    column at eta 0. Raises ValueError for negative eta or s_noise and non-Gaussian processes.
    """
    grid = _checked(process, grid, eta, s_noise, "euler_ancestral")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        _single(rows, grid[i], grid[i + 1], eta, s_noise)
    return rows.table(grid[len(grid)], stochastic=eta > 0 or bool(stochastic))


def dpm2_ancestral(
    process: Process, grid: Any, *, eta: float = 1.0, s_noise: float = 1.0, stochastic: bool | None = None
) -> Table:
    """DPM2 to rho_down, then noise (k-diffusion's dpm_2_ancestral): 2 evaluations a step, 1 on a step to sigma = 0.

    With ``rho_m = sqrt(rho_t rho_down)``: ``v_m = v + (rho_m - rho_t) E(v)``, ``v_s = v + (rho_down - rho_t) E(v_m) +
    up z``. At eta 1 rho_m is rho_s itself, so the stage lies on the grid and explicit (alpha, sigma) arrays will do;
    other eta need the path. Weak order 2 at every eta, ``dpm2`` at eta 0: the split itself is exact. Steps from alpha
    = 0 and to sigma = 0 are first-order.
    """

    def stage(at: Point, mid: Point, to: Point, down: float) -> tuple:
        a = mid.alpha / at.alpha
        b = mid.alpha * (mid.rho - at.rho)
        A = to.alpha / at.alpha
        B = down - to.alpha * at.rho
        return (a, b), (A, 0.0, B)

    return _two_stage(process, grid, eta, s_noise, stochastic, NOISE, stage, "dpm2_ancestral")


def dpmpp_2s_ancestral(
    process: Process, grid: Any, *, eta: float = 1.0, s_noise: float = 1.0, stochastic: bool | None = None
) -> Table:
    """DPM-Solver++(2S) to rho_down, then noise (k-diffusion's dpmpp_2s_ancestral): 2 evaluations a step.

    With ``rho_m = sqrt(rho_t rho_down)``: ``v_m = (rho_m/rho_t) v + (1 - rho_m/rho_t) D(v)``, ``v_s =
    (rho_down/rho_t) v + (1 - rho_down/rho_t) D(v_m) + up z``. At eta 1 rho_m is rho_s itself, so the stage lies on
    the grid and explicit (alpha, sigma) arrays will do; other eta need the path. Weak order 2 at every eta, the
    singlestep ``dpm_solver_pp(order=2)`` at eta 0: the split itself is exact. Steps from alpha = 0 and to sigma = 0
    are first-order.
    """

    def stage(at: Point, mid: Point, to: Point, down: float) -> tuple:
        a, A = mid.sigma / at.sigma, down / at.sigma
        return (a, mid.alpha - a * at.alpha), (A, 0.0, to.alpha - A * at.alpha)

    return _two_stage(process, grid, eta, s_noise, stochastic, DATA, stage, "dpmpp_2s_ancestral")


def _checked(process: Process, grid: Any, eta: float, s_noise: float, solver: str) -> Grid:
    check_noise(eta, s_noise, solver)
    if eta > 0:
        require_gaussian(process, solver)
    return as_grid(process, grid)


def _single(rows: Rows, at: Point, to: Point, eta: float, s_noise: float) -> None:
    """One first-order step with noise; exact at alpha_t = 0 and at sigma_s = 0."""
    if to.sigma == 0:
        rows.add(at, *first_order(at, to))
        return
    down, up = split(at, to, eta)
    a = down / at.sigma
    rows.add(at, [a], [to.alpha - a * at.alpha], C=s_noise * up)


def _two_stage(
    process: Process,
    grid: Any,
    eta: float,
    s_noise: float,
    stochastic: bool | None,
    form: tuple[float, float],
    stage: Callable[[Point, Point, Point, float], tuple],
    solver: str,
) -> Table:
    """Steps of two records: ``x_m = a x + b d``, ``x_s = A x + B_0 d + B_m d_m + up z``; the noise-free stage gives x back."""
    grid = _checked(process, grid, eta, s_noise, solver)
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        down, up = split(at, to, eta)
        if to.sigma == 0 or at.alpha == 0 or down == 0:
            _single(rows, at, to, eta, s_noise)
            continue
        lam = 0.5 * (at.lam + math.log(to.alpha / down))
        mid = to if abs(lam - to.lam) < 1e-10 else _between(process, grid, lam, solver)
        (a, b), (A, B, B_mid) = stage(at, mid, to, down)
        rows.add(at, [a], [b], form=form, out=False)
        rows.add(mid, [A / a], [B_mid, B - A / a * b], C=s_noise * up, form=form)
    return steady(process, rows.table(grid[len(grid)], stochastic=eta > 0 or bool(stochastic)))


def _between(process: Process, grid: Grid, lam: float, solver: str) -> Point:
    require_path(grid, solver, "points between the grid's unless eta = 1 (use euler_ancestral)")
    return point_at(process, lam)
