"""DPM-Solver (2206.00927 [50]) and DPM-Solver++ (2211.01095 [244]): one family, noise form and data form.

Each has multistep tables (one evaluation a step), singlestep tables (``order`` evaluations a step, stages between grid
points) and "fast" tables (singlestep whose stages are grid points, so that N grid steps cost exactly N evaluations).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA, require_gaussian, require_path
from jaxdiff.solver.exponential import FORMS, check_choice, frame, jump, point_at
from jaxdiff.solver.grid import Grid, Point, as_grid
from jaxdiff.solver.multistep import VARIANTS, check_order, check_tail, multistep
from jaxdiff.solver.renoise import check_noise, split
from jaxdiff.solver.table import Table
from jaxdiff.solver.tape import Expression, Tape

__all__ = ["dpm_solver", "dpm_solver_pp"]

METHODS = ("multistep", "singlestep", "fast")


def dpm_solver_pp(
    process: Process,
    grid: Any,
    *,
    order: int = 2,
    method: str = "multistep",
    variant: str = "midpoint",
    lower_order_final: str = "auto",
    eta: float = 0.0,
    s_noise: float = 1.0,
    nfe: int | None = None,
) -> Table:
    """DPM-Solver++: ``x_s = (sigma_s/sigma_t) x_t + alpha_s sum_j w_j x0_hat_j``, weights in half log-SNR (2211.01095 [244]).

    ``method="multistep"`` (1, 2M, 3M; 4 with "lagrange"): the last ``order`` predictions, one evaluation a step. With
    ``h = lam_s - lam_t``, ``r = h_prev/h``, ``variant="midpoint"`` (default) uses the paper's second-order step,
    ``D = (1 + 1/(2r)) D_0 - (1/(2r)) D_1`` under the first-order weight ``alpha_s (1 - e^-h)``, and integrates the
    quadratic of order 3 exactly; "lagrange" integrates the linear interpolant exactly too (diffusers' "heun");
    "public" is the published 3M, whose curvature term is half of what it should be (second order); "heun" and "taylor" are
    "public" with the second-order steps of "lagrange" (diffusers' and the paper's code's options of those names).
    ``method="singlestep"`` (1, 2S, 3S): ``order`` evaluations a step, stages at 1/2 (order 2), 1/3 and 2/3 (order 3) of the
    step in lam. ``method="fast"``: the same with stages on grid points, N evaluations on N grid steps. Variants as in
    :func:`dpm_solver`.

    ``lower_order_final`` (multistep): "auto" (fewer than 15 steps), "always", "zero", "never". ``eta``, ``s_noise`` (not
    multistep): fresh noise at the end of every step, as in :func:`dpm_solver`. ``nfe``: refuse a table that does not cost
    exactly this many evaluations. Order 1 is DDIM. Steps from alpha = 0 and to sigma = 0 are first-order.
    Raises ValueError for other orders and names, and singlestep on grids without a path.
    """
    return _dpm(
        process, grid, "data", order, method, variant, lower_order_final, eta, s_noise, nfe, "dpm_solver_pp()"
    )


def dpm_solver(
    process: Process,
    grid: Any,
    *,
    order: int = 3,
    method: str = "fast",
    variant: str = "midpoint",
    lower_order_final: str = "auto",
    eta: float = 0.0,
    s_noise: float = 1.0,
    nfe: int | None = None,
) -> Table:
    """DPM-Solver: ``x_s = (alpha_s/alpha_t) x_t + sigma_s sum_j w_j eps_hat_j``, weights in half log-SNR (2206.00927 [50]).

    With ``h = lam_s - lam_t``: order 1 ``x_s = (alpha_s/alpha_t) x_t - sigma_s (e^h - 1) E_t`` (DDIM); order 2, stage u at
    ``r1 = 1/2``, subtracts ``sigma_s (e^h - 1) (E_u - E_t)/(2 r1)``; order 3, stages 1 and 2 at 1/3 and 2/3, subtracts
    ``(sigma_s/r2) ((e^h - 1)/h - 1) (E_2 - E_t)``, stage 2 itself subtracting
    ``(r2/r1) sigma_2 ((e^{r2 h} - 1)/(r2 h) - 1) (E_1 - E_t)`` beyond first order.

    ``method="fast"``: K steps of order 3 (order 2), then a shorter tail, so that a grid of N steps costs exactly N
    evaluations: ``[3]*(K-2) + [2, 1]``, ``[3]*(K-1) + [1]``, ``[3]*(K-1) + [2]`` for N mod 3 = 0, 1, 2, ``K = N//3 + 1``; the
    stages are grid points, so any grid will do. ``method="singlestep"``: stages inside each grid step, ``order`` evaluations
    each (needs the path). ``method="multistep"``: past predictions instead of stages.

    ``variant``: "midpoint" (default; "public" is the same here), the formulas above; "lagrange", exact quadrature on the
    stages, with the last stage's slope scaled so that order 3 holds wherever the first stage is up to 0.6 of the step:
    fast tables on uneven grids need it, the published formula being of order 3 only as stage 2 tends to 2/3; "taylor", the
    same without that scaling (the paper's code's option); "heun", exact quadrature in order 2 and the formula above in order 3
    (diffusers' option).

    ``eta`` > 0 (not multistep): each step goes to ``rho_down`` of :func:`euler_ancestral`, stages at the same fractions of that
    longer step in lam, and ``s_noise`` times the noise that leads back up is drawn (k-diffusion's dpm_fast). As published, no
    step goes below the grid's last level (or the path's), so a last step to sigma > 0 draws nothing. The split is exact: the
    weak order is that of the steps without noise, 3 too. Above eta = 1 a step whose noise is all fresh is first-order.
    ``eta`` > 0 needs Gaussian noise, and the path from order 2 on.
    ``nfe``: refuse a table that does not cost exactly this many evaluations. Raises ValueError for other orders and names.
    """
    return _dpm(process, grid, "noise", order, method, variant, lower_order_final, eta, s_noise, nfe, "dpm_solver()")


def _dpm(
    process: Process,
    grid: Any,
    form: str,
    order: int,
    method: str,
    variant: str,
    lower_order_final: str,
    eta: float,
    s_noise: float,
    nfe: int | None,
    solver: str,
) -> Table:
    grid = as_grid(process, grid)
    check_choice("method", method, METHODS)
    check_choice("variant", variant, VARIANTS)
    check_tail(lower_order_final)
    check_noise(eta, s_noise, solver.rstrip("()"))
    if eta > 0:
        require_gaussian(process, f"{solver} with eta > 0")
        if method == "multistep":
            raise ValueError(
                f"eta: {eta} given; {solver} with method 'multistep' draws no noise: allowed methods 'singlestep' and 'fast' "
                "(or use dpm_solver_pp_sde, euler_maruyama)"
            )
    if method == "multistep":
        table = multistep(
            process,
            grid,
            form=form,
            order=order,
            variant=variant,
            lower_order_final=lower_order_final,
            solver=solver,
        )
    else:
        check_order(order, (1, 2, 3), f"{solver} with method {method!r}")
        steps = _fast_steps(grid, order) if method == "fast" else _single_steps(process, grid, order, solver)
        noise = [0.0] * len(steps)
        if eta > 0:
            if any(len(points) > 2 for points in steps):
                require_path(grid, f"{solver} with eta > 0", "points between the grid's unless order = 1")
            moved = [_below(process, points, eta, grid[len(grid)].rho) for points in steps]
            steps, noise = [points for points, _ in moved], [s_noise * up for _, up in moved]
        tape = _singlestep(process, grid[0], steps, noise, form, variant)
        table = tape.table(grid[len(grid)], stochastic=eta > 0)
    if nfe is not None and table.nfe != nfe:
        raise ValueError(
            f"nfe: {nfe} given, but method {method!r} of order {order} costs {table.nfe} on this grid of {len(grid)} "
            f"steps; use a grid of {nfe} steps with method='fast' or 'multistep', which cost one a grid step"
        )
    return table


def _single_steps(process: Process, grid: Grid, order: int, solver: str) -> list[list[Point]]:
    """Each step as its points: start, stages inside the grid step, end."""
    if order > 1:
        require_path(grid, f"{solver} with method 'singlestep'", "points between the grid's (use method='fast')")
    fractions = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}[order]
    steps = []
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        h = to.lam - at.lam
        inner = [point_at(process, at.lam + r * h) for r in fractions] if h < float("inf") else []
        steps.append([at, *inner, to])
    return steps


def fast_orders(count: int, order: int) -> list[int]:
    """Orders that sum to ``count``, by the published schedule."""
    if order == 1:
        return [1] * count
    if order == 2:
        return [2] * (count // 2) + [1] * (count % 2)
    blocks = count // 3 + 1
    tail = {0: [2, 1], 1: [1], 2: [2]}[count % 3]
    return [3] * (blocks - len(tail)) + tail


def _fast_steps(grid: Grid, order: int) -> list[list[Point]]:
    """Each step as its points, all of them grid points; a start at alpha = 0 and an end at sigma = 0 are order 1."""
    start = 1 if grid[0].alpha == 0 else 0
    orders = [1] * start + (fast_orders(len(grid) - start, order) if len(grid) > start else [])
    if grid[len(grid)].sigma == 0 and orders[-1] > 1:
        orders[-1:] = [1, 1]  # the schedules end in 1 or 2
    steps, i = [], 0
    for size in orders:
        steps.append([grid[j] for j in range(i, i + size + 1)])
        i += size
    return steps


def _below(process: Process, points: list[Point], eta: float, floor: float) -> tuple[list[Point], float]:
    """The step's points moved so that it ends at rho_down, and the std of the noise that leads back, both in the scale of its
    own end."""
    at, to = points[0], points[-1]
    if to.sigma == 0:
        return points, 0.0
    down, up = split(at, to, eta)
    if len(points) > 2:  # stages stay on the path
        clean = process.coefficients(np.float64(0.0))
        floor = max(floor, float(clean.sigma / clean.alpha))
    if to.rho <= floor * (1 + 1e-12):
        down, up = to.sigma, 0.0
    elif down < floor * to.alpha:
        down = floor * to.alpha
        up = math.sqrt((to.sigma - down) * (to.sigma + down))
    end = Point(to.time, to.alpha, down)
    if at.alpha == 0 or down == 0:
        return [at, end], up
    stretch = (end.lam - at.lam) / (to.lam - at.lam)
    return [at, *(point_at(process, at.lam + stretch * (p.lam - at.lam)) for p in points[1:-1]), end], up


def _singlestep(
    process: Process, start: Point, steps: list[list[Point]], noise: list[float], form: str, variant: str
) -> Tape:
    tape = Tape(process, start)
    for points, std in zip(steps, noise):
        base, end = tape.state, points[-1]
        if points[0].alpha == 0 or end.sigma == 0:
            tape.move(jump(points[0], end, base, tape.evaluate(points[0], DATA)), noise=std)
            continue
        rule = variant
        if len(points) == 4 and (points[1].lam - points[0].lam) > 0.6 * (end.lam - points[0].lam):
            rule = "midpoint"  # at a first stage of 2/3 no weights give order 3, and near it they are huge
        # in noise the step multiplies eps_hat's rounding by an alpha ratio
        ask = tape.infer if form == "noise" and points[0].alpha < points[0].sigma else tape.evaluate
        records: list[Expression] = []
        for j, at in enumerate(points[:-1]):
            records.append(ask(at, FORMS[form]))
            gains = _stage_weights(points, j + 1, form, rule)
            ratio, scale, _ = frame(points[0], points[j + 1], form)
            to = ratio * base
            for gain, record in zip(gains, records):
                to = to + (scale * gain) * record
            last = points[j + 1] is end
            tape.move(to, out=last, noise=std if last else 0.0)
    return tape


def _stage_weights(points: list[Point], target: int, form: str, variant: str) -> list[float]:
    """Weights of the step's first ``target`` records in the state at ``points[target]``."""
    at, to, end = points[0], points[target], points[-1]
    _, _, H = frame(at, to, form)
    if target == 1:
        return list(weights.moments(H, 1))
    h = to.lam - at.lam
    r = [(p.lam - at.lam) / (end.lam - at.lam) for p in points[:target]]
    nodes = [(p.lam - at.lam) / h for p in points[:target]]
    psi0, psi1 = weights.moments(H, 2)
    if target == 2:
        if to is end and variant in ("midpoint", "public"):
            slope = psi0 / (2 * nodes[1])
        else:
            slope = psi1 / nodes[1]
            if to is not end and variant == "lagrange":
                # b2 a32 r1 = 1/6 for the quadrature weight b2 of the last stage; 1 at (1/3, 2/3)
                r2 = (to.lam - at.lam) / (end.lam - at.lam)
                slope *= 2 * (r2 - r[1]) / ((2 - 3 * r[1]) * r2)
        return [psi0 - slope, slope]
    if variant in ("lagrange", "taylor"):
        return list(weights.exponential(H, nodes))
    slope = psi1 / nodes[2]
    return [psi0 - slope, 0.0, slope]
