"""Momentum solvers: generalised heavy ball and heavy ball (2307.11118 [260])."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA, NOISE, Rows, first_order
from jaxdiff.solver.exponential import check_choice
from jaxdiff.solver.grid import Grid, as_grid
from jaxdiff.solver.multistep import check_order
from jaxdiff.solver.table import Table

__all__ = ["ghvb", "heavy_ball"]


def ghvb_weights(order: int, beta: float) -> np.ndarray:
    """Weights m_j on ``v_k, v_{k-1}, ...``, over beta: a step is ``(rho_s - rho_t) sum_j m_j v_{k-j}``, summing to 1."""
    b = beta
    table = {
        1: [b],
        2: np.array([2 + b, -(2 - b)]) / 2,
        3: np.array([18 + 5 * b, -(24 - 8 * b), 6 - b]) / 12,
        4: np.array([46 + 9 * b, -(78 - 19 * b), 42 - 5 * b, -(10 - b)]) / 24,
        5: np.array([1650 + 251 * b, -(3420 - 646 * b), 2880 - 264 * b, -(1380 - 106 * b), 270 - 19 * b]) / 720,
    }
    return np.array(table[order], np.float64) / b


def ghvb(process: Process, grid: Any, *, order: float = 1.8, lower_order_final: str = "never") -> Table:
    """GHVB: a momentum buffer in front of Adams-Bashforth, which enlarges the stability region (2307.11118 [260]).

    In ``x/alpha`` over rho: ``v_k = (1 - beta) v_{k-1} + beta E_k`` (``v_0 = E_0``), then
    ``x/alpha += (rho_s - rho_t)/beta sum_j m_j v_{k-j}``.

    ``order`` in (0, 5] is p - 1 + beta: 1.8 means the p = 2 weights with beta = 0.8; a whole order p has beta = 1,
    which is iPNDM with its published weights. Of order p where steps are equal, at most 2 otherwise. The buffer is
    not carried: the slope of the step before is read off the last two states, so the table has two states and p
    records. A start at alpha = 0 and, with
    ``lower_order_final="zero"``, a step to sigma = 0 are first-order. Raises ValueError for an order out of range.
    """
    grid = as_grid(process, grid)
    if not 0 < order <= 5:
        raise ValueError(f"order: {order} given; ghvb() needs 0 < order <= 5")
    p = math.ceil(order)
    return _momentum(process, grid, p, 1.0 - (p - float(order)), lower_order_final, "ghvb")


def heavy_ball(
    process: Process, grid: Any, *, order: int = 2, beta: float = 0.8, lower_order_final: str = "never"
) -> Table:
    """HB: momentum behind Adams-Bashforth, ``v <- (1 - beta) v + beta AB_p(E)``, ``x/alpha += (rho_s - rho_t) v`` (2307.11118).

    ``order`` p 1..4, ``beta`` in (0, 1], 1 being iPNDM with its published weights; the first v is E. First order for
    beta < 1. Ends as in :func:`ghvb`. Raises ValueError for a number out of range.
    """
    grid = as_grid(process, grid)
    check_order(order, (1, 2, 3, 4), "heavy_ball()")
    if not 0 < beta <= 1:
        raise ValueError(f"beta: {beta} given; heavy_ball() needs 0 < beta <= 1")
    return _momentum(process, grid, order, float(beta), lower_order_final, "hb")


def _momentum(process: Process, grid: Grid, p: int, beta: float, lower_order_final: str, kind: str) -> Table:
    """Slopes ``s_k`` with ``x_s/alpha_s = x_t/alpha_t + (rho_s - rho_t) s_k``.

    Once k >= p, both kinds obey ``s_k = (1 - beta) s_{k-1} + (fixed weights) . (E_k, E_{k-1}, ...)``; before, s_k is written in
    the records themselves, of which there are then at most p.
    """
    check_choice("lower_order_final", lower_order_final, ("zero", "never"))
    rows, records = Rows(process, grid[0]), np.eye(p)
    buffers: list[np.ndarray] = []
    first = 0 if grid[0].alpha > 0 else 1
    for i in range(len(grid)):
        at, to, k = grid[i], grid[i + 1], i - first
        if at.alpha == 0 or (to.sigma == 0 and lower_order_final == "zero"):
            rows.add(at, *first_order(at, to), form=DATA)
            continue
        ratio, width = to.alpha / at.alpha, to.alpha * (to.rho - at.rho)
        if k >= p:
            before = grid[i - 1]
            pull = (1 - beta) * width / (at.rho - before.rho)
            own = beta * (ghvb_weights(p, beta) if kind == "ghvb" else adams(p))
            A = [ratio + pull / at.alpha, -pull / before.alpha] if pull else [ratio]
            rows.add(at, A, list(width * own), form=NOISE)
            continue
        # buffers[j]: v_j as weights of E_0, E_1, ...
        newest = records[k] if kind == "ghvb" else adams(k + 1) @ records[k::-1][: k + 1]
        buffers.append(newest if k == 0 else (1 - beta) * buffers[-1] + beta * newest)
        slope = ghvb_weights(k + 1, beta) @ np.array(buffers[::-1]) if kind == "ghvb" else buffers[-1]
        rows.add(at, [ratio], list(width * slope[k::-1]), form=NOISE)
    return rows.table(grid[len(grid)])


def adams(order: int) -> np.ndarray:
    """Adams-Bashforth weights of equal steps, newest first."""
    return weights.polynomial(-np.arange(order, dtype=np.float64))
