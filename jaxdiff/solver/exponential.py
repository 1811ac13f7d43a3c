"""One step of the exponential family: exact linear part, interpolated prediction.

From t to s with ``h = lam_s - lam_t``, in data form and in noise form,

- ``x_s = (sigma_s/sigma_t) x_t + alpha_s sum_j w_j(h) D_j``
- ``x_s = (alpha_s/alpha_t) x_t + sigma_s sum_j w_j(-h) E_j``,

w from :mod:`jaxdiff.solver.weights`. Interpolation is in half log-SNR ("lam"), time ("t") or ``rho = sigma/alpha``
("rho"). In rho the noise form is a plain integral, ``x_s/alpha_s = x_t/alpha_t + sum_j E_j int L_j d rho``, finite even at
sigma_s = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.near import near
from jaxdiff.process.process import Process
from jaxdiff.solver import weights
from jaxdiff.solver.build import DATA, NOISE, first_order, require_path
from jaxdiff.solver.grid import Grid, Point
from jaxdiff.solver.tape import Expression

__all__ = ["FORMS", "VARIABLES", "Node", "frame", "jump", "point_at", "step"]

FORMS = {"data": DATA, "noise": NOISE}
VARIABLES = ("lam", "t", "rho")


class Node(NamedTuple):
    """A point of the history and the prediction made there."""

    at: Point
    value: Any


def frame(at: Point, to: Point, form: str) -> tuple[float, float, float]:
    """``(ratio, scale, H)`` with ``x_s = ratio x_t + scale sum_j w_j(H) d_j`` in ``form``; finite half log-SNR only."""
    h = to.lam - at.lam
    if form == "data":
        return to.sigma / at.sigma, to.alpha, h
    return to.alpha / at.alpha, to.sigma, -h


def jump(at: Point, to: Point, base: Expression, data: Expression) -> Expression:
    """First-order step on the data prediction, exact at alpha_t = 0 and at sigma_s = 0."""
    A, B = first_order(at, to)
    return A[0] * base + B[0] * data


def positions(process: Process, at: Point, to: Point, points: Sequence[Point], variable: str) -> tuple[Any, Any]:
    """``(nodes, clock)`` for :func:`weights.exponential`: where ``points`` lie in the interpolation variable, and that
    variable as a function of u, which is 0 at ``at``, 1 at ``to`` and linear in lam (clock None: it is u itself)."""
    h = to.lam - at.lam
    if variable == "lam":
        return np.array([(p.lam - at.lam) / h for p in points]), None
    if variable == "t":
        return np.array([p.time for p in points]), lambda u: process.time(at.lam + u * h)
    return np.array([p.rho for p in points]) / at.rho, lambda u: np.exp(-u * h)


def step(
    process: Process,
    at: Point,
    to: Point,
    base: Expression,
    nodes: Sequence[Node],
    form: str,
    variable: str = "lam",
    *,
    pseudo: bool = False,
) -> Expression:
    """The step from ``at`` to ``to`` on the interpolant of ``nodes`` (predictions of ``form``).

    ``pseudo``: on :func:`weights.nearest` instead, in the order of ``nodes``, of which ``at`` is the first.
    """
    points = [node.at for node in nodes]
    if variable == "rho" and form == "noise":
        width = to.rho - at.rho
        # alpha_s times the weights: at sigma_s = 0, alpha_s/alpha_t x - alpha_s rho_t E is x0_hat
        gains = to.alpha * width * weights.polynomial([(p.rho - at.rho) / width for p in points], pseudo=pseudo)
        total = (to.alpha / at.alpha) * base
    else:
        ratio, scale, H = frame(at, to, form)
        gains = scale * weights.exponential(H, *positions(process, at, to, points, variable), pseudo=pseudo)
        total = ratio * base
    for gain, node in zip(gains, nodes):
        total = total + gain * node.value
    return total


def point_at(process: Process, lam: float) -> Point:
    """The point of the path at half log-SNR ``lam``."""
    time = float(process.time(np.float64(lam)))
    c = process.coefficients(np.float64(time))
    return Point(time, float(c.alpha), float(c.sigma))


def check_choice(name: str, value: Any, allowed: Sequence) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(
            f"{name}: {value!r} given; allowed: {', '.join(str(a) for a in allowed)}{near(value, allowed)}"
        )


def check_variable(variable: str, grid: Grid, solver: str) -> None:
    """Validate the interpolation variable and what it needs of the grid."""
    check_choice("variable", variable, VARIABLES)
    if variable == "t":
        require_path(grid, f"{solver}(variable='t')", "the path's time between grid points (variable='rho' or 'lam')")
