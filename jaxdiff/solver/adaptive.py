"""Adaptive solvers: a step size of its own for every sample, in one compiled call. Not tables, the same arguments."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.process.coefficients import expand
from jaxdiff.process.process import Process

__all__ = ["Adapted", "adaptive_ode"]

METHODS = {"tsit5": "Tsit5", "dopri5": "Dopri5", "dopri8": "Dopri8", "heun": "Heun"}


class Adapted(NamedTuple):
    """Samples ``x`` (B, ...) and per sample the steps tried (B,), rejected ones included."""

    x: jax.Array
    steps: jax.Array


def adaptive_ode(
    process: Process,
    d: Any,
    x: Any,
    *,
    t_min: float = 1e-4,
    rtol: Any = 1e-5,
    atol: Any = 1e-5,
    method: str = "tsit5",
    cond: Any = None,
    max_steps: int = 4096,
) -> Adapted:
    """The probability-flow ODE from ``x`` at t_max to data, by diffrax with step control per sample.

    Integrated in the angle ``phi = atan2(sigma, alpha)`` of the unit-norm state ``u = x/sqrt(alpha^2 + sigma^2)``,
    ``du/dphi = cos phi eps_hat - sin phi x0_hat``, which is finite on every path, also from alpha = 0, down to ``t_min``;
    from there one exact jump ``x0_hat`` (error O(sigma(t_min)^2)). ``cond`` (B, ...) is handed to the denoiser sample by
    sample. The solve is vmapped: samples take steps of their own, and the call as many as the slowest needs.

    Raises ValueError for unknown methods, tolerances not above 0, and stateful denoisers; the compiled call
    raises when a sample needs more than ``max_steps``.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method: {method!r} is unknown; allowed: {', '.join(METHODS)}{hint}")
    traced = any(isinstance(v, jax.core.Tracer) for v in (rtol, atol))
    if not traced and not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol, atol: {rtol}, {atol} given; need tolerances above 0")
    if not 0 < t_min < process.t_max:
        raise ValueError(f"t_min: {t_min} given; need 0 < t_min < t_max = {process.t_max}")
    d = prediction.lift(d)
    if hasattr(d, "step"):
        raise ValueError("d: stateful; an adaptive solver may reject steps and needs a plain denoiser")
    import diffrax

    x = jnp.asarray(x)
    ends = process.coefficients(np.array([process.t_max, t_min]))
    first, last = (float(v) for v in np.arctan2(ends.sigma, ends.alpha))
    norm = float(np.hypot(ends.alpha[0], ends.sigma[0]))
    tiny = float(jnp.finfo(x.dtype).tiny)

    def ask(own: Any, u: jax.Array, phi: Any) -> tuple:
        alpha, sigma = jnp.maximum(jnp.cos(phi), 0), jnp.maximum(jnp.sin(phi), 0)
        lam = jnp.log(jnp.maximum(alpha, tiny)) - jnp.log(jnp.maximum(sigma, tiny))
        t = jnp.clip(process.time(lam), 0, process.t_max)
        c = process.coefficients(t)
        size = jnp.sqrt(c.alpha**2 + c.sigma**2)
        query = prediction.Query(t, None, c.alpha, c.sigma)
        return prediction.evaluate(own, (), (expand(size, u) * u)[None], query)[0], alpha, sigma

    def field(phi: Any, u: jax.Array, own: Any) -> jax.Array:
        told, alpha, sigma = ask(own, u, phi)
        return (alpha * told.noise - sigma * told.data)[0]

    def one(start: jax.Array, label: Any) -> tuple:
        own = d if label is None else prediction.condition(d, jax.tree.map(lambda v: v[None], label))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            getattr(diffrax, METHODS[method])(),
            first,
            last,
            None,
            start / norm,
            own,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=max_steps,
        )
        return ask(own, solution.ys[0], jnp.asarray(last, start.dtype))[0].data[0], solution.stats["num_steps"]

    return Adapted(*jax.vmap(one)(x, cond))
