"""Holding the data estimate to a constraint, as a denoiser."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import prediction
from jaxdiff.guidance.mix import ask, tabulated
from jaxdiff.near import unknown
from jaxdiff.prediction import Prediction, Query, evaluate, lift
from jaxdiff.process.coefficients import expand

__all__ = ["Constrained", "constrain"]

NOISES = ("consistent", "kept")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Constrained:
    """``inner`` with its data estimate put on a constraint; build with :func:`constrain`, ``clip`` or ``threshold``."""

    inner: Any
    constraint: Any
    noise: str = dataclasses.field(metadata={"static": True})

    @property
    def process(self) -> Any:
        """The inner denoiser's process, None for plain functions."""
        return getattr(self.inner, "process", None)

    def __call__(self, x: Any, t: Any, r: Any = None) -> Any:
        """Predict at state ``x`` (B, ...) and time ``t``."""
        return ask(self, x, t, r)

    def start(self, x: Any) -> Any:
        """The inner denoiser's state."""
        return prediction.start(self.inner, x)

    def step(self, state: Any, x: Any, query: Query) -> tuple:
        """``(prediction, state)``: one evaluation of the inner denoiser."""
        told, state = evaluate(self.inner, state, x, query)
        return _replace_data(told, self.constraint(told.data), self.noise, query), state

    def tabulate(self, query: Query) -> Any:
        """The inner denoiser's own view of the query; None if it has none."""
        return tabulated(self.inner, query)

    def condition(self, cond: Any) -> Constrained:
        """The same, told ``cond``."""
        return dataclasses.replace(self, inner=prediction.condition(self.inner, cond))


def _replace_data(told: Prediction, data: Any, noise: str, query: Query) -> Prediction:
    """The pair with other data; its noise "kept", or moved so that ``alpha x0 + sigma eps`` is unchanged ("consistent")."""
    if noise == "kept":
        return Prediction(data, told.noise)
    if query.alpha is None:
        raise ValueError(
            "noise: 'consistent' needs alpha and sigma, which a plain function has not; use noise='kept'"
        )
    alpha, sigma = expand(query.alpha, data), expand(query.sigma, data)
    change = jnp.where(sigma > 0, alpha / jnp.where(sigma > 0, sigma, 1), 0) * (told.data - data)
    return Prediction(data, told.noise + change)


def constrain(d: Any, constraint: Any, *, noise: str = "consistent") -> Constrained:
    """``d`` with ``x0_hat`` put on ``constraint``: one of ``solver.affine``, ``box``, ``known``, or any function x -> x.

    With ``affine`` this is null-space data consistency, ``x0 - A^+ (A x0 - b)`` (DDNM, 2212.00490). ``noise``: "consistent"
    moves eps_hat so that ``alpha x0 + sigma eps`` is unchanged; then every solver that ends at sigma = 0 ends with
    ``A x = b``, whatever its steps. "kept" leaves it, the published choice for ddim(eta): solvers whose rows store noise
    do not end on the constraint then. Raises ValueError for another name.
    """
    if noise not in NOISES:
        raise unknown("noise", noise, NOISES)
    if not callable(constraint):
        raise ValueError(f"constraint: {constraint!r} given; need a function x -> x, as of solver.affine()")
    leaf = jax.tree_util.all_leaves([constraint])
    return Constrained(lift(d), jax.tree_util.Partial(constraint) if leaf else constraint, noise)
