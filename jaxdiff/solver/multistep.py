"""Exponential multistep methods in data form: DPM-Solver++ (2211.01095 [244])."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import Rows, first_order
from jaxdiff.solver.grid import Grid, as_grid
from jaxdiff.solver.table import Table

__all__ = ["dpm_solver_pp"]


def allowed_order(grid: Grid, i: int, order: int, lower_order_final: str) -> int:
    """The order step i may have: history since the last node at finite half log-SNR, and the tail rule.

    A step to sigma = 0 has infinite length in lam and is first-order. ``lower_order_final``: "always" lowers the last
    steps to what the remaining steps allow, "auto" does so on grids of fewer than 15 steps, "zero" and "never" leave
    the tail alone (a step to sigma = 0 stays first-order, there being no other).
    """
    if grid[i + 1].sigma == 0 or grid[i].alpha == 0:
        return 1
    finite = 1
    while finite < order and i - finite >= 0 and grid[i - finite].alpha > 0:
        finite += 1
    lower = lower_order_final == "always" or (lower_order_final == "auto" and len(grid) < 15)
    return min(finite, len(grid) - i) if lower else finite


def dpm_solver_pp(
    process: Process, grid: Any, *, order: int = 2, variant: str = "midpoint", lower_order_final: str = "auto"
) -> Table:
    """DPM-Solver++ multistep: ``x_s = (sigma_s/sigma_t) x_t + alpha_s sum_j w_j x0_hat_j`` (2211.01095 [244]).

    order 1 is DDIM. Order 2 (2M), with ``h = lam_s - lam_t``, ``r = h_prev/h``: ``variant="midpoint"``, the paper's,
    ``D = (1 + 1/(2r)) D_0 - (1/(2r)) D_1`` under the first-order weight ``alpha_s (1 - e^-h)``; ``variant="lagrange"``
    integrates the linear interpolant exactly (diffusers' "heun"). ``lower_order_final``: "auto", "always", "zero", "never".
    Raises ValueError for other orders and names.
    """
    grid = as_grid(process, grid)
    if order not in (1, 2):
        raise ValueError(f"order: {order} given; dpm_solver_pp() has orders 1 and 2")
    if variant not in ("midpoint", "lagrange"):
        raise ValueError(f"variant: {variant!r} given; allowed: midpoint, lagrange")
    check_tail(lower_order_final)
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        A, B = first_order(at, to)
        if allowed_order(grid, i, order, lower_order_final) == 2:
            h, before = to.lam - at.lam, at.lam - grid[i - 1].lam
            if variant == "midpoint":
                slope = 0.5 * h / before * B[0]
                B = [B[0] + slope, -slope]
            else:
                B = list(to.alpha * weights.exponential(h, np.array([0.0, -before / h])))
        rows.add(at, A, B)
    return rows.table(grid[len(grid)])


def check_tail(lower_order_final: str) -> None:
    """Validate the option shared by all multistep makers."""
    if lower_order_final not in ("auto", "always", "zero", "never"):
        raise ValueError(f"lower_order_final: {lower_order_final!r} given; allowed: auto, always, zero, never")
