"""SDE-DPM-Solver++: exponential integrators of the reverse SDE in data form (2211.01095 [244]; 2M/3M SDE of k-diffusion)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import Rows, first_order, require_gaussian, require_path
from jaxdiff.solver.exponential import check_choice, point_at
from jaxdiff.solver.grid import Grid, Point, as_grid
from jaxdiff.solver.multistep import allowed_order, check_order, check_tail, taylor_weights
from jaxdiff.solver.renoise import check_noise, split
from jaxdiff.solver.table import Table

__all__ = ["dpm_solver_pp_sde", "noise_std", "sde_frame"]

VARIANTS = ("midpoint", "lagrange", "heun", "public")
COUPLINGS = ("exact", "rho", "independent")


def noise_std(to: Point, kh: float) -> float:
    """``sigma_s sqrt(1 - e^{-2 k h})``, the fresh noise of a step with ``kh`` = k h; no cancellation at small steps."""
    return to.sigma * math.sqrt(-math.expm1(-2 * kh))


def sde_frame(at: Point, to: Point, k: float) -> tuple[float, float, float]:
    """``(a, H, c)`` of ``x_s = a x_t + alpha_s sum_j w_j(H) D_j + c z``: ``a = (sigma_s/sigma_t) e^{-k h}``, ``H = (1
    + k) h``, ``c = sigma_s sqrt(1 - e^{-2 k h})``; k = 0 is the probability flow, k = 1 DDPM's reverse SDE."""
    h = to.lam - at.lam
    return to.sigma / at.sigma * math.exp(-k * h), (1 + k) * h, noise_std(to, k * h)


def jump_row(at: Point, to: Point, k: float) -> tuple[list[float], list[float], float]:
    """``(A, B, C)`` of the first-order step where h is infinite: from alpha_t = 0, or to sigma_s = 0 (no noise)."""
    c = to.sigma if k > 0 else 0.0
    return (*first_order(at, to, c), c)


def dpm_solver_pp_sde(
    process: Process,
    grid: Any,
    *,
    order: int = 2,
    method: str = "multistep",
    variant: str = "midpoint",
    eta: float = 1.0,
    s_noise: float = 1.0,
    coupling: str = "exact",
    lower_order_final: str = "auto",
    stochastic: bool | None = None,
) -> Table:
    """SDE-DPM-Solver++, which k-diffusion calls 2M SDE, 3M SDE and dpmpp_sde (2211.01095 [244]).

    ``x_s = (sigma_s/sigma_t) e^{-eta h} x_t + alpha_s sum_j w_j D_j + s_noise sigma_s sqrt(1 - e^{-2 eta h}) z``,
    with ``h = lam_s - lam_t``, data predictions D_j and weights w_j over the length ``H = (1 + eta) h``.

    ``method="multistep"`` (order 1, 2 = 2M SDE, 3 = 3M SDE): the last ``order`` predictions, one evaluation a step.
    With r = h_prev/h, ``variant`` says what order 2 adds to ``(1 - e^-H) D_0``: "midpoint" (default)
    ``(1 - e^-H)(D_0 - D_1)/(2r)``; "lagrange" or "heun" ``((e^-H - 1)/H + 1)(D_0 - D_1)/r``, the exact integral of
    the linear interpolant. In order 3 these three integrate the quadratic exactly; "public" is the published 3M, with
    half the curvature term.

    ``method="singlestep"`` (order 2 = k-diffusion's dpmpp_sde): ancestral steps (:func:`split`) to the midpoint in
    lam and, with its prediction, to the end: 2 evaluations a step. Both noises are of one Brownian path, so the
    second is correlated with the first: ``coupling="exact"`` as the linear SDE has it, "rho" ``z = sqrt((rho_t -
    rho_m)/(rho_t - rho_s)) z_1 + ...`` (the public Brownian tree, a clock linear in sigma), "independent" lowers the
    weak order to 1 and exists to show it.

    eta 0 is the ODE table of the same order (``dpm_solver_pp``). Weak order ``min(order, 2)`` measured. ``s_noise``
    != 1 scales the noise and leaves the marginals by design. ``lower_order_final`` as in dpm_solver_pp. Steps from
    alpha = 0 and to sigma = 0 are first-order, the last without noise. Raises ValueError for other names and orders
    and non-Gaussian processes.
    """
    grid = as_grid(process, grid)
    check_noise(eta, s_noise, "dpm_solver_pp_sde")
    check_choice("method", method, ("multistep", "singlestep"))
    check_choice("variant", variant, VARIANTS)
    check_choice("coupling", coupling, COUPLINGS)
    check_tail(lower_order_final)
    if eta > 0:
        require_gaussian(process, "dpm_solver_pp_sde")
    if method == "singlestep":
        check_order(order, (2,), "dpm_solver_pp_sde(method='singlestep')")
        rows = _single(process, grid, "lagrange" if variant == "heun" else variant, eta, s_noise, coupling)
    else:
        check_order(order, (1, 2, 3), "dpm_solver_pp_sde()")
        rows = _multi(process, grid, order, variant, eta, s_noise, lower_order_final)
    return rows.table(grid[len(grid)], stochastic=eta > 0 or bool(stochastic))


def _multi(
    process: Process, grid: Grid, order: int, variant: str, eta: float, s_noise: float, lower_order_final: str
) -> Rows:
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        if at.alpha == 0 or to.sigma == 0:
            A, B, c = jump_row(at, to, eta)
            rows.add(at, A, B, C=s_noise * c)
            continue
        p = allowed_order(grid, i, order, lower_order_final)
        a, H, c = sde_frame(at, to, eta)
        nodes = np.array([(grid[i - j].lam - at.lam) / (to.lam - at.lam) for j in range(p)])
        rule = "lagrange" if variant == "heun" or (variant == "public" and p == 2 and order == 3) else variant
        rows.add(at, [a], list(to.alpha * taylor_weights(H, nodes, rule)), C=s_noise * c)
    return rows


def _single(process: Process, grid: Grid, variant: str, eta: float, s_noise: float, coupling: str) -> Rows:
    """Two rows a step; the second reads the base state from its own register and the first noise from the stage."""
    require_path(grid, "dpm_solver_pp_sde(method='singlestep')", "points between the grid's (use method='multistep')")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        if at.alpha == 0 or to.sigma == 0:
            down, up = split(at, to, eta) if to.sigma > 0 else (0.0, 0.0)
            a = down / at.sigma
            rows.add(at, [a], [to.alpha - a * at.alpha], C=s_noise * up)
            continue
        mid = point_at(process, 0.5 * (at.lam + to.lam))
        down_mid, up_mid = split(at, mid, eta)
        down, up = split(at, to, eta)
        a, A = down_mid / at.sigma, down / at.sigma
        b = mid.alpha - a * at.alpha
        rows.add(at, [a], [b], C=s_noise * up_mid, out=False)
        total = to.alpha - A * at.alpha  # alpha_s (1 - e^-H)
        slope = total
        if variant == "lagrange" and A > 0:
            slope = 2 * to.alpha * weights.moments(-math.log(A * at.alpha / to.alpha), 2)[1]
        shared = _shared(at, mid, to, (down_mid, up_mid), (down, up), coupling)
        if shared == 0:  # no noise, or independent: the base register alone
            rows.add(mid, [0.0, A], [slope, total - slope], C=s_noise * up)
            continue
        # up_mid z_1 = x_m - a x - b d, whatever s_noise
        gain = shared / up_mid
        rest = math.sqrt(max(up * up - shared * shared, 0.0))
        rows.add(mid, [gain, A - gain * a], [slope, total - slope - gain * b], C=s_noise * rest)
    return rows


def _shared(at: Point, mid: Point, to: Point, middle: tuple, end: tuple, coupling: str) -> float:
    """Part of the step's noise std that is the stage's draw."""
    (down_mid, up_mid), (down, up) = middle, end
    if up_mid == 0 or down_mid == 0 or coupling == "independent":
        return 0.0
    if coupling == "rho":
        return up * math.sqrt((at.rho - mid.rho) / (at.rho - to.rho))
    # the linear part carries the stage's noise from mid to the end
    return up_mid * down / down_mid
