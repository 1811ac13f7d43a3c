"""Paths written through ``n(t) = -log alpha(t)``: continuous VP, discrete DDPM, sub-VP.

``VP`` and ``DDPM`` keep ``alpha^2 + sigma^2 = 1``; ``sigma ~ sqrt(t)`` at 0, so their tangent is scaled by
``pace = sigma`` (``sigma sigma' = alpha^2 n'`` stays finite). ``SubVP`` has ``sigma = 1 - alpha^2``, whose
derivative is finite.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.near import near
from jaxdiff.process.coefficients import Coefficients, leaf, resolve

__all__ = ["VP", "DDPM", "SubVP"]


def _softplus(xp: Any, x: Any) -> Any:
    return xp.log1p(xp.exp(-xp.abs(x))) + xp.maximum(x, 0)


def _preserving(xp: Any, n: Any, dn: Any) -> Coefficients:
    """Coefficients of ``alpha = e^-n``, ``sigma = sqrt(1 - e^-2n)``, tangent times sigma."""
    alpha, variance = xp.exp(-n), -xp.expm1(-2 * n)
    safe = xp.where(variance > 0, variance, 1)  # sqrt has an infinite gradient at 0
    sigma = xp.where(variance > 0, xp.sqrt(safe), 0)
    return Coefficients(alpha, sigma, -sigma * alpha * dn, alpha * alpha * dn, sigma)


def _linear_beta(t: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """``n = t beta_min/2 + t^2 (beta_max - beta_min)/4`` and its derivative ``beta(t)/2``."""
    return t * low / 2 + t * t * (high - low) / 4, (low + t * (high - low)) / 2


def _linear_beta_time(xp: Any, n: Any, low: Any, high: Any) -> Any:
    """Inverse of :func:`_linear_beta` in the root form that does not cancel as n -> 0."""
    return 2 * n / (low / 2 + xp.sqrt(low * low / 4 + (high - low) * n))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class VP:
    """Continuous variance-preserving path with linear ``beta(t)`` (2011.13456).

    ``alpha = exp(-t beta_min/2 - t^2 (beta_max - beta_min)/4)``, ``sigma = sqrt(1 - alpha^2)``.
    """

    beta_min: Any
    beta_max: Any
    name = "vp"
    clean = True
    appends_clean = False

    def coefficients(self, t: Any) -> Coefficients:
        """Path and sigma-scaled tangent at ``t``."""
        xp, t, low, high = resolve(t, self.beta_min, self.beta_max)
        return _preserving(xp, *_linear_beta(t, low, high))

    def half_log_snr(self, t: Any) -> Any:
        """``-n - log(1 - e^-2n)/2``, accurate where alpha is close to 1."""
        xp, t, low, high = resolve(t, self.beta_min, self.beta_max)
        n, _ = _linear_beta(t, low, high)
        with np.errstate(divide="ignore"):
            return -n - 0.5 * xp.log(-xp.expm1(-2 * n))

    def time(self, lam: Any) -> Any:
        """Inverse of :meth:`half_log_snr`, closed form."""
        xp, lam, low, high = resolve(lam, self.beta_min, self.beta_max)
        return _linear_beta_time(xp, 0.5 * _softplus(xp, -2 * lam), low, high)

    def network_time(self, t: Any) -> Any:
        """The time told to the network: ``t`` itself."""
        return t

    def interior(self) -> tuple[Any, Any]:
        """Times between which log-SNR grids place their interior points."""
        return 1e-3, 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DDPM:
    """Discrete variance-preserving chain of T steps (2006.11239 [131]); library time ``t_i = i/T``.

    ``n`` holds ``-log alpha_i`` for i = 0..T (index 0 is data, n=0). Between indices n is linear in t,
    which is the continuous process with beta constant inside a step; at the indices it is exact. With ``zero_terminal``
    the last n is inf (alpha_T = 0), and in the last step alpha itself is linear in t.
    """

    n: Any
    zero_terminal: bool = dataclasses.field(default=False, metadata={"static": True})
    name = "ddpm"
    clean = True
    appends_clean = False

    @property
    def steps(self) -> int:
        """T, the number of corruption steps."""
        return self.n.shape[-1] - 1

    def coefficients(self, t: Any) -> Coefficients:
        """Path and sigma-scaled tangent at ``t``."""
        xp, t, n = resolve(t, self.n)
        position = t * self.steps
        index = xp.clip(xp.floor(position), 0, self.steps - 1).astype(np.int32)
        low, high = n[index], n[index + 1]
        if not self.zero_terminal:
            rise = high - low
            return _preserving(xp, low + (position - index.astype(position.dtype)) * rise, rise * self.steps)
        last = index == self.steps - 1
        rise = xp.where(last, 0, xp.where(last, low, high) - low)
        inside = _preserving(xp, low + (position - index.astype(position.dtype)) * rise, rise * self.steps)
        left = (1 - t) * self.steps  # of the last step
        top = xp.exp(-low)
        alpha = top * left
        sigma = xp.sqrt(xp.where(last, -xp.expm1(-2 * low) + top * top * (1 - left * left), 1))
        ending = Coefficients(alpha, sigma, -sigma * top * self.steps, alpha * top * self.steps, sigma)
        return jax.tree.map(lambda a, b: xp.where(last, a, b), ending, inside)

    def half_log_snr(self, t: Any) -> Any:
        """``log(alpha / sigma)``."""
        return self.coefficients(t).half_log_snr

    def time(self, lam: Any) -> Any:
        """Inverse of :meth:`half_log_snr` by exact interpolation of ``n``."""
        xp, lam, n = resolve(lam, self.n)
        index, at = xp.linspace(0, 1, self.steps + 1), 0.5 * _softplus(xp, -2 * lam)
        if not self.zero_terminal:
            return xp.interp(at, n, index)
        top = n[-2]
        ending = 1 - xp.exp(-xp.maximum(at - top, 0)) / self.steps
        return xp.where(at > top, ending, xp.interp(at, n[:-1], index[:-1]))

    def network_time(self, t: Any) -> Any:
        """The zero-based index ``T t - 1`` that published networks were trained on."""
        return t * self.steps - 1

    def interior(self) -> tuple[Any, Any]:
        """Times between which log-SNR grids place their interior points: the first and the last index with a finite one."""
        return 1.0 / self.steps, (self.steps - 1.0) / self.steps if self.zero_terminal else 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SubVP:
    """Sub-variance-preserving path (2011.13456): VP's alpha with ``sigma = 1 - alpha^2``."""

    beta_min: Any
    beta_max: Any
    name = "subvp"
    clean = True
    appends_clean = False

    def coefficients(self, t: Any) -> Coefficients:
        """Path and tangent at ``t``; ``sigma' = 2 alpha^2 n'`` is finite, so pace is 1."""
        xp, t, low, high = resolve(t, self.beta_min, self.beta_max)
        n, dn = _linear_beta(t, low, high)
        alpha = xp.exp(-n)
        return Coefficients(alpha, -xp.expm1(-2 * n), -alpha * dn, 2 * alpha * alpha * dn, xp.ones_like(t))

    def half_log_snr(self, t: Any) -> Any:
        """``-n - log(1 - e^-2n)``."""
        xp, t, low, high = resolve(t, self.beta_min, self.beta_max)
        n, _ = _linear_beta(t, low, high)
        with np.errstate(divide="ignore"):
            return -n - xp.log(-xp.expm1(-2 * n))

    def time(self, lam: Any) -> Any:
        """Inverse of :meth:`half_log_snr`: ``alpha^2 + rho alpha - 1 = 0`` with rho = e^-lam.

        ``-log alpha`` is ``log((rho + sqrt(rho^2 + 4))/2) = asinh(rho/2)``; for rho > 1 the rho is taken out of the
        logarithm, since it overflows.
        """
        xp, lam, low, high = resolve(lam, self.beta_min, self.beta_max)
        u = xp.exp(-xp.abs(lam))
        n = xp.where(lam < 0, xp.log1p((xp.sqrt(1 + 4 * u * u) - 1) / 2) - lam, xp.arcsinh(u / 2))
        return _linear_beta_time(xp, n, low, high)

    def network_time(self, t: Any) -> Any:
        """The time told to the network: ``t`` itself."""
        return t

    def interior(self) -> tuple[Any, Any]:
        """Times between which log-SNR grids place their interior points."""
        return 1e-3, 1.0


def _check_betas(beta_min: Any, beta_max: Any) -> None:
    if isinstance(beta_min, jax.Array) or isinstance(beta_max, jax.Array):
        return
    if not 0 < float(beta_min) <= float(beta_max) < np.inf:
        raise ValueError(f"beta_min, beta_max: {beta_min}, {beta_max} given; need 0 < beta_min <= beta_max < inf")


def make_vp(beta_min: Any = 0.1, beta_max: Any = 20.0) -> VP:
    """Validate and build; see :class:`VP`."""
    _check_betas(beta_min, beta_max)
    return VP(leaf(beta_min), leaf(beta_max))


def make_subvp(beta_min: Any = 0.1, beta_max: Any = 20.0) -> SubVP:
    """Validate and build; see :class:`SubVP`."""
    _check_betas(beta_min, beta_max)
    return SubVP(leaf(beta_min), leaf(beta_max))


def _linear_betas(steps: int) -> np.ndarray:
    return np.linspace(1e-4, 0.02, steps)


def _scaled_linear_betas(steps: int) -> np.ndarray:
    return np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2


def _cosine_betas(steps: int) -> np.ndarray:
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


DDPM_SCHEDULES = {"linear": _linear_betas, "scaled_linear": _scaled_linear_betas, "cosine": _cosine_betas}


def make_ddpm(steps: int = 1000, schedule: Any = "linear", zero_terminal_snr: bool = False) -> DDPM:
    """Build from a named beta schedule or an array of betas; see :class:`DDPM`.

    ``schedule``: "linear" (1e-4..0.02, 2006.11239), "scaled_linear" (latent diffusion), "cosine" (iDDPM,
    betas clipped at 0.999), or betas of shape (T,) in (0, 1), whose number then counts in place of ``steps``; the last
    may be 1, which ends the chain in pure noise. ``zero_terminal_snr``: alpha is moved and scaled so that it does,
    ``alpha_i <- (alpha_i - alpha_T) alpha_1/(alpha_1 - alpha_T)`` (2305.08891).
    """
    if isinstance(schedule, str):
        if schedule not in DDPM_SCHEDULES:
            names = ", ".join(DDPM_SCHEDULES)
            hint = near(schedule, DDPM_SCHEDULES)
            raise ValueError(f"schedule: {schedule!r} is unknown; allowed: {names} or betas{hint}")
        if isinstance(steps, bool) or not steps >= 1 or steps % 1:
            raise ValueError(f"steps: {steps} given; ddpm() needs a whole number, at least 1")
        schedule = DDPM_SCHEDULES[schedule](int(steps))
    xp = jnp if isinstance(schedule, jax.Array) else np
    betas = schedule if isinstance(schedule, jax.Array) else np.asarray(schedule, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"schedule: betas of shape {betas.shape} given; need shape (T,)")
    ends = False
    if not isinstance(betas, jax.core.Tracer):  # the values of traced betas are not known
        values = np.asarray(betas)
        ends = bool(values[-1] == 1)
        if not np.all((values > 0) & (values < 1) | (np.arange(values.size) == values.size - 1) & ends):
            raise ValueError(
                f"schedule: betas from {values.min():g} to {values.max():g} given; need 0 < beta < 1, last <= 1"
            )
    if (ends or zero_terminal_snr) and betas.size < 2:
        raise ValueError(f"schedule: {betas.size} beta given; a chain that ends in pure noise needs at least 2 steps")
    if ends:
        betas = betas[:-1]
    n = xp.concatenate([xp.zeros(1, betas.dtype), -0.5 * xp.cumsum(xp.log1p(-betas))])
    if zero_terminal_snr and not ends:
        left = -xp.expm1(n[1:-1] - n[-1])  # (alpha_i - alpha_T)/alpha_i
        n = n[:-1] - xp.concatenate([xp.zeros(1, n.dtype), xp.log(left / left[0])])
    if ends or zero_terminal_snr:
        n = xp.append(n, np.inf)
    return DDPM(n, ends or bool(zero_terminal_snr))
