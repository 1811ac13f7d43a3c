"""Gaussian mixtures in d dimensions: multimodal data whose denoiser, score and density are closed form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.exact.gaussian import eigen
from jaxdiff.exact.vectors import aligned, apply_matrix, leading, rows
from jaxdiff.prediction import Prediction
from jaxdiff.process.coefficients import Coefficients, expand

__all__ = ["GaussianMixture"]

_UNSET = object()
FLOOR = 1e-24
"""Smallest marginal variance used: point components at sigma = 0 then have finite log-densities and the
posterior is the nearest one, its limit."""


def _flatten(means: Any, covs: Any) -> tuple[np.ndarray, list]:
    means = np.asarray(means, np.float64)
    means = means[:, None] if means.ndim == 1 else means
    if means.ndim != 2 or means.shape[0] == 0:
        raise ValueError(f"means: shape {means.shape} given; need (K, d), or (K,) in one dimension")
    if not np.all(np.isfinite(means)):
        raise ValueError(f"means: {np.sum(~np.isfinite(means))} of {means.size} numbers given are not finite")
    covs = np.asarray(covs, np.float64)
    covs = np.broadcast_to(covs, means.shape[:1]) if covs.ndim == 0 else covs
    if covs.ndim not in (1, 3) or covs.shape[0] != means.shape[0]:
        raise ValueError(f"covs: shape {covs.shape} given for means {means.shape}; need (K, d, d), (K,) or ()")
    return means, [eigen(cov, means.shape[1], f"covs[{k}]") for k, cov in enumerate(covs)]


def _normalise(weights: Any, count: int) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (count,) or not np.all(weights >= 0) or not 0 < np.sum(weights) < np.inf:
        raise ValueError(f"weights: {weights} given; need ({count},) non-negative numbers with a positive sum")
    return weights / np.sum(weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class GaussianMixture:
    """Data ``x0 ~ sum_k w_k N(mean_k, U_k diag(l_k) U_k^T)`` with K components in d dimensions.

    ``GaussianMixture(weights, means, covs, labels=None)``: ``weights`` (K,), normalised here; ``means`` (K, d),
    or (K,) for d = 1; ``covs`` (K, d, d), or variances (K,) or (), the same in all directions (0: points).
    ``labels`` (K,) gives each component a class >= 0; every function then takes ``cond``, integer classes
    aligned with the samples, -1 for all classes. The eigendecompositions are done once, on the host, in float64;
    ``bases=, spectra=`` take them as they are. Leaves stay float64, cast to the state's dtype where used.

    States are (..., d); 1-D worlds also take states without that axis, (B,). ``alpha`` and ``sigma`` are
    scalars or left-aligned with the state. Responsibilities go through log-sum-exp, so far tails are finite.
    """

    weights: Any
    means: Any
    bases: Any
    spectra: Any
    labels: Any

    def __init__(
        self,
        weights: Any,
        means: Any,
        covs: Any = _UNSET,
        *,
        labels: Any = None,
        bases: Any = _UNSET,
        spectra: Any = _UNSET,
    ):
        if covs is not _UNSET:
            means, pairs = _flatten(means, covs)
            bases, spectra = (np.stack(each) for each in zip(*pairs))
            weights = _normalise(weights, means.shape[0])
            if labels is not None:
                labels = np.asarray(labels)
                if labels.shape != weights.shape or labels.dtype.kind not in "iu" or labels.min() < 0:
                    raise ValueError(f"labels: {labels} given; need {weights.shape} integers >= 0")
                labels = labels.astype(np.int32)
        elif bases is _UNSET or spectra is _UNSET:
            raise TypeError("covs: missing; GaussianMixture needs covs, or both bases and spectra")
        fields = {"weights": weights, "means": means, "bases": bases, "spectra": spectra, "labels": labels}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def dimension(self) -> int:
        """d."""
        return self.means.shape[-1]

    def moments(self) -> tuple[Any, Any]:
        """Mean (d,) and covariance (d, d) of the data."""
        mean = self.weights @ self.means
        centred = self.means - mean
        second = ((self.bases * self.spectra[:, None, :]) @ self.bases.mT) + centred[:, :, None] * centred[:, None, :]
        return mean, (self.weights[:, None, None] * second).sum(0)

    def _log_prior(self, x: jax.Array, cond: Any) -> jax.Array:
        """Log-weights of the components (..., K) among those of the class asked for."""
        log_weights = jnp.log(jnp.asarray(self.weights, x.dtype))
        if cond is None:
            return log_weights
        if self.labels is None:
            raise ValueError("cond: given, but this mixture has no labels; build it with labels=")
        cond = jnp.asarray(cond)
        cond = jnp.reshape(cond, cond.shape + (1,) * (x.ndim - cond.ndim))
        chosen = jnp.where((cond < 0) | (cond == jnp.asarray(self.labels)), log_weights, -jnp.inf)
        return chosen - jax.nn.logsumexp(chosen, -1, keepdims=True)

    def _components(self, x: Any, alpha: Any, sigma: Any, cond: Any) -> tuple:
        """``U_k^T (x - alpha mean_k)`` (..., K, d), its variances, the joint log-densities (..., K) and their offset.

        The log-densities are formed relative to one reference Gaussian, centred at the mixture's mean with the largest
        variance v0, so that at low signal they are small numbers (all proportional to alpha) and not small
        differences of large ones; ``offset`` (...,) is the reference's own log-density.
        """
        x, restore = rows(x, self.dimension)
        a, s = aligned(alpha, x), aligned(sigma, x)
        spectra, centre = jnp.asarray(self.spectra, x.dtype), self.weights @ self.means
        x = x - a * jnp.asarray(centre, x.dtype)
        widest = jnp.max(spectra)
        v0 = jnp.maximum(a * a * widest + s * s, FLOOR)
        offset = -0.5 * jnp.sum(x * x / v0 + jnp.log(2 * math.pi * v0), -1)
        a, s, v0, x = (each[..., None, :] for each in (a, s, v0, x))
        shift = a * jnp.asarray(self.means - centre, x.dtype)
        z = apply_matrix("kij,...ki->...kj", self.bases, x - shift)
        v = jnp.maximum(a * a * spectra + s * s, FLOOR)
        narrower = a * a * (widest - spectra) / v0  # 1 - v/v0, without cancellation
        log_ratio = jnp.where(narrower < 0.5, jnp.log1p(-jnp.minimum(narrower, 0.5)), jnp.log(v / v0))
        square = narrower * z * z / v + shift * (shift - 2 * x) / v0
        log_joint = self._log_prior(x[..., 0, :], cond) - 0.5 * jnp.sum(square + log_ratio, -1)
        return z, v, a, s, spectra, log_joint, offset, restore

    def log_posterior(self, x: Any, alpha: Any, sigma: Any, cond: Any = None) -> jax.Array:
        """Log-probability of each component given the state, (..., K)."""
        return jax.nn.log_softmax(self._components(x, alpha, sigma, cond)[5], -1)

    def predict(self, x: Any, alpha: Any, sigma: Any, cond: Any = None) -> Prediction:
        """Posterior means of x0 and eps given ``x = alpha x0 + sigma eps``; finite at both ends.

        The responsibility-weighted means of the components' own, ``r_k = softmax_k log w_k N(x; ...)``.
        """
        z, v, a, s, spectra, log_joint, _, restore = self._components(x, alpha, sigma, cond)
        r = jax.nn.softmax(log_joint, -1)[..., None]
        u = r * z / v
        data = jnp.sum(r * jnp.asarray(self.means, z.dtype), -2)
        data = data + apply_matrix("kij,...kj->...i", self.bases, a * spectra * u)
        return Prediction(restore(data), restore(apply_matrix("kij,...kj->...i", self.bases, s * u)))

    def score(self, x: Any, alpha: Any, sigma: Any, cond: Any = None) -> jax.Array:
        """``grad_x log p`` of the marginal, shape of ``x``."""
        z, v, *_, log_joint, _, restore = self._components(x, alpha, sigma, cond)
        r = jax.nn.softmax(log_joint, -1)[..., None]
        return restore(apply_matrix("kij,...kj->...i", self.bases, -r * z / v))

    def velocity(self, x: Any, c: Coefficients, cond: Any = None) -> jax.Array:
        """PF-ODE velocity ``(da x0_hat + ds eps_hat)/pace``; not defined where ``pace`` is 0 (VP at t = 0)."""
        p = self.predict(x, c.alpha, c.sigma, cond)
        return (expand(c.da, p.data) * p.data + expand(c.ds, p.data) * p.noise) / expand(c.pace, p.data)

    def log_prob(self, x: Any, alpha: Any = 1.0, sigma: Any = 0.0, cond: Any = None) -> jax.Array:
        """Log-density in nats of the marginal at (alpha, sigma), by default of the data; the vector axis is gone.

        A marginal variance below 1e-24 (points at sigma = 0, which have no density) counts as 1e-24.
        """
        *_, log_joint, offset, _ = self._components(x, alpha, sigma, cond)
        return jax.nn.logsumexp(log_joint, -1) + offset

    def sample(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32, cond: Any = None) -> jax.Array:
        """Data of shape ``(*shape, d)``; ``shape`` a number of samples or a tuple; ``cond`` aligned with it."""
        pick, draw = jax.random.split(key)
        shape = leading(shape)
        z = jax.random.normal(draw, (*shape, self.dimension), dtype)
        k = jax.random.categorical(pick, jnp.broadcast_to(self._log_prior(z, cond), (*shape, len(self.weights))))
        z = z * jnp.sqrt(jnp.asarray(self.spectra, dtype))[k]
        return jnp.asarray(self.means, dtype)[k] + apply_matrix(
            "...ij,...j->...i", jnp.asarray(self.bases, dtype)[k], z
        )
