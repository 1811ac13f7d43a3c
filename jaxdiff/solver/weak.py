"""Weak order without sampling: on Gaussian data every table is affine, so the law of a run is propagated exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.algebra import churn_gain, plain_block, propagate
from jaxdiff.solver.grid import Grid, from_times
from jaxdiff.solver.order import Order
from jaxdiff.solver.table import Table

__all__ = ["gaussian_law", "level_grid", "weak_order"]

# data N(mean, variance); several variances, so that an error that changes its sign along one is seen in another
MEAN, VARIANCES = 0.7, (0.1, 0.3, 1.5)


def gaussian_law(table: Table, mean: float, variance: float, *, start: float | None = None) -> tuple[float, float]:
    """(mean, variance) of a run's last state when data is ``N(mean, variance)`` and the denoiser exact.

    The first state has the mean of the path's marginal and variance ``start`` (default: the marginal's), before
    churn. float64, no sampling: the denoiser is affine, so the state is followed as coefficients on the start and on
    every draw.
    """
    block = plain_block(table)
    K = np.shape(block.A)[0]
    alpha, sigma = np.asarray(block.alpha, np.float64), np.asarray(block.sigma, np.float64)
    v = alpha**2 * variance + sigma**2
    churn = 0.0 if block.start_noise is None else float(block.start_noise)
    given = float(block.start[0]) ** 2 * variance + float(block.start[1]) ** 2
    # basis: unused, constant, start, churn, fresh noise of each row
    first = np.zeros(4 + K)
    first[1] = alpha[0] * mean
    first[2] = churn_gain(block) * np.sqrt(given if start is None else start)
    first[3] = churn
    constant = np.zeros(4 + K)
    constant[1] = 1.0

    def records(k: int, y: np.ndarray) -> np.ndarray:
        z = (y - alpha[k] * mean * constant) / v[k]
        data = mean * constant + alpha[k] * variance * z
        return float(block.p[k]) * data + float(block.q[k]) * sigma[k] * z

    y = propagate(block, first, records)[-1]
    return float(y[1]), float(np.sum(y[2:] ** 2))


def weak_error(table: Table) -> float:
    """RMS over data variances of the errors of mean and variance at the end; exact: ``alpha m``, ``alpha^2 v + sigma^2``."""
    block = plain_block(table)
    a, s = float(block.alpha[-1]), float(block.sigma[-1])
    errors = []
    for v in VARIANCES:
        mean, variance = gaussian_law(table, MEAN, v)
        errors += [mean - a * MEAN, variance - (a * a * v + s * s)]
    return float(np.sqrt(np.mean(np.square(errors))))


def level_grid(
    process: Process, steps: int, *, power: float = 1.0, lam_min: float = -1.8, lam_max: float = 1.8
) -> Grid:
    """Half log-SNR ``lam_min + (lam_max - lam_min) (i/N)^power``: at power 2 the first steps are so short that a cold
    start costs a multistep method nothing."""
    lam = lam_min + (lam_max - lam_min) * np.linspace(0.0, 1.0, steps + 1) ** power
    return from_times(process, np.asarray(process.time(lam), np.float64))


def weak_order(
    make: Callable[[Process, Grid], Table],
    process: Process,
    *,
    steps: Sequence[int] = (128, 256),
    grid: Callable[[Process, int], Grid] = level_grid,
) -> Order:
    """Weak order of ``make(process, grid) -> Table``, stochastic or not, on 1-D Gaussian data.

    The error is that of the mean and variance of the last state, RMS over three data variances, by exact propagation;
    the slope is taken between the two last of ``steps``. ``grid``: default :func:`level_grid`. float64, on the host.
    """
    tables = [make(process, grid(process, count)) for count in steps]
    errors = [weak_error(table) for table in tables]
    slope = np.log2(errors[-2] / errors[-1]) / np.log2(steps[-1] / steps[-2])
    return Order(float(slope), np.array(errors), np.array([int(table.nfe) for table in tables]))
