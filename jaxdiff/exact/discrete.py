"""A law of short token sequences, small enough to list: exact posteriors, and the exact law of what a sampler returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.prediction import DiscretePrediction

__all__ = ["Enumerable", "enumerable"]

STATES = 4096  # (V + 1)^L: the law of a sampler takes a matrix of this size squared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Enumerable:
    """Data of the law ``probs`` (V,)*L over L tokens 0..V-1; a masked position is V. Build with :func:`enumerable`."""

    probs: Any
    law = "mask"

    def predict(self, x: Any, alpha: Any = None, sigma: Any = None) -> DiscretePrediction:
        """``log mu`` (..., L, V) at ``x`` (..., L): the law of every position of the data given the revealed ones.

        ``mu_d(v) = sum_s P(s) 1[s agrees with x] 1[s_d = v] / Z``; a revealed position has its own token for certain, at any
        noise level. Uniform at masked positions where no sequence agrees. numpy float64 when given numpy.
        """
        xp: Any = jnp if isinstance(x, jax.Array) else np
        dtype = jnp.result_type(float) if xp is jnp else np.float64
        tokens, sequences = self.probs.shape[0], _listed(self.probs.shape)
        x = xp.asarray(x)
        masked = x == tokens
        agrees = xp.all((x[..., None, :] == sequences) | masked[..., None, :], -1)
        weight = xp.where(agrees, xp.asarray(self.probs, dtype).reshape(-1), 0)
        one_hot = np.eye(tokens)[sequences].astype(dtype)
        options = {"precision": jax.lax.Precision.HIGHEST} if xp is jnp else {}
        mass = xp.einsum("...n,nlv->...lv", weight, one_hot, **options)
        total = weight.sum(-1)[..., None, None]
        mu = xp.where(total > 0, mass / xp.where(total > 0, total, 1), 1 / tokens)
        mu = xp.where(masked[..., None], mu, x[..., None] == np.arange(tokens))
        with np.errstate(divide="ignore"):
            return DiscretePrediction(xp.log(mu))

    def output_law(self, reveal: Any, remask: Any = None) -> np.ndarray:
        """The exact law (V+1,)*L of what a table returns that reveals masked positions with probabilities ``reveal``, (K,) or
        (K, L), from this posterior, and masks revealed ones again with ``remask``; started all masked. float64, host."""
        shape = tuple(n + 1 for n in self.probs.shape)
        length, mask = len(shape), self.probs.shape[0]
        reveal = _per_position(reveal, length)
        remask = np.zeros_like(reveal) if remask is None else _per_position(remask, length)
        states = _listed(shape)
        masked = states == mask
        own, hidden = np.eye(mask + 1)[states], np.eye(mask + 1)[mask]
        found = np.concatenate([np.exp(self.predict(states).log_probs), np.zeros((*states.shape, 1))], -1)
        law = np.zeros(len(states))
        law[-1] = 1.0  # the state with every position masked is listed last
        for u, c in zip(reveal[..., None], remask[..., None]):
            change = np.where(masked[..., None], u, c)
            site = (1 - change) * own + change * np.where(masked[..., None], found, hidden)
            step = np.ones((len(states), 1))
            for d in range(length):  # positions are drawn independently, given the state
                step = (step[:, :, None] * site[:, d, None, :]).reshape(len(states), -1)
            law = law @ step
        return law.reshape(shape)


def _listed(shape: tuple[int, ...]) -> np.ndarray:
    """All index tuples of an array of ``shape``, (N, L), in the order of ``ravel``."""
    return np.stack(np.unravel_index(np.arange(int(np.prod(shape))), shape), -1)


def _per_position(values: Any, length: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return np.broadcast_to(values.reshape(values.shape[0], -1), (values.shape[0], length))


def enumerable(probs: Any) -> Enumerable:
    """Validate, normalise and build; see :class:`Enumerable`. Raises ValueError unless ``probs`` is (V,)*L, not negative, not
    all 0, with (V+1)^L at most 4096."""
    probs = np.array(probs, np.float64)
    if probs.ndim < 1 or len(set(probs.shape)) != 1 or (probs.shape[0] + 1) ** probs.ndim > STATES:
        raise ValueError(f"probs: shape {probs.shape} given; need (V,)*L with (V+1)^L at most {STATES}")
    if not np.all(np.isfinite(probs)) or np.any(probs < 0) or not np.sum(probs) > 0:
        raise ValueError("probs: need finite numbers >= 0, not all 0")
    probs /= probs.sum()
    probs.setflags(write=False)
    return Enumerable(probs)
