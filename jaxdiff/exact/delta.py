"""Delta data: one point. Every exponential-type solver must return it to rounding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.exact.vectors import leading
from jaxdiff.prediction import Prediction
from jaxdiff.process.coefficients import Coefficients, expand

__all__ = ["Delta"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """Data that is always ``point``: ``x0_hat = point``, ``eps_hat = (x - alpha point)/sigma``.

    ``point`` is a number, or an array of the shape of one example (it then spans the last axes of a state).
    """

    point: Any

    def _offset(self, x: Any, alpha: Any, sigma: Any) -> tuple:
        x = jnp.asarray(x)
        point = jnp.broadcast_to(jnp.asarray(self.point, x.dtype), x.shape)
        return point, x - expand(alpha, x) * point, expand(sigma, x)

    def moments(self) -> tuple[Any, Any]:
        """Mean (d,) and covariance (d, d) (zeros) of the data, flattened."""
        mean = np.reshape(self.point, -1)
        return mean, np.zeros((mean.size, mean.size))

    def predict(self, x: Any, alpha: Any, sigma: Any) -> Prediction:
        """``(point, (x - alpha point)/sigma)``; the noise is 0 at sigma = 0."""
        point, offset, s = self._offset(x, alpha, sigma)
        return Prediction(point, jnp.where(s != 0, offset / jnp.where(s != 0, s, 1), 0).astype(offset.dtype))

    def score(self, x: Any, alpha: Any, sigma: Any) -> jax.Array:
        """``-(x - alpha point)/sigma^2``; infinite or NaN at sigma = 0, where there is no density."""
        _, offset, s = self._offset(x, alpha, sigma)
        return -offset / (s * s)

    def velocity(self, x: Any, c: Coefficients) -> jax.Array:
        """PF-ODE velocity ``(da point + ds eps_hat)/pace``; not defined where ``pace`` is 0 (VP at t = 0)."""
        p = self.predict(x, c.alpha, c.sigma)
        return (expand(c.da, p.data) * p.data + expand(c.ds, p.data) * p.noise) / expand(c.pace, p.data)

    def log_prob(self, x: Any, alpha: Any, sigma: Any) -> jax.Array:
        """Log-density in nats of ``N(alpha point, sigma^2)``, summed over the axes of ``point``."""
        _, offset, s = self._offset(x, alpha, sigma)
        each = -0.5 * (offset / s) ** 2 - jnp.log(s) - 0.5 * math.log(2 * math.pi)
        return jnp.sum(each, tuple(range(each.ndim - np.ndim(self.point), each.ndim)))

    def sample(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        """``point`` repeated, of shape ``(*shape, *point.shape)``; the key is not used."""
        return jnp.broadcast_to(jnp.asarray(self.point, dtype), (*leading(shape), *np.shape(self.point)))
