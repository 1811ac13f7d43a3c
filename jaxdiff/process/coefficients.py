"""What a Gaussian path is at one time, and the two rules every function of time obeys.

A path is ``x_t = alpha(t) x0 + sigma(t) n``. Functions of time compute in numpy float64 when all they
get is numpy (tables are built that way, on the host, exactly) and in jax otherwise (training, learned
schedules). Coefficients are LEFT-aligned with the data: a time of shape ``(B,)`` scales whole samples,
``(B, F)`` whole frames, and trailing axes of length one are added to meet ``x``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Coefficients", "expand", "leaf", "resolve"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Coefficients:
    """The path and its tangent at some times; every field has the shape of ``t``.

    ``alpha``, ``sigma``: signal and noise scale. ``da``, ``ds``: tangent scaled by ``pace``, so that
    ``velocity = (da * x0 + ds * eps) / pace`` with every field finite on [0, t_max]. Paths whose
    ``sigma'`` is infinite at t=0 (sigma ~ sqrt(t)) use ``pace = sigma``; all others ``pace = 1``.
    """

    alpha: Any
    sigma: Any
    da: Any
    ds: Any
    pace: Any

    @property
    def half_log_snr(self) -> Any:
        """``lam = log(alpha / sigma)``; +-inf at the ends where one of the two vanishes."""
        xp, alpha, sigma = resolve(self.alpha, self.sigma)
        with np.errstate(divide="ignore"):
            return xp.log(alpha) - xp.log(sigma)


def leaf(value: Any) -> Any:
    """A process parameter as a pytree leaf: jax arrays pass through, numbers become numpy float64.

    Numbers stay numpy so that tables are computed from the exact decimal value (0.1, not float32(0.1)),
    and always have one type, so that an int and a float trace alike.
    """
    return value if isinstance(value, jax.Array) else np.asarray(value, np.float64)


def resolve(t: Any, *parameters: Any) -> tuple:
    """``(xp, t, *parameters)``: the array namespace, and everything as arrays of it in one dtype.

    numpy float64 when nothing is a jax array; else jax with the (at least float32) dtype of ``t``.
    """
    if not any(isinstance(v, jax.Array) for v in (t, *parameters)):
        return (np, *(np.asarray(v, np.float64) for v in (t, *parameters)))
    dtype = jnp.result_type(t) if isinstance(t, jax.Array) else jnp.result_type(float)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        dtype = jnp.float32
    return (jnp, *(jnp.asarray(v, dtype) for v in (t, *parameters)))


def expand(coefficient: Any, x: Any) -> Any:
    """``coefficient`` with trailing axes of length one up to the rank of ``x`` (left alignment).

    Raises ValueError where it has more axes than ``x`` or sizes that do not meet it, and for ``x`` of integers.
    """
    shape, sizes = np.shape(coefficient), np.shape(x)
    if len(shape) > len(sizes):
        raise ValueError(
            f"coefficient: shape {shape} has more axes than the data's {sizes}; "
            "times may be (), (B,), (B, F), ... and are aligned with the data from the left"
        )
    if any(own != size and own != 1 != size for own, size in zip(shape, sizes)):
        raise ValueError(
            f"coefficient: shape {shape} does not meet the data's {sizes}; times are (), (B,), (B, F), ... from the left"
        )
    if isinstance(x, np.ndarray) and not isinstance(coefficient, jax.Array):
        return np.reshape(np.asarray(coefficient, np.float64), shape + (1,) * (x.ndim - len(shape)))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"data: dtype {x.dtype} given; need floating-point numbers (images scaled to [-1, 1])")
    dtype = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    return jnp.reshape(jnp.asarray(coefficient, dtype), shape + (1,) * (x.ndim - len(shape)))
