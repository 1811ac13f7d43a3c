"""Frechet distance between Gaussian fits of two sets of features."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxdiff.metric import flat


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of a set of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: Any) -> Moments:
    """Sample mean and unbiased covariance (divisor N-1) of features (N, D), float64 on the host."""
    points = flat(np.asarray(features))
    if len(points) < 2:
        raise ValueError(f"features: {len(points)} point; a covariance needs at least 2")
    mean = points.mean(axis=0)
    centred = points - mean
    return Moments(mean, centred.T @ centred / (len(points) - 1))


def _root(covariance: np.ndarray, name: str) -> np.ndarray:
    """Symmetric square root; directions whose variance is rounding error count as exactly flat."""
    if not np.allclose(covariance, covariance.T, rtol=1e-8, atol=1e-8 * np.abs(covariance).max(initial=0.0)):
        raise ValueError(f"{name}: covariance is not symmetric")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    top = max(values[-1], 0.0)
    if values[0] < -1e-8 * max(top, -values[0]) * len(values):
        raise ValueError(f"{name}: covariance has the negative eigenvalue {values[0]:.3g}; allowed >= 0")
    values = np.where(values > len(values) * np.finfo(np.float64).eps * top, values, 0.0)
    return (vectors * np.sqrt(values)) @ vectors.T


def frechet_from_moments(first: Moments, second: Moments) -> float:
    """``|m1-m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)``: squared W2 between two Gaussians.

    The last trace is the sum of singular values of ``S1^(1/2) S2^(1/2)``: those are the square roots of the
    eigenvalues of ``S1^(1/2) S2 S1^(1/2)``, but reach zero without passing through the square root of rounding
    error, so covariances of low rank (fewer samples than features) need no regularisation. Never negative.
    Source: Dowson and Landau 1982; as a metric of generators, arXiv 1706.08500. Raises ValueError for different numbers of
    features.
    """
    first = Moments(*(np.asarray(part, np.float64) for part in first))
    second = Moments(*(np.asarray(part, np.float64) for part in second))
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"moments: {first.mean.shape[0]} and {second.mean.shape[0]} features; must be equal")
    shift = np.sum((first.mean - second.mean) ** 2)
    cross = np.linalg.svd(_root(first.covariance, "first") @ _root(second.covariance, "second"), compute_uv=False)
    value = shift + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * cross.sum()
    return float(max(value, 0.0))


def frechet_distance(x: Any, y: Any) -> float:
    """Frechet distance (squared units, as FID is quoted) between features x (N, D) and y (M, D).

    Biased upwards by about ``c (1/N + 1/M)`` with a c that depends on the law: only values at equal counts
    against one reference compare. ``eval.report`` sets a floor at equal counts beside it for that reason.
    """
    return frechet_from_moments(moments(x), moments(y))
