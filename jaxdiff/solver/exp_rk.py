"""Exponential Runge-Kutta in data form: RES (2308.02157) and the classical ETD schemes."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA, require_path
from jaxdiff.solver.churn import Churn
from jaxdiff.solver.exponential import check_choice, frame, jump, point_at
from jaxdiff.solver.grid import as_grid
from jaxdiff.solver.table import Table
from jaxdiff.solver.tape import Tape

__all__ = ["exp_rk"]

# stage positions c; the last entry of each row list is b. Entries are combinations of phi functions, see _phis.
NODES = {
    "res2": (0, 1 / 2),
    "res3": (0, 1 / 2, 1),
    "etd2": (0, 1),
    "etd3": (0, 1 / 2, 1),
    "etd4": (0, 1 / 2, 1 / 2, 1),
}


def _phis(H: float) -> np.ndarray:
    """``phi_1, phi_2, phi_3`` at -H: ``phi_k = (1/(k-1)!) int_0^1 e^{-(1-u)H} u^{k-1} du``."""
    return weights.moments(H, 3) / H / np.array([1.0, 1.0, 2.0])


def _rows(tableau: str, h: float) -> list[list[float]]:
    """Weights of each stage and of the end, in units of h, for a step of length ``h``."""
    f1, f2, f3 = _phis(h)
    g1, g2, _ = _phis(h / 2)
    if tableau == "res2":
        return [[g1 / 2], [f1 - 2 * f2, 2 * f2]]
    if tableau == "res3":  # c2 = 1/2, c3 = 1, gamma = 4: 2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2)
        last = 4 * g2 / 2 + 2 * f2
        return [[g1 / 2], [f1 - last, last], [f1 - 5 * f2 / 3, 4 * f2 / 3, f2 / 3]]
    if tableau == "etd2":
        return [[f1], [f1 - f2, f2]]
    if tableau == "etd3":
        return [[g1 / 2], [-f1, 2 * f1], [f1 - 3 * f2 + 4 * f3, 4 * f2 - 8 * f3, 4 * f3 - f2]]
    first = g1 / 2 * np.expm1(-h / 2)
    middle = 2 * f2 - 4 * f3
    return [[g1 / 2], [0.0, g1 / 2], [first, 0.0, g1], [f1 - 3 * f2 + 4 * f3, middle, middle, 4 * f3 - f2]]


def exp_rk(
    process: Process,
    grid: Any,
    *,
    tableau: str = "res2",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    stochastic: bool | None = None,
) -> Table:
    """Explicit exponential Runge-Kutta: ``u_i = (sigma_i/sigma_t) x_t + alpha_i h sum_j a_ij(h) x0_hat(u_j)``.

    Stages at ``lam_t + c_i h``. With ``phi_k`` at -h (phi_{k,i} at -c_i h), ``tableau``:

    - "res2": c = (0, 1/2), ``b_2 = phi_2/c_2, b_1 = phi_1 - b_2`` (RES, stiff order 2)
    - "res3": c = (0, 1/2, 1), ``a_32 = 4 c_2 phi_{2,2} + (c_3^2/c_2) phi_{2,3}``, ``b_2 = 4 phi_2/3, b_3 = phi_2/3``
      (Hochbruck and Ostermann's third-order family at gamma = 4, which RES uses)
    - "etd2": c = (0, 1), ``b = (phi_1 - phi_2, phi_2)``
    - "etd3", "etd4": Cox and Matthews' schemes of orders 3 and 4

    The multistep RES is ``dpm_solver_pp(variant="lagrange")``. Every stage is exact on constant predictions
    (``sum_j a_ij = c_i phi_{1,i}``). Steps from alpha = 0 and to sigma = 0 are first-order. ``s_churn``, ``s_min``, ``s_max``,
    ``s_noise``: noise added before each step, as in :func:`jaxdiff.solver.edm` (the stochastic RES, weak order 2 at a fixed
    s_churn). Raises ValueError on grids without a path, except "etd2" without churn, whose stage is the end of the step.
    """
    grid = as_grid(process, grid)
    check_choice("tableau", tableau, tuple(NODES))
    if tableau != "etd2":
        require_path(grid, f"exp_rk(tableau={tableau!r})", "points between the grid's (use 'etd2')")
    churn = Churn(process, grid, "exp_rk", s_churn, s_min, s_max, s_noise)
    tape = Tape(process, grid[0])
    churn.start(tape.rows)
    for i in range(len(grid)):
        at, to, base = churn.hats[i], grid[i + 1], tape.state
        end, std = churn.end(i)
        if to.sigma == 0 or at.alpha == 0:
            tape.move(jump(at, end, base, tape.evaluate(at, DATA)), noise=std)
            continue
        h = to.lam - at.lam
        points = [to if c == 1 else at if c == 0 else point_at(process, at.lam + c * h) for c in NODES[tableau]]
        rows, records = _rows(tableau, h), []
        for j, (here, there) in enumerate(zip(points, [*points[1:], end])):
            records.append(tape.evaluate(here, DATA))
            total = frame(at, there, "data")[0] * base
            for gain, record in zip(rows[j], records):
                total = total + (there.alpha * h * gain) * record
            last = j + 1 == len(points)
            tape.move(total, out=last, noise=std if last else 0.0)
    return tape.table(grid[len(grid)], stochastic=s_churn > 0 or bool(stochastic))
