"""ER-SDE-Solver: exact semi-linear solutions of a one-function family of reverse SDEs (2309.06169 [124])."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import Rows, first_order, require_gaussian
from jaxdiff.solver.exponential import check_choice
from jaxdiff.solver.grid import Grid, Point, as_grid
from jaxdiff.solver.multistep import allowed_order, check_order, check_tail
from jaxdiff.solver.table import Table

__all__ = ["PHIS", "er_sde"]

_LOG = math.log(10.0)
_PEAK = 6.9298832797  # log rho beyond which x^0.9 log10(1 + 100 x^1.5)/x would fall


def _sde_1(u: np.ndarray) -> np.ndarray:
    return np.log(np.exp(-np.exp(-u)) + 10)


def _sde_4(u: np.ndarray) -> np.ndarray:
    u = np.minimum(u, _PEAK)
    return -0.1 * u + np.log(np.log1p(100 * np.exp(1.5 * u)) / _LOG)


def _sde_5(u: np.ndarray) -> np.ndarray:
    return np.logaddexp(np.exp(0.3 * u), _LOG)


# name -> log(phi(rho)/rho) as a function of log rho; in this form nothing overflows, and rho = inf has a limit
PHIS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x": np.zeros_like,
    "x^1.5": lambda u: 0.5 * u,
    "x^2": lambda u: 1.0 * u,
    "x^2.5": lambda u: 1.5 * u,
    "sde_1": _sde_1,
    "sde_4": _sde_4,
    "sde_5": _sde_5,
}


def er_sde(
    process: Process,
    grid: Any,
    *,
    order: int = 3,
    phi: str | Callable[[np.ndarray], np.ndarray] = "sde_5",
    variant: str = "lagrange",
    quadrature: str | None = None,
    lower_order_final: str = "never",
    stochastic: bool | None = None,
) -> Table:
    """ER-SDE-Solver: reverse SDEs whose noise is set by a function phi of ``rho = sigma/alpha`` (2309.06169 [124]).

    ``x_s = (alpha_s/alpha_t) r x_t + alpha_s sum_j w_j D_j + alpha_s sqrt(rho_s^2 - r^2 rho_t^2) z``,
    ``r = phi(rho_s)/phi(rho_t)``, D_j data predictions.

    ``phi`` sets how much noise is injected: "x" none (the probability flow), "x^2" DDPM's reverse SDE, "x^1.5",
    "x^2.5", "sde_1" ``x (e^{-1/x} + 10)``, "sde_4" ``x^0.9 log10(1 + 100 x^1.5)`` (continued as c x beyond rho =
    1,022, where phi/x would fall), "sde_5" (the paper's choice) ``x (e^{x^0.3} + 10)``; or a function of rho with
    ``phi(x)/x`` positive and not decreasing. ``order`` 1..3: the last ``order`` data predictions are interpolated in
    rho and integrated against the SDE's kernel, ``int phi(rho_s) phi'/phi^2 D d rho``; with derivatives D', D'' of
    the interpolant at rho_t and ``d = rho_s - rho_t`` that is ``(1-r) D_0 + [d + phi(rho_s) int d rho/phi] D' +
    [d^2/2 + phi(rho_s) int (rho - rho_t)/phi d rho] D''``, integrals from rho_s to rho_t.

    ``variant="lagrange"`` (default) takes D' and D'' of the quadratic through three predictions; "public" the
    published raw differences ``D' = (D_0-D_1)/(rho_t - rho_1)``, ``D'' = 2 (D' - D'_1)/(rho_t - rho_2)``, which is
    second order, with the published 100-point left sums (``quadrature="riemann"``, about 1 % on the weights) and
    without noise where its variance in rho is below 1e-6; ``quadrature="exact"`` keeps the published differences but
    integrates by Gauss-Legendre and drops no noise.

    Order 1 with "x" is DDIM, with "x^2" ddim(eta=1). Weak order ``min(order, 2)`` from a cold start. Steps from alpha
    = 0 and to sigma = 0 are first-order, the last without noise. Raises ValueError for unknown names and a decreasing
    phi(x)/x.
    """
    grid = as_grid(process, grid)
    check_order(order, (1, 2, 3), "er_sde()")
    check_choice("variant", variant, ("lagrange", "public"))
    quadrature = ("riemann" if variant == "public" else "exact") if quadrature is None else quadrature
    check_choice("quadrature", quadrature, ("exact", "riemann"))
    check_tail(lower_order_final)
    if not callable(phi):
        check_choice("phi", phi, (*PHIS, "a function of rho"))
    quiet = phi == "x"
    if not quiet:
        require_gaussian(process, "er_sde")
    excess = _of_function(phi) if callable(phi) else PHIS[phi]
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        if to.sigma == 0:
            rows.add(at, *first_order(at, to))
            continue
        decay = _decay(excess, at, to)
        std = to.sigma * math.sqrt(-math.expm1(2 * decay))
        if at.alpha == 0:
            rows.add(at, *first_order(at, to, std), C=std)
            continue
        p = allowed_order(grid, i, order, lower_order_final)
        moments = (_exact if quadrature == "exact" else _riemann)(excess, at, to, p)
        gains = to.alpha * _gains(grid, i, moments, variant)
        if quadrature == "riemann" and (std / to.alpha) ** 2 < 1e-6:
            std = 0.0
        rows.add(at, [to.sigma / at.sigma * math.exp(decay)], list(gains), C=std)
    return rows.table(grid[len(grid)], stochastic=not quiet or bool(stochastic))


def _of_function(phi: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """``log(phi(rho)/rho)`` of a user's function; rho = inf is read at 1e8."""

    def excess(u: np.ndarray) -> np.ndarray:
        u = np.minimum(u, math.log(1e8))
        with np.errstate(all="ignore"):
            value = np.log(np.asarray(phi(np.exp(u)), np.float64)) - u
        if not np.all(np.isfinite(value)):
            raise ValueError(
                "phi: not positive and finite on the grid's rho = sigma/alpha; er_sde() needs phi(x) > 0"
            )
        return value

    return excess


def _decay(excess: Callable, at: Point, to: Point) -> float:
    """``log(phi(rho_s) rho_t/(phi(rho_t) rho_s))``, at most 0: the factor by which old noise shrinks beyond the ODE's."""
    start = np.inf if at.alpha == 0 else -at.lam
    with np.errstate(over="ignore"):
        value = float(excess(np.float64(-to.lam)) - excess(np.float64(start)))
    if not value <= 1e-12:
        raise ValueError(
            f"phi: phi(x)/x falls between rho={to.rho:g} and rho={at.rho:g}; er_sde() needs it not to decrease with x"
        )
    return min(value, 0.0)


def _exact(excess: Callable, at: Point, to: Point, count: int) -> np.ndarray:
    """``M_m = int phi(rho_s) (phi'/phi^2) u^m d rho``, ``u = (rho - rho_t)/(rho_s - rho_t)``, m < count.

    ``M_0 = 1 - r``; by parts ``M_m = int_0^1 m u^{m-1} (1 - phi(rho_s)/phi(rho)) du``, in the variable log rho, where
    it is smooth.
    """
    h = to.lam - at.lam
    v, gains = weights.gauss(64)
    gains = gains * h * np.exp(-v * h) / -math.expm1(-h)
    u = np.expm1(-v * h) / math.expm1(-h)
    last = excess(np.float64(-to.lam))
    values = 1 - np.exp(last - excess(-at.lam - v * h) - (1 - v) * h)
    r = math.exp(last - excess(np.float64(-at.lam)) - h)
    return np.array([1 - r, *(m * float(np.sum(gains * u ** (m - 1) * values)) for m in range(1, count))])


def _riemann(excess: Callable, at: Point, to: Point, count: int) -> np.ndarray:
    """The same moments by the published left sums of 100 points in rho."""
    v = 1 - np.arange(100) / 100  # u at rho_s first
    rho = at.rho + v * (to.rho - at.rho)
    last = excess(np.float64(-to.lam)) + math.log(to.rho)
    ratio = np.exp(last - excess(np.log(rho)) - np.log(rho))
    r = math.exp(last - excess(np.float64(-at.lam)) - math.log(at.rho))
    return np.array([1 - r, *(1 - m * float(np.mean(v ** (m - 1) * ratio)) for m in range(1, count))])


def _gains(grid: Grid, i: int, moments: np.ndarray, variant: str) -> np.ndarray:
    """Weights of the newest predictions from the moments of 1, u, u^2."""
    rho = np.array([grid[i - j].rho for j in range(moments.size)])
    nodes = (rho - rho[0]) / (grid[i + 1].rho - rho[0])
    if variant == "lagrange" or moments.size < 3:
        return np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    first = np.array([1.0, -1.0, 0.0]) / -nodes[1]
    earlier = np.array([0.0, 1.0, -1.0]) / (nodes[1] - nodes[2])
    second = 2 * (first - earlier) / -nodes[2]
    return moments[0] * np.array([1.0, 0.0, 0.0]) + moments[1] * first + 0.5 * moments[2] * second
