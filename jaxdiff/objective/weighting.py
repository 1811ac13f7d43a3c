"""How much each noise level counts: weights in ``lam = log(alpha/sigma)`` on the squared noise residual.

Regressions on different targets are one loss with different weights: at fixed x,

    eps - eps_hat = g (F - F_hat),   g = alpha/sigma (data), 1 (noise), sigma (score), alpha/(alpha^2 + sigma^2) (vpred),
                                     alpha pace/(alpha ds - sigma da) (velocity), alpha sigma_data/q (edm)

A weighting w(lam) is stated once, for the noise residual, and multiplies ``|F - F_hat|^2`` as ``w g^2``; so every
target trains the same loss. "flat" alone is stated for the target's own residual: its weight is 1.

alpha and sigma are floored at 1e-9 here. A product ``w g^2`` with a finite limit at an end of the path has it (min-SNR
on data at sigma = 0 is gamma), and one without is large and finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.prediction import check_target
from jaxdiff.process.coefficients import Coefficients

__all__ = [
    "WEIGHTINGS",
    "Level",
    "Weighting",
    "edm",
    "flat",
    "level",
    "likelihood",
    "min_snr",
    "over_lam",
    "p2",
    "residual_factor",
    "sigmoid",
    "snr",
    "target_weight",
]

FLOOR = 1e-9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """A noise level: ``rho = sigma/alpha``, ``snr = 1/rho^2`` (both positive and finite) and ``pace_lam = -dlam/dt``."""

    rho: Any
    snr: Any
    pace_lam: Any


@dataclasses.dataclass(frozen=True)
class Weighting:
    """A weight on the noise residual, ``noise(level)``; None means weight 1 on the target's own residual.

    ``over_lam``: also multiply by ``-(dlam/dt)/p(t)``, p the density that times are drawn from. The loss is then an
    estimate of ``integral w(lam) E|eps - eps_hat|^2 dlam`` whatever that density is.
    """

    noise: Callable[[Level], Any] | None
    over_lam: bool = False


def _floored(c: Coefficients) -> Coefficients:
    """``c`` with alpha, sigma and pace away from 0."""
    alpha, sigma = jnp.maximum(c.alpha, FLOOR), jnp.maximum(c.sigma, FLOOR)
    return Coefficients(alpha, sigma, c.da, c.ds, jnp.maximum(c.pace, FLOOR))


def level(c: Coefficients) -> Level:
    """The noise level of coefficients ``c``."""
    c = _floored(c)
    rho = c.sigma / c.alpha
    return Level(rho, (c.alpha / c.sigma) ** 2, (c.alpha * c.ds - c.sigma * c.da) / (c.alpha * c.sigma * c.pace))


def residual_factor(target: str, c: Coefficients, sigma_data: Any = 0.5) -> Any:
    """``g^2`` with ``eps - eps_hat = g (F - F_hat)`` at fixed x; see the module."""
    c = _floored(c)
    if target == "data":
        return (c.alpha / c.sigma) ** 2
    if target == "noise":
        return jnp.ones_like(c.alpha)
    if target == "score":
        return c.sigma**2
    if target == "vpred":
        return (c.alpha / (c.alpha**2 + c.sigma**2)) ** 2
    if target == "velocity":
        return (c.alpha * c.pace / (c.alpha * c.ds - c.sigma * c.da)) ** 2
    check_target(target)  # the one left is edm
    return c.alpha**2 * sigma_data**2 / (c.sigma**2 + c.alpha**2 * sigma_data**2)


def target_weight(
    weighting: Weighting, target: str, c: Coefficients, sigma_data: Any = 0.5, density: Any = None
) -> Any:
    """What multiplies ``|F - F_hat|^2``, in the shape of the time. ``density`` is p(t), used by over-lam weights."""
    weight = jnp.ones_like(c.alpha)
    if weighting.noise is not None:
        weight = weighting.noise(level(c)) * residual_factor(target, c, sigma_data)
    return weight * level(c).pace_lam / density if weighting.over_lam else weight


def flat() -> Weighting:
    """Weight 1 on the residual of the target in use."""
    return Weighting(None)


def snr() -> Weighting:
    """Weight 1 on the noise residual, which is SNR on the data residual (2006.11239, 2202.00512)."""
    return Weighting(lambda at: jnp.ones_like(at.snr))


def min_snr(gamma: Any = 5.0) -> Weighting:
    """``min(1, gamma/SNR)`` on the noise residual, ``min(SNR, gamma)`` on data's (2303.09556).

    Raises ValueError unless gamma > 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma: {gamma} given; min_snr() needs gamma > 0")
    return Weighting(lambda at: jnp.minimum(1.0, gamma * at.rho**2))


def p2(k: Any = 1.0, power: Any = 1.0) -> Weighting:
    """``1/(k + SNR)^power`` on the noise residual (2204.00227; the authors use k = 1, power 0.5 and 1).

    Raises ValueError unless k > 0 and power >= 0.
    """
    if not (k > 0 and power >= 0):
        raise ValueError(f"k, power: {k}, {power} given; p2() needs k > 0 and power >= 0")
    return Weighting(lambda at: (k + at.snr) ** -power)


def edm(sigma_data: Any = 0.5) -> Weighting:
    """``(rho^2 + sigma_data^2)/(rho sigma_data)^2`` on the data residual: 1 on that of the edm target (2206.00364).

    Raises ValueError unless sigma_data > 0.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data: {sigma_data} given; edm() needs sigma_data > 0")
    return Weighting(lambda at: at.rho**2 / sigma_data**2 + 1)


def sigmoid(bias: Any = 0.0) -> Weighting:
    """``sigmoid(bias - log SNR)`` on the noise residual (2303.00848).

    The paper integrates it over lam: ``over_lam(sigmoid(bias))``.
    """
    return Weighting(lambda at: jax.nn.sigmoid(bias - jnp.log(at.snr)))


def over_lam(weighting: Weighting) -> Weighting:
    """``weighting`` integrated over lam instead of drawn times; see :class:`Weighting`."""
    return dataclasses.replace(weighting, over_lam=True)


def likelihood() -> Weighting:
    """The likelihood bound's weight, ``-(dlam/dt)/p(t)`` on the noise residual (2107.00630; methods S5).

    With ``reduce="sum"`` the loss is the bound's diffusion term in nats, for any time density that reaches everywhere.
    """
    return over_lam(snr())


WEIGHTINGS = {
    "flat": flat,
    "snr": snr,
    "min_snr": min_snr,
    "p2": p2,
    "edm": edm,
    "sigmoid": sigmoid,
    "likelihood": likelihood,
}
