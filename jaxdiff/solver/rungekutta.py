"""Heun's method on the probability-flow ODE, and EDM's stochastic Heun."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.build import DATA, NOISE, Rows, first_order, noise_step, require_path
from jaxdiff.solver.churn import Churn
from jaxdiff.solver.exponential import check_choice, jump, point_at
from jaxdiff.solver.grid import Grid, Point, as_grid
from jaxdiff.solver.onestep import check_clock, euler_row, velocity_form
from jaxdiff.solver.rounding import steady
from jaxdiff.solver.table import Table
from jaxdiff.solver.tape import Tape

__all__ = ["dpm2", "edm", "heun", "rho_rk", "rk4"]

# c, rows of a, b of explicit Runge-Kutta methods
TABLEAUS: dict[str, tuple[list, list[list], list]] = {
    "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "2heun": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "3kutta": ([0, 1 / 2, 1], [[], [1 / 2], [-1, 2]], [1 / 6, 2 / 3, 1 / 6]),
    "4rk": ([0, 1 / 2, 1 / 2, 1], [[], [1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


def heun(process: Process, grid: Any, *, clock: str = "time") -> Table:
    """Heun's second-order method: an Euler step, then the average of both slopes. Order 2, 2N-1 evaluations.

    ``clock``: as in :func:`euler`. Steps that end at sigma = 0, and in the rho clock those that start at alpha = 0,
    are first-order (the slope there is not defined), which keeps the global order. With the stage state ``y1 = y + h f0``
    the corrected state is ``y1 + (h/2)(f1 - f0)``, so one state register is enough. With churn it is :func:`edm`.
    """
    grid = as_grid(process, grid)
    check_clock(clock, grid, "heun")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        A, B, form = euler_row(process, grid, i, clock)
        corrected = to.sigma > 0 and not (clock == "rho" and at.alpha == 0)
        rows.add(at, A, B, form=form, out=not corrected)
        if corrected:
            half = B[0] / 2
            rows.add(to, [1.0], [half, -half], form=NOISE if clock == "rho" else velocity_form(process, to))
    return steady(process, rows.table(grid[len(grid)]))


def _explicit(process: Process, grid: Grid, tableau: str, clock: str) -> Table:
    """Explicit Runge-Kutta of ``d(x/alpha)/d rho = E`` (clock "rho") or ``dx/dt = velocity`` ("time")."""
    c, rows, b = TABLEAUS[tableau]
    tape = Tape(process, grid[0])
    for i in range(len(grid)):
        at, to, base = grid[i], grid[i + 1], tape.state
        if to.sigma == 0 or (clock == "rho" and at.alpha == 0):
            tape.move(jump(at, to, base, tape.evaluate(at, DATA)))
            continue
        points = [_between(process, at, to, fraction, clock) for fraction in c] + [to]
        slopes = []
        for j, a in enumerate([*rows[1:], b]):
            here, there = points[j], points[j + 1]
            slopes.append(tape.evaluate(here, NOISE if clock == "rho" else velocity_form(process, here)))
            if clock == "rho":
                total, width = (there.alpha / at.alpha) * base, there.alpha * (to.rho - at.rho)
            else:
                total, width = base, to.time - at.time
            for gain, slope in zip(a, slopes):
                total = total + (width * gain) * slope
            tape.move(total, out=j + 1 == len(c))
    return steady(process, tape.table(grid[len(grid)]))


def _between(process: Process, at: Point, to: Point, fraction: float, clock: str) -> Point:
    """The point at ``fraction`` of the step in the clock."""
    if fraction in (0, 1):
        return to if fraction else at
    if clock == "rho":
        return point_at(process, -np.log(at.rho + fraction * (to.rho - at.rho)))
    time = at.time + fraction * (to.time - at.time)
    c = process.coefficients(np.float64(time))
    return Point(time, float(c.alpha), float(c.sigma))


def rk4(process: Process, grid: Any, *, clock: str = "time") -> Table:
    """The classical fourth-order Runge-Kutta method on the probability-flow ODE; 4 evaluations a step.

    ``clock``: as in :func:`heun`; either needs the path between grid points. A step to sigma = 0 (and, in the rho clock,
    from alpha = 0) is the first-order jump.
    """
    grid = as_grid(process, grid)
    check_clock(clock, grid, "rk4")
    require_path(grid, "rk4", "points between the grid's (use lms or heun(clock='rho'))")
    return _explicit(process, grid, "4rk", clock)


def rho_rk(process: Process, grid: Any, *, tableau: str = "3kutta") -> Table:
    """DEIS's rhoRK: explicit Runge-Kutta on ``d(x/alpha)/d rho = E``, rho = sigma/alpha (2204.13902 [66]).

    ``tableau``: "midpoint", "2heun", "3kutta", "4rk" (orders 2, 2, 3, 4); all but "2heun" have stages between grid points.
    """
    grid = as_grid(process, grid)
    check_choice("tableau", tableau, tuple(TABLEAUS))
    if tableau != "2heun":
        require_path(grid, f"rho_rk(tableau={tableau!r})", "points between the grid's (use '2heun')")
    return _explicit(process, grid, tableau, "rho")


def dpm2(
    process: Process,
    grid: Any,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    stochastic: bool | None = None,
) -> Table:
    """k-diffusion's DPM2: in ``x/alpha``, Euler to the geometric mean of rho and s's rho, then that slope for the whole step.

    ``x_s/alpha_s = x_t/alpha_t + (rho_s - rho_t) E(mid)``. Order 2, 2 evaluations a step; steps to sigma = 0 and from alpha = 0
    are first-order. ``s_churn``, ``s_min``, ``s_max``, ``s_noise``: noise added before each step, as in :func:`edm`.
    """
    grid = as_grid(process, grid)
    require_path(grid, "dpm2", "points between the grid's (use dpm_solver(method='fast') or lms)")
    churn = Churn(process, grid, "dpm2", s_churn, s_min, s_max, s_noise)
    tape = Tape(process, grid[0])
    churn.start(tape.rows)
    for i in range(len(grid)):
        at, to, base = churn.hats[i], grid[i + 1], tape.state
        end, std = churn.end(i)
        if to.sigma == 0 or at.alpha == 0:
            tape.move(jump(at, end, base, tape.evaluate(at, DATA)), noise=std)
            continue
        middle = point_at(process, (at.lam + to.lam) / 2)
        slope = tape.evaluate(at, NOISE)
        tape.move((middle.alpha / at.alpha) * base + middle.alpha * (middle.rho - at.rho) * slope, out=False)
        slope = tape.evaluate(middle, NOISE)
        tape.move((end.alpha / at.alpha) * base + end.alpha * (to.rho - at.rho) * slope, noise=std)
    return steady(process, tape.table(grid[len(grid)], stochastic=s_churn > 0 or bool(stochastic)))


def edm(
    process: Process,
    grid: Any,
    *,
    heun: bool = True,
    clock: str = "rho",
    variant: str = "jump",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    stochastic: bool | None = None,
) -> Table:
    """EDM's sampler (2206.00364): Euler or Heun in ``x/alpha`` over ``rho = sigma/alpha``, with churn.

    Before step i, noise is raised to ``rho_hat = rho (1 + gamma)``, ``gamma = min(s_churn/N, sqrt(2) - 1)`` if
    ``s_min <= rho <= s_max``, by adding ``s_noise sqrt(rho_hat^2 - rho^2) z``. N is the number of steps; ``s_min`` and
    ``s_max`` are k-diffusion's s_tmin and s_tmax. Noise added before an evaluation is the C of the row before it; before the
    first, the table's ``start_gain`` and ``start_noise``. On paths with alpha != 1 rho_hat stays within the process's range: a
    start at its end is not churned. Order 2 (weak order 2 at fixed s_churn); ``s_noise != 1`` leaves a variance floor by
    design. ``clock="time"``: the slopes are the path's velocities in its time, the paper's general sampler, as in
    :func:`heun`. A step to sigma = 0 is the exact jump to x0_hat; ``variant="public"`` makes it the published Euler step,
    which in the clock "time" leaves part of the noise.
    """
    grid = as_grid(process, grid)
    churn = Churn(process, grid, "edm", s_churn, s_min, s_max, s_noise)
    check_clock(clock, grid, "edm")
    check_choice("variant", variant, ("jump", "public"))
    slope = (lambda point: NOISE) if clock == "rho" else (lambda point: velocity_form(process, point))
    rows = Rows(process, grid[0])
    churn.start(rows)
    for i in range(len(grid)):
        at, to = churn.hats[i], grid[i + 1]
        end, std = churn.end(i)
        gain, last = end.alpha / to.alpha, to.sigma == 0
        exact = (last and variant == "jump") or (clock == "rho" and at.alpha == 0)
        form = DATA if exact else slope(at)
        A, B = (
            first_order(at, to) if exact else noise_step(at, to) if clock == "rho" else ([1.0], [to.time - at.time])
        )
        if heun and not exact and not last:
            rows.add(at, A, B, form=form, out=False)
            half = B[0] / 2
            rows.add(to, [gain], [gain * half, -gain * half], C=std, form=slope(to))
        else:
            rows.add(at, [gain * A[0]], [gain * B[0]], C=std, form=form)
    return steady(process, rows.table(grid[len(grid)], stochastic=s_churn > 0 or bool(stochastic)))
