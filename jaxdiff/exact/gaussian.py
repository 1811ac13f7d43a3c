"""Gaussian data: the denoiser is affine, so every sampler on it has exact moments and the flow is closed form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.exact.vectors import aligned, apply_matrix, leading, rows
from jaxdiff.prediction import Prediction
from jaxdiff.process.coefficients import Coefficients, expand
from jaxdiff.process.process import Process

__all__ = ["Gaussian", "GaussianFlow", "eigen", "gaussian_flow"]

_UNSET = object()


def eigen(cov: Any, dimension: int, field: str) -> tuple[np.ndarray, np.ndarray]:
    """``(basis (d, d), spectrum (d,))`` of a covariance: a variance () for all directions, or a matrix (d, d).

    Raises ValueError unless symmetric and positive semi-definite; rounding-size negative eigenvalues become 0.
    """
    cov = np.asarray(cov, np.float64)
    if cov.shape not in ((), (dimension, dimension)):
        raise ValueError(f"{field}: shape {cov.shape} given; need () or ({dimension}, {dimension})")
    scale = np.max(np.abs(cov))
    if not np.isfinite(scale) or np.max(np.abs(cov - cov.T)) > 1e-9 * scale:
        raise ValueError(f"{field}: a matrix that is not finite and symmetric given; need a covariance")
    if cov.shape == ():  # the decomposition of a large matrix takes minutes
        basis, spectrum = np.eye(dimension), np.full(dimension, float(cov))
    else:
        spectrum, basis = np.linalg.eigh(0.5 * (cov + cov.T))
    if spectrum[0] < -1e-9 * scale:
        raise ValueError(f"{field}: smallest eigenvalue {spectrum[0]:.3g} given; a covariance has none below 0")
    return basis, np.maximum(spectrum, 0.0)


def _reciprocal(v: Any) -> Any:
    """``1/v``, and 0 where v = 0: directions in which the law is a point carry no noise estimate."""
    positive = v > 0
    return jnp.where(positive, 1 / jnp.where(positive, v, 1), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Gaussian:
    """Data ``x0 ~ N(mean, U diag(l) U^T)`` in d dimensions, known in closed form at every noise level.

    ``Gaussian(mean, cov)``: ``mean`` (d,) or a number (d = 1); ``cov`` (d, d), or a variance () for all
    directions. The eigendecomposition is done once, on the host, in float64; ``Gaussian(mean, basis=U,
    spectrum=l)`` takes it as it is (arrays of any kind, traced ones too). Leaves stay float64 and are cast to
    the state's dtype where used.

    States are (..., d); 1-D worlds also take states without that axis, (B,). ``alpha`` and ``sigma`` are
    scalars or left-aligned with the state. Source: 2303.02490 [216].
    """

    mean: Any
    basis: Any
    spectrum: Any

    def __init__(self, mean: Any, cov: Any = _UNSET, *, basis: Any = _UNSET, spectrum: Any = _UNSET):
        if cov is not _UNSET:
            mean = np.atleast_1d(np.asarray(mean, np.float64))
            if mean.ndim != 1 or not np.all(np.isfinite(mean)):
                raise ValueError(f"mean: shape {mean.shape} given; need (d,) finite numbers")
            basis, spectrum = eigen(cov, mean.shape[0], "cov")
        elif basis is _UNSET or spectrum is _UNSET:
            raise TypeError("cov: missing; Gaussian needs cov, or both basis and spectrum")
        for name, value in (("mean", mean), ("basis", basis), ("spectrum", spectrum)):
            object.__setattr__(self, name, value)

    @property
    def dimension(self) -> int:
        """d."""
        return self.mean.shape[-1]

    def moments(self) -> tuple[Any, Any]:
        """Mean (d,) and covariance (d, d) of the data."""
        return self.mean, (self.basis * self.spectrum) @ self.basis.T

    def _whiten(self, x: Any, alpha: Any, sigma: Any) -> tuple:
        """``U^T (x - alpha mean)``, its variances ``alpha^2 l + sigma^2``, and what they were made of."""
        x, restore = rows(x, self.dimension)
        a, s = aligned(alpha, x), aligned(sigma, x)
        spectrum = jnp.asarray(self.spectrum, x.dtype)
        z = apply_matrix("ij,...i->...j", self.basis, x - a * jnp.asarray(self.mean, x.dtype))
        return z, a * a * spectrum + s * s, a, s, spectrum, restore

    def predict(self, x: Any, alpha: Any, sigma: Any) -> Prediction:
        """Posterior means of x0 and eps given ``x = alpha x0 + sigma eps``; finite at both ends.

        ``eps = sigma U (alpha^2 l + sigma^2)^-1 U^T (x - alpha mean)``,
        ``x0 = mean + alpha U l (alpha^2 l + sigma^2)^-1 U^T (x - alpha mean)``.
        """
        z, v, a, s, spectrum, restore = self._whiten(x, alpha, sigma)
        u = z * _reciprocal(v)
        data = jnp.asarray(self.mean, z.dtype) + apply_matrix("ij,...j->...i", self.basis, a * spectrum * u)
        return Prediction(restore(data), restore(apply_matrix("ij,...j->...i", self.basis, s * u)))

    def score(self, x: Any, alpha: Any, sigma: Any) -> jax.Array:
        """``grad_x log p`` of the marginal, shape of ``x``; 0 along directions of zero variance."""
        z, v, *_, restore = self._whiten(x, alpha, sigma)
        return restore(apply_matrix("ij,...j->...i", self.basis, -z * _reciprocal(v)))

    def velocity(self, x: Any, c: Coefficients) -> jax.Array:
        """PF-ODE velocity ``(da x0_hat + ds eps_hat)/pace``; not defined where ``pace`` is 0 (VP at t = 0)."""
        p = self.predict(x, c.alpha, c.sigma)
        return (expand(c.da, p.data) * p.data + expand(c.ds, p.data) * p.noise) / expand(c.pace, p.data)

    def log_prob(self, x: Any, alpha: Any = 1.0, sigma: Any = 0.0) -> jax.Array:
        """Log-density in nats of the marginal at (alpha, sigma), by default of the data; the vector axis is gone.

        Infinite or NaN where the marginal has a direction of zero variance (no density there).
        """
        z, v, *_ = self._whiten(x, alpha, sigma)
        return -0.5 * jnp.sum(z * z / v + jnp.log(v), -1) - 0.5 * self.dimension * math.log(2 * math.pi)

    def sample(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        """Data of shape ``(*shape, d)``; ``shape`` a number of samples or a tuple."""
        z = jax.random.normal(key, (*leading(shape), self.dimension), dtype)
        z = z * jnp.sqrt(jnp.asarray(self.spectrum, dtype))
        return jnp.asarray(self.mean, dtype) + apply_matrix("ij,...j->...i", self.basis, z)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GaussianFlow:
    """The PF-ODE map of Gaussian data; build with :func:`gaussian_flow`."""

    world: Gaussian
    process: Process

    def __call__(self, x: Any, t: Any, s: Any) -> jax.Array:
        """Carry the state ``x`` from time ``t`` to time ``s``."""
        start, stop = self.process.coefficients(t), self.process.coefficients(s)
        return self.between(x, start.alpha, start.sigma, stop.alpha, stop.sigma)

    def between(self, x: Any, alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any) -> jax.Array:
        """Carry ``x`` between two points of a path, whatever their times."""
        z, v, *_, restore = self.world._whiten(x, alpha_t, sigma_t)
        a, s = aligned(alpha_s, z), aligned(sigma_s, z)
        w = a * a * jnp.asarray(self.world.spectrum, z.dtype) + s * s
        ratio = w * _reciprocal(v)
        positive = ratio > 0
        ratio = jnp.where(positive, jnp.sqrt(jnp.where(positive, ratio, 1)), 0)
        mean = a * jnp.asarray(self.world.mean, z.dtype)
        return restore(mean + apply_matrix("ij,...j->...i", self.world.basis, ratio * z))


def gaussian_flow(world: Gaussian, process: Process) -> GaussianFlow:
    """The exact probability-flow map ``flow(x, t, s)`` of Gaussian data on a Gaussian path.

    ``x_s = alpha_s mean + U diag(sqrt((alpha_s^2 l + sigma_s^2)/(alpha_t^2 l + sigma_t^2))) U^T (x_t - alpha_t mean)``.
    Directions without variance (l = 0) scale as ``sigma_s/sigma_t``. Source: 2303.02490 [216].
    Raises ValueError for a world that is not Gaussian or a process whose noise is not.
    """
    if not isinstance(world, Gaussian):
        raise ValueError(f"world: {type(world).__name__} given; gaussian_flow() needs a Gaussian")
    if not process.noise.gaussian:
        raise ValueError(f"process: noise law {process.noise.name!r} given; gaussian_flow() needs 'gaussian'")
    return GaussianFlow(world, process)
