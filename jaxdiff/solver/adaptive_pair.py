"""DPM-Solver-12 and -23: exponential steps whose size is each sample's own, in one loop of batched evaluations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.process.coefficients import expand
from jaxdiff.process.process import Process
from jaxdiff.solver.adaptive import Adapted, at_level, stateless, tell

__all__ = ["DpmPair", "DpmState", "adaptive_dpm", "dpm12", "dpm23"]

FORMS = ("noise", "data")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DpmState:
    """Where every sample is: state ``x`` (B, ...), ``low`` its last accepted lower-order value; all else (B,): the half
    log-SNR ``lam``, the step ``h`` to try next, ``steps`` tried, ``nfe`` spent."""

    x: jax.Array
    low: jax.Array
    lam: jax.Array
    h: jax.Array
    steps: jax.Array
    nfe: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DpmPair:
    """An embedded pair as a step function, ``step(d, state) -> state``; build with :func:`dpm12` or :func:`dpm23`."""

    process: Process
    atol: Any
    rtol: Any
    theta: Any
    growth: Any
    h_init: Any
    t_err: Any
    t_min: Any
    order: int = dataclasses.field(metadata={"static": True})
    form: str = dataclasses.field(metadata={"static": True})
    # filled in by the functions that build a pair
    lam_last: Any = None
    pure: bool = dataclasses.field(default=False, metadata={"static": True})

    def start(self, d: Any, x: Any) -> DpmState:
        """The state at t_max. Where alpha is 0 there, one data-form jump to a first finite half log-SNR, whose error
        ``alpha^2`` is a tenth of ``atol`` (one evaluation)."""
        x = jnp.asarray(x)
        batch, dtype = x.shape[0], jnp.promote_types(x.dtype, jnp.float32)
        full = lambda v, kind=dtype: jnp.broadcast_to(jnp.asarray(v, kind), (batch,))
        spent = full(0, jnp.int32)
        if self.pure:
            t = full(self.process.t_max)
            c = self.process.coefficients(t)
            told = tell(d, x, prediction.Query(t, None, c.alpha, c.sigma))
            lam = full(0.5 * jnp.log(jnp.minimum(self.atol, 1) / 10))
            to = at_level(self.process, lam)
            x = expand(to.sigma / c.sigma, x) * x + expand(to.alpha, x) * told.data
            spent = spent + 1
        else:
            lam = full(self.process.half_log_snr(jnp.asarray(self.process.t_max, dtype)))
        h = jnp.minimum(full(self.h_init), full(self.lam_last) - lam)
        return DpmState(x, x, lam, h, full(0, jnp.int32), spent)

    def done(self, state: DpmState) -> jax.Array:
        """Which samples (B,) have come within ``t_err`` of ``t_min``."""
        close = at_level(self.process, state.lam).t - self.t_min <= self.t_err
        return close | (state.lam >= jnp.asarray(self.lam_last, state.lam.dtype))

    def step(self, d: Any, state: DpmState) -> DpmState:
        """One try for every sample that is not done: 2 or 3 evaluations, then each accepts or rejects for itself.

        A step that is not finite ends its sample with NaN.
        """
        x, lam = state.x, state.lam
        active = ~self.done(state)
        h = jnp.where(active, state.h, 0)
        first = self._ask(d, x, lam)
        slope = lambda y, r: self._ask(d, y, lam + r * h) - first
        to = lambda r, *tilt: self._reach(x, lam, r * h, first, *tilt)
        if self.order == 2:
            low, high = to(1), to(1, slope(to(1 / 2), 1 / 2), 1, 0)
        else:
            near = slope(to(1 / 3), 1 / 3)
            far = slope(to(2 / 3, near, 0, 2), 2 / 3)
            low, high = to(1, near, 3 / 2, 0), to(1, far, 0, 3 / 2)
        size = jnp.maximum(expand(self.atol, x), expand(self.rtol, x) * jnp.maximum(jnp.abs(low), jnp.abs(state.low)))
        error = _rms((high - low) / size).astype(lam.dtype)
        lost = active & ~jnp.isfinite(error)
        accepted = active & ((error <= 1) | lost)
        last = jnp.asarray(self.lam_last, lam.dtype)
        reached = jnp.where(lost | (h >= last - lam), last, lam + h)
        lam = jnp.where(accepted, reached, lam)
        factor = self.theta * jnp.maximum(error, jnp.finfo(lam.dtype).tiny) ** (-1 / self.order)
        grown = h * jnp.minimum(factor, self.growth)
        choose = lambda new, old: jnp.where(_like(accepted, old), new.astype(old.dtype), old)
        return DpmState(
            x=choose(jnp.where(_like(lost, high), jnp.nan, high), x),
            low=choose(low, state.low),
            lam=lam,
            h=jnp.where(active, jnp.minimum(grown, last - lam), state.h),
            steps=state.steps + active,
            nfe=state.nfe + self.order * active,
        )

    def finish(self, d: Any, state: DpmState) -> jax.Array:
        """The data estimate at the states' own levels, the exact jump to sigma = 0."""
        return tell(d, state.x, at_level(self.process, state.lam)).data

    def _ask(self, d: Any, x: jax.Array, lam: jax.Array) -> jax.Array:
        told = tell(d, x, at_level(self.process, lam))
        return told.noise if self.form == "noise" else told.data

    def _reach(
        self,
        x: jax.Array,
        lam: jax.Array,
        h: jax.Array,
        first: jax.Array,
        slope: Any = None,
        m: float = 0,
        w: float = 0,
    ) -> jax.Array:
        """``x`` carried over a step ``h`` in half log-SNR: ``ratio x + scale [w0 first + (m w0 + w w1) slope]``.

        ``first``: the prediction at ``x``; ``slope``: a later one minus it, with the published factors ``m`` of a
        midpoint term or ``w`` of a Taylor term. ``w_j = int_0^1 H e^{-(1-u)H} u^j du``, H = h in data form and -h in
        noise form."""
        at, end = at_level(self.process, lam), at_level(self.process, lam + h)
        if self.form == "data":
            ratio, scale, H = end.sigma / at.sigma, end.alpha, h
        else:
            ratio, scale, H = end.alpha / at.alpha, end.sigma, -h
        w0 = -jnp.expm1(-H)
        total = expand(ratio, x) * x + expand(scale * w0, x) * first
        if slope is not None:
            total = total + expand(scale * (m * w0 + (w * _first_moment(H) if w else 0)), x) * slope
        return total


def _first_moment(H: jax.Array) -> jax.Array:
    """``int_0^1 H e^{-(1-u)H} u du = 1 - (1 - e^-H)/H``, by its series where that cancels."""
    small = jnp.abs(H) < 0.2
    safe = jnp.where(small, 1, H)
    series, term = H / 2, H / 2
    for j in range(3, 14):
        term = -term * H / j
        series = series + term
    return jnp.where(small, series, 1 + jnp.expm1(-safe) / safe)


def _like(which: jax.Array, x: jax.Array) -> jax.Array:
    return which.reshape(which.shape + (1,) * (x.ndim - 1))


def _rms(v: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(v.reshape(v.shape[0], -1) ** 2, 1))


def _checked(pair: DpmPair) -> DpmPair:
    """The pair once its numbers are checked, with what follows from them (``t_min`` None, ``lam_last``, ``pure``) filled in."""
    name = f"dpm{pair.order - 1}{pair.order}()"
    if pair.form not in FORMS:
        raise ValueError(f"form: {pair.form!r} given; allowed: {', '.join(FORMS)}")
    for field in ("atol", "theta", "h_init", "t_err"):
        _need(pair, field, lambda v: (v > 0) & np.isfinite(v), f"{name} needs a number above 0")
    _need(pair, "rtol", lambda v: v >= 0, f"{name} needs a number of at least 0")
    _need(pair, "theta", lambda v: v < 1, f"{name} needs 0 < theta < 1")
    _need(pair, "growth", lambda v: v > 1, f"{name} needs a factor above 1")
    process = pair.process
    t_min = float(process.path.interior()[0]) if pair.t_min is None else pair.t_min
    ends = process.coefficients(np.array([process.t_max, t_min]))
    alpha, sigma = np.asarray(ends.alpha, np.float64), np.asarray(ends.sigma, np.float64)
    if not 0 <= t_min < process.t_max or sigma[1] <= 0:
        raise ValueError(f"t_min: {t_min} given; need t_min < t_max = {process.t_max} where sigma is above 0")
    lam_last = math.log(alpha[1] / sigma[1])
    return dataclasses.replace(pair, t_min=t_min, lam_last=lam_last, pure=not alpha[0] > 0)


def _need(pair: DpmPair, field: str, holds: Callable, message: str) -> None:
    """Refuse a number of the pair, or an array of them, for which ``holds`` is not true; traced ones pass."""
    value = getattr(pair, field)
    if not isinstance(value, jax.core.Tracer) and not np.all(holds(np.asarray(value))):
        raise ValueError(f"{field}: {value} given; {message}")


def dpm12(
    process: Process,
    *,
    atol: Any = 0.0078,
    rtol: Any = 0.05,
    theta: Any = 0.9,
    growth: Any = 3.0,
    h_init: float = 0.05,
    t_err: float = 1e-5,
    t_min: float | None = None,
    form: str = "noise",
) -> DpmPair:
    """DPM-Solver-12: orders 1 and 2 of one step ``h`` in half log-SNR, sharing their first evaluation (2206.00927 [50]).

    ``E = rms((high - low)/max(atol, rtol max(|low|, |previous low|)))`` of each sample by itself; a step with E <= 1 is
    taken and goes on from ``high``; then ``h <- min(theta h E^(-1/order), growth h, what is left)``. Starts with ``h_init``,
    stops when time is within ``t_err`` of ``t_min`` (default: the path's own, 1e-3 or sigma_min). The public code takes
    the largest E of the batch, so that a sample depends on its neighbours.

    ``growth`` inf is published; a step whose error happens to vanish may then swallow the rest of the path (on states of
    one coordinate, edm, data form, tolerance 1e-2: RMS error 0.6, against 0.07 with 3). ``form``: "noise" is published,
    "data" its mirror, which stays accurate at large guidance scales. Numbers may be traced, tolerances of shape () or
    (B,). Raises ValueError for numbers out of range and unknown names.

    Run it with :func:`adaptive_dpm`, or write the loop: ``state = pair.start(d, x)``, ``pair.step(d, state)`` until
    ``pair.done(state)``, ``pair.finish(d, state)``.
    """
    return _checked(DpmPair(process, atol, rtol, theta, growth, h_init, t_err, t_min, 2, form))


def dpm23(
    process: Process,
    *,
    atol: Any = 0.0078,
    rtol: Any = 0.05,
    theta: Any = 0.9,
    growth: Any = 3.0,
    h_init: float = 0.05,
    t_err: float = 1e-5,
    t_min: float | None = None,
    form: str = "noise",
) -> DpmPair:
    """DPM-Solver-23: orders 2 (r1 = 1/3) and 3 (r1, r2 = 1/3, 2/3) sharing two evaluations; see :func:`dpm12`."""
    return _checked(DpmPair(process, atol, rtol, theta, growth, h_init, t_err, t_min, 3, form))


def adaptive_dpm(pair: DpmPair, d: Any, x: Any, *, cond: Any = None, max_steps: int = 4096) -> Adapted:
    """Run an embedded pair from ``x`` (B, ...) at t_max to data, each sample with steps of its own, in one ``while_loop``.

    The network is asked for the whole batch at once, at times (B,); the loop goes on until the slowest sample has
    reached ``t_min``, and from there one jump to ``x0_hat`` (error O(sigma(t_min)^2)). ``nfe`` counts each sample's own
    evaluations, rejected steps included. Samples not there after ``max_steps`` come back NaN. ``cond`` is handed to the
    denoiser. Pure: jit it, vmap it over tolerances. Raises ValueError for stateful denoisers.
    """
    x = jnp.asarray(x)
    d = stateless(d if cond is None else prediction.condition(d, cond), x)
    more = lambda carry: jnp.any(~pair.done(carry[0])) & (carry[1] < max_steps)
    state, _ = jax.lax.while_loop(more, lambda c: (pair.step(d, c[0]), c[1] + 1), (pair.start(d, x), 0))
    out = pair.finish(d, state)
    return Adapted(jnp.where(_like(pair.done(state), out), out, jnp.nan), state.steps, state.nfe + 1)
