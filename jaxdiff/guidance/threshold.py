"""Keeping the data estimate in range: clipping and dynamic thresholding, as denoisers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.guidance.constrain import Constrained, constrain
from jaxdiff.process.coefficients import expand

__all__ = ["clip", "threshold"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Range:
    """``clip(x, low, high)``."""

    low: Any
    high: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        """Clip."""
        return jnp.clip(x, self.low.astype(x.dtype), self.high.astype(x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dynamic:
    """``clip(x, -s, s) bound/s`` with ``s = max(quantile(|x|, percentile), bound)`` of each sample."""

    percentile: Any
    bound: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        """Clip and rescale samples (B, ...)."""
        flat = jnp.abs(x).reshape(x.shape[0], -1)
        size = jnp.maximum(jnp.quantile(flat, self.percentile, axis=1), self.bound)
        size = expand(size.astype(x.dtype), x)
        return jnp.clip(x, -size, size) * (self.bound.astype(x.dtype) / size)


def clip(d: Any, low: Any = -1.0, high: Any = 1.0, *, noise: str = "consistent") -> Constrained:
    """``d`` with ``x0_hat`` clipped to [low, high], numbers or arrays that broadcast against x.

    ``noise``: "consistent" moves eps_hat so that ``alpha x0 + sigma eps`` is unchanged, "kept" leaves it (data-form
    solvers do not see the difference). Inside the range it is ``d`` bitwise. Raises ValueError unless low < high.
    """
    if not np.all(np.asarray(low) < np.asarray(high)):
        raise ValueError(f"low, high: {low}, {high} given; clip() needs low < high")
    return constrain(d, Range(jnp.asarray(low, float), jnp.asarray(high, float)), noise=noise)


def threshold(d: Any, percentile: float = 0.995, *, bound: float = 1.0, noise: str = "consistent") -> Constrained:
    """Dynamic thresholding: ``x0 <- clip(x0, -s, s) bound/s``, ``s = max(quantile(|x0|, percentile), bound)`` per sample.

    Keeps high guidance scales in range without saturating whole images (2205.11487); for pixel data in [-bound, bound], not
    for latents. Where all ``|x0| <= bound`` it is ``d`` bitwise. ``noise`` as in :func:`clip`.
    Raises ValueError for a percentile outside (0, 1] and a bound not above 0.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile: {percentile} given; threshold() needs 0 < percentile <= 1")
    if not bound > 0:
        raise ValueError(f"bound: {bound} given; threshold() needs a bound above 0")
    return constrain(d, Dynamic(jnp.asarray(percentile, float), jnp.asarray(bound, float)), noise=noise)
