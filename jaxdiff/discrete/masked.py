"""Absorbing corruption: every token is hidden by a mask at a time of its own, and then stays hidden."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.near import unknown
from jaxdiff.process.coefficients import Coefficients, expand, leaf, resolve
from jaxdiff.solver.categorical import happens

__all__ = ["SCHEDULES", "Bits", "Cosine", "Mask", "Masked", "Polynomial", "masked"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Polynomial:
    """``alpha = 1 - t^p``, p = ``exponent``; 1 is the linear schedule."""

    exponent: Any
    name = "polynomial"

    def coefficients(self, t: Any) -> Coefficients:
        """Shares ``alpha`` revealed and ``sigma = 1 - alpha`` masked, and their slopes."""
        xp, t, p = resolve(t, self.exponent)
        slope = p * t ** (p - 1)
        return Coefficients(1 - t**p, t**p, -slope, slope, xp.ones_like(t))

    def time(self, sigma: Any) -> Any:
        """The time at which the share ``sigma`` is masked."""
        _, sigma, p = resolve(sigma, self.exponent)
        return sigma ** (1 / p)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cosine:
    """``alpha = 1 - cos(pi (1 - t)/2)``: few reveals a step near noise, where tokens drawn together fit least."""

    name = "cosine"

    def coefficients(self, t: Any) -> Coefficients:
        """Shares ``alpha`` revealed and ``sigma = 1 - alpha`` masked, and their slopes."""
        xp, t = resolve(t)
        half = np.pi / 2
        sigma, slope = xp.sin(half * t), half * xp.sin(half * (1 - t))
        # near noise 1 - cos(2 v) as 2 sin(v)^2, so that alpha keeps its digits
        alpha = xp.where(t < 0.5, 1 - sigma, 2 * xp.sin(half / 2 * (1 - t)) ** 2)
        return Coefficients(alpha, sigma, -slope, slope, xp.ones_like(t))

    def time(self, sigma: Any) -> Any:
        """The time at which the share ``sigma`` is masked."""
        xp, sigma = resolve(sigma)
        return 2 / np.pi * xp.arcsin(sigma)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bits:
    """The noise of a masked process: 32 uniform bits a position, which say when it is masked."""

    name = "mask"
    gaussian = False

    def sample(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
        """One draw of ``shape`` (one example), uint32 whatever ``dtype`` the data have."""
        return jax.random.bits(key, shape, jnp.uint32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """The law of pure noise: every position is ``mask_id``."""

    mask_id: int = dataclasses.field(metadata={"static": True})
    name = "mask"
    gaussian = False

    def sample(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.Array:
        """One example of ``shape``; the key is not used."""
        return jnp.full(shape, self.mask_id, dtype)

    def log_prob(self, x: jax.Array) -> jax.Array:
        """0 for each example of ``x`` (B, ...) that is masked throughout, else -inf; shape (B,)."""
        return jnp.where(jnp.all(jnp.reshape(x, (x.shape[0], -1)) == self.mask_id, -1), 0.0, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """Tokens 0..V-1 that are masked one by one; position d shows ``x0_d`` with probability ``alpha(t)`` and V else.

    Build with :func:`masked`. It has what grids and makers ask of a :class:`~jaxdiff.process.Process`: ``coefficients(t)`` are
    the share ``alpha`` of revealed and ``sigma = 1 - alpha`` of masked positions, so that
    ``E[one_hot(x_t)] = alpha one_hot(x0) + sigma e_V``; ``half_log_snr`` is ``log(alpha/sigma)``, the log-odds of being shown.
    """

    schedule: Any
    tokens: int = dataclasses.field(metadata={"static": True})
    t_max: float = dataclasses.field(default=1.0, metadata={"static": True})
    name = "masked"
    noise = Bits()
    clean = True
    appends_clean = False

    @property
    def path(self) -> Masked:
        """What grids read their ends from: the process itself."""
        return self

    @property
    def mask_id(self) -> int:
        """V: the mask is the index after the last token."""
        return self.tokens

    @property
    def prior(self) -> Mask:
        """The law of the start: all masked."""
        return Mask(self.tokens)

    def coefficients(self, t: Any) -> Coefficients:
        """``alpha, sigma`` and their slopes at ``t``, in its shape."""
        return self.schedule.coefficients(t)

    def half_log_snr(self, t: Any) -> Any:
        """``log(alpha/sigma)``, decreasing in t."""
        return self.coefficients(t).half_log_snr

    def time(self, lam: Any) -> Any:
        """Inverse of :meth:`half_log_snr`: ``sigma = 1/(1 + e^lam)``."""
        xp, lam = resolve(lam)
        small = xp.exp(-xp.abs(lam))
        return self.schedule.time(xp.where(lam >= 0, small, 1) / (1 + small))

    def network_time(self, t: Any) -> Any:
        """The time told to the network: ``t`` itself (it may ignore it: the masks say it all)."""
        return t

    def interior(self) -> tuple[Any, Any]:
        """Times between which log-odds grids place their interior points."""
        return 1e-3, 1 - 1e-3

    def corrupt(self, x0: Any, n: Any, t: Any) -> jax.Array:
        """``x_t`` from tokens ``x0`` (B, ...), bits ``n`` of ``noise``, times ``t`` aligned from the left.

        A position is masked where its bits, read as a number in [0, 1), are below ``sigma(t)``: with n kept and t growing it is
        a path of the process, on which masked positions stay masked. Raises ValueError for tokens that are not integers.
        """
        x0 = jnp.asarray(x0)
        if not jnp.issubdtype(x0.dtype, jnp.integer):
            raise ValueError(f"x0: dtype {x0.dtype} given; tokens are integers in 0..{self.tokens - 1}")
        sigma = expand(self.coefficients(t).sigma, jax.ShapeDtypeStruct(x0.shape, jnp.float32))
        return jnp.where(happens(n, sigma), jnp.asarray(self.tokens, x0.dtype), x0)


def _polynomial(exponent: Any = 2.0) -> Polynomial:
    if not isinstance(exponent, jax.Array) and not 1 <= float(exponent) < np.inf:
        raise ValueError(f"exponent: {exponent} given; need 1 <= exponent < inf")
    return Polynomial(leaf(exponent))


SCHEDULES = {"linear": lambda: _polynomial(1.0), "polynomial": _polynomial, "cosine": Cosine}


def masked(tokens: int, schedule: Any = "linear", *, t_max: float = 1.0, **options: Any) -> Masked:
    """Absorbing diffusion of ``tokens`` = V tokens (2107.03006 [140], 2406.04329); the mask is V.

    ``schedule``: a name of SCHEDULES with its options (``exponent`` of "polynomial"), or an object with ``coefficients(t)`` and
    ``time(sigma)``. Raises ValueError for another name, V < 1 and t_max outside (0, 1].
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int | np.integer) or tokens < 1:
        raise ValueError(f"tokens: {tokens!r} given; need the size of the vocabulary without the mask, at least 1")
    if not 0 < t_max <= 1:
        raise ValueError(f"t_max: {t_max} given; need 0 < t_max <= 1")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        schedule = SCHEDULES[schedule](**options)
    return Masked(schedule, int(tokens), float(t_max))
