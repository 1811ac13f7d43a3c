"""Keys of a run's noise: one a sample, one a row, all functions of (key, global index) alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["fold_each"]

# Threefry-2x32 with 20 rounds (Salmon et al. 2011): rotations of the two alternating groups of four rounds
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)


def fold_each(key: Any, index: Any) -> jax.Array:
    """``vmap(jax.random.fold_in, (None, 0))(key, index)``, bitwise, for one typed threefry key and uint32 ``index`` (B,).

    The rounds are written out. jax rolls them into a loop on CPU, whose iterations cost more at small batches than a
    whole solver step; written out they fuse into one pass.
    """
    data = jax.random.key_data(key)
    words = (data[0], data[1], data[0] ^ data[1] ^ PARITY)
    x, y = jnp.full_like(index, words[0]), index + words[1]
    for group in range(5):
        for turn in ROTATIONS[group % 2]:
            x = x + y
            y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
        x = x + words[(group + 1) % 3]
        y = y + words[(group + 2) % 3] + np.uint32(group + 1)
    return jax.random.wrap_key_data(jnp.stack([x, y], axis=-1), impl="threefry2x32")
