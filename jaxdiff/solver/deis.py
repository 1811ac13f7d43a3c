"""Adams-Bashforth in transformed time: DEIS (2204.13902 [66]), LMS, PNDM and iPNDM (2202.09778 [58])."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA, NOISE, require_path
from jaxdiff.solver.exponential import Node, check_choice, check_variable, jump, point_at, step
from jaxdiff.solver.grid import Grid, Point, as_grid
from jaxdiff.solver.multistep import allowed_order, check_order, check_tail
from jaxdiff.solver.rounding import steady
from jaxdiff.solver.table import Table
from jaxdiff.solver.tape import Expression, Tape

__all__ = ["deis", "f_pndm", "ipndm", "lms", "pndm"]


def deis(
    process: Process, grid: Any, *, order: int = 3, variable: str = "t", lower_order_final: str = "never"
) -> Table:
    """DEIS: ``x_s/alpha_s = x_t/alpha_t + sum_j E_j int_t^s L_j d rho``, rho = sigma/alpha (2204.13902 [66]).

    ``L_j`` interpolates the last ``order`` (1..4) noise predictions in ``variable``: "t" (the paper's tAB), "rho" (rhoAB, the
    linear multistep method) or "lam" (DPM-Solver multistep). ``order`` counts predictions: the paper's order q is
    order - 1. Earlier steps use what history there is. ``lower_order_final``: as in dpm_solver_pp; with "never" (the
    published choice) the rho variable keeps its order on a step to sigma = 0, the others are first-order there.
    A start at alpha = 0 is first-order and leaves no history. Raises ValueError for "t" on grids without a path.

    Order 4 in "t" in few steps from alpha = 0 weighs x0_hat by thousands: 12 steps of edm_rho on linear multiply an error of
    x0_hat by 2,500 (order 3: 30), so that float32 runs follow float64 to 4e-5, whatever the rows keep.
    """
    grid = as_grid(process, grid)
    check_order(order, (1, 2, 3, 4), "deis()")
    check_variable(variable, grid, "deis")
    check_tail(lower_order_final)
    return _adams(process, grid, order, variable, lower_order_final)


def lms(process: Process, grid: Any, *, order: int = 4, lower_order_final: str = "never") -> Table:
    """Linear multistep in rho = sigma/alpha: :func:`deis` with ``variable="rho"``, k-diffusion's LMS."""
    check_order(order, (1, 2, 3, 4), "lms()")
    return deis(process, grid, order=order, variable="rho", lower_order_final=lower_order_final)


def ipndm(
    process: Process, grid: Any, *, order: int = 4, variant: str = "rho", lower_order_final: str = "never"
) -> Table:
    """Improved PNDM: Adams-Bashforth on the DDIM increment, its order rising over the first steps (2204.13902 [66]).

    ``x_s = T(x_t, t, s, sum_j b_j E_j)``, ``T(x, t, s, E) = (alpha_s/alpha_t) x + (sigma_s - alpha_s sigma_t/alpha_t) E``.
    ``variant="public"``: the published weights b of equal steps ([1], [3, -1]/2, [23, -16, 5]/12, [55, -59, 37, -9]/24), which
    on unequal increments of rho are of second order whatever ``order`` (1..4). "rho" (default): the weights of the actual
    increments, of full order; that is :func:`lms`.
    """
    grid = as_grid(process, grid)
    check_order(order, (1, 2, 3, 4), "ipndm()")
    check_choice("variant", variant, ("rho", "public"))
    check_tail(lower_order_final)
    return _adams(process, grid, order, "rho" if variant == "rho" else "index", lower_order_final)


def _adams(process: Process, grid: Grid, order: int, variable: str, lower_order_final: str) -> Table:
    tape = Tape(process, grid[0])
    history: list[Node] = []
    reaches = variable in ("rho", "index")
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        p = allowed_order(grid, i, order, lower_order_final, reaches_zero=reaches)
        if at.alpha == 0 or (to.sigma == 0 and p == 1):
            tape.move(jump(at, to, tape.state, tape.evaluate(at, DATA)))
            continue
        history = [Node(at, tape.evaluate(at, NOISE)), *history][:order]
        tape.move(adams_step(process, at, to, tape.state, history[:p], variable))
    return steady(process, tape.table(grid[len(grid)]))


def adams_step(
    process: Process, at: Point, to: Point, base: Expression, nodes: list[Node], variable: str
) -> Expression:
    """One step on noise predictions, newest first; "index" interpolates in the step number."""
    if variable != "index":
        return step(process, at, to, base, nodes, "noise", variable)
    gains = weights.polynomial(-np.arange(len(nodes), dtype=np.float64))
    mean = gains[0] * nodes[0].value
    for gain, node in zip(gains[1:], nodes[1:]):
        mean = mean + gain * node.value
    return transfer(at, to, base, mean)


def transfer(at: Point, to: Point, base: Expression, noise: Expression) -> Expression:
    """DDIM's map ``T(x, t, s, E) = alpha_s (x/alpha_t + (rho_s - rho_t) E)``."""
    ratio = to.alpha / at.alpha
    return ratio * base + (to.sigma - at.sigma * ratio) * noise


def pndm(
    process: Process,
    grid: Any,
    *,
    order: int = 4,
    warmup: str = "rk",
    variant: str = "rho",
    lower_order_final: str = "never",
) -> Table:
    """PNDM: a Runge-Kutta start, then Adams-Bashforth, on the DDIM transfer (2202.09778 [58]).

    ``order=4`` is F-PNDM: three fourth-order Runge-Kutta steps of four evaluations (``E_1`` at t, ``E_2``, ``E_3`` at a middle
    point, ``E_4`` at s, mean ``(E_1 + 2 E_2 + 2 E_3 + E_4)/6``), N + 9 evaluations; ``order=2`` is S-PNDM: one Heun step
    (``(E_1 + E_2)/2``), N + 1 evaluations. E_1 of each step is the history. ``warmup="heun"``: one such Heun step, then
    Adams steps of rising order up to ``order``, N + 1 evaluations (the public PLMS, with "public"). ``warmup="ramp"``: no
    Runge-Kutta (:func:`ipndm`).
    ``variant="public"``: middle at ``(t + s)/2`` and the weights of equal steps, second order; "rho" (default): middle at
    the mean of rho and the weights of the actual increments, of full order. Runge-Kutta steps need points between the grid's;
    from alpha = 0 and to sigma = 0 the steps are first-order (Adams steps reach sigma = 0 with "never").
    """
    grid = as_grid(process, grid)
    check_choice("order", order, (2, 4))
    check_choice("warmup", warmup, ("rk", "heun", "ramp"))
    check_choice("variant", variant, ("rho", "public"))
    check_tail(lower_order_final)
    if warmup == "ramp":
        return ipndm(process, grid, order=order, variant=variant, lower_order_final=lower_order_final)
    heun = order == 2 or warmup == "heun"
    if not heun:
        require_path(grid, "pndm(order=4)", "points between the grid's (warmup='heun' and 'ramp' need none)")
    needed = 2 if heun else order  # predictions from which Adams steps start
    variable = "rho" if variant == "rho" else "index"
    tape = Tape(process, grid[0])
    history: list[Node] = []
    for i in range(len(grid)):
        at, to, base = grid[i], grid[i + 1], tape.state
        p = allowed_order(grid, i, order, lower_order_final, reaches_zero=True)
        if at.alpha == 0 or (to.sigma == 0 and (p == 1 or len(history) < needed - 1)):
            tape.move(jump(at, to, base, tape.evaluate(at, DATA)))
            continue
        first = tape.evaluate(at, NOISE)
        history = [Node(at, first), *history][:order]
        if len(history) >= needed:
            tape.move(adams_step(process, at, to, base, history[:p], variable))
        elif heun:
            tape.move(transfer(at, to, base, first), out=False)
            tape.move(transfer(at, to, base, 0.5 * first + 0.5 * tape.evaluate(to, NOISE)))
        else:
            _runge_kutta_start(tape, at, _middle(process, at, to, variant), to, first)
    return steady(process, tape.table(grid[len(grid)]))


def _middle(process: Process, at: Point, to: Point, variant: str) -> Point:
    if variant == "rho":
        return point_at(process, -np.log((at.rho + to.rho) / 2))
    c = process.coefficients(np.float64((at.time + to.time) / 2))
    return Point((at.time + to.time) / 2, float(c.alpha), float(c.sigma))


def _runge_kutta_start(tape: Tape, at: Point, middle: Point, to: Point, first: Expression) -> None:
    base = tape.state
    tape.move(transfer(at, middle, base, first), out=False)
    second = tape.evaluate(middle, NOISE)
    tape.move(transfer(at, middle, base, second), out=False)
    third = tape.evaluate(middle, NOISE)
    tape.move(transfer(at, to, base, third), out=False)
    fourth = tape.evaluate(to, NOISE)
    tape.move(transfer(at, to, base, (first + 2 * second + 2 * third + fourth) / 6))


def f_pndm(process: Process, grid: Any, *, variant: str = "rho", lower_order_final: str = "never") -> Table:
    """F-PNDM: :func:`pndm` of order 4."""
    return pndm(process, grid, order=4, variant=variant, lower_order_final=lower_order_final)
