"""Align Your Steps: the grid of least divergence bound, found exactly on a ladder of noise levels (2404.14507 [62]).

The stochastic first-order solver (``ddim(eta=1)``) freezes the prediction over a step. By Girsanov's theorem its paths
are as far from the true reverse paths as, in nats,

    ``KLUB = 1/2 sum_i int_{w_i}^{w_{i+1}} E||D(x_w) - D(x_{w_i})||^2 dw``,   ``w = alpha^2/sigma^2``,

with ``x_{w_i}`` the state x_w with more noise on it: the paper's ``int rho^-3 E||.||^2 d rho`` in w, where nothing is
singular at alpha = 0. It bounds the divergence between the laws of the last state. The cost of a step depends on its
two ends alone, so on a ladder of levels all costs come from one noising chain a sample, evaluated once a level, and the
least sum over grids is a shortest path. (For an exact denoiser the integrand is ``mmse(w_i) - mmse(w)``.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.process.process import Process
from jaxdiff.solver.build import require_gaussian
from jaxdiff.solver.grid import Grid, as_grid
from jaxdiff.solver.learn.fit import Learned
from jaxdiff.solver.table import Table

__all__ = ["kl_bound", "klub"]


def kl_bound(grid: Any, d: Any, x0: Any, *, process: Process | None = None, fine: int = 32, seed: int = 0) -> float:
    """KLUB of a grid in nats, estimated on data ``x0`` (N, ...) with one noising chain a sample.

    ``fine``: rungs a step, equal in half log-SNR, for the trapezoid rule in w. A last step to sigma = 0 is left out (the
    divergence from an exact sample is infinite there); the sum over axes is taken, so pixels count. Raises
    ValueError for a process whose noise is not Gaussian and a grid of another process.
    """
    process = _process(process, d)
    points = _finite(process, grid)
    ladder, at = _ladder(process, points, fine)
    costs = _costs(d, jnp.asarray(x0), ladder, seed)
    return float(np.sum(costs[at[:-1], at[1:]]))


def klub(
    maker: Callable[[Process, Grid], Table],
    grid: Any,
    d: Any,
    x0: Any,
    *,
    process: Process | None = None,
    rungs: int = 200,
    sweeps: int | None = 1,
    judge: Callable[[Table], Any] | None = None,
    seed: int = 0,
) -> Learned:
    """Move the interior points of ``grid`` to where KLUB is least; the table is ``maker(process, grid)`` on them.

    ``grid``: gives the number of steps, the first point and the last one above sigma = 0, which stay, as does a step to
    sigma = 0. ``x0`` (N, ...): data; ``rungs``: levels to choose from, equal in half log-SNR, besides the grid's own.
    ``sweeps``: passes of a coordinate search from ``grid``, every point to its best rung between its neighbours; None
    finds the least sum there is. The minimiser of the bound is not the best grid: it opens with one giant step, and the
    endpoint of a deterministic solver is worse on it than on ``grid``; the paper stops early, and so does one sweep. With
    a ``judge`` (say the endpoint's error of a table on a few starts) the sweep it finds least is kept, ``grid`` being
    sweep 0. ``losses``: the bound of ``grid`` and after each sweep, or of the minimiser. Raises ValueError as
    :func:`kl_bound` does, and for grids with no interior point.
    """
    process = _process(process, d)
    if sweeps is not None and sweeps < 1:
        raise ValueError(f"sweeps: {sweeps} given; need at least 1, or None for the least sum")
    grid = as_grid(process, grid)
    points = _finite(process, grid)
    if len(points) < 2:
        raise ValueError(f"grid: {len(grid)} steps given; no point between its ends is left to move")
    ladder, at = _ladder(process, points, max(1, -(-rungs // len(points))), even=True)
    costs = _costs(d, jnp.asarray(x0), ladder, seed)
    if sweeps is None:
        tried = [at, _shortest(costs, len(points))]
    else:
        tried = [at]
        for _ in range(sweeps):
            tried.append(_sweep(costs, tried[-1]))
    bounds = np.array([np.sum(costs[at[:-1], at[1:]]) for at in tried])
    clean = slice(len(points) + 1, None)

    def found(at: np.ndarray) -> Grid:
        pair = lambda name: np.append(getattr(ladder, name)[at], getattr(grid, name)[clean])
        return Grid(pair("time"), pair("alpha"), pair("sigma"), grid.on_path)

    if judge is None:
        best = len(tried) - 1
    else:
        best = int(np.argmin([float(judge(maker(process, found(at)))) for at in tried]))
    chosen = found(tried[best])
    return Learned(maker(process, chosen), {"time": chosen.time}, bounds)


def _process(process: Process | None, d: Any) -> Process:
    process = getattr(d, "process", None) if process is None else process
    if process is None:
        raise ValueError("process: missing; the noise levels between grid points lie on it")
    require_gaussian(process, "klub()")
    return process


def _finite(process: Process, grid: Any) -> Grid:
    """The grid without a clean last point."""
    grid = as_grid(process, grid)
    stop = len(grid) + (grid.sigma[-1] > 0)
    return Grid(grid.time[:stop], grid.alpha[:stop], grid.sigma[:stop], grid.on_path)


def _ladder(process: Process, points: Grid, fine: int, even: bool = False) -> tuple[Grid, np.ndarray]:
    """Rungs that contain ``points``, and where. ``fine`` between neighbours, or (``even``) as many equal in all."""
    lam = np.array([points[i].lam for i in range(len(points) + 1)])
    if not np.isfinite(lam[0]):  # from alpha = 0: beyond six units nothing is known of the data
        lam[0] = lam[1] - 6.0
    if even:
        between = np.linspace(lam[0], lam[-1], fine * (lam.size - 1) + 1)
        between = between[np.min(np.abs(between[:, None] - lam), 1) > 1e-9]
    else:
        between = np.concatenate([np.linspace(a, b, fine + 1)[1:-1] for a, b in itertools.pairwise(lam)])
    if points.alpha[0] == 0:
        between = np.append(between, lam[0])
    time = np.asarray(process.time(between), np.float64)
    c = process.coefficients(time)
    join = lambda own, new: np.concatenate([own, np.asarray(new, np.float64)])
    alpha, sigma = join(points.alpha, c.alpha), join(points.sigma, c.sigma)
    order = np.argsort(np.arctan2(sigma, alpha))[::-1]
    at = np.argsort(order)[: lam.size]
    return Grid(join(points.time, time)[order], alpha[order], sigma[order], points.on_path), at


def _shortest(costs: np.ndarray, steps: int) -> np.ndarray:
    """Rungs (steps + 1,) of the cheapest way from the first to the last in so many steps."""
    open_costs = np.where(np.triu(np.ones_like(costs), 1) > 0, costs, np.inf)
    best, come_from = open_costs[0], []
    for _ in range(steps - 1):
        total = best[:, None] + open_costs
        come_from.append(np.argmin(total, 0))
        best = np.min(total, 0)
    at = [costs.shape[0] - 1]
    for previous in reversed(come_from):
        at.append(int(previous[at[-1]]))
    return np.array([0, *reversed(at)])


def _sweep(costs: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Every interior point at its best rung between its neighbours, one after the other."""
    at = at.copy()
    for i in range(1, at.size - 1):
        inside = np.arange(at[i - 1] + 1, at[i + 1])
        at[i] = inside[np.argmin(costs[at[i - 1], inside] + costs[inside, at[i + 1]])]
    return at


def _costs(d: Any, x0: Any, ladder: Grid, seed: int) -> np.ndarray:
    """Costs (M, M) in nats of one step from rung i to rung j > i; 0 elsewhere. One evaluation a sample and rung."""
    alpha, sigma = (np.asarray(v, np.float64) for v in (ladder.alpha, ladder.sigma))
    predictions = _predictions(d, x0, ladder, seed)
    count = x0.shape[0]
    inner = predictions @ predictions.T / count
    own = np.diagonal(inner)
    apart = np.maximum(own[:, None] + own[None] - 2 * inner, 0.0)  # E||D_j - D_i||^2, summed over axes
    snr = (alpha / sigma) ** 2
    pieces = 0.5 * np.diff(snr) * 0.5 * (apart[:, 1:] + apart[:, :-1])
    costs = np.concatenate([np.zeros((snr.size, 1)), np.cumsum(pieces, 1)], 1)
    return np.triu(costs - np.diagonal(costs)[:, None], 1)


def _predictions(d: Any, x0: Any, ladder: Grid, seed: int) -> np.ndarray:
    """Data predictions (M, N * size) in float64 along one noising chain a sample, rungs noise first."""
    d, x0 = prediction.lift(d), jnp.asarray(x0)
    rho = np.asarray(ladder.sigma, np.float64) / np.maximum(ladder.alpha, 1e-300)
    shrink = np.append(rho[1:] / rho[:-1], 0.0)  # towards noise, n_i = shrink_i n_{i+1} + fresh

    @jax.jit
    def climb(key: jax.Array, rungs: tuple) -> jax.Array:
        def step(n: jax.Array, rung: tuple) -> tuple:
            key, time, alpha, sigma, keep, fresh = rung
            n = keep * n + fresh * jax.random.normal(key, n.shape, n.dtype)
            x = alpha * x0 + sigma * n
            query = prediction.Query(time, None, alpha, sigma)
            return n, prediction.evaluate(d, prediction.start(d, x), x, query)[0].data

        keys = jax.random.split(key, ladder.time.size)
        return jax.lax.scan(step, jnp.zeros_like(x0), (keys, *rungs), reverse=True)[1]

    fresh = np.sqrt(np.maximum(1 - shrink**2, 0.0))
    rungs = tuple(jnp.asarray(v, x0.dtype) for v in (ladder.time, ladder.alpha, ladder.sigma, shrink, fresh))
    return np.asarray(climb(jax.random.key(seed), rungs), np.float64).reshape(rho.size, -1)
