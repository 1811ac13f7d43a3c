"""Which noise meets which data: independently, or re-paired inside small groups by optimal transport.

A coupling is ``(keys, x0, noise, cond) -> noise``, a rearrangement of the noise. Groups are consecutive rows of the
batch, that is consecutive global indices, so that the pairing of an example does not depend on batch size or device
count as long as groups are not cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.near import unknown

__all__ = ["COUPLINGS", "independent", "minibatch_ot", "pairing_cost", "sinkhorn_plan"]

Coupling = Callable[[jax.Array, Any, Any, Any], Any]
METHODS = ("exact", "sinkhorn", "ott")


def independent() -> Coupling:
    """The noise as it was drawn."""
    return lambda keys, x0, noise, cond: noise


def pairing_cost(x0: jax.Array, noise: jax.Array, cond: jax.Array | None = None) -> jax.Array:
    """(g, g) cost of giving noise j to data i: ``-<x0_i, n_j>``, which has the optimum of ``|x0_i - n_j|^2 / 2``.

    (The squares only add terms of one index.) With ``cond``, pairs of unequal conditions cost so much more that no
    optimal assignment holds one: leaving all in place costs less.
    """
    cost = -jnp.einsum("i...,j...->ij", x0, noise, precision="highest").astype(jnp.float32)
    if cond is None:
        return cost
    cond = jnp.reshape(cond, (cond.shape[0], -1))
    differ = jnp.any(cond[:, None] != cond[None], -1)
    return cost + differ * (cost.shape[0] * (jnp.max(cost) - jnp.min(cost)) + 1)


def sinkhorn_plan(cost: jax.Array, epsilon: Any, iterations: int) -> jax.Array:
    """(g, g) log-plan of entropic transport between uniform weights, by log-domain Sinkhorn iterations.

    ``log P = (f_i + g_j - cost)/epsilon``; ends on a row update, so rows sum to 1/g exactly.
    """
    size = cost.shape[0]
    kernel, log_weight = -cost / epsilon, -jnp.log(jnp.float32(size))

    def update(potentials: tuple, _: Any) -> tuple:
        f, _ = potentials
        g = log_weight - jax.nn.logsumexp(kernel + f[:, None], 0)
        f = log_weight - jax.nn.logsumexp(kernel + g[None], 1)
        return (f, g), None

    zeros = jnp.zeros(size, kernel.dtype)
    (f, g), _ = jax.lax.scan(update, (zeros, zeros), None, length=iterations)
    return kernel + f[:, None] + g[None]


def _ott_plan(cost: jax.Array, epsilon: Any, iterations: int) -> jax.Array:
    """What :func:`sinkhorn_plan` computes, by ott-jax, which stops when the columns sum to 1/g within 1e-5."""
    from ott.geometry import geometry
    from ott.solvers import linear

    problem = geometry.Geometry(cost_matrix=cost, epsilon=epsilon)
    # its own threshold of 1e-3 stops with columns half a per cent off, where sinkhorn_plan would go on
    out: Any = linear.solve(problem, max_iterations=iterations, threshold=1e-5)  # full rank, so with potentials
    return (out.f[:, None] + out.g[None] - cost) / epsilon  # the matrix itself underflows where epsilon is small


def minibatch_ot(
    group: int = 16,
    *,
    method: str = "exact",
    per_class: bool = True,
    epsilon: Any = 0.05,
    iterations: int = 100,
) -> Coupling:
    """Noise re-paired with data inside groups to shorten paths (2302.00482, 2304.14772).

    The law of the noise is unchanged. That of the noise *given the condition* changes unless pairing respects it:
    ``per_class`` pairs only examples of equal condition (true labels, before dropping), and then guidance and
    conditional sampling may start from plain noise.

    Args:
        group: rows a group; 1 is independent pairing, bitwise. It must divide the batch (each device's share of it).
        method: "exact" assignment (optax, O(group^3)); "sinkhorn", a row of the entropic plan sampled for every
            example (rows may then share noise); "ott", the same plan by ott-jax, which stops once it has converged.
        per_class: see above; without a condition it does nothing.
        epsilon: entropic regularisation, as a fraction of the standard deviation of the cost.
        iterations: of Sinkhorn; its plan's column sums are 1/group only in the limit.

    Raises:
        ValueError: group < 1, an unknown method, a batch that groups do not divide; ModuleNotFoundError: "ott"
            without ott-jax.
    """
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"group: {group!r} given; minibatch_ot() needs an integer >= 1")
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if method != "exact" and not (epsilon > 0 and iterations >= 1):
        raise ValueError(f"epsilon, iterations: {epsilon}, {iterations} given; need epsilon > 0, iterations >= 1")
    if method == "ott":
        try:
            import ott  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "method: 'ott' needs ott-jax; pip install 'jaxdiff[ot]', or use 'exact' or 'sinkhorn'",
                name=error.name,
            ) from None
    plan = _ott_plan if method == "ott" else sinkhorn_plan

    def choose(keys: jax.Array, x0: jax.Array, noise: jax.Array, cond: Any) -> jax.Array:
        plain = pairing_cost(x0, noise)
        cost = plain if cond is None else pairing_cost(x0, noise, cond)
        if method == "exact":
            from optax.assignment import hungarian_algorithm

            rows, columns = hungarian_algorithm(cost)
            chosen = jnp.zeros_like(columns).at[rows].set(columns)
        else:
            scale = epsilon * jnp.maximum(jnp.std(plain), 1e-12)
            log_plan = plan(cost, scale, iterations)
            # a class penalty is finite, so forbid what it makes improbable
            log_plan = log_plan if cond is None else jnp.where(cost - plain > 0, -jnp.inf, log_plan)
            chosen = jax.vmap(jax.random.categorical)(keys, log_plan)
        return noise[chosen]

    def coupling(keys: jax.Array, x0: jax.Array, noise: jax.Array, cond: Any) -> jax.Array:
        if group == 1:
            return noise
        size = x0.shape[0]
        if size % group:
            raise ValueError(f"group: {group} given; it must divide the batch (here {size} rows)")
        cut = lambda v: jnp.reshape(v, (size // group, group, *v.shape[1:]))
        cond = cut(cond) if per_class and cond is not None else None
        paired = jax.vmap(choose, in_axes=(0, 0, 0, None if cond is None else 0))(
            cut(keys), cut(x0), cut(noise), cond
        )
        return jnp.reshape(paired, noise.shape)

    return coupling


COUPLINGS = {"independent": independent, "ot": minibatch_ot}
