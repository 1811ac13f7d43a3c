"""Cosine paths: the trigonometric flow and iDDPM's offset schedule (2102.09672), with a log-SNR shift."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxdiff.process.coefficients import Coefficients, leaf, resolve

__all__ = ["Cosine"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cosine:
    """``a = cos(u)/cos(u_0)``, ``b = sqrt(1 - a^2)``, ``u = (pi/2)(t + offset)/(1 + offset)``, u_0 = u(0).

    ``shift`` is added to ``half_log_snr`` on the variance-preserving circle:
    ``alpha = a e^shift / m``, ``sigma = b / m``, ``m^2 = a^2 e^(2 shift) + b^2``. At offset 0 this is
    ``alpha = cos(pi t/2)``, ``sigma = sin(pi t/2)`` with a finite tangent; with an offset
    ``sigma ~ sqrt(t)`` at 0 and the tangent is scaled by sigma. iDDPM's schedule is offset 0.008.
    """

    offset: Any
    shift: Any
    scaled: bool = dataclasses.field(metadata={"static": True})
    name = "cosine"
    clean = True
    appends_clean = False

    def _base(self, t: Any) -> tuple:
        """(xp, a, b^2, sin u / cos u_0, du/dt, e^shift): all exact at both ends."""
        xp, t, offset, shift = resolve(t, self.offset, self.shift)
        rate = (np.pi / 2) / (1 + offset)
        start = rate * offset
        # cos(u) as sin(pi/2 - u), so that alpha(1) is 0 and not 6e-17; b^2 factored, so that b(0) is 0.
        a = xp.sin(rate * (1 - t)) / xp.cos(start)
        sine = xp.sin(start + rate * t)
        b2 = xp.sin(rate * t) * xp.sin(2 * start + rate * t) / xp.cos(start) ** 2
        return xp, a, b2, sine / xp.cos(start), rate, xp.exp(shift)

    def coefficients(self, t: Any) -> Coefficients:
        """Path and tangent at ``t`` (times sigma when offset > 0)."""
        xp, a, b2, sine, rate, gain = self._base(t)
        m2 = a * a * gain * gain + b2
        m = xp.sqrt(m2)
        alpha = a * gain / m
        slope = -gain * rate * sine / (m2 * m)  # alpha'
        if not self.scaled:
            return Coefficients(alpha, sine / m, slope, gain * gain * rate * a / (m2 * m), xp.ones_like(alpha))
        safe = xp.where(b2 > 0, b2, 1)  # sqrt has an infinite gradient at 0
        sigma = xp.where(b2 > 0, xp.sqrt(safe), 0) / m
        return Coefficients(alpha, sigma, sigma * slope, gain * gain * rate * a * sine / (m2 * m2), sigma)

    def half_log_snr(self, t: Any) -> Any:
        """``log(a) - log(b^2)/2 + shift``."""
        xp, a, b2, _, _, gain = self._base(t)
        with np.errstate(divide="ignore"):
            return xp.log(a) - 0.5 * xp.log(b2) + xp.log(gain)

    def time(self, lam: Any) -> Any:
        """Inverse of :meth:`half_log_snr`; ``sin(u - u_0)`` is formed without cancellation."""
        xp, lam, offset, shift = resolve(lam, self.offset, self.shift)
        rate = (np.pi / 2) / (1 + offset)
        start = rate * offset
        lam = lam - shift
        w = xp.exp(-2 * xp.abs(lam))
        a = xp.sqrt(xp.where(lam >= 0, 1, w) / (1 + w))
        b2 = xp.where(lam >= 0, w, 1) / (1 + w)
        cosine, scale = a * xp.cos(start), b2 * xp.cos(start) ** 2
        sine = xp.sqrt(xp.sin(start) ** 2 + scale)
        total = sine * xp.cos(start) + cosine * xp.sin(start)  # sin(u + u_0)
        rise = xp.where(total > 0, scale / xp.where(total > 0, total, 1), 0)  # sin(u - u_0)
        return xp.arctan2(rise, cosine * xp.cos(start) + sine * xp.sin(start)) / rate

    def network_time(self, t: Any) -> Any:
        """The time told to the network: ``t`` itself."""
        return t

    def interior(self) -> tuple[Any, Any]:
        """Times between which log-SNR grids place their interior points."""
        return 1e-3, 1 - 1e-3


def make(offset: Any = 0.0, shift: Any = 0.0) -> Cosine:
    """Validate and build; see :class:`Cosine`."""
    traced = isinstance(offset, jax.Array)
    if not traced and not 0 <= float(offset) < 1:
        raise ValueError(f"offset: {offset} given; cosine() needs 0 <= offset < 1")
    if not isinstance(shift, jax.Array) and not np.isfinite(shift):
        raise ValueError(f"shift: {shift} given; cosine() needs a finite number")
    return Cosine(leaf(offset), leaf(shift), scaled=traced or float(offset) > 0)
