"""Empirical model statistics of DPM-Solver-v3: the linear part, scaling and bias that fit a denoiser best (2310.13268 [40])."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.adaptive import at_level, stateless, tell
from jaxdiff.solver.build import require_gaussian
from jaxdiff.solver.dpm_v3 import Statistics

__all__ = ["ems"]


def ems(
    d: Any,
    x0: Any,
    *,
    process: Process | None = None,
    count: int = 120,
    lam_min: float | None = None,
    lam_max: float | None = None,
    ridge: float = 1e-4,
    seed: int = 0,
) -> Statistics:
    """Scalar statistics ``(l, s, b)`` at ``count`` half log-SNRs, for ``dpm_solver_v3(process, grid, **ems(...)._asdict())``.

    At each lam, over data ``x0`` (N, ...) with fresh noise and over all elements of a sample: ``l``, the mean diagonal of
    the Jacobian of ``sigma eps_hat`` (one Rademacher vector a sample, so ``|d(sigma eps_hat)/dx - l|^2`` is least), then,
    with ``f = (sigma eps_hat - l x)/alpha`` and f' its derivative along the flow, ``s = cov(f, f')/var f``,
    ``b = E f' - s E f``, so that ``|f' - s f - b|^2`` is least. ``ridge`` times ``E f^2`` is added to the variance,
    which vanishes for Gaussian data and, under rounding, at high noise; s then goes to 0.

    ``process``: the denoiser's own by default. ``lam_min``, ``lam_max``: default the path's interior; beyond them the
    statistics are constant. Each lam costs three evaluations of N samples, two with a forward derivative; one compiled
    program. A condition is given by ``prediction.condition(d, cond)``. The same seed gives the same statistics. Raises
    ValueError for noise that is not Gaussian, numbers out of range and denoisers that carry a state.
    """
    x0 = jnp.asarray(x0)
    d = stateless(d, x0, "ems()")
    process = getattr(d, "process", None) if process is None else process
    if process is None:
        raise ValueError(f"process: missing, and a denoiser of type {type(d).__name__} has none of its own")
    require_gaussian(process, "ems()")
    if isinstance(count, bool) or int(count) != count or count < 3:
        raise ValueError(f"count: {count} given; ems() needs a whole number of at least 3")
    if not 0 <= ridge < np.inf:
        raise ValueError(f"ridge: {ridge} given; ems() needs a finite number of at least 0")
    clean, noisy = (float(process.half_log_snr(np.float64(t))) for t in process.path.interior())
    first, last = noisy if lam_min is None else lam_min, clean if lam_max is None else lam_max
    if not -np.inf < first < last < np.inf:
        raise ValueError(f"lam_min, lam_max: {first}, {last} given; ems() needs lam_min < lam_max, both finite")
    lam = np.linspace(first, last, int(count))
    keys = jax.random.split(jax.random.key(seed), lam.size)
    levels = jnp.asarray(lam, x0.dtype)
    linear = np.asarray(_linear(process, d, x0, keys, levels), np.float64)
    slope = np.gradient(linear, lam, edge_order=2)
    found = _moments(process, d, x0, keys, levels, *(jnp.asarray(v, x0.dtype) for v in (linear, slope)))
    mean, rate, variance, covariance = (np.asarray(v, np.float64) for v in found)
    scale = covariance / np.maximum(variance + ridge * (variance + mean**2), np.finfo(np.float64).tiny)
    return Statistics(linear, scale, rate - scale * mean, lam)


def _data(process: Process, d: Any, u: jax.Array, lam: Any) -> jax.Array:
    """The data prediction at the state ``alpha u``."""
    query = at_level(process, lam)
    return tell(d, query.alpha * u, query).data


def _draw(x0: jax.Array, key: jax.Array, lam: Any) -> tuple[jax.Array, jax.Array]:
    """``u = x/alpha`` at half log-SNR ``lam``, and signs for the estimate of a trace."""
    noise, signs = jax.random.split(key)
    u = x0 + jnp.exp(-lam) * jax.random.normal(noise, x0.shape, x0.dtype)
    return u, jax.random.rademacher(signs, x0.shape, x0.dtype)


@jax.jit
def _linear(process: Process, d: Any, x0: jax.Array, keys: jax.Array, lam: jax.Array) -> jax.Array:
    """l (count,): ``sigma eps_hat = x - alpha x0_hat``, whose Jacobian in x is ``1 - d x0_hat/du``."""

    def one(_: None, at: tuple) -> tuple:
        key, level = at
        u, v = _draw(x0, key, level)
        return None, 1 - jnp.mean(v * jax.jvp(lambda u: _data(process, d, u, level), (u,), (v,))[1])

    return jax.lax.scan(one, None, (keys, lam))[1]


@jax.jit
def _moments(
    process: Process, d: Any, x0: jax.Array, keys: jax.Array, lam: jax.Array, linear: jax.Array, slope: jax.Array
) -> tuple:
    """Means of f and f', variance of f, covariance of both, (count,) each.

    ``f = (1 - l) u - x0_hat``; on the flow ``du/dlam = x0_hat - u``, so no small number is a difference of large ones.
    """

    def one(_: None, at: tuple) -> tuple:
        key, level, l, dl = at  # noqa: E741
        u, _signs = _draw(x0, key, level)
        data = _data(process, d, u, level)
        moved = jax.jvp(lambda u, q: _data(process, d, u, q), (u, level), (data - u, jnp.ones_like(level)))[1]
        f, rate = (1 - l) * u - data, (1 - l) * (data - u) - dl * u - moved
        mean, mean_rate = jnp.mean(f), jnp.mean(rate)
        return None, (mean, mean_rate, jnp.mean((f - mean) ** 2), jnp.mean((f - mean) * (rate - mean_rate)))

    return jax.lax.scan(one, None, (keys, lam, linear, slope))[1]
