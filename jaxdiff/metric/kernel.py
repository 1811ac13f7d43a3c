"""Kernels and the maximum mean discrepancy between two sets of points (Gretton et al. 2012)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdiff.metric.distance import flat, flat_pair, pairwise_squared_distances

BANDWIDTH_FACTORS: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the median distance over which the default kernel is averaged."""


def rbf(x: Any, y: Any, bandwidths: float | Sequence[float] = 1.0) -> Any:
    """``mean_h exp(-|x_i - y_j|^2 / (2 h^2))``, matrix (N, M); several bandwidths h are averaged.

    Bandwidths are in the units of the data and positive, else ``ValueError``.
    """
    widths = np.atleast_1d(np.asarray(bandwidths, dtype=np.float64))
    if widths.size == 0 or not (widths > 0).all():
        raise ValueError(f"bandwidths: {bandwidths!r}; every bandwidth must be > 0")
    squared = pairwise_squared_distances(x, y)
    xp = squared.__array_namespace__()
    total = xp.zeros_like(squared)
    for width in widths:
        total = total + xp.exp(squared * float(-0.5 / width**2))
    return total / len(widths)


def polynomial(x: Any, y: Any, degree: int = 3, gamma: float | None = None, constant: float = 1.0) -> Any:
    """``(gamma x_i.y_j + constant)^degree``, matrix (N, M); ``gamma=None`` means 1/D.

    With its defaults this is the kernel of KID (Binkowski et al., arXiv 1801.01401). Raises ``ValueError`` for degree < 1.
    """
    if degree < 1:
        raise ValueError(f"degree: {degree}; allowed >= 1")
    x, y = flat_pair(x, y)
    scale = 1.0 / x.shape[1] if gamma is None else gamma
    return (scale * (x @ y.T) + constant) ** degree


def median_bandwidth(x: Any, limit: int = 1000) -> float:
    """Median distance between different points of x, from at most ``limit`` evenly spaced ones.

    Raises ``ValueError`` when that is zero (more than half of the pairs coincide): no scale to choose.
    """
    points = flat(np.asarray(x))
    points = points[np.linspace(0, len(points) - 1, min(len(points), limit)).astype(int)]
    above = np.triu_indices(len(points), k=1)
    median = float(np.sqrt(np.median(pairwise_squared_distances(points, points)[above]))) if len(points) > 1 else 0.0
    if median <= 0.0:
        raise ValueError(f"bandwidths: the median distance of {len(points)} points is 0; pass bandwidths explicitly")
    return median


def mmd_squared(
    x: Any, y: Any, kernel: Callable[[Any, Any], Any] = rbf, *, unbiased: bool = True, chunk: int = 2048
) -> Any:
    """Squared maximum mean discrepancy ``E k(x,x') + E k(y,y') - 2 E k(x,y)``, a scalar.

    ``unbiased=True`` leaves the diagonal out of the first two means: the expectation is then exactly the
    population value, zero for equal laws, so single values may be negative; it needs two points a side.
    ``unbiased=False`` is the V-statistic, never negative, with bias of order 1/N. The kernel maps two sets
    of points to a matrix; rows are done ``chunk`` at a time. Differentiable for jax input.

    Raises ``ValueError`` for sets too small.
    """
    x, y = flat_pair(x, y)
    if unbiased and min(len(x), len(y)) < 2:
        raise ValueError(f"points: sets of {len(x)} and {len(y)}; the unbiased estimate needs at least 2 each")

    def total(a: Any, b: Any, skip_diagonal: bool) -> Any:
        value = 0.0
        for start in range(0, len(a), chunk):
            block = kernel(a[start : start + chunk], b)
            value = value + block.sum()
            if skip_diagonal:
                value = value - block[:, start : start + len(block)].trace()
        return value

    n, m = len(x), len(y)
    pairs = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    own = total(x, x, unbiased) / pairs[0] + total(y, y, unbiased) / pairs[1]
    return own - 2.0 * total(x, y, False) / (n * m)
