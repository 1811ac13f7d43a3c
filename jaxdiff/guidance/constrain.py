"""Holding the data estimate to a constraint, as a denoiser."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxdiff import prediction
from jaxdiff.guidance.mix import ask, tabulated
from jaxdiff.guidance.threshold import check_noise, replace_data
from jaxdiff.prediction import Query, evaluate, lift

__all__ = ["Constrained", "constrain"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Constrained:
    """``inner`` with its data estimate put on a constraint; build with :func:`constrain`."""

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
        return replace_data(told, self.constraint(told.data), self.noise, query), state

    def tabulate(self, query: Query) -> Any:
        """The inner denoiser's own view of the query; None if it has none."""
        return tabulated(self.inner, query)

    def condition(self, cond: Any) -> Constrained:
        """The same, told ``cond``."""
        return dataclasses.replace(self, inner=prediction.condition(self.inner, cond))


def constrain(d: Any, constraint: Any, *, noise: str = "consistent") -> Constrained:
    """``d`` with ``x0_hat`` put on ``constraint``: one of ``solver.affine``, ``box``, ``known``, or any function x -> x.

    With ``affine`` this is null-space data consistency, ``x0 - A^+ (A x0 - b)`` (DDNM, 2212.00490). ``noise``: "consistent"
    moves eps_hat so that ``alpha x0 + sigma eps`` is unchanged; then every solver that ends at sigma = 0 ends with
    ``A x = b``, whatever its steps. "kept" leaves it, the published choice for ddim(eta): solvers whose rows store noise
    do not end on the constraint then. Raises ValueError for another name.
    """
    check_noise(noise)
    if not callable(constraint):
        raise ValueError(f"constraint: {constraint!r} given; need a function x -> x, as of solver.affine()")
    leaf = jax.tree_util.all_leaves([constraint])
    return Constrained(lift(d), jax.tree_util.Partial(constraint) if leaf else constraint, noise)
