"""What can be known of a table without a network: its dense normal form and the delta-data test."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.solver.table import AffineBlock, Table, blocks_of

__all__ = ["Check", "Dense", "check", "churn_gain", "plain_block", "propagate", "unroll"]


class Dense(NamedTuple):
    """``y_K = a y_0 + W . D + N . z + e``: coefficients on the start, each evaluation, each fresh draw; a constant.

    ``a`` (), ``W`` (K,), ``N`` (K+1,) (churn before row 0 first), ``e`` (); with ``rows`` True each has a leading row
    axis, entry k being the state after row k.
    """

    a: np.ndarray
    W: np.ndarray
    N: np.ndarray
    e: np.ndarray


class Check(NamedTuple):
    """Worst delta-data errors over grid rows: of the mean and of the variance, relative to max(alpha, sigma)."""

    mean_error: float
    variance_error: float

    def ok(self, tolerance: float = 1e-10) -> bool:
        """Whether both errors are within ``tolerance``."""
        return self.mean_error <= tolerance and self.variance_error <= tolerance


def plain_block(table: Table) -> AffineBlock:
    """The table's one block, zeros in place of absent p, q, C and E; raises ValueError unless its coefficients are scalars."""
    blocks = blocks_of(table)
    if len(blocks) != 1 or not isinstance(blocks[0], AffineBlock) or np.ndim(blocks[0].A) != 2:
        raise ValueError("table: needs one affine block with scalar coefficients")
    block = blocks[0]
    zero = np.zeros(np.shape(block.A)[0])
    return dataclasses.replace(block, **{n: zero for n in ("p", "q", "C", "E") if getattr(block, n) is None})


def churn_gain(block: AffineBlock) -> float:
    """What churn before row 0 multiplies the start by."""
    return 1.0 if block.start_gain is None else float(block.start_gain)


def propagate(block: AffineBlock, start: np.ndarray, records: Any) -> np.ndarray:
    """States after each row (K, size) as vectors over a basis: of ``start``, whose entry 1 is the constant and whose last K are
    the rows' fresh draws; ``records(k, y)`` gives row k's record vector."""
    A, B = np.asarray(block.A, np.float64), np.asarray(block.B, np.float64)
    ys, ds, out = [start] * A.shape[1], [np.zeros_like(start)] * B.shape[1], []
    for k in range(A.shape[0]):
        ds = [records(k, ys[0]), *ds[:-1]]
        y = sum(A[k, h] * ys[h] for h in range(A.shape[1])) + sum(B[k, h] * ds[h] for h in range(B.shape[1]))
        y[-A.shape[0] + k] += float(block.C[k])
        y[1] += float(block.E[k])
        ys = [y, *ys[:-1]]
        out.append(y)
    return np.array(out)


def unroll(table: Table, *, rows: bool = False) -> Dense:
    """The dense normal form in data predictions: two tables are the same solver iff a, W, e and N N^T agree.

    A record that stores noise is rewritten by ``eps_hat = (y - alpha x0_hat)/sigma``, so that tables with different
    stored forms compare equal; that is what makes the form unique. float64, host only.
    """
    block = plain_block(table)
    K = np.shape(block.A)[0]
    # basis: start, constant, x0_hat of each row, churn, fresh noise of each row
    size = 2 + K + 1 + K
    start = np.zeros(size)
    start[0] = churn_gain(block)
    start[2 + K] = 0.0 if block.start_noise is None else float(block.start_noise)

    def records(k: int, y: np.ndarray) -> np.ndarray:
        unit = np.zeros(size)
        unit[2 + k] = 1.0
        p, q = float(block.p[k]), float(block.q[k])
        if q == 0:
            return p * unit
        return p * unit + q * (y - block.alpha[k] * unit) / block.sigma[k]

    states = propagate(block, start, records)
    final = states if rows else states[-1]
    return Dense(final[..., 0], final[..., 2 : 2 + K], final[..., 2 + K :], final[..., 1])


def check(table: Table) -> Check:
    """The delta-data test: for data that is one point c, the law of every run is known in closed form.

    The denoiser then returns ``x0_hat = c``, ``eps_hat = (y - alpha c)/sigma``; started from ``alpha_0 c + sigma_0 z``, the
    state after every row that ends on a grid point must have mean ``alpha c`` and variance ``sigma^2``; the worst row is
    reported. Every exponential-type table passes to rounding. By design these do not: ancestral with the large
    variance, ``s_noise != 1``, and Runge-Kutta in raw time on curved paths (including euler(clock="time") there).
    """
    block = plain_block(table)
    K = np.shape(block.A)[0]
    alpha, sigma = np.asarray(block.alpha, np.float64), np.asarray(block.sigma, np.float64)
    # basis: c, constant, start noise, churn, fresh noise of each row
    size = 2 + 2 + K
    start = np.zeros(size)
    start[0], start[2] = alpha[0], sigma[0]
    if block.start_noise is not None:  # alpha, sigma of row 0 are those after the churn
        start[3] = float(block.start_noise)
        start[2] = float(block.start_scale) * churn_gain(block)
    point = np.zeros(size)
    point[0] = 1.0

    def records(k: int, y: np.ndarray) -> np.ndarray:
        noise = (y - alpha[k] * point) / sigma[k] if sigma[k] > 0 else 0 * y
        return float(block.p[k]) * point + float(block.q[k]) * noise

    states = propagate(block, start, records)[np.asarray(table.out, bool)]
    alpha, sigma = alpha[1:][np.asarray(table.out, bool)], sigma[1:][np.asarray(table.out, bool)]
    scale = np.maximum(alpha, sigma)
    mean = np.hypot(states[:, 0] - alpha, states[:, 1]) / scale
    variance = np.abs(np.sum(states[:, 2:] ** 2, -1) - sigma**2) / scale**2
    return Check(float(np.max(mean)), float(np.max(variance)))
