"""UniPC (2302.04867), DC-Solver (2409.03755 [69]) and USF (2312.07243 [121]): predictor, corrector, free choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA
from jaxdiff.solver.exponential import FORMS, Node, check_choice, check_variable, frame, jump, step
from jaxdiff.solver.grid import Point, as_grid
from jaxdiff.solver.multistep import allowed_order, check_order, check_tail, combine
from jaxdiff.solver.rounding import steady
from jaxdiff.solver.table import Table
from jaxdiff.solver.tape import Expression, Tape

__all__ = ["Step", "dc_solver", "unipc", "usf"]


def unipc(
    process: Process,
    grid: Any,
    *,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool | Sequence[bool] = True,
    prediction: str = "data",
    compensation: Any = None,
    lower_order_final: str = "always",
) -> Table:
    """UniPC: the multistep predictor, and a corrector that reuses the next step's evaluation (2302.04867 [69]).

    Predictor: ``x_s = ratio x_t + scale sum_j w_j d_j`` on the last ``order`` (1..4) predictions, weights in half log-SNR.
    Corrector: once ``d_s`` is evaluated at that x_s, the same step with d_s among the nodes gives the state from which the
    next step starts; d_s is kept. Folded into the next predictor it costs nothing: one row and one evaluation a
    step. Order p with a corrector is of order p + 1, and p without.

    ``variant``: the function B(h) of the paper, which matters only where a coefficient is set to 1/2 instead of
    solved for (order-2 predictor, order-1 corrector): "bh1" ``B = h``, "bh2" ``B = 1 - e^-h`` (noise form:
    ``e^h - 1``), "lagrange" solves there too. ``corrector``: or one flag a step, whether step i is corrected (never
    the last). ``prediction``: "data" or "noise". ``compensation``: DC-Solver's ratios, see :func:`dc_solver`.
    ``lower_order_final``: as in dpm_solver_pp; "always" is the published rule. Raises ValueError for other names,
    orders and lengths.
    """
    grid = as_grid(process, grid)
    check_order(order, (1, 2, 3, 4), "unipc()")
    check_choice("variant", variant, ("bh1", "bh2", "lagrange"))
    check_choice("prediction", prediction, tuple(FORMS))
    check_tail(lower_order_final)
    count = len(grid)
    corrected = per_step("corrector", corrector, count)
    ratios = np.array(per_step("compensation", 1.0 if compensation is None else compensation, count), np.float64)
    if not np.all(np.isfinite(ratios)):
        raise ValueError(f"compensation: {compensation} given; ratios must be finite")
    tape, before = Tape(process, grid[0]), None
    history: list[Node] = []
    for i in range(count):
        at, to = grid[i], grid[i + 1]
        p = allowed_order(grid, i, order, lower_order_final)
        if at.alpha == 0:
            tape.move(jump(at, to, tape.state, tape.evaluate(at, DATA)))
            continue
        value = tape.evaluate(at, FORMS[prediction])
        base = tape.state
        if before is not None and corrected[i - 1]:
            start, state, used = before
            gains = step_weights(start, at, history[:used], prediction, variant, at)
            ratio, scale, _ = frame(start, at, prediction)
            base = combine(ratio * state, scale * gains, [Node(at, value), *history[:used]])
        history = [Node(at, value), *history][: max(order, 3)]
        if ratios[i] != 1 and len(history) >= 3:
            history[0] = Node(at, _blend(history[:3], ratios[i]))
        before = (at, base, p)
        if to.sigma == 0:
            tape.move(to_data(base, history[0], to, prediction))
            continue
        gains = step_weights(at, to, history[:p], prediction, variant, None)
        ratio, scale, _ = frame(at, to, prediction)
        tape.move(combine(ratio * base, scale * gains, history))
    return steady(process, tape.table(grid[count]))


def per_step(name: str, value: Any, count: int) -> list:
    """One value a step, from a single one or a sequence of ``count``."""
    if np.ndim(value) == 0:
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} values given; need one, or one a step ({count})")
    return list(value)


def to_data(base: Expression, node: Node, to: Point, form: str) -> Expression:
    """The last step, to sigma = 0: alpha_s x0_hat, from either form."""
    if form == "data":
        return to.alpha * node.value
    return (to.alpha / node.at.alpha) * (base - node.at.sigma * node.value)


def step_weights(
    at: Point, to: Point, past: Sequence[Node], form: str, variant: str, end: Point | None
) -> np.ndarray:
    """Weights on ``[end,] past`` of the step; B(h) enters where the method sets a coefficient to 1/2."""
    _, _, H = frame(at, to, form)
    h = to.lam - at.lam
    nodes = np.array(([1.0] if end is not None else []) + [(n.at.lam - at.lam) / h for n in past])
    fixed = nodes.size == 2 and variant != "lagrange"
    if not fixed:
        return weights.exponential(H, nodes)
    psi = weights.moments(H, 1)[0]
    half = 0.5 * (psi if variant == "bh2" else H)
    slope = half / (nodes[0] if end is not None else nodes[1])
    return np.array([slope, psi - slope]) if end is not None else np.array([psi - slope, slope])


def _blend(nodes: Sequence[Node], ratio: float) -> Expression:
    """The quadratic in time through three predictions, read at ``ratio t_0 + (1 - ratio) t_1``."""
    times = np.array([n.at.time for n in nodes])
    gains = weights.lagrange(times, np.array([ratio * times[0] + (1 - ratio) * times[1]]))[:, 0]
    return gains[0] * nodes[0].value + gains[1] * nodes[1].value + gains[2] * nodes[2].value


def dc_solver(
    process: Process,
    grid: Any,
    *,
    compensation: Any = 1.0,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool | Sequence[bool] = True,
    prediction: str = "data",
    lower_order_final: str = "always",
) -> Table:
    """DC-Solver: UniPC whose newest prediction is, before each step, moved along its history (2409.03755 [69]).

    From the third prediction on, ``D_0 <- sum_j D_j L_j(r t_0 + (1 - r) t_1)``, the quadratic in time through the last
    three, kept in the history. ``compensation``: r of every step, or one a step (N,); 1 is UniPC. Ratios are learned per
    number of steps; a constant r != 1 lowers the order to 1. Overwritten history makes the table
    carry all predictions so far, so it is for few steps. The other options are those of :func:`unipc`.
    """
    return unipc(
        process,
        grid,
        order=order,
        variant=variant,
        corrector=corrector,
        prediction=prediction,
        compensation=compensation,
        lower_order_final=lower_order_final,
    )


ESTIMATORS = ("lagrange", "pseudo")


class Step(NamedTuple):
    """Choices of one step of :func:`usf`: ``order`` 1..4 (lowered to the history there is), ``prediction`` "data" or
    "noise", ``variable`` of the interpolation "lam", "t" or "rho", ``corrector``: whether it is corrected, and ``estimator``:
    "lagrange" (the interpolant) or "pseudo" (each derivative from as few of the nearest values as it takes)."""

    order: int = 2
    prediction: str = "data"
    variable: str = "lam"
    corrector: bool = False
    estimator: str = "lagrange"


def usf(process: Process, grid: Any, steps: Sequence[Step | dict] | Step | dict | None = None) -> Table:
    """The unified sampling framework: every step its own order, form, interpolation and corrector (2312.07243 [121]).

    ``steps``: a :class:`Step` (or a dict of its fields) for all steps, or one a step. Histories serve both forms: the noise
    prediction of an earlier node is ``(y - alpha x0_hat)/sigma`` at the state evaluated there. Times are the grid's. Equal
    steps give DPM-Solver, DPM-Solver++, DEIS, LMS and UniPC (with solved coefficients). Steps from alpha = 0 and to
    sigma = 0 are first-order. One evaluation a step. Raises ValueError for wrong lengths and names.
    """
    grid = as_grid(process, grid)
    count = len(grid)
    steps = Step() if steps is None else steps
    if isinstance(steps, (Step, dict)):
        steps = [steps] * count
    plan = [Step(**s) if isinstance(s, dict) else Step(*s) for s in steps]
    if len(plan) != count:
        raise ValueError(f"steps: {len(plan)} given; need one, or one a step ({count})")
    for choice in plan:
        check_order(choice.order, (1, 2, 3, 4), "usf()")
        check_choice("prediction", choice.prediction, tuple(FORMS))
        check_variable(choice.variable, grid, "usf")
        check_choice("estimator", choice.estimator, ESTIMATORS)
    # histories in noise form need the states evaluated at
    tape = Tape(process, grid[0], keep=any(choice.prediction == "noise" for choice in plan))
    history: list[Seen] = []
    start, used = None, 0
    for i in range(count):
        at, to, choice = grid[i], grid[i + 1], plan[i]
        data, state = tape.evaluate(at, DATA), tape.state
        if at.alpha == 0:
            tape.move(jump(at, to, state, data))
            continue
        seen, base = Seen(Node(at, data), state), state
        if start is not None and plan[i - 1].corrector:
            base = _usf_step(process, grid[i - 1], at, start, [seen, *history[:used]], plan[i - 1])
        history = [seen, *history][:4]
        if to.sigma == 0:
            # x0_hat is that of the state before its correction; in noise form the correction itself is kept, scaled
            corrected = base - state if choice.prediction == "noise" else 0 * data
            tape.move((to.alpha / at.alpha) * corrected + to.alpha * data)
            continue
        used = min(choice.order, len(history))
        pull = _usf_step(process, at, to, 0 * data, history[:used], choice)
        ratio = frame(at, to, choice.prediction)[0]
        tape.move(ratio * base + pull)
        start = (tape.state - pull) / ratio  # the base, in the states just carried
    return steady(process, tape.table(grid[count]))


class Seen(NamedTuple):
    """A data prediction and the state it was made at."""

    node: Node
    state: Expression


def _usf_step(
    process: Process, at: Point, to: Point, base: Expression, past: Sequence[Seen], choice: Step
) -> Expression:
    pseudo = choice.estimator == "pseudo"
    if pseudo and past[0].node.at == to:  # a correction: its differences start where the step does
        past = [past[1], past[0], *past[2:]]
    nodes = [seen.node for seen in past]
    if choice.prediction == "noise":
        nodes = [Node(n.at, (state - n.at.alpha * n.value) / n.at.sigma) for n, state in past]
    return step(process, at, to, base, nodes, choice.prediction, choice.variable, pseudo=pseudo)
