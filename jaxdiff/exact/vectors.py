"""How closed-form worlds read their arguments: states as rows of vectors, coefficients aligned from the left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.coefficients import expand

__all__ = ["aligned", "apply_matrix", "leading", "rows"]


def rows(x: Any, dimension: int) -> tuple[jax.Array, Callable[[Any], jax.Array]]:
    """``(vectors, restore)``: ``x`` as (..., d) in float32 or wider, and the way back to its shape and dtype.

    The last axis of ``x`` is the vector; for d = 1 it may be left out: unless the last axis has length 1,
    every element is a sample of its own.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: dtype {x.dtype} given; a world of {dimension} dimensions needs floating-point states")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if x.shape[-1:] == (dimension,):
        return wide, lambda v: v.astype(x.dtype)
    if dimension == 1:
        return wide[..., None], lambda v: v[..., 0].astype(x.dtype)
    raise ValueError(f"x: shape {x.shape} given; this world has {dimension} dimensions, need (..., {dimension})")


def aligned(coefficient: Any, vectors: jax.Array) -> jax.Array:
    """``coefficient``, one a vector, left-aligned with ``vectors`` (..., d) as (..., 1)."""
    c = expand(coefficient, vectors)
    if c.shape[-1] != 1:
        raise ValueError(
            f"alpha, sigma: shape {np.shape(coefficient)} given for states {vectors.shape}; a full covariance "
            "needs one coefficient for all of a sample's coordinates"
        )
    return c


def apply_matrix(spec: str, matrix: Any, vectors: jax.Array) -> jax.Array:
    """einsum at full precision (accelerators would round float32 products to fewer bits)."""
    return jnp.einsum(spec, jnp.asarray(matrix, vectors.dtype), vectors, precision=jax.lax.Precision.HIGHEST)


def leading(shape: Any) -> tuple[int, ...]:
    """A sample shape given as a number of samples or as a tuple."""
    return (int(shape),) if np.ndim(shape) == 0 else tuple(int(n) for n in shape)
