"""Which noise levels training visits: a time density is the inverse distribution function of a uniform number.

A density is an increasing function ``(u, process) -> t`` of u in (0, 1). Any way of drawing u then
works with any density. ``draw="stratified"`` takes ``u = frac(shift(step) + index * golden)``: the golden-ratio
sequence is equidistributed over every window of consecutive indices, whatever the batch size, device count or
accumulation, and a fresh uniform shift each step makes each u exactly uniform. The arithmetic is uint32
fixed point (multiples of 2^-32 modulo 1): in float32 the product would have no fractional digits left beyond
index 2^24. u is the centre of its cell among 2^23, so it is never 0 or 1 and is exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

__all__ = [
    "TIMES",
    "cosmap",
    "density_at",
    "discrete",
    "iid",
    "log_normal",
    "logit_normal",
    "mode",
    "stratified",
    "uniform",
]

Density = Callable[[Any, Any], Any]
GOLDEN = np.uint32(2654435769)  # 2^32 (sqrt(5) - 1)/2, rounded; odd, so its multiples visit every uint32


def _unit(bits: jax.Array) -> jax.Array:
    """float32 in (0, 1) from uint32: the centre of one of 2^23 cells."""
    return ((bits >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)


def iid(keys: jax.Array) -> jax.Array:
    """(B,) independent uniform numbers, one from each typed key."""
    return _unit(jax.vmap(lambda key: jax.random.bits(key, dtype=jnp.uint32))(keys))


def stratified(step: Any, index: Any, seed: int = 0) -> jax.Array:
    """(B,) low-discrepancy uniform numbers from the step and the global example indices; see the module.

    Each is a function of (seed, step, its own index) alone. ``index``: integers of any width, taken modulo 2^32.
    """
    shift = jax.random.bits(jax.random.fold_in(jax.random.key(seed), step), dtype=jnp.uint32)
    return _unit(shift + jnp.asarray(index).astype(jnp.uint32) * GOLDEN)


def density_at(time: Density, u: jax.Array, process: Any, low: float, high: float) -> jax.Array:
    """p(t) at ``t = time(u)``: ``1/(dt/du)``, and infinity where t was clipped to an end (nothing is drawn there)."""
    t, slope = jax.jvp(lambda v: time(v, process), (u,), (jnp.ones_like(u),))
    return jnp.where((t > low) & (t < high), 1 / jnp.maximum(slope, 1e-30), jnp.inf)


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, jax.Array) and not float(value) > 0:
        raise ValueError(f"{name}: {value} given; need {name} > 0")


def uniform() -> Density:
    """``t = u``."""
    return lambda u, process: u


def logit_normal(mean: Any = 0.0, std: Any = 1.0) -> Density:
    """``t = sigmoid(mean + std z)``, z standard normal (2403.03206: mean 0, std 1)."""
    _positive("std", std)
    return lambda u, process: jax.nn.sigmoid(mean + std * ndtri(u))


def log_normal(mean: Any = -1.2, std: Any = 1.2) -> Density:
    """EDM's: ``log(sigma/alpha) ~ N(mean, std^2)`` on any path, t through ``process.time`` (2206.00364)."""
    _positive("std", std)
    return lambda u, process: process.time(-(mean + std * ndtri(u)))


def mode(scale: Any = 1.29) -> Density:
    """Stable Diffusion 3's heavy-tailed density: ``t = u + scale (u - sin^2(pi u/2))`` (2403.03206).

    The paper's formula at 1 - u, so that t increases. scale in [-1, 2/(pi - 2)], where it is monotone; positive
    favours the middle, 0 is uniform. Raises ValueError outside.
    """
    if not isinstance(scale, jax.Array) and not -1 <= float(scale) <= 2 / (np.pi - 2):
        raise ValueError(f"scale: {scale} given; mode() needs -1 <= scale <= {2 / (np.pi - 2):.3f}")
    return lambda u, process: u + scale * (u - jnp.sin(np.pi / 2 * u) ** 2)


def cosmap() -> Density:
    """The linear path with the cosine schedule's noise levels: ``t = 1 - 1/(tan(pi u/2) + 1)`` (2403.03206)."""

    def density(u: Any, process: Any) -> Any:
        sine, cosine = jnp.sin(np.pi / 2 * u), jnp.cos(np.pi / 2 * u)
        return sine / (sine + cosine)

    return density


def discrete(steps: int = 1000) -> Density:
    """``t = i/steps`` with i uniform on 1..steps: DDPM's training times (2006.11239 [131]). Raises ValueError for steps < 1."""
    if steps < 1:
        raise ValueError(f"steps: {steps} given; discrete() needs at least 1")
    return lambda u, process: (jnp.floor(u * steps) + 1) / steps


TIMES = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "log_normal": log_normal,
    "mode": mode,
    "cosmap": cosmap,
    "discrete": discrete,
}
