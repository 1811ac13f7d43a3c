"""Variance-exploding paths, ``alpha = 1``: Song's geometric VE and EDM's sigma clock."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxdiff.process.coefficients import Coefficients, leaf, resolve

__all__ = ["EDM", "VE"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class VE:
    """Geometric noise scale ``sigma(t) = sigma_min (sigma_max/sigma_min)^t`` (2011.13456).

    ``sigma(0) = sigma_min``, so grids append one clean point (t=0, sigma=0) after it.
    """

    sigma_min: Any
    sigma_max: Any
    name = "ve"
    clean = False
    appends_clean = True

    def coefficients(self, t: Any) -> Coefficients:
        """Path and tangent ``(0, sigma log(sigma_max/sigma_min))`` at ``t``."""
        xp, t, low, high = resolve(t, self.sigma_min, self.sigma_max)
        span = xp.log(high / low)
        sigma = low * xp.exp(t * span)
        one = xp.ones_like(t)
        return Coefficients(one, sigma, 0 * one, sigma * span, one)

    def half_log_snr(self, t: Any) -> Any:
        """``-log sigma(t)``, linear in t."""
        xp, t, low, high = resolve(t, self.sigma_min, self.sigma_max)
        return -xp.log(low) - t * xp.log(high / low)

    def time(self, lam: Any) -> Any:
        """Inverse of :meth:`half_log_snr`."""
        xp, lam, low, high = resolve(lam, self.sigma_min, self.sigma_max)
        return (-lam - xp.log(low)) / xp.log(high / low)

    def network_time(self, t: Any) -> Any:
        """The time told to the network: ``t`` itself."""
        return t

    def interior(self) -> tuple[Any, Any]:
        """Times between which log-SNR grids place their interior points: all of [0, 1]."""
        return 0.0, 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EDM:
    """Sigma as the clock, ``sigma(t) = sigma_max t`` (2206.00364); ``sigma_min`` ends grid interiors.

    ``t = sigma / sigma_max``: relative accuracy is kept down to sigma_min in float32, the tangent is the
    constant sigma_max, and t=0 is exactly data.
    """

    sigma_min: Any
    sigma_max: Any
    name = "edm"
    clean = True
    appends_clean = False

    def coefficients(self, t: Any) -> Coefficients:
        """Path and tangent ``(0, sigma_max)`` at ``t``."""
        xp, t, high = resolve(t, self.sigma_max)
        one = xp.ones_like(t)
        return Coefficients(one, high * t, 0 * one, high * one, one)

    def half_log_snr(self, t: Any) -> Any:
        """``-log(sigma_max t)``."""
        xp, t, high = resolve(t, self.sigma_max)
        with np.errstate(divide="ignore"):
            return -xp.log(high * t)

    def time(self, lam: Any) -> Any:
        """Inverse of :meth:`half_log_snr`: ``e^-lam / sigma_max``."""
        xp, lam, high = resolve(lam, self.sigma_max)
        return xp.exp(-lam) / high

    def network_time(self, t: Any) -> Any:
        """The time told to the network: ``t`` itself (EDM-preconditioned networks get log(sigma)/4)."""
        return t

    def interior(self) -> tuple[Any, Any]:
        """Times between which log-SNR grids place their interior points: sigma_min to sigma_max."""
        return self.sigma_min / self.sigma_max, 1.0


def _check(sigma_min: Any, sigma_max: Any) -> None:
    if isinstance(sigma_min, jax.Array) or isinstance(sigma_max, jax.Array):
        return
    if not 0 < float(sigma_min) < float(sigma_max) < np.inf:
        raise ValueError(
            f"sigma_min, sigma_max: {sigma_min}, {sigma_max} given; need 0 < sigma_min < sigma_max < inf"
        )


def make_ve(sigma_min: Any = 0.01, sigma_max: Any = 50.0) -> VE:
    """Validate and build; see :class:`VE`."""
    _check(sigma_min, sigma_max)
    return VE(leaf(sigma_min), leaf(sigma_max))


def make_edm(sigma_min: Any = 0.002, sigma_max: Any = 80.0) -> EDM:
    """Validate and build; see :class:`EDM`."""
    _check(sigma_min, sigma_max)
    return EDM(leaf(sigma_min), leaf(sigma_max))
