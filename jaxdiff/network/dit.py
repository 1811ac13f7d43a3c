"""DiT: a transformer on patches, conditioned by adaLN-zero (arXiv 2212.09748)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.network.attention import SelfAttention
from jaxdiff.network.embedding import conditioning
from jaxdiff.network.options import at_least, check_conditioning, check_option_names, construct, option_names
from jaxdiff.network.output import NetOut, Taps

ZEROS = nn.initializers.zeros
XAVIER = nn.initializers.xavier_uniform()

# depth, width, heads of the paper's table 1; a size is one of these names, a slash and the patch size.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def position_table(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed 2-D sin-cos table (rows * columns, width), float64.

    The first half of the features encodes the column, the second the row; each is ``[sin, cos]`` with
    frequencies ``10000^(-i / (width/4))``. It is a constant, not a parameter.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    halves = []
    for place in (column, row):
        angle = place.reshape(-1, 1) * omega
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves, axis=1)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, C) -> (B, HW/p^2, p p C): row-major patches, features ordered (row, column, channel)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """The inverse of `patchify`, for an image of height x width."""
    batch = tokens.shape[0]
    x = tokens.reshape(batch, height // patch, width // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """``LN(x) (1 + scale) + shift`` with an affine-free layer norm, computed in float32."""
    norm = nn.LayerNorm(use_bias=False, use_scale=False, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32)
    y = norm(x) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
    return y.astype(dtype)


class DiTBlock(nn.Module):
    """``x += g1 attention(LN(x)(1+s1)+b1)``, then the same with an MLP; the identity at initialisation.

    ``(b1, s1, g1, b2, s2, g2) = chunk(W silu(c))`` with W zero at first.
    """

    heads: int
    mlp_ratio: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """x (B, N, D), c (1 or B, 1, D), already through silu."""
        width = x.shape[-1]
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        modulation = nn.Dense(6 * width, kernel_init=ZEROS, name="modulation", **kinds)(c)
        b1, s1, g1, b2, s2, g2 = jnp.split(modulation, 6, axis=-1)
        y = modulated_norm(x, b1, s1, self.dtype)
        x = x + g1 * SelfAttention(self.heads, name="attention", **kinds)(y)
        y = modulated_norm(x, b2, s2, self.dtype)
        y = nn.Dense(int(width * self.mlp_ratio), kernel_init=XAVIER, name="mlp_in", **kinds)(y)
        y = nn.Dense(width, kernel_init=XAVIER, name="mlp_out", **kinds)(nn.gelu(y, approximate=True))
        return x + g2 * y


class DiT(nn.Module):
    """Diffusion transformer with adaLN-zero conditioning; its output is exactly zero at initialisation.

    Attributes:
        width: token width D, a multiple of 4 and of ``heads``. depth: blocks. heads: attention heads.
        patch: patch side; it must divide both image sides.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: K label classes (label K is null), 0 for none.
        learn_sigma: twice the output channels (mean then variance), as published.
        two_time: accept ``c_noise_r``.
        time_features: Fourier features of the time.
        frequencies: their (low, high) in radians per unit of ``c_noise``. The default is the published
            one, for times in 0..1000; (0.1, 100) suits times of order one.
        remat: recompute block activations in the backward pass.
        dtype: compute dtype (norms, modulation and softmax are float32). param_dtype: parameter dtype.

    Taps: ``embed`` and ``block_0 .. block_{depth-1}``, each (B, N, D), N patches in row-major order.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    mlp_ratio: float = 4.0
    num_classes: int = 0
    learn_sigma: bool = False
    two_time: bool = False
    time_features: int = 256
    frequencies: tuple[float, float] = (1e-4, 1.0)
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def check(self) -> None:
        """Raise ``ValueError`` for a field out of range."""
        at_least(self, 1, "depth", "heads", "patch")
        at_least(self, 4, "width")
        check_conditioning(self)
        if not 0 < self.mlp_ratio < float("inf"):
            raise ValueError(f"network DiT: mlp_ratio={self.mlp_ratio!r} must be a finite number > 0")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"network DiT: width={self.width} must be a multiple of 4 and of heads={self.heads}")

    @nn.compact
    def __call__(
        self, x: jax.Array, c_noise: Any, cond: Any = None, *, c_noise_r: Any = None, taps: Sequence[str] = ()
    ) -> NetOut:
        """Map x (B, H, W, C) to a raw output (B, H, W, C) or, with ``learn_sigma``, (B, H, W, 2C)."""
        self.check()
        if x.ndim != 4 or x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"DiT: x has shape {x.shape}; it needs (B, H, W, C), patch={self.patch} dividing H and W"
            )
        tap = Taps(taps, ["embed", *(f"block_{i}" for i in range(self.depth))])
        batch, rows, columns, channels = x.shape
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        c = conditioning(self, self.width)(batch, c_noise, cond, c_noise_r)
        c = nn.silu(c)[:, None, :]

        h = nn.Dense(self.width, kernel_init=XAVIER, name="patch_embed", **kinds)(patchify(x, self.patch))
        h = h + position_table(rows // self.patch, columns // self.patch, self.width).astype(h.dtype)
        tap.offer("embed", h)
        block = nn.remat(DiTBlock) if self.remat else DiTBlock
        for i in range(self.depth):
            h = block(self.heads, self.mlp_ratio, name=f"block_{i}", **kinds)(h, c)
            tap.offer(f"block_{i}", h)

        final = nn.Dense(2 * self.width, kernel_init=ZEROS, name="final_modulation", **kinds)(c)
        shift, scale = jnp.split(final, 2, axis=-1)
        h = modulated_norm(h, shift, scale, self.dtype)
        out = self.patch**2 * channels * (2 if self.learn_sigma else 1)
        h = nn.Dense(out, kernel_init=ZEROS, name="final", **kinds)(h)
        return tap.out(unpatchify(h, rows, columns, self.patch).astype(x.dtype))


def make_dit(size: str | None = None, **options: Any) -> DiT:
    """Build a `DiT` from options, or from a published size and options over it.

    Args:
        size: "S/2", "B/4", "XL/2", ...: a name of `SIZES`, a slash, the patch side.
        **options: fields of `DiT`; they win over the size.

    Raises:
        ValueError: an unknown size or option, or a value out of range.
    """
    check_option_names("DiT", options, ("size", *option_names(DiT)))
    preset: dict[str, Any] = {}
    if size is not None:
        name, _, patch = str(size).partition("/")
        if name not in SIZES or not patch.isdigit():
            raise ValueError(
                f"network DiT: size={size!r} must be one of {', '.join(SIZES)}, a slash and a patch side"
            )
        depth, width, heads = SIZES[name]
        preset = {"depth": depth, "width": width, "heads": heads, "patch": int(patch)}
    return construct(DiT, **(preset | options))
