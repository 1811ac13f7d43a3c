"""Exponential multistep methods in data and in noise form: DPM-Solver++ (2211.01095 [244]) and DPM-Solver (2206.00927 [50])."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA
from jaxdiff.solver.exponential import FORMS, Node, check_choice, frame, jump
from jaxdiff.solver.grid import Grid, as_grid
from jaxdiff.solver.rounding import steady
from jaxdiff.solver.table import Table
from jaxdiff.solver.tape import Expression, Tape

__all__ = ["multistep"]

TAILS = ("auto", "always", "zero", "never")
VARIANTS = ("midpoint", "lagrange", "public", "heun", "taylor")


def allowed_order(grid: Grid, i: int, order: int, lower_order_final: str, *, reaches_zero: bool = False) -> int:
    """The order that step i may have: ``order``, or what its history and the rule for the last steps allow.

    Points at alpha = 0 are no history, their half log-SNR being infinite. A step to sigma = 0 has infinite length in
    lam and is first-order. ``lower_order_final``: "always" gives the last steps orders ..., 3, 2, 1; "auto" does so
    on grids of fewer than 15 steps; "zero" and "never" do not. ``reaches_zero``: for weights in rho, in which sigma =
    0 is a point like others; "never" then keeps the order on the step there, and "zero" is first-order on it.
    """
    if grid[i].alpha == 0 or (grid[i + 1].sigma == 0 and not (reaches_zero and lower_order_final == "never")):
        return 1
    finite = 1
    while finite < order and i - finite >= 0 and grid[i - finite].alpha > 0:
        finite += 1
    lower = lower_order_final == "always" or (lower_order_final == "auto" and len(grid) < 15)
    return min(finite, len(grid) - i) if lower else finite


def check_tail(lower_order_final: str) -> None:
    """Validate the option shared by all multistep makers."""
    check_choice("lower_order_final", lower_order_final, TAILS)


def check_order(order: Any, allowed: tuple[int, ...], solver: str) -> None:
    """Raise ValueError unless ``order`` is one of ``allowed``."""
    if isinstance(order, bool) or not isinstance(order, int | np.integer) or order not in allowed:
        raise ValueError(f"order: {order} given; {solver} has orders {', '.join(map(str, allowed))}")


def taylor_weights(H: float, nodes: np.ndarray, variant: str) -> np.ndarray:
    """Weights of the predictions at ``nodes`` (0, then the past, in units of the step) over a step of length H.

    "lagrange" integrates the interpolant exactly. The others differ from it as follows. Two nodes, "midpoint" and
    "public": the published ``psi_0 (D_0 - D_1)/(2 r)``. Three nodes, "public", "heun" and "taylor": half the
    curvature term, as in the published third-order code, which is of second order.
    """
    if variant in ("midpoint", "public") and nodes.size == 2:
        psi = weights.moments(H, 1)[0]
        slope = -0.5 * psi / nodes[1]
        return np.array([psi + slope, -slope])
    if variant in ("public", "heun", "taylor") and nodes.size == 3:
        return np.linalg.solve(np.vander(nodes, increasing=True).T, weights.moments(H, 3) * [1.0, 1.0, 0.5])
    return weights.exponential(H, nodes)


def multistep(
    process: Process, grid: Any, *, form: str, order: int, variant: str, lower_order_final: str, solver: str
) -> Table:
    """``x_s = ratio x_t + scale sum_j w_j d_j`` on the last ``order`` predictions of ``form``; see :func:`taylor_weights`."""
    grid = as_grid(process, grid)
    check_order(order, (1, 2, 3, 4) if variant == "lagrange" else (1, 2, 3), f"{solver} with variant {variant!r}")
    check_choice("variant", variant, VARIANTS)
    check_tail(lower_order_final)
    tape = Tape(process, grid[0])
    history: list[Node] = []
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        p = allowed_order(grid, i, order, lower_order_final)
        if at.alpha == 0 or to.sigma == 0:
            tape.move(jump(at, to, tape.state, tape.evaluate(at, DATA)))
            continue
        history = [Node(at, tape.evaluate(at, FORMS[form])), *history][:order]
        ratio, scale, H = frame(at, to, form)
        nodes = np.array([(n.at.lam - at.lam) / (to.lam - at.lam) for n in history[:p]])
        gains = scale * taylor_weights(H, nodes, variant)
        tape.move(combine(ratio * tape.state, gains, history))
    return steady(process, tape.table(grid[len(grid)]))


def combine(base: Expression, gains: Any, history: list[Node]) -> Expression:
    """``base`` plus the weighted predictions."""
    for gain, node in zip(gains, history):
        base = base + gain * node.value
    return base
