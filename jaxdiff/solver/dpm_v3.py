"""DPM-Solver-v3 (2310.13268 [40]) with scalar model statistics, its correctors and its pseudo-order rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA
from jaxdiff.solver.exponential import Node, check_choice, jump
from jaxdiff.solver.grid import Point, as_grid
from jaxdiff.solver.multistep import allowed_order, check_order, check_tail
from jaxdiff.solver.table import Table
from jaxdiff.solver.tape import Expression, Tape
from jaxdiff.solver.unipc import per_step

__all__ = ["Statistics", "dpm_solver_v3"]


class Statistics(NamedTuple):
    """``l``, ``s``, ``b`` as numbers, or (n,) values at the increasing half log-SNRs ``lam`` (n,), linear in between and
    constant beyond."""

    l: Any = 1.0  # noqa: E741 (the paper's letter)
    s: Any = 0.0
    b: Any = 0.0
    lam: Any = None


def dpm_solver_v3(
    process: Process,
    grid: Any,
    *,
    l: Any = 1.0,  # noqa: E741
    s: Any = 0.0,
    b: Any = 0.0,
    lam: Any = None,
    order: int = 2,
    corrector: bool | Sequence[bool] = False,
    variant: str = "lagrange",
    p_pseudo: bool = False,
    c_pseudo: bool = False,
    lower_order_final: str = "auto",
) -> Table:
    """DPM-Solver-v3: a linear part and a scaling fitted to the model, as functions of half log-SNR (2310.13268 [40]).

    With ``f = (sigma E - l x)/alpha = (1 - l)(sigma/alpha) E - l D`` (the record), and relative to the step's start lam_t
    ``L = int l``, ``S = int s``, ``B = int e^{-S} b``, ``g_j = e^{-S_j} f_j - B_j``:
    ``x_s = (alpha_s/alpha_t) e^{-L_s} x_t - alpha_s e^{-L_s} int e^{L+S} (P + B) d lam``, P the polynomial in lam through the
    last ``order`` (1..4) values g_j. ``(l, s, b) = (1, 0, 0)`` is DPM-Solver++, ``(0, -1, 0)`` DPM-Solver, both multistep
    with exact weights. ``l``, ``s``, ``b``: numbers, or arrays (n,) at half log-SNRs ``lam`` (n,), increasing.

    ``corrector``: the next evaluation corrects the state, keeping its f; or one flag a step, whether step i is corrected
    (never the last; the published "half" corrects down to a noise level). A step of order p is corrected on p + 1 values,
    the new one and the p of the predictor, as in UniPC; ``variant`` "public" on the new one and p - 1, the published rule,
    which corrects first-order steps only with ``c_pseudo``.
    ``p_pseudo``: the predictor's P is ``sum_k g[t, ..., t_-k] (lam - lam_t)^k`` with the divided differences of the nearest
    k + 1 values in place of derivatives at lam_t (the pseudo-order rule, meant for very few steps): of order 2
    at most. ``c_pseudo``: the same in the corrector, on p + 1 values in the order t, s, t_-1, ...

    Steps from alpha = 0 and to sigma = 0 are first-order. ``solver.learn.ems`` measures the statistics of a model. Raises
    ValueError for other orders, names, lengths and shapes, statistics that are not finite, and corrector rules without
    corrector. Statistics per pixel are not supported.
    """
    grid = as_grid(process, grid)
    check_order(order, (1, 2, 3, 4), "dpm_solver_v3()")
    check_tail(lower_order_final)
    check_choice("variant", variant, ("lagrange", "public"))
    corrected = per_step("corrector", corrector, len(grid))
    for name, given in {"variant 'public'": variant == "public", "c_pseudo True": c_pseudo}.items():
        if given and not any(corrected):
            raise ValueError(f"{name.replace(' ', ': ')} given without a corrector for it; give corrector=True")
    stats = _checked(Statistics(l, s, b, lam))
    tape, before = Tape(process, grid[0]), None
    history: list[Node] = []
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        if at.alpha == 0:
            tape.move(jump(at, to, tape.state, tape.evaluate(at, DATA)))
            continue
        linear = _read(stats, "l", at.lam)
        form = DATA if to.sigma == 0 else (-linear, (1 - linear) * at.rho)
        value, base = tape.evaluate(at, form), tape.state
        if before is not None and corrected[i - 1]:
            # the record of the last row is data: f in terms of it and of the state evaluated there
            own = value if to.sigma > 0 else ((1 - linear) / at.alpha) * tape.state - value
            start, state, used = before
            past = history[: used - (variant == "public" and not c_pseudo)]
            if past:
                # the newest value second: pseudo differences lean on the first ones
                base = _step(stats, start, at, state, [past[0], Node(at, own), *past[1:]], c_pseudo)
        if to.sigma == 0:
            tape.move(jump(at, to, base, value))
            continue
        history = [Node(at, value), *history][:order]
        p = allowed_order(grid, i, order, lower_order_final)
        before = (at, base, p)
        tape.move(_step(stats, at, to, base, history[:p], p_pseudo))
    return tape.table(grid[len(grid)])


def _checked(stats: Statistics) -> Statistics:
    values = {name: np.asarray(getattr(stats, name), np.float64) for name in ("l", "s", "b")}
    for name, value in values.items():
        if not np.all(np.isfinite(value)):
            raise ValueError(f"{name}: not finite; dpm_solver_v3() needs finite statistics")
    if stats.lam is None:
        for name, value in values.items():
            if value.ndim:
                raise ValueError(
                    f"{name}: shape {value.shape} given without lam; need a number, or lam of that shape"
                )
        return Statistics(**values)
    lam = np.asarray(stats.lam, np.float64)
    if lam.ndim != 1 or lam.size < 2 or np.any(np.diff(lam) <= 0):
        raise ValueError(f"lam: shape {lam.shape} given; need at least two increasing half log-SNRs")
    for name, value in values.items():
        if value.ndim and value.shape != lam.shape:
            raise ValueError(f"{name}: shape {value.shape} given; need a number or the shape of lam, {lam.shape}")
    return Statistics(**values, lam=lam)


def _read(stats: Statistics, name: str, lam: Any) -> Any:
    value = getattr(stats, name)
    if value.ndim == 0:
        return float(value) + 0 * np.asarray(lam)
    return np.interp(lam, stats.lam, value)


def _cells(stats: Statistics, start: float, end: float) -> np.ndarray:
    """Ends of the intervals between ``start`` and ``end`` (either way round) on which the statistics are linear."""
    knots = np.empty(0) if stats.lam is None else stats.lam
    inner = knots[(knots > min(start, end)) & (knots < max(start, end))]
    return np.concatenate([[start], inner if end > start else inner[::-1], [end]])


def _integrals(stats: Statistics, start: float, end: float, reduce: Callable) -> tuple[float, float, float, Any]:
    """``(L, S, B)`` from ``start`` to ``end``, and the sum over quadrature points of ``weight reduce(lam, L, S, B)``.

    Gauss-Legendre on every cell; running integrals inside a cell use the same rule on [cell start, point].
    """
    x, w = weights.gauss(24)
    L = S = B = total = 0.0
    cells = _cells(stats, start, end)
    for a, z in itertools.pairwise(cells):
        lam = np.append(a + x * (z - a), z)
        width = lam - a
        inner = a + x * width[:, None]  # (points, quadrature)
        Ls = L + width * (_read(stats, "l", inner) @ w)
        Ss = S + width * (_read(stats, "s", inner) @ w)
        # S at the inner points, for B
        deeper = a + x * (inner - a)[..., None]
        inner_S = S + (inner - a) * (_read(stats, "s", deeper) @ w)
        Bs = B + width * ((np.exp(-inner_S) * _read(stats, "b", inner)) @ w)
        total = total + reduce(lam[:-1], Ls[:-1], Ss[:-1], Bs[:-1]) @ w * (z - a)
        L, S, B = Ls[-1], Ss[-1], Bs[-1]
    return float(L), float(S), float(B), total


def _step(stats: Statistics, at: Point, to: Point, base: Expression, nodes: list[Node], pseudo: bool) -> Expression:
    positions = np.array([n.at.lam for n in nodes])
    basis = weights.nearest if pseudo else weights.lagrange

    def integrand(lam: np.ndarray, L: np.ndarray, S: np.ndarray, B: np.ndarray) -> np.ndarray:
        return np.exp(L + S) * np.concatenate([basis(positions, lam), B[None]])

    L, _, _, total = _integrals(stats, at.lam, to.lam, integrand)
    outer = -to.alpha * np.exp(-L)
    state = (to.alpha / at.alpha * np.exp(-L)) * base + outer * total[-1]
    for gain, node in zip(total[:-1], nodes):
        _, S, B, _ = _integrals(stats, at.lam, node.at.lam, lambda *a: np.zeros((1, a[0].size)))
        state = state + (outer * gain * np.exp(-S)) * node.value - outer * gain * B
    return state
