"""Wasserstein-2 distances that are exact on a line, and their average over projections."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.metric.distance import flat_pair


def _coupling(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Monotone coupling of n and m equally weighted sorted points: (index in x, index in y, mass).

    The two empirical quantile functions are steps, constant between the levels i/n and j/m; cutting [0, 1] at
    the union of the levels gives at most n + m - 1 pieces. Integer arithmetic, so equal levels meet exactly.
    """
    levels = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))
    return levels[:-1] // m, levels[:-1] // n, np.diff(levels) / (n * m)


def _squared(x: Any, y: Any) -> Any:
    """Squared W2 along axis 0 of two (N, P), (M, P) sets of projected points, shape (P,)."""
    xp = x.__array_namespace__()
    x, y = xp.sort(x, axis=0), xp.sort(y, axis=0)
    if x.shape[0] == y.shape[0]:
        return xp.mean((x - y) ** 2, axis=0)
    i, j, mass = _coupling(x.shape[0], y.shape[0])
    weights = xp.asarray(mass, dtype=x.dtype)[:, None]
    return xp.sum(weights * (x[i] - y[j]) ** 2, axis=0)


def wasserstein_1d(x: Any, y: Any) -> Any:
    """Exact W2 between two samples on the line, ``sqrt(int_0^1 (Q_x(u) - Q_y(u))^2 du)``, a scalar.

    x (N,) or (N, 1) and y (M,) or (M, 1); N and M may differ, the integral of the two step functions is exact
    either way. Units of the data. Raises ``ValueError`` when the points are not one-dimensional.
    """
    x, y = flat_pair(x, y)
    if x.shape[1] != 1:
        raise ValueError(f"x: points of dimension {x.shape[1]}; expected 1 (sliced_wasserstein takes any)")
    return _squared(x, y)[0] ** 0.5


def directions(dimension: int, count: int, seed: int = 0) -> np.ndarray:
    """``count`` unit vectors in R^dimension, (dimension, count) float64, a function of the seed alone.

    Drawn as uniformly random orthonormal bases, the last one cut short: each vector is uniform on the sphere,
    and over a whole basis a shift between two sets is measured without error.
    """
    for name, value in (("dimension", dimension), ("count", count)):
        if value < 1:
            raise ValueError(f"{name}: {value}; allowed >= 1")
    generator = np.random.default_rng(seed)
    bases = []
    for _ in range(-(-count // dimension)):
        basis, triangle = np.linalg.qr(generator.standard_normal((dimension, dimension)))
        bases.append(basis * np.sign(np.diag(triangle)))  # the sign makes the law Haar and the result LAPACK-free
    return np.concatenate(bases, axis=1)[:, :count]


def sliced_wasserstein(x: Any, y: Any, *, projections: int = 256, seed: int = 0) -> Any:
    """Sliced W2, ``sqrt(E_theta W2(theta.x, theta.y)^2)`` over directions theta on the unit sphere, a scalar.

    x (N, ...) and y (M, ...) are flattened to D dimensions; unequal counts are allowed and exact (the step
    quantile functions are integrated, nothing is interpolated). Two laws that differ by a shift d alone are at
    ``|d| / sqrt(D)``. At finite N it does not vanish for equal laws: compare it with a floor at equal counts.
    jax input gives a traceable scalar. Source: Bonneel et al. 2015.
    """
    x, y = flat_pair(x, y)
    xp = x.__array_namespace__()
    theta = xp.asarray(directions(x.shape[1], projections, seed), dtype=x.dtype)
    return xp.mean(_squared(x @ theta, y @ theta)) ** 0.5
