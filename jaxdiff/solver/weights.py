"""Exponential quadrature weights in float64: the one generator behind the exponential solver family.

Over one step of size H in the solver's clock, ``int_0^1 H e^{-(1-u)H} f(u) du`` with f replaced by its
interpolant on nodes u_j (0 is now, 1 the end of the step, negative the past).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["exponential", "gauss", "lagrange", "moments", "nearest", "polynomial"]


@functools.cache
def gauss(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights (count,) of Gauss-Legendre quadrature on [0, 1], read-only: finding them takes longer than a step."""
    points, gains = np.polynomial.legendre.leggauss(count)
    points, gains = 0.5 * (points + 1), 0.5 * gains
    points.flags.writeable = gains.flags.writeable = False
    return points, gains


def moments(H: float, count: int) -> np.ndarray:
    """``psi_m(H) = int_0^1 H e^{-(1-u)H} u^m du`` for m = 0..count-1, H > 0 or finite H < 0, relative error about 1e-15.

    ``psi_0 = 1 - e^-H``, ``psi_m = 1 - (m/H) psi_{m-1}`` where that is stable (H >= m + 1), and the series
    ``sum_j (-1)^j H^{j+1} m!/(m+1+j)!`` below (the recursion in float32 gives phi_3(1e-3) with 42 % error).
    """
    values = np.empty(count)
    for m in range(count):
        if m == 0:
            values[m] = -math.expm1(-H)
        elif math.isinf(H):
            values[m] = 1.0
        elif m + 1 <= H:
            values[m] = 1 - m / H * values[m - 1]
        else:
            term = total = H / (m + 1)
            j = 1
            while abs(term) > 1e-18 * abs(total):
                term *= -H / (m + 1 + j)
                total += term
                j += 1
            values[m] = total
    return values


def exponential(
    H: float, nodes: Any, clock: Callable[[np.ndarray], np.ndarray] | None = None, *, pseudo: bool = False
) -> np.ndarray:
    """Weights w_j with ``sum_j w_j f(u_j) = int_0^1 H e^{-(1-u)H} f(u) du`` for interpolants f; they sum to 1 - e^-H.

    A negative H gives the noise-form weights ``-int_0^1 |H| e^{(1-u)|H|} L_j du``. ``nodes`` (n,): positions u_j of a
    polynomial in u (exact for degree < n); with ``clock``, positions of a polynomial in ``clock(u)`` instead, integrated by
    64-point Gauss-Legendre. ``pseudo``: the polynomial of :func:`nearest` in place of the interpolant; without clock its
    first node is 0.
    """
    nodes = np.asarray(nodes, np.float64)
    if clock is None:
        return _fit(nodes, moments(H, nodes.size), pseudo)
    u, gains = gauss(64)
    return (nearest if pseudo else lagrange)(nodes, clock(u)) @ (gains * H * np.exp(-(1 - u) * H))


def polynomial(nodes: Any, *, pseudo: bool = False) -> np.ndarray:
    """Weights with ``sum_j w_j f(u_j) = int_0^1 f(u) du`` exact for degree < len(nodes); they sum to 1.

    Nodes 0, -1, -2, ... give the Adams-Bashforth weights [1], [3/2, -1/2], [23, -16, 5]/12, [55, -59, 37, -9]/24.
    ``pseudo``: as in :func:`exponential`.
    """
    nodes = np.asarray(nodes, np.float64)
    return _fit(nodes, 1.0 / np.arange(1, nodes.size + 1), pseudo)


def _fit(nodes: np.ndarray, integrals: np.ndarray, pseudo: bool) -> np.ndarray:
    """Weights on ``nodes`` that integrate u^m to ``integrals[m]``, or (``pseudo``) the polynomial of :func:`nearest`."""
    if pseudo:
        return integrals @ _differences(nodes)
    return np.linalg.solve(np.vander(nodes, increasing=True).T, integrals)


def lagrange(nodes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Lagrange basis polynomials of ``nodes`` (n,) at ``points`` (m,): (n, m)."""
    basis = np.ones((nodes.size, points.size))
    for j, own in enumerate(nodes):
        for i, other in enumerate(nodes):
            if i != j:
                basis[j] *= (points - other) / (own - other)
    return basis


def nearest(nodes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Gains (n, m) of n values in ``sum_k f[x_0, ..., x_k] (x - x_0)^k`` at ``points`` (m,).

    Divided differences of the first k + 1 nodes stand for ``f^(k)(x_0)/k!``, which they are to first order only: at most
    two nodes give the interpolant (the pseudo-order rule of 2310.13268 [40]).
    """
    powers = (points - nodes[0]) ** np.arange(nodes.size)[:, None]
    return _differences(nodes).T @ powers


def _differences(nodes: np.ndarray) -> np.ndarray:
    """Row k: the coefficients of ``f[x_0, ..., x_k]``."""
    table = np.zeros((nodes.size, nodes.size))
    for k in range(nodes.size):
        for j in range(k + 1):
            table[k, j] = 1 / np.prod(nodes[j] - np.delete(nodes[: k + 1], j))
    return table
