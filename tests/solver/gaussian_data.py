"""Weak error without sampling: on Gaussian data every table is affine, so its law is propagated exactly."""

from __future__ import annotations

import numpy as np

from jaxdiff.solver.algebra import _block, _propagate
from jaxdiff.solver.grid import from_times

# data N(mean, variance); several variances, so that an error that changes its sign along one is seen in another
MEAN, VARIANCES = 0.7, (0.1, 0.3, 1.5)


def law(table, variance, mean=MEAN, start=None):
    """(mean, variance) of the last state when data is N(mean, variance); the start has the exact law, or variance ``start``."""
    block = _block(table)
    K = np.shape(block.A)[0]
    alpha, sigma = np.asarray(block.alpha, np.float64), np.asarray(block.sigma, np.float64)
    v = alpha**2 * variance + sigma**2
    # basis: unused, constant, start, churn, fresh noise of each row
    first = np.zeros(4 + K)
    first[1], first[2] = alpha[0] * mean, np.sqrt(v[0] if start is None else start)
    constant = np.zeros(4 + K)
    constant[1] = 1.0

    def records(k, y):
        z = y - alpha[k] * mean * constant
        data = mean * constant + alpha[k] * variance / v[k] * z
        return float(block.p[k]) * data + float(block.q[k]) * sigma[k] / v[k] * z

    y = _propagate(block, first, records)[-1]
    return y[1], float(np.sum(y[2:] ** 2))


def weak_error(table):
    """RMS over the data variances of the errors of mean and variance, exact ones alpha m and alpha^2 v + sigma^2."""
    block = _block(table)
    a, s = float(block.alpha[-1]), float(block.sigma[-1])
    errors = []
    for v in VARIANCES:
        mean, variance = law(table, v)
        errors += [mean - a * MEAN, variance - (a * a * v + s * s)]
    return float(np.sqrt(np.mean(np.square(errors))))


def graded(process, steps, power=1.0, low=-1.8, high=1.8):
    """Half log-SNR ``low + (high - low) u^power``; at power 2 the first steps are so short that a cold start costs nothing."""
    lam = low + (high - low) * np.linspace(0.0, 1.0, steps + 1) ** power
    return from_times(process, np.asarray(process.time(lam), np.float64))


def weak_order(make, process, *, power=1.0, steps=(128, 256)):
    """Slope of the weak error, and the errors."""
    errors = [weak_error(make(process, graded(process, n, power))) for n in steps]
    return float(np.log2(errors[0] / errors[1]) / np.log2(steps[1] / steps[0])), errors
