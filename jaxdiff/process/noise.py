"""Noise laws: what is added to data, and with it the unit-scale law a sampler starts from.

A law is one of examples, whole arrays. One key draws one example of the shape given, however many axes that has; keys (B,) draw
one each, which makes a batch. ``log_prob`` takes a batch: its leading axis counts examples.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.process.coefficients import leaf

__all__ = ["LAWS", "Gaussian", "StudentT"]


def _several(key: jax.Array) -> bool:
    """Whether these are typed keys (B,); an old-style key is an array itself."""
    return jnp.ndim(key) > 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _per_example(z: Any) -> Any:
    return jnp.reshape(z, (z.shape[0], -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """Independent standard normal coordinates."""

    name = "gaussian"
    gaussian = True

    def sample(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """One example of ``shape``, or from keys (B,) one each, (B, *shape)."""
        if _several(key):
            return jax.vmap(lambda one: self.sample(one, shape, dtype))(key)
        return jax.random.normal(key, shape, dtype)

    def log_prob(self, z: jax.Array) -> jax.Array:
        """Log-density in nats of each example of ``z`` (B, ...), shape (B,)."""
        z = _per_example(z)
        return -0.5 * jnp.sum(z * z, -1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StudentT:
    """Multivariate Student-t with ``df`` degrees of freedom: the noise of PFGM++ (2302.04265 [4]).

    ``n = eps / sqrt(chi2_df / df)``, one chi-square an example. Only deterministic tables apply: rows that
    split noise are not exact for it, and ``score = -n/sigma`` does not hold.
    """

    df: Any
    name = "student_t"
    gaussian = False

    def sample(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """One example of ``shape``, with one chi-square, or from keys (B,) one each, (B, *shape)."""
        if _several(key):
            return jax.vmap(lambda one: self.sample(one, shape, dtype))(key)
        normal, gamma = jax.random.split(key)
        half = jnp.asarray(self.df, dtype) / 2
        return jax.random.normal(normal, shape, dtype) / jnp.sqrt(jax.random.gamma(gamma, half, (), dtype) / half)

    def log_prob(self, z: jax.Array) -> jax.Array:
        """Log-density in nats of each example of ``z`` (B, ...), shape (B,)."""
        z = _per_example(z)
        n, df = z.shape[-1], jnp.asarray(self.df, z.dtype)
        lgamma = jax.scipy.special.gammaln
        constant = lgamma((df + n) / 2) - lgamma(df / 2) - 0.5 * n * jnp.log(df * math.pi)
        return constant - 0.5 * (df + n) * jnp.log1p(jnp.sum(z * z, -1) / df)


def student_t(df: Any) -> StudentT:
    """Validate and build; see :class:`StudentT`. Raises ValueError unless 0 < df < inf."""
    if not isinstance(df, jax.Array) and not 0 < float(df) < math.inf:
        raise ValueError(f"df: {df} given; student_t() needs 0 < df < inf")
    return StudentT(leaf(df))


LAWS = {"gaussian": Gaussian, "student_t": student_t}
