"""The 1-D oracle: the PF-ODE flow of any 1-D law is its quantile map, ``x_s = F_s^-1(F_t(x_t))``.

No reference solver is needed for convergence orders or gradients. All probabilities are kept as the logarithm
of the smaller tail, so that a state eight standard deviations out is mapped as well as one in the middle.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.exact.delta import Delta
from jaxdiff.exact.gaussian import Gaussian
from jaxdiff.exact.mixture import GaussianMixture
from jaxdiff.process.coefficients import expand
from jaxdiff.process.process import Process

__all__ = ["QuantileFlow", "quantile_flow"]

STEPS = 100  # of a bracketed Newton iteration that halves at worst: enough to exhaust float64
TINY = 1e-15  # smallest standard deviation of a component: points at sigma = 0 become steps of this width


def _log_pdf(z: jax.Array) -> jax.Array:
    return -0.5 * z * z - 0.5 * jnp.log(2 * jnp.asarray(np.pi, z.dtype))


def _normal_quantile(log_p: jax.Array) -> jax.Array:
    """``z <= 0`` with ``log Phi(z) = log_p <= log(1/2)``.

    ``log Phi`` is concave and ``Phi(z) <= exp(-z^2/2)/2``, so Newton from that bound rises to the root without
    ever passing it; it needs at most seven steps in float64.
    """

    def newton(_: Any, z: jax.Array) -> jax.Array:
        here = jax.scipy.special.log_ndtr(z)
        return jnp.minimum(z - (here - log_p) * jnp.exp(here - _log_pdf(z)), 0)

    return jax.lax.fori_loop(0, 7, newton, -jnp.sqrt(2 * jnp.maximum(-log_p - np.log(2.0), 0)))


def _log_tail(y: jax.Array, log_weights: jax.Array, means: jax.Array, scales: jax.Array) -> tuple:
    """Log of the mixture's lower tail at ``y`` and its derivative; components on the last axis of the rest."""
    z = (y[..., None] - means) / scales
    tail = jax.nn.logsumexp(log_weights + jax.scipy.special.log_ndtr(z), -1)
    density = jax.nn.logsumexp(log_weights + _log_pdf(z) - jnp.log(scales), -1)
    return tail, jnp.exp(density - tail)


def _solve(log_p: jax.Array, log_weights: jax.Array, means: jax.Array, scales: jax.Array) -> jax.Array:
    """``y`` whose log lower tail is ``log_p``: Newton kept inside a bracket, bisecting when it is slow.

    A mixture's p-quantile lies between the smallest and the largest p-quantile of its components.
    """
    quantiles = means + scales * _normal_quantile(log_p)[..., None]
    low, high = jnp.min(quantiles, -1), jnp.max(quantiles, -1)
    eps = jnp.finfo(log_p.dtype).eps
    finest = jnp.min(scales, -1)

    def body(carry: tuple) -> tuple:
        step, y, low, high, before, last, done = carry
        tail, slope = _log_tail(y, log_weights, means, scales)
        gap = tail - log_p
        low, high = jnp.where(gap < 0, y, low), jnp.where(gap > 0, y, high)
        move = -gap / jnp.where(slope > 0, slope, 1)
        newton = (slope > 0) & (y + move >= low) & (y + move <= high) & (2 * jnp.abs(move) <= jnp.abs(before))
        target = jnp.where(newton, y + move, low + 0.5 * (high - low))
        target = jnp.where(done | (gap == 0), y, target)
        moved = target - y
        done = done | (jnp.abs(moved) <= eps * (jnp.abs(y) + finest)) | (newton & (jnp.abs(gap) <= eps))
        return step + 1, target, low, high, last, moved, done

    def more(carry: tuple) -> jax.Array:
        return (carry[0] < STEPS) & ~jnp.all(carry[-1])

    width = high - low
    start = (0, low + 0.5 * width, low, high, 2 * width, 2 * width, jnp.zeros(width.shape, bool))
    return jax.lax.while_loop(more, body, start)[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantileFlow:
    """The exact 1-D PF-ODE map; build with :func:`quantile_flow`. States are of any shape, one sample an element."""

    weights: Any
    means: Any
    variances: Any
    process: Process

    def __call__(self, x: Any, t: Any, s: Any) -> jax.Array:
        """Carry the state ``x`` from time ``t`` to time ``s`` (left-aligned), shape and dtype of ``x``."""
        start, stop = self.process.coefficients(t), self.process.coefficients(s)
        return self.between(x, start.alpha, start.sigma, stop.alpha, stop.sigma)

    def _at(self, x: jax.Array, alpha: Any, sigma: Any) -> tuple:
        a, s = expand(alpha, x)[..., None], expand(sigma, x)[..., None]
        variances = a * a * jnp.asarray(self.variances, x.dtype) + s * s
        means = a * jnp.asarray(self.means, x.dtype)
        shape = (*x.shape, means.shape[-1])
        return jnp.broadcast_to(means, shape), jnp.broadcast_to(jnp.sqrt(jnp.maximum(variances, TINY**2)), shape)

    def between(self, x: Any, alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any) -> jax.Array:
        """Carry ``x`` between two points of a path, whatever their times.

        Differentiable in every argument and parameter: the root's derivative is that of a Newton step.
        """
        x = jnp.asarray(x)
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        log_weights = jnp.log(jnp.asarray(self.weights, y.dtype))
        means, scales = self._at(y, alpha_t, sigma_t)
        below, above = (_log_tail(sign * y, log_weights, sign * means, scales)[0] for sign in (1, -1))
        side = jnp.where(below <= above, 1, -1).astype(y.dtype)  # the smaller tail, as a lower tail
        log_p = jnp.minimum(below, above)
        means, scales = self._at(y, alpha_s, sigma_s)
        problem = (log_p, log_weights, side[..., None] * means, scales)
        root = _solve(*jax.lax.stop_gradient(problem))
        tail, slope = _log_tail(root, *problem[1:])
        residual = (tail - log_p) / jax.lax.stop_gradient(jnp.where(slope > 0, slope, jnp.inf))
        tangent = jax.lax.stop_gradient(residual) - residual  # zero: it only carries the root's derivative
        return (side * (root + tangent)).astype(x.dtype)

    def jacobian(self, x: Any, t: Any, s: Any) -> jax.Array:
        """``dx_s/dx_t = p_t(x_t)/p_s(x_s)``, shape of ``x``."""
        x = jnp.asarray(x)
        y = self(x, t, s)
        start, stop = self.process.coefficients(t), self.process.coefficients(s)
        return jnp.exp(self.log_prob(x, start.alpha, start.sigma) - self.log_prob(y, stop.alpha, stop.sigma))

    def log_prob(self, x: Any, alpha: Any, sigma: Any) -> jax.Array:
        """Log-density in nats of the marginal at each element of ``x``."""
        x = jnp.asarray(x)
        means, scales = self._at(x, alpha, sigma)
        log_weights = jnp.log(jnp.asarray(self.weights, x.dtype))
        return jax.nn.logsumexp(log_weights + _log_pdf((x[..., None] - means) / scales) - jnp.log(scales), -1)


def quantile_flow(world: Any, process: Process) -> QuantileFlow:
    """The exact probability-flow map ``flow(x, t, s) = F_s^-1(F_t(x))`` of a 1-D world, between any two times.

    ``world``: a Gaussian, GaussianMixture or Delta in one dimension. The start must have a density (sigma > 0,
    or no point components); between modes that share no mass the map is as ill-conditioned as the law itself.
    Raises ValueError for more dimensions or noise that is not Gaussian.
    """
    if not process.noise.gaussian:
        raise ValueError(f"process: noise law {process.noise.name!r} given; quantile_flow() needs 'gaussian'")
    if isinstance(world, Delta) and np.size(world.point) == 1:
        point = world.point if isinstance(world.point, jax.Array) else np.asarray(world.point, np.float64)
        return QuantileFlow(np.ones(1), point.reshape(1), np.zeros(1), process)
    if isinstance(world, Gaussian) and world.dimension == 1:
        return QuantileFlow(np.ones(1), world.mean, world.spectrum, process)
    if isinstance(world, GaussianMixture) and world.dimension == 1:
        return QuantileFlow(world.weights, world.means[:, 0], world.spectra[:, 0], process)
    raise ValueError(
        f"world: {type(world).__name__} with {getattr(world, 'dimension', 'several')} dimensions given; "
        "quantile_flow() needs a Gaussian, GaussianMixture or Delta in one"
    )
