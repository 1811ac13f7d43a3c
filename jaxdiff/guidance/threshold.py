"""Keeping the data estimate in range: clipping and dynamic thresholding, as denoisers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.guidance.mix import ask, tabulated
from jaxdiff.prediction import Prediction, Query, evaluate, lift
from jaxdiff.process.coefficients import expand

__all__ = ["Bounded", "clip", "threshold"]

NOISES = ("consistent", "kept")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bounded:
    """``inner`` with its data estimate bounded; build with :func:`clip` or :func:`threshold`."""

    inner: Any
    low: Any
    high: Any
    percentile: Any
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
        data = told.data
        if self.percentile is None:
            bounded = jnp.clip(data, self.low.astype(data.dtype), self.high.astype(data.dtype))
        else:
            flat = jnp.abs(data).reshape(data.shape[0], -1)
            size = jnp.maximum(jnp.quantile(flat, self.percentile, axis=1), self.high)
            size = expand(size.astype(data.dtype), data)
            bounded = jnp.clip(data, -size, size) * (self.high.astype(data.dtype) / size)
        return replace_data(told, bounded, self.noise, query), state

    def tabulate(self, query: Query) -> Any:
        """The inner denoiser's own view of the query; None if it has none."""
        return tabulated(self.inner, query)

    def condition(self, cond: Any) -> Bounded:
        """The same, told ``cond``."""
        return dataclasses.replace(self, inner=prediction.condition(self.inner, cond))


def replace_data(told: Prediction, data: Any, noise: str, query: Query) -> Prediction:
    """The pair with other data; its noise "kept", or moved so that ``alpha x0 + sigma eps`` is unchanged ("consistent")."""
    if noise == "kept":
        return Prediction(data, told.noise)
    alpha, sigma = expand(query.alpha, data), expand(query.sigma, data)
    change = jnp.where(sigma > 0, alpha / jnp.where(sigma > 0, sigma, 1), 0) * (told.data - data)
    return Prediction(data, told.noise + change)


def check_noise(noise: str) -> None:
    """Refuse an unknown name of what becomes of the noise."""
    if noise not in NOISES:
        raise ValueError(f"noise: {noise!r} given; allowed: {', '.join(NOISES)}")


def clip(d: Any, low: Any = -1.0, high: Any = 1.0, *, noise: str = "consistent") -> Bounded:
    """``d`` with ``x0_hat`` clipped to [low, high], numbers or arrays that broadcast against x.

    ``noise``: "consistent" moves eps_hat so that ``alpha x0 + sigma eps`` is unchanged, "kept" leaves it (data-form
    solvers do not see the difference). Inside the range it is ``d`` bitwise. Raises ValueError unless low < high.
    """
    check_noise(noise)
    if not np.all(np.asarray(low) < np.asarray(high)):
        raise ValueError(f"low, high: {low}, {high} given; clip() needs low < high")
    return Bounded(lift(d), jnp.asarray(low, float), jnp.asarray(high, float), None, noise)


def threshold(d: Any, percentile: float = 0.995, *, bound: float = 1.0, noise: str = "consistent") -> Bounded:
    """Dynamic thresholding: ``x0 <- clip(x0, -s, s) bound/s``, ``s = max(quantile(|x0|, percentile), bound)`` per sample.

    Keeps high guidance scales in range without saturating whole images (2205.11487); for pixel data in [-bound, bound], not
    for latents. Where all ``|x0| <= bound`` it is ``d`` bitwise. ``noise`` as in :func:`clip`.
    Raises ValueError for a percentile outside (0, 1] and a bound not above 0.
    """
    check_noise(noise)
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile: {percentile} given; threshold() needs 0 < percentile <= 1")
    if not bound > 0:
        raise ValueError(f"bound: {bound} given; threshold() needs a bound above 0")
    high = jnp.asarray(bound, float)
    return Bounded(lift(d), -high, high, jnp.asarray(percentile, float), noise)
