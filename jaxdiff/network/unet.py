"""A small convolutional UNet in the DDPM / ADM line (arXiv 2006.11239, 2105.05233), NHWC."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.network.attention import SelfAttention
from jaxdiff.network.embedding import conditioning
from jaxdiff.network.options import at_least, check_conditioning
from jaxdiff.network.output import NetOut, Taps

ZEROS = nn.initializers.zeros


def group_norm(channels: int, name: str, param_dtype: Any) -> nn.GroupNorm:
    """Group norm in float32 with up to 32 groups of at least four channels."""
    groups = math.gcd(channels, min(32, max(1, channels // 4)))
    return nn.GroupNorm(
        groups, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, param_dtype=param_dtype, name=name
    )


class ResBlock(nn.Module):
    """Two 3x3 convolutions, time and label entering as scale and shift of the second norm.

    ``y = conv2(silu(GN(conv1(silu(GN x))) (1 + s) + b))``, ``(s, b) = W c``; returns ``skip(x) + y``. The
    last convolution starts at zero.
    """

    channels: int
    dropout: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """x (B, H, W, C), c (1 or B, E), already through silu -> (B, H, W, channels)."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.silu(group_norm(x.shape[-1], "norm_0", self.param_dtype)(x)).astype(self.dtype)
        y = nn.Conv(self.channels, (3, 3), name="conv_0", **kinds)(y)
        film = nn.Dense(2 * self.channels, name="film", **kinds)(c)[:, None, None, :].astype(jnp.float32)
        scale, shift = jnp.split(film, 2, axis=-1)
        y = group_norm(self.channels, "norm_1", self.param_dtype)(y) * (1 + scale) + shift
        y = nn.silu(y).astype(self.dtype)
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        y = nn.Conv(self.channels, (3, 3), kernel_init=ZEROS, name="conv_1", **kinds)(y)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, name="skip", **kinds)(x)
        return x + y


class AttentionBlock(nn.Module):
    """``x + attention(GN(x))`` over all positions; the identity at initialisation."""

    heads: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> the same shape."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = group_norm(x.shape[-1], "norm", self.param_dtype)(x).astype(self.dtype)
        y = y.reshape(x.shape[0], -1, x.shape[-1])
        y = SelfAttention(self.heads, out_init=ZEROS, name="attention", **kinds)(y)
        return x + y.reshape(x.shape)


class UNet(nn.Module):
    """Residual UNet with skip connections; its output is exactly zero at initialisation.

    Any image size works: halving rounds up and doubling is cropped to the skip it meets.

    Attributes:
        channels: channels of the outermost level.
        multipliers: channels of each level over ``channels``; each further level halves the sides.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: sides (the longer one, in pixels) of the levels that get attention, besides the middle.
        middle_attention: attention between the two middle blocks.
        heads: attention heads; they must divide the channels where attention acts.
        out_channels: output channels, None for those of x.
        dropout: rate inside residual blocks; active only when ``rngs={"dropout": key}`` is passed.
        num_classes: K label classes (label K is null), 0 for none.
        two_time: accept ``c_noise_r``.
        time_features: Fourier features of the time.
        frequencies: their (low, high) in radians per unit of ``c_noise``; the default suits times of
            order one, (1e-4, 1) times in 0..1000.
        remat: recompute residual blocks in the backward pass.
        dtype: compute dtype (norms and softmax are float32). param_dtype: parameter dtype.

    Taps: ``down_{level}_{block}``, ``middle``, ``up_{level}_{block}``, each (B, h, w, c).
    """

    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    heads: int = 4
    out_channels: int | None = None
    dropout: float = 0.0
    num_classes: int = 0
    two_time: bool = False
    time_features: int = 64
    frequencies: tuple[float, float] = (0.1, 100.0)
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def check(self) -> None:
        """Raise ``ValueError`` for a field out of range."""
        at_least(self, 1, "channels", "blocks", "heads")
        check_conditioning(self)
        at_least(self, 0, "dropout")
        if self.out_channels is not None:
            at_least(self, 1, "out_channels")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"network UNet: multipliers={self.multipliers!r} must be one or more integers >= 1")
        if self.dropout >= 1:
            raise ValueError(f"network UNet: dropout={self.dropout!r} must be below 1")

    def tap_names(self) -> list[str]:
        """Names that ``taps`` may hold, in the order of computation."""
        levels = range(len(self.multipliers))
        down = [f"down_{i}_{j}" for i in levels for j in range(self.blocks)]
        return [*down, "middle", *(f"up_{i}_{j}" for i in reversed(levels) for j in range(self.blocks + 1))]

    def attended(self, height: int, width: int) -> list[bool]:
        """Which levels get attention for this image size; refuses a side that no level has."""
        sides = [max(height, width)]
        for _ in self.multipliers[1:]:
            sides.append(-(-sides[-1] // 2))
        for side in self.attention:
            if side not in sides:
                raise ValueError(
                    f"network UNet: attention={self.attention!r}: no level of side {side}; sides: {sides}"
                )
        use = [side in self.attention for side in sides]
        last = self.middle_attention or use[-1]
        for channels, on in zip((self.channels * m for m in self.multipliers), [*use[:-1], last]):
            if on and channels % self.heads:
                raise ValueError(f"network UNet: heads={self.heads} must divide the {channels} channels it attends")
        return use

    @nn.compact
    def __call__(
        self, x: jax.Array, c_noise: Any, cond: Any = None, *, c_noise_r: Any = None, taps: Sequence[str] = ()
    ) -> NetOut:
        """Map x (B, H, W, C) to a raw output (B, H, W, out_channels or C)."""
        self.check()
        if x.ndim != 4:
            raise ValueError(f"UNet: x has shape {x.shape}; it needs (B, H, W, C)")
        tap = Taps(taps, self.tap_names())
        use = self.attended(*x.shape[1:3])
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        c = conditioning(self, 4 * self.channels)(x.shape[0], c_noise, cond, c_noise_r)
        c = nn.silu(c)
        res = nn.remat(ResBlock) if self.remat else ResBlock
        widths = [self.channels * m for m in self.multipliers]

        def block(h: jax.Array, level: int, name: str) -> jax.Array:
            h = res(widths[level], self.dropout, name=name, **kinds)(h, c)
            if use[level]:
                h = AttentionBlock(self.heads, name=f"{name}_attention", **kinds)(h)
            tap.offer(name, h)
            return h

        h = nn.Conv(self.channels, (3, 3), name="input", **kinds)(x)
        skips = [h]
        for i, width in enumerate(widths):
            for j in range(self.blocks):
                h = block(h, i, f"down_{i}_{j}")
                skips.append(h)
            if i + 1 < len(widths):
                h = nn.Conv(width, (3, 3), strides=2, name=f"halve_{i}", **kinds)(h)
                skips.append(h)

        h = res(widths[-1], self.dropout, name="middle_0", **kinds)(h, c)
        if self.middle_attention:
            h = AttentionBlock(self.heads, name="middle_attention_block", **kinds)(h)
        h = res(widths[-1], self.dropout, name="middle_1", **kinds)(h, c)
        tap.offer("middle", h)

        for i in reversed(range(len(widths))):
            for j in range(self.blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), i, f"up_{i}_{j}")
            if i:
                height, width = skips[-1].shape[1:3]
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)[:, :height, :width]
                h = nn.Conv(widths[i], (3, 3), name=f"double_{i}", **kinds)(h)

        h = nn.silu(group_norm(h.shape[-1], "output_norm", self.param_dtype)(h)).astype(self.dtype)
        out = x.shape[-1] if self.out_channels is None else self.out_channels
        h = nn.Conv(out, (3, 3), kernel_init=ZEROS, name="output", **kinds)(h)
        return tap.out(h.astype(x.dtype))
