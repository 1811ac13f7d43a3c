"""The reverse SDE with steps of each sample's own, on a Brownian path of its own that step sizes do not change."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.process.coefficients import expand
from jaxdiff.process.process import Process
from jaxdiff.solver.adaptive import Adapted, at_level, check_method, check_tolerances, stateless, tell
from jaxdiff.solver.build import require_gaussian
from jaxdiff.solver.streams import check_key, row_keys, sample_indices, sample_keys

__all__ = ["adaptive_sde"]

METHODS = {"shark": "ShARK", "sra1": "SRA1", "spark": "SPaRK"}
STAGES = {"shark": 2, "sra1": 2, "spark": 3}


def adaptive_sde(
    process: Process,
    d: Any,
    x: Any,
    key: jax.Array,
    *,
    index: Any = None,
    eta: Any = 1.0,
    rtol: Any = 1e-2,
    atol: Any = 1e-2,
    method: str = "shark",
    t_min: float | None = None,
    lam_first: float = -6.0,
    resolution: float = 1e-4,
    cond: Any = None,
    max_steps: int = 4096,
) -> Adapted:
    """The reverse SDE from ``x`` at t_max to data, by diffrax with step control per sample.

    For the unit-norm state ``u = x/sqrt(alpha^2 + sigma^2)``, with ``c, s`` its signal and noise scale and lam = log(c/s) as
    the clock: ``du = [s^2 c x0_hat - s (c^2 + eta^2) eps_hat] dlam + sqrt(2) eta s dW``. ``eta`` 1 is the time reversal of
    the process (DDPM's limit), 0 its probability flow; every eta has the same marginals. Noise is additive, so the methods
    have strong order 1.5. Ends at ``t_min`` (default: the path's own, 1e-3 or sigma_min) and jumps to ``x0_hat``.
    Where alpha(t_max) = 0 the time reversal is infinitely long; there one data-form jump leads to ``lam_first``, whose
    bias is of size ``exp(2 lam_first)``.

    ``key``, ``index`` as in ``sample``: sample i walks on a virtual Brownian tree of its own (2001.01328), cut at
    ``resolution`` in lam, so tolerances and neighbours change its steps and never its path: a tight solve is the strong
    reference of a loose one. (Which steps are accepted on a rough path is a matter of rounding: across batch sizes samples
    agree to tolerance, not to rounding.) ``cond`` (B, ...) is handed to the denoiser sample by sample. ``method``: shark, sra1,
    spark.

    Raises ValueError for unknown methods, numbers out of range, noise that is not Gaussian and stateful denoisers; the
    compiled call raises when a sample needs more than ``max_steps``.
    """
    check_method(method, METHODS)
    check_tolerances(rtol, atol)
    check_key(key)
    require_gaussian(process, "adaptive_sde")
    if not isinstance(eta, jax.core.Tracer) and not 0 <= eta < math.inf:
        raise ValueError(f"eta: {eta} given; adaptive_sde() needs 0 <= eta < inf")
    t_min = float(process.path.interior()[0]) if t_min is None else t_min
    ends = process.coefficients(np.array([process.t_max, t_min]))
    alpha, sigma = np.asarray(ends.alpha, np.float64), np.asarray(ends.sigma, np.float64)
    if not 0 <= t_min < process.t_max or sigma[1] <= 0:
        raise ValueError(f"t_min: {t_min} given; need t_min < t_max = {process.t_max} where sigma is above 0")
    if not resolution > 0:
        raise ValueError(f"resolution: {resolution} given; need a length in half log-SNR above 0")
    x = jnp.asarray(x)
    d = stateless(d if cond is None else prediction.condition(d, cond), x)
    last = math.log(alpha[1] / sigma[1])
    first = math.log(alpha[0] / sigma[0]) if alpha[0] > 0 else lam_first
    if not first < last:
        raise ValueError(f"lam_first: {lam_first} given; need less than {last:g}, the half log-SNR at t_min")
    import diffrax
    import lineax

    def ask(own: Any, u: jax.Array, lam: Any) -> prediction.Prediction:
        query = at_level(process, lam)
        size = jnp.sqrt(query.alpha**2 + query.sigma**2)
        return jax.tree.map(lambda v: v[0], tell(own, (expand(size, u) * u)[None], query))

    def drift(lam: Any, u: jax.Array, own: Any) -> jax.Array:
        told = ask(own, u, lam)
        c2, s2 = jax.nn.sigmoid(2 * lam), jax.nn.sigmoid(-2 * lam)
        return s2 * jnp.sqrt(c2) * told.data - jnp.sqrt(s2) * (c2 + eta**2) * told.noise

    def diffusion(lam: Any, u: jax.Array, own: Any) -> Any:
        return lineax.DiagonalLinearOperator(jnp.full(u.shape, eta * jnp.sqrt(2 * jax.nn.sigmoid(-2 * lam)), u.dtype))

    def one(start: jax.Array, label: Any, own_key: jax.Array) -> tuple:
        own = d if label is None else prediction.condition(d, jax.tree.map(lambda v: v[None], label))
        if alpha[0] > 0:
            u = start / math.hypot(alpha[0], sigma[0])
        else:
            t, zero, scale = (jnp.asarray(v, start.dtype) for v in (process.t_max, 0.0, sigma[0]))
            query = prediction.Query(t, None, zero, scale)
            told = tell(own, start[None], query).data[0]
            c, s = (1 / math.sqrt(1 + math.exp(2 * sign * first)) for sign in (-1, 1))
            u = c * told + s * (start / sigma[0])
        path = diffrax.VirtualBrownianTree(  # wider than the walk: its ends, rounded, must not fall outside
            first - 0.5,
            last + 0.5,
            resolution,
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            own_key,
            diffrax.SpaceTimeLevyArea,
        )
        solution = diffrax.diffeqsolve(
            diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path)),
            getattr(diffrax, METHODS[method])(),
            first,
            last,
            min(0.05, last - first),
            u,
            own,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, pcoeff=0.1, icoeff=0.3),
            max_steps=max_steps,
        )
        return ask(own, solution.ys[0], jnp.asarray(last, u.dtype)).data, solution.stats["num_steps"]

    keys = sample_keys(row_keys(key, 1)[0], sample_indices(index, x.shape[0]))
    words = jax.vmap(lambda k: jax.random.bits(k, (2,), jnp.uint32))(keys)
    out, steps = jax.vmap(one)(x, cond, jax.random.wrap_key_data(words, impl="threefry2x32"))
    return Adapted(out.astype(x.dtype), steps, steps * STAGES[method] + (1 if alpha[0] > 0 else 2))
