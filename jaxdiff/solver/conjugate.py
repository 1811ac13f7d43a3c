"""Conjugate integrators: a free linear part (2310.07894 [85])."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA, NOISE, Rows, first_order, noise_step, require_path
from jaxdiff.solver.grid import Point, as_grid
from jaxdiff.solver.rounding import steady
from jaxdiff.solver.table import Table

__all__ = ["conjugate"]


def conjugate(process: Process, grid: Any, *, rate: float = 0.0) -> Table:
    """lambda-DDIM: Euler in ``xhat = e^{l t} x/alpha``, with the scalar l of the paper's B = l I (2310.07894 [85]).

    ``xhat_s = (1 + l (s - t)) xhat_t + E_t int_t^s e^{l u} d rho(u)``, rho = sigma/alpha, u time. ``rate`` is l; 0 is
    DDIM. Order 1.
    Its linear part is only stepped to first order, so for l != 0 the delta-data check fails by design. Steps from alpha = 0
    and to sigma = 0 are DDIM's. Raises ValueError for l != 0 on grids without a path.
    """
    grid = as_grid(process, grid)
    if not np.isfinite(rate):
        raise ValueError(f"rate: {rate} given; conjugate() needs a finite number")
    if rate != 0:
        require_path(grid, f"conjugate(rate={rate:g})", "the path's time between grid points")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        if at.alpha == 0 or to.sigma == 0:
            rows.add(at, *first_order(at, to), form=DATA)
        elif rate == 0:
            rows.add(at, *noise_step(at, to), form=NOISE)
        else:
            rows.add(at, *_row(process, at, to, float(rate)), form=NOISE)
    return steady(process, rows.table(grid[len(grid)]))


def _row(process: Process, at: Point, to: Point, rate: float) -> tuple[list[float], list[float]]:
    """(A, B), the integral ``alpha_s int e^{l (u - s)} d rho(u)`` by Gauss-Legendre in half log-SNR."""
    u, gains = weights.gauss(64)
    lam = at.lam + u * (to.lam - at.lam)
    rates = -np.exp(-lam) * (to.lam - at.lam)
    integral = np.sum(gains * rates * np.exp(rate * (process.time(lam) - to.time)))
    gain = (1 + rate * (to.time - at.time)) * np.exp(rate * (at.time - to.time)) * to.alpha / at.alpha
    return [float(gain)], [float(to.alpha * integral)]
