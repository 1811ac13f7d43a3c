r"""Exponential moving averages of parameters: fixed decay with warm-up, and power-function profiles.

``ema <- beta_t ema + (1 - beta_t) params`` after the t-th update, t = 1, 2, ... A player may carry several
averages; the first is the one losses see as ``ctx.ema`` and samplers use unless told otherwise.

* ``decay(rate)``: beta = rate; with warm-up beta_t = min(rate, (1 + t) / (10 + t)), so that a short run is
  not dominated by the initial parameters.
* ``power(gamma)`` (EDM2, arXiv 2312.02696): beta_t = (1 - 1/t)^(gamma + 1), whose weight on the parameters
  at time tau is proportional to tau^gamma: the averaging window grows with training. Snapshots of two or
  more such averages allow *any* profile to be reconstructed afterwards by ``posthoc_weights``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Average:
    """One moving average: ``kind`` is "decay" or "power". Made by ``decay`` and ``power``."""

    kind: str
    value: float
    warmup: bool = False

    @property
    def label(self) -> str:
        """A short name for tables and files: ``decay_0.999``, ``power_16.97``."""
        return f"{self.kind}_{self.value:.6g}"

    def beta(self, update: jax.Array) -> jax.Array:
        """Weight kept on the old average at the ``update``-th update (1-based), float32 scalar."""
        return 1.0 - self.weight(update)

    def weight(self, update: jax.Array) -> jax.Array:
        """``1 - beta``, the weight of the new parameters: accurate where float32 could not tell beta from 1."""
        t = jnp.asarray(update, jnp.float32)
        if self.kind == "power":
            return -jnp.expm1((self.value + 1.0) * jnp.log1p(-1.0 / t))
        if self.warmup:
            return jnp.maximum(1.0 - self.value, 9.0 / (10.0 + t))
        return jnp.full((), 1.0 - self.value, jnp.float32)


def decay(rate: float = 0.999, warmup: bool = True) -> Average:
    """Average with constant decay ``rate`` in [0, 1), warmed up by min(rate, (1+t)/(10+t)) if asked."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"ema.decay={rate}: allowed are 0 <= decay < 1")
    return Average("decay", float(rate), bool(warmup))


def power(gamma: float | None = None, *, std: float | None = None) -> Average:
    """Power-function average, by exponent ``gamma`` > -1/2 or relative width ``std`` (EDM2's sigma_rel)."""
    if (gamma is None) == (std is None):
        raise ValueError(f"ema.power: give gamma or std, not both or neither (gamma={gamma}, std={std})")
    if std is not None:
        gamma = gamma_of_std(std)
    gamma = float(gamma)  # type: ignore[arg-type]  # one of the two is given
    if not gamma > -0.5:
        raise ValueError(f"ema.power: gamma={gamma}: allowed are gamma > -0.5")
    return Average("power", gamma)


def averages(settings: float | Average | Sequence[float | Average] | None) -> tuple[Average, ...]:
    """Canonical tuple of averages from a decay, an ``Average``, a sequence of either, or None (no EMA)."""
    if settings is None:
        return ()
    if isinstance(settings, int | float | Average):
        settings = (settings,)
    return tuple(entry if isinstance(entry, Average) else decay(entry) for entry in settings)


def start(params: Any, profiles: Sequence[Average]) -> tuple[Any, ...]:
    """One *copy* of the parameters per average; an alias would be deleted when the state is donated."""
    return tuple(jax.tree.map(jnp.copy, params) for _ in profiles)


def update(ema: tuple[Any, ...], params: Any, profiles: Sequence[Average], count: jax.Array) -> tuple[Any, ...]:
    """All averages after the ``count``-th update (1-based) that produced ``params``."""

    def one(profile: Average, average: Any) -> Any:
        weight = profile.weight(count)

        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            if not jnp.issubdtype(old.dtype, jnp.inexact):
                return new
            return old + weight.astype(old.dtype) * (new - old)

        return jax.tree.map(mix, average, params)

    return tuple(one(profile, average) for profile, average in zip(profiles, ema, strict=True))


def std_of_gamma(gamma: float) -> float:
    """Relative width of the profile tau^gamma on [0,1]: sqrt(gamma+1) / ((gamma+2) sqrt(gamma+3))."""
    return float(np.sqrt(gamma + 1.0) / ((gamma + 2.0) * np.sqrt(gamma + 3.0)))


def gamma_of_std(std: float) -> float:
    """Inverse of ``std_of_gamma``: largest root of (g+2)^2 (g+3) std^2 = g + 1, for 0 < std <= 12^(-1/2).

    Raises:
        ValueError: if the width is not that of any profile with gamma >= 0 (uniform averaging is 1/sqrt(12)).
    """
    if not 0.0 < std <= 12**-0.5 * (1 + 1e-12):
        raise ValueError(f"ema.power: std={std}: allowed are 0 < std <= {12**-0.5:.4f}")
    # (g+2)^2 (g+3) - (g+1)/std^2 = g^3 + 7 g^2 + (16 - s) g + (12 - s), s = std^-2
    s = float(std) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


def _inner(t_a: np.ndarray, g_a: np.ndarray, t_b: np.ndarray, g_b: np.ndarray) -> np.ndarray:
    """Integral of the product of two profiles p(tau) = (g+1) tau^g / t^(g+1) on [0, t]; float64."""
    low = np.log(np.minimum(t_a, t_b))
    logs = (g_a + g_b + 1) * low - (g_a + 1) * np.log(t_a) - (g_b + 1) * np.log(t_b)
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * np.exp(logs)


def posthoc_weights(times: Sequence[float], gammas: Sequence[float], time: float, gamma: float) -> np.ndarray:
    """Weights that rebuild a power-function average from saved ones (post-hoc EMA, arXiv 2312.02696).

    Minimises the L2 distance between the wanted profile and the weighted sum of the saved profiles.

    Args:
        times: (n,) number of updates at which each snapshot was taken, >= 1.
        gammas: (n,) exponent of each snapshot's average.
        time: number of updates at which the rebuilt average ends; at most max(times).
        gamma: exponent wanted.

    Returns:
        (n,) float64 weights; the average is ``sum_i weights[i] * snapshot_i``.

    Raises:
        ValueError: shapes that differ, or a ``time`` out of range.
    """
    t, g = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    if t.ndim != 1 or t.shape != g.shape or t.size == 0 or (t < 1).any():
        raise ValueError(f"posthoc_weights: times {t.shape} and gammas {g.shape} must be equal, times >= 1")
    if not 1 <= time <= t.max():
        raise ValueError(f"posthoc_weights: time={time}: allowed are 1..{t.max():g}, the last snapshot")
    gram = _inner(t[:, None], g[:, None], t[None], g[None])
    wanted = _inner(t, g, np.asarray(time, np.float64), np.asarray(gamma, np.float64))
    return np.linalg.lstsq(gram, wanted, rcond=1e-14)[0]
