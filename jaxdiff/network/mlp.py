"""A residual multilayer perceptron for low-dimensional data and quick proofs."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.network.embedding import conditioning
from jaxdiff.network.options import at_least, check_conditioning
from jaxdiff.network.output import NetOut, Taps


class MLP(nn.Module):
    """Residual MLP on flattened samples, conditioned on time and label in every block.

    ``h = W_in x``; each block ``h += W_2 silu(W_1 silu(h) + W_c silu(c))``; ``raw = W_out silu(h)``.

    Attributes:
        width: hidden units.
        depth: residual blocks (two matrices each).
        num_classes: K label classes (label K is null), 0 for none.
        two_time: accept ``c_noise_r``.
        time_features: Fourier features of the time.
        frequencies: their (low, high) in radians per unit of ``c_noise``; the default suits times of
            order one, (1e-4, 1) times in 0..1000.
        dtype: compute dtype. param_dtype: parameter dtype.

    Taps: ``block_0 .. block_{depth-1}``, each (B, width).
    """

    width: int = 128
    depth: int = 3
    num_classes: int = 0
    two_time: bool = False
    time_features: int = 64
    frequencies: tuple[float, float] = (0.1, 100.0)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def check(self) -> None:
        """Raise ``ValueError`` for a field out of range."""
        at_least(self, 1, "width", "depth")
        check_conditioning(self)

    @nn.compact
    def __call__(
        self, x: jax.Array, c_noise: Any, cond: Any = None, *, c_noise_r: Any = None, taps: Sequence[str] = ()
    ) -> NetOut:
        """Map x (B, ...) to a raw output of the same shape and dtype."""
        self.check()
        if x.ndim < 2:
            raise ValueError(f"MLP: x has shape {x.shape}; it needs a batch axis and at least one more")
        tap = Taps(taps, [f"block_{i}" for i in range(self.depth)])
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, size = x.shape[0], math.prod(x.shape[1:])
        c = conditioning(self, self.width)(batch, c_noise, cond, c_noise_r)
        c = nn.silu(c)
        h = nn.Dense(self.width, name="input", **kinds)(x.reshape(batch, size))
        for i in range(self.depth):
            u = nn.Dense(self.width, name=f"block_{i}_0", **kinds)(nn.silu(h))
            u = u + nn.Dense(self.width, use_bias=False, name=f"block_{i}_c", **kinds)(c)
            h = h + nn.Dense(self.width, name=f"block_{i}_1", **kinds)(nn.silu(u))
            tap.offer(f"block_{i}", h)
        raw = nn.Dense(size, name="output", **kinds)(nn.silu(h))
        return tap.out(raw.reshape(x.shape).astype(x.dtype))
