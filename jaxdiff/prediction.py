"""What a raw network output means: the pair ``Prediction(data, noise)``, and denoisers that return it.

A network may be trained for any of six targets. :func:`pair` turns its raw output F into estimates of the
data and of the noise by formulas that divide by neither alpha nor sigma wherever the pair is identifiable;
:func:`target_of` is the other direction, what such a network is trained on. A denoiser is a pytree
``d(x, t, r=None) -> Prediction``: functions static, arrays (parameters, conditions, scales) dynamic, so
compiled samplers never retrace for new values.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.coefficients import Coefficients, expand, leaf
from jaxdiff.process.process import Process

__all__ = [
    "CLOCKS",
    "TARGETS",
    "CrossPath",
    "Denoiser",
    "DiscretePrediction",
    "Lifted",
    "Prediction",
    "Query",
    "check_target",
    "condition",
    "denoiser",
    "evaluate",
    "lift",
    "network_inputs",
    "on_path",
    "pair",
    "start",
    "target_of",
]

TARGETS = ("data", "noise", "vpred", "velocity", "score", "edm")
CLOCKS = ("time", "half_log_snr", "log_sigma")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Estimates ``data`` of x0 and ``noise`` of n, each of the shape of x. A free pair: neither is re-derived."""

    data: Any
    noise: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiscretePrediction:
    """Log-probabilities over the vocabulary at every token: ``log_probs`` (B, ..., V), nats."""

    log_probs: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """What a solver asks at one row: time ``t``, jump-to time ``r`` (None means t), the path's ``alpha`` and
    ``sigma`` there, and the row's integer ``mode`` (None unless the table has modes)."""

    t: Any
    r: Any = None
    alpha: Any = None
    sigma: Any = None
    mode: Any = None


def _divide(a: Any, b: Any) -> Any:
    """``a / b``, and 0 where b is 0 (by convention nothing ever weights that value), gradient-safe."""
    nonzero = b != 0
    return jnp.where(nonzero, a / jnp.where(nonzero, b, 1), 0)


def pair(target: str, c: Coefficients, x: Any, raw: Any, sigma_data: Any = 0.5) -> Prediction:
    """The estimates ``(x0_hat, eps_hat)`` that raw output ``raw`` of kind ``target`` stands for at state ``x``.

    With ``Delta = alpha ds - sigma da`` (> 0) and ``q^2 = sigma^2 + alpha^2 sigma_data^2``:

    - data: ``x0 = F``, ``eps = (x - alpha F)/sigma``; noise: ``eps = F``, ``x0 = (x - sigma F)/alpha``;
      score: noise with ``F -> -sigma F``
    - vpred: ``x0 = (alpha x - sigma F)/(alpha^2 + sigma^2)``, ``eps = (sigma x + alpha F)/(alpha^2 + sigma^2)``
    - velocity: ``x0 = (ds x - sigma pace F)/Delta``, ``eps = (alpha pace F - da x)/Delta``
    - edm: ``x0 = alpha sigma_data^2 x/q^2 + sigma sigma_data F/q``, ``eps = sigma x/q^2 - alpha sigma_data F/q``
      (2206.00364's preconditioning carried from alpha = 1 to any path)

    At sigma = 0, ``eps`` of the data target is 0. Noise and score at alpha = 0 are not identifiable
    (``x0`` is 0 there); :func:`denoiser` refuses to build them. Source: methods S2.
    """
    alpha, sigma = expand(c.alpha, x), expand(c.sigma, x)
    if target == "data":
        return Prediction(raw, _divide(x - alpha * raw, sigma))
    if target == "noise":
        return Prediction(_divide(x - sigma * raw, alpha), raw)
    if target == "score":
        return Prediction(_divide(x + sigma * sigma * raw, alpha), -sigma * raw)
    if target == "vpred":
        norm = alpha * alpha + sigma * sigma
        return Prediction((alpha * x - sigma * raw) / norm, (sigma * x + alpha * raw) / norm)
    if target == "velocity":
        da, ds, pace = expand(c.da, x), expand(c.ds, x), expand(c.pace, x)
        delta = alpha * ds - sigma * da
        return Prediction((ds * x - sigma * pace * raw) / delta, (alpha * pace * raw - da * x) / delta)
    if target == "edm":
        spread = expand(sigma_data, x)
        q2 = sigma * sigma + alpha * alpha * spread * spread
        q = jnp.sqrt(q2)
        return Prediction(
            alpha * spread * spread * x / q2 + sigma * spread * raw / q, sigma * x / q2 - alpha * spread * raw / q
        )
    raise check_target(target)


def target_of(target: str, c: Coefficients, x0: Any, eps: Any, sigma_data: Any = 0.5) -> Any:
    """The value a network of kind ``target`` should output, given data and noise: the inverse of :func:`pair`.

    velocity is infinite at t=0 on paths whose sigma' is; score is ``-eps/sigma``, infinite at sigma = 0.
    edm: ``F = (x0 - c_skip x)/c_out = (sigma x0 - alpha sigma_data^2 eps)/(sigma_data q)``.
    """
    alpha, sigma = expand(c.alpha, x0), expand(c.sigma, x0)
    if target == "data":
        return x0
    if target == "noise":
        return eps
    if target == "score":
        return -eps / sigma
    if target == "vpred":
        return alpha * eps - sigma * x0
    if target == "velocity":
        return (expand(c.da, x0) * x0 + expand(c.ds, x0) * eps) / expand(c.pace, x0)
    if target == "edm":
        spread = expand(sigma_data, x0)
        q = jnp.sqrt(sigma * sigma + alpha * alpha * spread * spread)
        return (sigma * x0 - alpha * spread * spread * eps) / (spread * q)
    raise check_target(target)


def check_target(target: str, process: Process | None = None) -> ValueError:
    """The error for an unknown ``target``; raises it, and raises for a target ``process`` cannot identify."""
    if target not in TARGETS:
        near = difflib.get_close_matches(str(target), TARGETS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"target: {target!r} is unknown; allowed: {', '.join(TARGETS)}{hint}")
    if process is not None and target in ("noise", "score"):
        end = process.coefficients(process.t_max).alpha
        if not isinstance(end, jax.core.Tracer) and float(np.min(np.asarray(end))) <= 0:
            raise ValueError(
                f"target: {target!r} cannot identify the data at t={process.t_max} of process {process.name!r}, "
                f"where alpha = 0; build the process with t_max < 1 (t_max=0.999, say) or use one of "
                "data, vpred, velocity, edm"
            )
    return ValueError(f"target: {target!r} is not implemented")


def network_inputs(
    process: Process, target: str, clock: str, x: Any, t: Any, alpha: Any, sigma: Any, sigma_data: Any
) -> tuple[Any, Any]:
    """``(x_in, c_noise)``: the state and the noise level as the network is told them.

    ``x_in = x / q`` for the edm target (unit variance), else x. ``clock``: "time" (``process.network_time(t)``),
    "half_log_snr" (lam clipped to [-20, 20]) or "log_sigma" (``log(sigma/alpha)/4``, EDM's, same clipping).
    """
    if clock == "time":
        c_noise = process.network_time(t)
    else:
        tiny = 1e-20
        lam = jnp.clip(jnp.log(jnp.maximum(alpha, tiny)) - jnp.log(jnp.maximum(sigma, tiny)), -20.0, 20.0)
        c_noise = lam if clock == "half_log_snr" else -lam / 4
    if target == "edm":
        a, s, d = expand(alpha, x), expand(sigma, x), expand(sigma_data, x)
        x = x / jnp.sqrt(s * s + a * a * d * d)
    return x, c_noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A network with the meaning of its output: ``d(x, t, r=None) -> Prediction``. Build with :func:`denoiser`."""

    process: Process
    params: Any
    cond: Any
    sigma_data: Any
    apply: Callable = dataclasses.field(metadata={"static": True})
    target: str = dataclasses.field(metadata={"static": True})
    clock: str = dataclasses.field(metadata={"static": True})
    two_time: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Any, t: Any, r: Any = None) -> Prediction:
        """Predict at state ``x`` (B, ...) and time ``t`` (left-aligned); alpha and sigma follow from t."""
        c = self.process.coefficients(t)
        return self.at(x, Query(t, r, c.alpha, c.sigma))

    def at(self, x: Any, query: Query) -> Prediction:
        """Predict as a solver's row asks, with the row's own (float64-made) alpha and sigma."""
        raw = self.raw(x, query)
        if self.target == "velocity":
            tangent = self.process.coefficients(query.t)
            c = dataclasses.replace(tangent, alpha=query.alpha, sigma=query.sigma)
        else:
            c = Coefficients(query.alpha, query.sigma, None, None, None)
        return pair(self.target, c, x, raw, self.sigma_data)

    def raw(self, x: Any, query: Query) -> Any:
        """The network's output F before it is given a meaning."""
        x_in, c_noise = network_inputs(
            self.process, self.target, self.clock, x, query.t, query.alpha, query.sigma, self.sigma_data
        )
        if self.two_time:
            r = query.t if query.r is None else query.r
            c = self.process.coefficients(r)
            _, c_noise_r = network_inputs(self.process, "data", self.clock, x, r, c.alpha, c.sigma, self.sigma_data)
            out = self.apply(self.params, x_in, c_noise, self.cond, c_noise_r=c_noise_r)
        else:
            out = self.apply(self.params, x_in, c_noise, self.cond)
        return getattr(out, "raw", out)

    def condition(self, cond: Any) -> Denoiser:
        """The same denoiser told ``cond``."""
        return dataclasses.replace(self, cond=cond)


def denoiser(
    process: Process,
    apply: Any,
    params: Any = None,
    *,
    target: str,
    cond: Any = None,
    clock: str | None = None,
    two_time: bool = False,
    sigma_data: Any = 0.5,
) -> Denoiser:
    """Give a network's output its meaning.

    ``apply(params, x_in, c_noise, cond, c_noise_r=...)`` is any function: a linen module's bound ``.apply``, an
    NNX, Equinox or plain function; ``params`` is its first argument. Solvers call it with scalar times.
    ``target`` is one of TARGETS; ``clock`` says what the network is told for time (default "time"; "log_sigma"
    for the edm target); ``two_time`` networks also get the jump-to time. ``sigma_data``: the data's standard
    deviation, used by the edm target alone. Raises ValueError for unknown names and unidentifiable targets.
    """
    from jaxdiff.network.apply import as_apply

    check_target(target, process)
    clock = clock or ("log_sigma" if target == "edm" else "time")
    if clock not in CLOCKS:
        raise ValueError(f"clock: {clock!r} is unknown; allowed: {', '.join(CLOCKS)}")
    # on the device once: numpy leaves would be transferred again at every call
    process, sigma_data = jax.tree_util.tree_map(jnp.asarray, (process, leaf(sigma_data)))
    return Denoiser(process, params, cond, sigma_data, as_apply(apply), target, clock, bool(two_time))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Lifted:
    """A plain function ``fn(x, t, r) -> Prediction`` as a denoiser pytree (``fn`` is compared by identity)."""

    fn: Callable = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Any, t: Any, r: Any = None) -> Prediction:
        """Call the function."""
        return self.fn(x, t, r)


def lift(d: Any) -> Any:
    """``d`` itself if it is a pytree node, else its :class:`Lifted` form."""
    if dataclasses.is_dataclass(d) or not jax.tree_util.all_leaves([d]):
        return d
    return Lifted(d)


def start(d: Any, x: Any) -> Any:
    """The state a denoiser carries through a trajectory from ``x``; () for plain denoisers."""
    return d.start(x) if hasattr(d, "start") else ()


def evaluate(d: Any, state: Any, x: Any, query: Query) -> tuple[Any, Any]:
    """``(prediction, state)``: the one call solvers and wrappers make, for stateful and plain denoisers alike.

    A stateful denoiser has ``start(x) -> state`` and ``step(state, x, query) -> (prediction, state)``; every leaf
    of the state has the batch axis first.
    """
    if hasattr(d, "step"):
        return d.step(state, x, query)
    if hasattr(d, "at"):
        return d.at(x, query), state
    return d(x, query.t, query.r), state


def condition(d: Any, cond: Any) -> Any:
    """``d`` told ``cond`` (labels (B,), or any pytree its network takes)."""
    if not hasattr(d, "condition"):
        raise ValueError(f"cond: given, but a denoiser of type {type(d).__name__} takes no condition")
    return d.condition(cond)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CrossPath:
    """A denoiser trained on one path, asked on another; see :func:`on_path`."""

    inner: Any
    trained: Process
    sampled: Process

    def __call__(self, x: Any, t: Any, r: Any = None) -> Prediction:
        """Predict at a state and time of the sampling path."""
        c = self.sampled.coefficients(t)
        return self.at(x, Query(t, r, c.alpha, c.sigma))

    def at(self, x: Any, query: Query) -> Prediction:
        """Predict as a row of a table on the sampling path asks."""
        prediction, _ = evaluate(self.inner, (), *self._translate(x, query))
        return prediction

    def _translate(self, x: Any, query: Query) -> tuple[Any, Query]:
        """Equal signal-to-noise means equal states up to scale, ``x/alpha`` being the same."""
        t, alpha, sigma = self._match(query.alpha, query.sigma)
        signal = jnp.asarray(query.alpha) >= jnp.asarray(query.sigma)  # scale by the larger, neither vanishes then
        scale = jnp.where(
            signal,
            alpha / jnp.where(signal, query.alpha, 1),
            sigma / jnp.where(signal, 1, query.sigma),
        )
        r = None
        if query.r is not None:
            c = self.sampled.coefficients(query.r)
            r, _, _ = self._match(c.alpha, c.sigma)
        return expand(scale, x) * x, Query(t, r, alpha, sigma, query.mode)

    def _match(self, alpha: Any, sigma: Any) -> tuple[Any, Any, Any]:
        tiny = 1e-20
        lam = jnp.log(jnp.maximum(alpha, tiny)) - jnp.log(jnp.maximum(sigma, tiny))
        t = jnp.clip(self.trained.time(lam), 0, self.trained.t_max)
        c = self.trained.coefficients(t)
        return t, c.alpha, c.sigma

    def condition(self, cond: Any) -> CrossPath:
        """The same, told ``cond``."""
        return dataclasses.replace(self, inner=condition(self.inner, cond))


def on_path(inner: Any, sampled: Process, trained: Process | None = None) -> CrossPath:
    """Use ``inner``, trained on its own process, with tables of ``sampled``: a VP model on an EDM grid, say.

    At equal ``alpha/sigma`` two Gaussian paths carry the same state up to scale, so ``(x0_hat, eps_hat)`` is read at
    ``t' = trained.time(lam(t))`` and ``x alpha'/alpha``. Levels beyond the trained range are clipped.
    Raises ValueError for stateful denoisers (their state belongs to one path) and unequal noise laws.
    """
    trained = inner.process if trained is None else trained
    if hasattr(inner, "step"):
        raise ValueError("inner: a stateful denoiser cannot change paths; wrap its plain part instead")
    if trained.noise.name != sampled.noise.name:
        raise ValueError(f"sampled: noise law {sampled.noise.name!r} given; the model's is {trained.noise.name!r}")
    return CrossPath(inner, trained, sampled)
