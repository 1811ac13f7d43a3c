"""Kernel discrepancies: MMD with Gaussian kernels of several widths, and KID."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.metric import BANDWIDTH_FACTORS, flat, median_bandwidth, mmd_squared, polynomial, rbf


def mmd(x: Any, y: Any, *, bandwidths: float | Sequence[float] | None = None) -> float:
    """Unbiased squared MMD between x (N, ...) and the reference y (M, ...), averaged over bandwidths.

    ``bandwidths=None`` takes 1/4, 1/2, 1, 2, 4 times the median distance of the reference alone, so that
    every set compared with one reference meets the same kernel. Zero in expectation for equal laws, hence
    sometimes negative. Float64 on the host.
    """
    if bandwidths is None:
        bandwidths = [factor * median_bandwidth(y) for factor in BANDWIDTH_FACTORS]
    return float(mmd_squared(np.asarray(x), np.asarray(y), partial(rbf, bandwidths=bandwidths)))


class Kid(NamedTuple):
    """Kernel distance: the mean over subsets and the spread (standard deviation) of one subset's value."""

    mean: float
    spread: float


def kid(x: Any, y: Any, *, subsets: int = 50, subset_size: int | None = None, seed: int = 0) -> Kid:
    """Kernel Inception distance: unbiased squared MMD with the kernel ``(x.y/D + 1)^3``, mean over subsets.

    x (N, D) and y (M, D) are features. Each of ``subsets`` seeded draws takes ``subset_size`` points a side
    without replacement; the default size is min(1000, half of the smaller set), so that draws differ. The
    estimate is unbiased at every size. The spread is that of one draw: it is not the error of the mean,
    since draws share points. Source: Binkowski et al., arXiv 1801.01401.
    """
    x, y = flat(np.asarray(x)), flat(np.asarray(y))
    smaller = min(len(x), len(y))
    if subset_size is None and smaller < 4:
        raise ValueError(
            f"x, y: sets of {len(x)} and {len(y)}; kid() needs at least 4 points a side, or a subset_size"
        )
    size = min(1000, smaller // 2) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise ValueError(f"subset_size: {size} of sets of {len(x)} and {len(y)}; allowed 2..{smaller}")
    if subsets < 1:
        raise ValueError(f"subsets: {subsets}; allowed >= 1")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        a = x[generator.choice(len(x), size, replace=False)]
        b = y[generator.choice(len(y), size, replace=False)]
        values.append(mmd_squared(a, b, polynomial))
    return Kid(float(np.mean(values)), float(np.std(values)))
