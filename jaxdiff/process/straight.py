"""The straight path of flow matching and rectified flow (2210.02747 [5], 2209.03003)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxdiff.process.coefficients import Coefficients, leaf, resolve

__all__ = ["Linear"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """``alpha = 1 - t``, ``sigma = sigma_min + (1 - sigma_min) t``; ``sigma_min = 0`` is rectified flow.

    With ``sigma_min > 0`` data is only reached up to noise of that size, as in the paper's optimal
    transport path; a grid then ends at ``sigma = sigma_min``.
    """

    sigma_min: Any
    clean: bool = dataclasses.field(metadata={"static": True})
    name = "linear"
    appends_clean = False

    def coefficients(self, t: Any) -> Coefficients:
        """Path and tangent at ``t``; the tangent is constant, (-1, 1 - sigma_min)."""
        xp, t, low = resolve(t, self.sigma_min)
        one = xp.ones_like(t)
        return Coefficients(1 - t, low + (1 - low) * t, -one, one - low, one)

    def half_log_snr(self, t: Any) -> Any:
        """``log((1 - t) / sigma(t))``."""
        return self.coefficients(t).half_log_snr

    def time(self, lam: Any) -> Any:
        """Inverse of :meth:`half_log_snr`: ``t = (rho - sigma_min) / (rho + 1 - sigma_min)``, rho = e^-lam."""
        xp, lam, low = resolve(lam, self.sigma_min)
        u = xp.exp(-xp.abs(lam))  # one of rho and 1/rho overflows at an end, u never does
        return xp.where(lam >= 0, (u - low) / (u + 1 - low), (1 - low * u) / (1 + (1 - low) * u))

    def network_time(self, t: Any) -> Any:
        """The time told to the network: ``t`` itself."""
        return t

    def interior(self) -> tuple[Any, Any]:
        """Times between which log-SNR grids place their interior points."""
        return (1e-3 if self.clean else 0.0), 1 - 1e-3


def make(sigma_min: Any = 0.0) -> Linear:
    """Validate and build; see :class:`Linear`."""
    traced = isinstance(sigma_min, jax.Array)
    if not traced and not 0 <= float(sigma_min) < 1:
        raise ValueError(f"sigma_min: {sigma_min} given; linear() needs 0 <= sigma_min < 1")
    return Linear(leaf(sigma_min), clean=not traced and float(sigma_min) == 0)
