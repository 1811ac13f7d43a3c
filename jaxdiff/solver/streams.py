"""Random streams of a run: a key and a position, one hash a number.

Sample ``i`` of a key owns the counters ``(i, 0), (i, 1), ...`` of threefry-2x32, so its noise is row ``i`` of what
``jax.random`` would draw for a whole set of 2^32 rows of 2^32 numbers with that key: the same for any batch, chunk and
device count, and as cheap as one draw for the batch. (Folding the index into the key gives each sample a key of its own,
at a second hash a sample, row and compile.)
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

__all__ = ["check_key", "churn_key", "row_keys", "sample_indices", "sample_keys"]

# The start of a run draws at its samples' positions of the run's key; everything later draws from keys of its own, one a
# row, made at a position that no sample takes.
LATER = np.uint32(0xFFFFFFFF)
BITS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}


def _hash(data: Any, low: Any) -> Any:
    """Both output words at counters ``(position, low)``; ``data`` is (key, key, position)."""
    high = data[2] + (low ^ low)  # not zeros_like: both counters must be batched where one is
    return jax.extend.random.threefry2x32_p.bind(data[0], data[1], high, low)


def _fold_in(data: Any, value: Any) -> Any:
    high, low = _hash(data, jnp.asarray(value, jnp.uint32))
    return jnp.stack([high, low, jnp.zeros_like(low)])


def _counters(size: int, shape: tuple[int, ...]) -> Any:
    if size > 2**32:
        raise ValueError(f"shape: {shape} given; one sample's stream holds 2^32 numbers")
    return jax.lax.iota(jnp.uint32, size).reshape(shape)


def _split(data: Any, shape: tuple[int, ...]) -> Any:
    high, low = _hash(data, _counters(math.prod(shape), shape))
    return jnp.stack([high, low, jnp.zeros_like(low)], -1)


def _random_bits(data: Any, width: int, shape: tuple[int, ...]) -> Any:
    high, low = _hash(data, _counters(math.prod(shape), shape))
    if width == 64:
        return (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
    return (high ^ low).astype(BITS[width])


def _seed(seed: Any) -> Any:
    return jnp.concatenate([jax.random.key_data(jax.random.key(seed, impl="threefry2x32")), jnp.zeros(1, jnp.uint32)])


@functools.cache
def _positioned() -> Any:
    return jax.extend.random.define_prng_impl(
        key_shape=(3,),
        seed=_seed,
        split=_split,
        random_bits=_random_bits,
        fold_in=_fold_in,
        name="positioned",
        tag="pos",
    )


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """Typed keys (B,), one a sample, from one threefry key and the global sample indices (B,) below 2^32 - 1.

    Every function of ``jax.random`` takes them. Distinct pairs of key and index give streams without a common counter.
    """
    words = jax.random.key_data(key)
    index = index.astype(jnp.uint32)
    data = jnp.stack([jnp.broadcast_to(words[0], index.shape), jnp.broadcast_to(words[1], index.shape), index], -1)
    return jax.random.wrap_key_data(data, impl=_positioned())


def row_keys(key: jax.Array, count: int) -> jax.Array:
    """Typed threefry keys (count,), one a row, of a run with ``key``: a hash of it, counted up.

    Threefry is built for keys that count up (Salmon et al. 2011); a hash a row would only take longer to compile.
    """
    high, low = _hash((*jax.random.key_data(key), LATER), np.uint32(0))
    low = low + jnp.arange(count, dtype=jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack([jnp.broadcast_to(high, low.shape), low], -1), impl="threefry2x32")


def churn_key(key: jax.Array) -> jax.Array:
    """The typed threefry key of the noise added before row 0, where the row after the last would take it."""
    high, low = _hash((*jax.random.key_data(key), LATER), LATER)
    return jax.random.wrap_key_data(jnp.stack([high, low]), impl="threefry2x32")


def sample_indices(index: Any, batch: int) -> jax.Array:
    """Global sample indices (batch,) uint32 from None (0..batch-1), an integer offset, or (batch,) integers.

    Raises ValueError for other shapes and dtypes.
    """
    if index is None:
        return jnp.arange(batch, dtype=jnp.uint32)
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"index: dtype {index.dtype} given; need integers, global sample indices or an offset")
    if index.ndim == 0:
        return index.astype(jnp.uint32) + jnp.arange(batch, dtype=jnp.uint32)
    if index.shape != (batch,):
        raise ValueError(
            f"index: shape {index.shape} given; need ({batch},), one global index a sample, or an offset"
        )
    return index.astype(jnp.uint32)


@functools.cache
def _threefry() -> Any:
    return jax.random.key(0, impl="threefry2x32").dtype


def check_key(key: Any) -> None:
    """Refuse anything but one typed threefry key: other generators are not invariant to batch and devices."""
    if getattr(key, "dtype", None) != _threefry() or key.shape != ():
        got = f"{getattr(key, 'dtype', type(key).__name__)} of shape {getattr(key, 'shape', ())}"
        raise ValueError(f"key: {got} given; need one typed threefry key, jax.random.key(seed)")
