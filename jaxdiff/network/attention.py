"""Multi-head self-attention over tokens, with the softmax in float32."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class SelfAttention(nn.Module):
    """``out(softmax(q k^T / sqrt(d)) v)``, one packed ``qkv`` matrix in the order (q, k, v), heads inside.

    Scores and softmax are float32 whatever ``dtype`` is.
    """

    heads: int
    kernel_init: Callable = nn.initializers.xavier_uniform()
    out_init: Callable = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, N, D) -> (B, N, D)."""
        batch, tokens, width = x.shape
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        qkv = nn.Dense(3 * width, kernel_init=self.kernel_init, name="qkv", **kinds)(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v).reshape(batch, tokens, width)
        return nn.Dense(width, kernel_init=self.out_init, name="out", **kinds)(y)
