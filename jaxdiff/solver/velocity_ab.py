"""Adams-Bashforth on the velocity, in clocks that reach both ends of a path (azula's vAB and REAB)."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA
from jaxdiff.solver.exponential import Node, check_choice, jump
from jaxdiff.solver.grid import Point, as_grid
from jaxdiff.solver.multistep import check_order, check_tail
from jaxdiff.solver.rounding import steady
from jaxdiff.solver.table import Table
from jaxdiff.solver.tape import Tape

__all__ = ["velocity_ab"]


def velocity_ab(
    process: Process, grid: Any, *, order: int = 2, clock: str = "flow", lower_order_final: str = "never"
) -> Table:
    """Multistep on the last ``order`` (1..4) velocities: ``x_s/n_s = x_t/n_t + sum_j v_j int_t^s L_j dw``.

    ``clock="flow"``: ``n = alpha + sigma``, ``w = sigma/n``, ``v = E - D`` (E, D the noise and data predictions): on the
    linear path w is time and v the velocity, and every other path is that one rescaled. ``clock="angle"``: ``n =
    sqrt(alpha^2 + sigma^2)``, ``w = atan(sigma/alpha)``, ``v = (alpha E - sigma D)/n``, the v-prediction. L_j interpolates in
    w. ``clock="rosenbrock"``: angle's v and dw, interpolated in half log-SNR, the exponential Rosenbrock form with linear part
    sigma^2/n^2 that unit-variance Gaussian data would have. ``order`` as in :func:`deis`; early steps use what history there
    is.

    "flow" and "angle" reach alpha = 0 and sigma = 0 at full order (``lower_order_final="never"``); "rosenbrock" is first-order
    there. "angle" and "rosenbrock" are not exact on one point of data, where their v turns. Raises ValueError for other names
    and orders.

    Order 4 in few steps from pure noise multiplies an error of x0_hat by thousands (8 steps of edm_rho or logsnr on linear:
    2,000 to 5,000, so that float32 runs follow float64 to 9e-5), and more where the last step to sigma = 0 is the longest (edm,
    8 equal times: 47,000; order 2: 42; ``lower_order_final="always"``: 14).
    """
    grid = as_grid(process, grid)
    check_order(order, (1, 2, 3, 4), "velocity_ab()")
    check_choice("clock", clock, ("flow", "angle", "rosenbrock"))
    check_tail(lower_order_final)
    lower = lower_order_final == "always" or (lower_order_final == "auto" and len(grid) < 15)
    tape = Tape(process, grid[0])
    history: list[Node] = []
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        p = min(order, i + 1, len(grid) - i if lower else order)
        infinite = at.alpha == 0 or to.sigma == 0
        if (to.sigma == 0 and (p == 1 or lower_order_final == "zero")) or (clock == "rosenbrock" and infinite):
            tape.move(jump(at, to, tape.state, tape.evaluate(at, DATA)))
            continue
        history = [Node(at, tape.evaluate(at, _velocity(at, clock))), *history][:order]
        state = (_scale(to, clock) / _scale(at, clock)) * tape.state
        for gain, node in zip(_scale(to, clock) * _weights(at, to, [n.at for n in history[:p]], clock), history):
            state = state + gain * node.value
        tape.move(state)
    return steady(process, tape.table(grid[len(grid)]))


def _scale(point: Point, clock: str) -> float:
    """The norm n that the state is divided by."""
    return point.alpha + point.sigma if clock == "flow" else float(np.hypot(point.alpha, point.sigma))


def _velocity(point: Point, clock: str) -> tuple[float, float]:
    """``v`` as weights of data and noise."""
    if clock == "flow":
        return -1.0, 1.0
    n = _scale(point, clock)
    return -point.sigma / n, point.alpha / n


def _clock(point: Point, clock: str) -> float:
    return point.sigma / _scale(point, clock) if clock == "flow" else float(np.arctan2(point.sigma, point.alpha))


def _weights(at: Point, to: Point, points: list[Point], clock: str) -> np.ndarray:
    """``int_t^s L_j dw`` of the interpolation through ``points``, newest first."""
    width = _clock(to, clock) - _clock(at, clock)
    if clock != "rosenbrock":
        return width * weights.polynomial([(_clock(p, clock) - _clock(at, clock)) / width for p in points])
    h = to.lam - at.lam
    u, gains = weights.gauss(64)
    slope = -0.5 * h / np.cosh(at.lam + u * h)  # d atan(e^-lam)/d lam
    return weights.lagrange(np.array([(p.lam - at.lam) / h for p in points]), u) @ (gains * slope)
