"""Time, second time and label become one conditioning vector, shared by every network."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SMALL = nn.initializers.normal(0.02)


def per_sample(name: str, value: Any, batch: int) -> jax.Array:
    """Bring a time of shape (), (B,), (1,) or (B, 1, ..., 1) to shape (1,) or (B,).

    A time shared by the batch stays a single row, so that its embedding is computed once.

    Raises:
        ValueError: for any other shape.
    """
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(jnp.float32)
    rows = value.shape[0] if value.ndim else 1
    if rows not in (1, batch) or value.size != rows:
        raise ValueError(
            f"{name} has shape {value.shape}; this network takes (), (1,) or ({batch},), one time per sample"
        )
    return value.reshape(rows)


def fourier_features(c_noise: jax.Array, width: int, frequencies: tuple[float, float]) -> jax.Array:
    """Sinusoidal features ``[cos(f_i c), sin(f_i c)]`` with geometric angular frequencies, float32.

    ``f_i = high (low / high)^(i / half)``, ``i = 0 .. half-1``, ``half = width / 2``. With
    ``frequencies=(1e-4, 1)`` this is DiT's embedding (arXiv 2212.09748), made for times in 0..1000.

    Args:
        c_noise: (B,) times.
        width: number of features, even.
        frequencies: (low, high), radians per unit of ``c_noise``.

    Returns:
        (B, width).
    """
    low, high = frequencies
    half = width // 2
    table = (high * (low / high) ** (np.arange(half) / half)).astype(np.float32)
    angle = c_noise.astype(jnp.float32)[:, None] * table
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def labels_of(cond: Any, num_classes: int) -> jax.Array | None:
    """Read integer labels from a condition.

    Args:
        cond: None, integer labels of shape () or (B,), or a dict whose only key is "label".
        num_classes: K. Labels are 0..K-1; K is the null label. 0 means an unconditional network.

    Returns:
        None for an unconditional network, else labels of shape (1,) or (B,); ``cond=None`` is all-null.

    Raises:
        ValueError: a condition given to an unconditional network, a dict with other keys, labels that are
            not integers or (when concrete) lie outside 0..K. Under `jax.jit` an out-of-range label cannot
            raise; its embedding is NaN.
    """
    if isinstance(cond, dict):
        if set(cond) != {"label"}:
            raise ValueError(f"cond has keys {sorted(cond)}; this network reads only 'label'")
        cond = cond["label"]
    if num_classes == 0:
        if cond is not None:
            raise ValueError("cond was given to a network with num_classes=0; set num_classes or pass cond=None")
        return None
    if cond is None:
        return jnp.full((1,), num_classes, jnp.int32)
    label = jnp.asarray(cond)
    if not jnp.issubdtype(label.dtype, jnp.integer) or label.ndim > 1:
        raise ValueError(f"cond label has dtype {label.dtype} and shape {label.shape}; give integers of shape (B,)")
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(cond)):
        # numpy, because a concrete array closed over inside jit still turns jnp results into tracers
        for worst in np.asarray(cond).reshape(-1):
            if not 0 <= worst <= num_classes:
                raise ValueError(f"cond label {worst} is out of range; allowed 0..{num_classes}, the last is null")
    return label.reshape(-1)


class TimeEmbedding(nn.Module):
    """Fourier features of a time, then ``Dense, silu, Dense`` to ``width``.

    ``zero_init`` zeroes the last layer: a second time added to a trained network changes nothing at first.
    """

    width: int
    features: int
    frequencies: tuple[float, float]
    zero_init: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, c_noise: jax.Array) -> jax.Array:
        """(B,) -> (B, width)."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        last = nn.initializers.zeros if self.zero_init else SMALL
        h = fourier_features(c_noise, self.features, self.frequencies)
        h = nn.silu(nn.Dense(self.width, kernel_init=SMALL, name="dense_0", **kinds)(h))
        return nn.Dense(self.width, kernel_init=last, name="dense_1", **kinds)(h)


class Conditioning(nn.Module):
    """The sum of the time, second-time and label embeddings, of shape (1 or B, width).

    The label table has ``num_classes + 1`` rows; the last is the null label. The second time's parameters
    exist only with ``two_time``; its last layer starts at zero.
    """

    width: int
    features: int
    frequencies: tuple[float, float]
    num_classes: int
    two_time: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch: int, c_noise: Any, cond: Any, c_noise_r: Any) -> jax.Array:
        """Embed; see `labels_of` and `per_sample` for what is accepted."""
        if c_noise_r is not None and not self.two_time:
            raise ValueError("c_noise_r was given to a network built with two_time=False")
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        time = (self.width, self.features, self.frequencies)
        c_noise = per_sample("c_noise", c_noise, batch)
        c = TimeEmbedding(*time, name="time", **kinds)(c_noise)
        if self.two_time and (c_noise_r is not None or self.is_initializing()):
            second = c_noise if c_noise_r is None else per_sample("c_noise_r", c_noise_r, batch)
            c = c + TimeEmbedding(*time, zero_init=True, name="second_time", **kinds)(second)
        label = labels_of(cond, self.num_classes)
        if label is not None:
            if label.shape[0] not in (1, batch):
                raise ValueError(f"cond has {label.shape[0]} labels for a batch of {batch}")
            table = nn.Embed(self.num_classes + 1, self.width, embedding_init=SMALL, name="label", **kinds)
            c = c + table(label)
        return c


def conditioning(net: Any, width: int) -> Conditioning:
    """The embedding of ``width`` that a network's fields ask for; called inside the network's own ``__call__``."""
    time = (net.time_features, net.frequencies)
    kinds = {"dtype": net.dtype, "param_dtype": net.param_dtype}
    return Conditioning(width, *time, net.num_classes, net.two_time, name="conditioning", **kinds)
