"""Euclidean distances between two sets of points."""

from __future__ import annotations

from typing import Any

import numpy as np


def flat(x: Any) -> Any:
    """Points (N, D) from data (N, ...): host data becomes float64, jax arrays keep their type.

    Raises ``ValueError`` for a scalar, an empty set, or host data holding NaN or infinity.
    """
    if not hasattr(x, "aval"):  # host data; jax arrays and tracers carry an aval
        x = np.asarray(x, dtype=np.float64)
        if x.ndim and x.size and not np.isfinite(x).all():
            bad = int((~np.isfinite(x.reshape(x.shape[0], -1)).all(axis=1)).sum())
            raise ValueError(f"points: {bad} of {x.shape[0]} hold NaN or infinity; every value must be finite")
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"points: shape {tuple(x.shape)}; expected (N, ...) with N >= 1 and no empty axis")
    return x.reshape(x.shape[0], -1)


def flat_pair(x: Any, y: Any) -> tuple[Any, Any]:
    """Both sets as points of one space; jax wins when the two are mixed. Refuses different dimensions."""
    x, y = flat(x), flat(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"points: dimensions {x.shape[1]} and {y.shape[1]} differ; both sets need the same")
    if hasattr(y, "aval") and not hasattr(x, "aval"):
        x = y.__array_namespace__().asarray(x, dtype=y.dtype)
    elif hasattr(x, "aval") and not hasattr(y, "aval"):
        y = x.__array_namespace__().asarray(y, dtype=x.dtype)
    return x, y


def pairwise_squared_distances(x: Any, y: Any) -> Any:
    """``|x_i - y_j|^2`` as a matrix (N, M), for x (N, ...) and y (M, ...).

    Uses one matrix product on centred points: ``|x|^2 + |y|^2 - 2 x.y`` loses digits when the cloud lies far
    from the origin, and subtracting the mean of y removes that. Rounding below zero is clipped.
    """
    x, y = flat_pair(x, y)
    xp = x.__array_namespace__()
    centre = y.mean(axis=0, keepdims=True)
    x, y = x - centre, y - centre
    squared = xp.sum(x * x, axis=1)[:, None] + xp.sum(y * y, axis=1)[None, :]
    return xp.maximum(squared - 2.0 * (x @ y.T), 0.0)


def nearest_distances(x: Any, y: Any, k: int = 1, *, same: bool = False, chunk: int = 2048) -> np.ndarray:
    """Distance from each x to its k-th nearest y, shape (N,), on the host in float64.

    ``same=True`` says that x and y are one set: each point then skips itself (by index, so duplicates count
    as neighbours at distance zero). Rows are done ``chunk`` at a time, so memory is ``chunk * M``.
    Raises ``ValueError`` when there are fewer than k neighbours.
    """
    x, y = flat_pair(np.asarray(x), np.asarray(y))
    if same and len(x) != len(y):
        raise ValueError(f"same: sets of {len(x)} and {len(y)} points cannot be one set")
    available = len(y) - int(same)
    if not 1 <= k <= available:
        raise ValueError(f"k: {k} neighbours asked of {available}; allowed 1..{available}")
    out = np.empty(len(x))
    for start in range(0, len(x), chunk):
        block = pairwise_squared_distances(x[start : start + chunk], y)
        rows = np.arange(len(block))
        if same:
            block[rows, start + rows] = np.inf
        # The matrix-product form rounds at 1e-16 of the cloud's size, which a square root turns into 1e-8:
        # the few candidates are measured again by subtraction, so that an exact copy is at exactly zero.
        candidates = np.argpartition(block, k - 1, axis=1)[:, :k]
        exact = np.square(x[start + rows][:, None, :] - y[candidates]).sum(axis=-1)
        out[start + rows] = np.sqrt(exact.max(axis=1))
    return out
