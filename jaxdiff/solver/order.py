"""Convergence order of a solver, measured against the exact 1-D flow: no network, no reference integration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxdiff.exact import GaussianMixture, QuantileFlow, quantile_flow
from jaxdiff.process.process import Process
from jaxdiff.solver.algebra import plain_block
from jaxdiff.solver.grid import Grid, from_times
from jaxdiff.solver.table import Table

__all__ = ["Order", "order"]

WORLD = GaussianMixture([0.3, 0.5, 0.2], [-1.5, 0.4, 2.0], [0.35**2, 0.25**2, 0.5**2])


class Order(NamedTuple):
    """``slope``: minus the slope of log2 error over log2 steps between the two finest grids. ``errors`` (n,): RMS error
    at the end of each grid; ``nfe`` (n,) evaluations."""

    slope: float
    errors: np.ndarray
    nfe: np.ndarray


def posterior(world: GaussianMixture, x: np.ndarray, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """``(x0_hat, eps_hat)`` of a 1-D mixture in numpy float64; needs sigma > 0."""
    means, spread = world.means[:, 0], world.spectra[:, 0]
    v = alpha * alpha * spread + sigma * sigma
    z = x[..., None] - alpha * means
    logs = np.log(world.weights) - 0.5 * np.log(v) - 0.5 * z * z / v
    r = np.exp(logs - logs.max(-1, keepdims=True))
    r = r / r.sum(-1, keepdims=True)
    return np.sum(r * (means + alpha * spread * z / v), -1), np.sum(r * sigma * z / v, -1)


def trace(
    table: Table,
    x: np.ndarray,
    predict: Callable[[np.ndarray, float, float], tuple],
    exact: Sequence | np.ndarray = (),
) -> np.ndarray:
    """A deterministic table in numpy float64; the first ``len(exact)`` grid states are replaced by ``exact``.

    Evaluations then see exact states, which is how multistep methods are started at full order.
    """
    block = plain_block(table)
    A, B = np.asarray(block.A), np.asarray(block.B)
    ys, ds, done = [x] * A.shape[1], [np.zeros_like(x)] * B.shape[1], 0
    for k in range(A.shape[0]):
        data, noise = predict(ys[0], float(block.alpha[k]), float(block.sigma[k]))
        ds = [block.p[k] * data + block.q[k] * noise, *ds[:-1]]
        y = sum(A[k, h] * ys[h] for h in range(A.shape[1])) + sum(B[k, h] * ds[h] for h in range(B.shape[1]))
        y = y + block.E[k]
        if table.out[k]:
            if done < len(exact):
                y = exact[done]
            done += 1
        ys = [y, *ys[:-1]]
    return ys[0]


def time_grid(process: Process, steps: int) -> Grid:
    """Equal times between half log-SNR -2.2 and 2.2: unequal steps in lam, finite ends."""
    first, last = (float(process.time(np.float64(lam))) for lam in (-2.2, 2.2))
    return from_times(process, np.linspace(first, last, steps + 1))


@jax.jit
def _between(flow: QuantileFlow, x: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    return flow.between(x, *start, *end)


def order(
    make: Callable[[Process, Grid], Table],
    process: Process,
    *,
    warm: int = 0,
    steps: Sequence[int] = (128, 256, 512),
    grid: Callable[[Process, int], Grid] = time_grid,
    world: GaussianMixture = WORLD,
) -> Order:
    """Order of ``make(process, grid) -> Table`` on the probability flow of a 1-D mixture.

    ``warm``: this many first grid states are exact (a multistep method of order p shows its order for warm >= p; started
    cold, a first-order first step limits it to 2). ``grid(process, N)``: defaults to equal times between half log-SNR
    -2.2 and 2.2. float64, on the host. Raises ValueError for tables that draw noise.
    """
    errors, costs = [], []
    for count in steps:
        points = grid(process, count)
        table = make(process, points)
        if plain_block(table).C.any():
            raise ValueError("make: gives a stochastic table; order() measures deterministic solvers")
        at = [*range(1, warm + 1), count]
        x = points.alpha[0] * 0.3 + points.sigma[0] * np.linspace(-2.0, 2.0, 33)
        # one shape for every grid, so that the flow compiles once
        padded = np.array((at + [count] * 8)[: max(8, len(at))])
        with jax.enable_x64(True):
            exact = np.asarray(
                _between(
                    quantile_flow(world, process),
                    np.tile(x, (padded.size, 1)),
                    np.stack([points.alpha[[0] * padded.size], points.sigma[[0] * padded.size]]),
                    np.stack([points.alpha[padded], points.sigma[padded]]),
                )
            )[: len(at)]
        y = trace(table, x, lambda y, a, s: posterior(world, y, a, s), exact[:-1])
        errors.append(float(np.sqrt(np.mean((y - exact[-1]) ** 2))))
        costs.append(int(table.nfe))
    slope = np.log2(errors[-2] / errors[-1]) / np.log2(steps[-1] / steps[-2])
    return Order(float(slope), np.array(errors), np.array(costs))
