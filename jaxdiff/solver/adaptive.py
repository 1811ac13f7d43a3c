"""Adaptive solvers: a step size of its own for every sample, in one compiled call. Not tables, the same arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.near import unknown
from jaxdiff.process.coefficients import expand
from jaxdiff.process.process import Process

__all__ = ["Adapted", "adaptive_ode"]

METHODS = {"tsit5": "Tsit5", "dopri5": "Dopri5", "dopri8": "Dopri8", "heun": "Heun"}


class Adapted(NamedTuple):
    """Samples ``x`` (B, ...) and per sample, rejected ones included, the ``steps`` tried and the evaluations ``nfe``, (B,)."""

    x: jax.Array
    steps: jax.Array
    nfe: jax.Array


def stateless(d: Any, x: Any, who: str = "an adaptive solver") -> Any:
    """``d`` lifted; raises ValueError if it carries a state from ``x`` on, which evaluations off the path would spoil."""
    d = prediction.lift(d)
    if jax.tree_util.tree_leaves(jax.eval_shape(lambda v: prediction.start(d, v), x)):
        raise ValueError(f"d: stateful; {who} asks off the sampler's path and needs a denoiser without a state")
    return d


def tell(d: Any, x: Any, query: prediction.Query) -> prediction.Prediction:
    """The prediction of a denoiser without state, guided or not."""
    return prediction.evaluate(d, prediction.start(d, x), x, query)[0]


def at_level(process: Process, lam: Any) -> prediction.Query:
    """The query at half log-SNR ``lam``, clipped to the process's times."""
    t = jnp.clip(process.time(lam), 0, process.t_max)
    c = process.coefficients(t)
    return prediction.Query(t, None, c.alpha, c.sigma)


def check_method(method: str, allowed: Iterable[str]) -> None:
    """Refuse an unknown method, naming the nearest."""
    if method not in allowed:
        raise unknown("method", method, allowed)


def check_tolerances(rtol: Any, atol: Any) -> None:
    """Refuse tolerances that are not above 0, where they are known."""
    traced = any(isinstance(v, jax.core.Tracer) for v in (rtol, atol))
    if not traced and not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol, atol: {rtol}, {atol} given; need tolerances above 0")


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
    check_method(method, METHODS)
    check_tolerances(rtol, atol)
    if not 0 < t_min < process.t_max:
        raise ValueError(f"t_min: {t_min} given; need 0 < t_min < t_max = {process.t_max}")
    x = jnp.asarray(x)
    d = stateless(d if cond is None else prediction.condition(d, cond), x)
    import diffrax

    ends = process.coefficients(np.array([process.t_max, t_min]))
    first, last = (float(v) for v in np.arctan2(ends.sigma, ends.alpha))
    norm = float(np.hypot(ends.alpha[0], ends.sigma[0]))
    tiny = float(jnp.finfo(x.dtype).tiny)

    def ask(own: Any, u: jax.Array, phi: Any) -> tuple:
        alpha, sigma = jnp.maximum(jnp.cos(phi), 0), jnp.maximum(jnp.sin(phi), 0)
        query = at_level(process, jnp.log(jnp.maximum(alpha, tiny)) - jnp.log(jnp.maximum(sigma, tiny)))
        size = jnp.sqrt(query.alpha**2 + query.sigma**2)
        return tell(own, (expand(size, u) * u)[None], query), alpha, sigma

    def field(phi: Any, u: jax.Array, own: Any) -> jax.Array:
        told, alpha, sigma = ask(own, u, phi)
        return (alpha * told.noise - sigma * told.data)[0]

    solver = getattr(diffrax, METHODS[method])()

    def one(start: jax.Array, label: Any) -> tuple:
        own = d if label is None else prediction.condition(d, jax.tree.map(lambda v: v[None], label))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            first,
            last,
            None,
            start / norm,
            own,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=max_steps,
        )
        return ask(own, solution.ys[0], jnp.asarray(last, start.dtype))[0].data[0], solution.stats["num_steps"]

    out, steps = jax.vmap(one)(x, cond)
    # a solver whose first stage is the last step's final one evaluates it once, at the start; and one jump to data
    reused = bool(solver.tableau.fsal)
    return Adapted(out.astype(x.dtype), steps, steps * (solver.tableau.num_stages - reused) + reused + 1)
