"""SA-Solver: stochastic Adams predictor and corrector with a free noise level tau (2309.05019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import Rows, require_gaussian
from jaxdiff.solver.exponential import check_choice
from jaxdiff.solver.grid import Grid, Point, as_grid
from jaxdiff.solver.multistep import allowed_order, check_tail
from jaxdiff.solver.sde_dpm import jump_row, sde_frame
from jaxdiff.solver.table import Table

__all__ = ["sa_solver"]

Tau = float | Sequence[float] | Callable[[float], float]


def sa_solver(
    process: Process,
    grid: Any,
    *,
    predictor: int = 2,
    corrector: int = 2,
    tau: Tau = 1.0,
    tau_range: tuple[float, float] | None = None,
    variant: str = "lagrange",
    pece: bool = False,
    denoise: bool = False,
    lower_order_final: str = "auto",
    stochastic: bool | None = None,
) -> Table:
    """SA-Solver: stochastic Adams predictor and corrector, with a noise level tau (2309.05019).

    ``x_s = (sigma_s/sigma_t) e^{-k h} x_t + alpha_s sum_j w_j D_j + sigma_s sqrt(1 - e^{-2 k h}) z``, ``k = tau^2``,
    ``h = lam_s - lam_t``, D_j data predictions.

    Predictor: weights of the last ``predictor`` (1..4) data predictions over ``H = (1 + k) h``. Corrector: the same
    step, start and draw with ``corrector`` (2..4, or 1; 0: none) predictions, the new point's among them. PEC
    (default) keeps the prediction made at the predicted state: both share start and noise, so the correction is a
    combination of stored predictions and folds into the next predictor, one evaluation a step. ``pece=True``
    evaluates again at the corrected state. ``denoise=True``, on a grid that ends at sigma > 0: the last state is corrected
    too, evaluated again, and x0_hat there is the result (the published "more steps"): 2 evaluations more, 1 without corrector.

    ``tau``: the noise level, a number, one a step (N,), or a function of ``rho = sigma/alpha`` (its mean square over
    the step in lam is used); ``tau_range=(low, high)`` confines it to that band of rho. tau 0 is a deterministic
    step, tau 1 DDPM's reverse SDE. ``variant="public"``: the few-step form of two-prediction steps, slope weight
    ``H/2`` (units of psi_1) instead of the integral, an O(h^3) change. ``lower_order_final`` as in dpm_solver_pp.

    Equals UniPC of order p (lagrange) at tau 0, predictor p, corrector p + 1, and the 2M SDE ("heun") at tau 1,
    predictor 2 without corrector. Steps from alpha = 0 and to sigma = 0 are first-order, the last without noise.
    Raises ValueError for other orders and names.
    """
    grid = as_grid(process, grid)
    check_choice("predictor", predictor, (1, 2, 3, 4))
    check_choice("corrector", corrector, (0, 1, 2, 3, 4))
    check_choice("variant", variant, ("lagrange", "public"))
    check_tail(lower_order_final)
    levels = [_level(grid, i, tau, tau_range) for i in range(len(grid))]
    points = [grid[i] for i in range(len(grid) + 1)]
    if denoise:
        if points[-1].sigma == 0:
            raise ValueError("denoise: True given, but the grid ends at sigma = 0, where nothing is left to denoise")
        points, levels = [*points, Point(points[-1].time, 1.0, 0.0)], [*levels, 0.0]
    if any(k > 0 for k in levels):
        require_gaussian(process, "sa_solver")
    rows = Rows(process, grid[0])
    past: list[int] = []  # rows whose records are history, newest first
    used: dict[int, float] = {}  # the predictor's weights of the step before, by row
    for i, (at, to, k) in enumerate(zip(points, points[1:], levels)):
        row = len(rows.rows)
        change: dict[int, float] = {}
        nodes = 0 if corrector == 0 or not used else _correction(grid, i, corrector, lower_order_final, len(past))
        if nodes:
            before = grid[i - 1]
            _, H, _ = sde_frame(before, at, levels[i - 1])
            gains = at.alpha * _weights(H, before, at, [at, *(grid[i - 1 - j] for j in range(nodes - 1))], variant)
            change = dict(zip([row, *past], gains))
            for j, gain in used.items():
                change[j] = change.get(j, 0.0) - gain
            if pece or i == len(grid):
                rows.rows[-1].out = False
                rows.add(at, [1.0], _ages(change, row))
                change, row = {}, row + 1
        if at.alpha == 0 or to.sigma == 0:
            A, B, c = jump_row(at, to, k)
            gains, used = B, {}
        else:
            p = allowed_order(grid, i, predictor, lower_order_final)
            a, H, c = sde_frame(at, to, k)
            A, gains = [a], to.alpha * _weights(H, at, to, [grid[i - j] for j in range(p)], variant)
            past = [row, *past][:4]
            used = dict(zip(past, gains))
        total = {j: A[0] * gain for j, gain in change.items()}
        for j, gain in zip([row] if not used else past, gains):
            total[j] = total.get(j, 0.0) + gain
        rows.add(at, A, _ages(total, row), C=c)
    return rows.table(points[-1], stochastic=any(k > 0 for k in levels) or bool(stochastic))


def _ages(gains: dict[int, float], row: int) -> list[float]:
    """Coefficients by age from coefficients by row."""
    return [gains.get(row - h, 0.0) for h in range(row - min(gains, default=row) + 1)]


def _correction(grid: Grid, i: int, corrector: int, lower_order_final: str, history: int) -> int:
    """Predictions in the corrector of step i - 1: history, and the tail rule."""
    lower = lower_order_final == "always" or (lower_order_final == "auto" and len(grid) < 15)
    return min(corrector, history + 1, len(grid) - i + 2 if lower else 4)


def _weights(H: float, at: Point, to: Point, points: Sequence[Point], variant: str) -> np.ndarray:
    h = to.lam - at.lam
    nodes = np.array([(p.lam - at.lam) / h for p in points])
    if variant == "public" and nodes.size == 2:
        # slope of (D_a - D_b)/(u_a - u_b) about the prediction at u = 0
        psi, slope = weights.moments(H, 1)[0], 0.5 * H / (nodes[0] - nodes[1])
        base = np.where(nodes == 0, psi, 0.0)
        return base + slope * np.array([1.0, -1.0])
    return weights.exponential(H, nodes)


def _level(grid: Grid, i: int, tau: Tau, tau_range: tuple[float, float] | None) -> float:
    """``k``: the mean of tau^2 over step i in half log-SNR; over an infinite step, tau at its finite end."""
    at, to = grid[i], grid[i + 1]
    if to.sigma == 0:
        return 0.0
    infinite = at.alpha == 0
    if callable(tau):
        u, gains = weights.gauss(16)
        lams = [to.lam] if infinite else at.lam + u * (to.lam - at.lam)
        squares = np.array([float(tau(float(np.exp(-lam)))) for lam in lams]) ** 2
        k = float(squares[0]) if infinite else float(gains @ squares)
    else:
        values = np.atleast_1d(np.asarray(tau, np.float64))
        if values.shape not in ((1,), (len(grid),)):
            raise ValueError(
                f"tau: shape {values.shape} given; need a number, one a step ({len(grid)},), or a function"
            )
        level = float(values[i if values.size > 1 else 0])
        if level < 0:
            raise ValueError(f"tau: {level} given on step {i}; need numbers >= 0")
        k = level**2
    if not 0 <= k < np.inf:
        raise ValueError(f"tau: mean square {k} on step {i}; sa_solver() needs finite tau")
    if tau_range is None:
        return k
    low, high = (float(v) for v in tau_range)
    if not 0 <= low < high:
        raise ValueError(f"tau_range: {tau_range} given; need 0 <= low < high, in units of sigma/alpha")
    if infinite:
        return k if low <= to.rho <= high else 0.0
    with np.errstate(divide="ignore"):
        top, bottom = -np.log(high), -np.log(low)
    inside = max(min(to.lam, bottom) - max(at.lam, top), 0.0)
    return k * inside / (to.lam - at.lam)
