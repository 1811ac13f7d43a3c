"""What a raw network output means: the pair ``Prediction(data, noise)``, and denoisers that return it.

A network may be trained for any of six targets. :func:`pair` turns its raw output F into estimates of the
data and of the noise by formulas that divide by neither alpha nor sigma wherever the pair is identifiable;
:func:`target_of` is the other direction, what such a network is trained on. A denoiser is a pytree
``d(x, t, r=None) -> Prediction``: functions static, arrays (parameters, conditions, scales) dynamic, so
compiled samplers never retrace for new values.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.near import unknown
from jaxdiff.process.coefficients import Coefficients, expand, leaf
from jaxdiff.process.process import Process, check_process

__all__ = [
    "CLOCKS",
    "TARGETS",
    "CrossPath",
    "Denoiser",
    "DiscretePrediction",
    "Form",
    "Lifted",
    "LiftedPair",
    "Prediction",
    "Query",
    "check_known",
    "check_labels",
    "check_sigma_data",
    "check_target",
    "condition",
    "denoiser",
    "evaluate",
    "given",
    "lift",
    "linear_form",
    "network_inputs",
    "on_device",
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
    ``sigma`` there, and the row's integer ``mode`` (None unless the table has modes).

    ``form``: what the denoiser's own ``tabulate`` made of this row, or None. A wrapper that changes the query must
    leave it out; one that hands it on unchanged to a single inner denoiser may offer that one's ``tabulate``."""

    t: Any
    r: Any = None
    alpha: Any = None
    sigma: Any = None
    mode: Any = None
    form: Any = None


def _divide(a: Any, b: Any) -> Any:
    """``a / b``, and 0 where b is 0 (by convention nothing ever weights that value), gradient-safe."""
    nonzero = b != 0
    return jnp.where(nonzero, a / jnp.where(nonzero, b, 1), 0)


def linear_form(target: str, c: Coefficients, sigma_data: Any = 0.5) -> tuple[Any, Any, Any, Any]:
    """``(a, b, g, h)`` with ``x0_hat = a x + b F`` and ``eps_hat = g x + h F``: what raw output F of kind ``target`` means.

    With ``Delta = alpha ds - sigma da`` (> 0), ``q^2 = sigma^2 + alpha^2 sigma_data^2``, ``m^2 = alpha^2 + sigma^2``:

    - data: ``0, 1, 1/sigma, -alpha/sigma``; noise: ``1/alpha, -sigma/alpha, 0, 1``;
      score: ``1/alpha, sigma^2/alpha, 0, -sigma``
    - vpred: ``alpha/m^2, -sigma/m^2, sigma/m^2, alpha/m^2``
    - velocity: ``ds/Delta, -sigma pace/Delta, -da/Delta, alpha pace/Delta``
    - edm: ``alpha sigma_data^2/q^2, sigma sigma_data/q, sigma/q^2, -alpha sigma_data/q``
      (2206.00364's preconditioning carried from alpha = 1 to any path)

    Each of the shape of t. A division by a vanishing sigma or alpha gives 0: at sigma = 0 the data target's eps is 0 by
    convention; noise and score at alpha = 0 identify no x0, and :func:`denoiser` refuses them. Source: methods S2.
    """
    alpha, sigma = c.alpha, c.sigma
    zero, one = jnp.zeros_like(alpha), jnp.ones_like(alpha)
    if target == "data":
        return zero, one, _divide(one, sigma), -_divide(alpha, sigma)
    if target == "noise":
        return _divide(one, alpha), -_divide(sigma, alpha), zero, one
    if target == "score":
        return _divide(one, alpha), _divide(sigma * sigma, alpha), zero, -sigma
    if target == "vpred":
        norm = alpha * alpha + sigma * sigma
        return alpha / norm, -sigma / norm, sigma / norm, alpha / norm
    if target == "velocity":
        delta = alpha * c.ds - sigma * c.da
        return c.ds / delta, -sigma * c.pace / delta, -c.da / delta, alpha * c.pace / delta
    if target == "edm":
        q2 = sigma * sigma + alpha * alpha * sigma_data * sigma_data
        q = jnp.sqrt(q2)
        return alpha * sigma_data**2 / q2, sigma * sigma_data / q, sigma / q2, -alpha * sigma_data / q
    raise unknown_target(target)


def pair(target: str, c: Coefficients, x: Any, raw: Any, sigma_data: Any = 0.5) -> Prediction:
    """The estimates ``(x0_hat, eps_hat)`` that raw output ``raw`` of kind ``target`` stands for at state ``x``.

    Linear in both, see :func:`linear_form`; shapes of x.
    """
    a, b, g, h = (expand(v, x) for v in linear_form(target, c, sigma_data))
    return Prediction(a * x + b * raw, g * x + h * raw)


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
    raise unknown_target(target)


def unknown_target(target: str) -> ValueError:
    """The error for a target that does not exist."""
    return unknown("target", target, TARGETS)


def check_target(target: str, process: Process | None = None) -> None:
    """Raise ValueError for an unknown ``target``, and for one that ``process`` cannot identify at its t_max."""
    if target not in TARGETS:
        raise unknown_target(target)
    if process is not None and target in ("noise", "score"):
        end = process.coefficients(process.t_max).alpha
        if not isinstance(end, jax.core.Tracer) and float(np.min(np.asarray(end))) <= 0:
            raise ValueError(
                f"target: {target!r} cannot identify the data at t={process.t_max} of process {process.name!r}, "
                f"where alpha = 0; build the process with t_max < 1 (t_max=0.999, say) or use one of "
                "data, vpred, velocity, edm"
            )


def check_sigma_data(sigma_data: Any) -> None:
    """Raise ValueError unless ``sigma_data`` is a finite standard deviation above 0 (or a jax array, not looked into)."""
    if not isinstance(sigma_data, jax.Array) and not np.all((np.asarray(sigma_data) > 0) & np.isfinite(sigma_data)):
        raise ValueError(f"sigma_data: {sigma_data} given; need a finite standard deviation above 0")


def input_scale(target: str, alpha: Any, sigma: Any, sigma_data: Any) -> Any:
    """What the state is multiplied by on its way into the network: ``1/q`` for the edm target, None (one) else."""
    return 1 / jnp.sqrt(sigma * sigma + alpha * alpha * sigma_data * sigma_data) if target == "edm" else None


def told_time(process: Process, clock: str, t: Any, alpha: Any, sigma: Any) -> Any:
    """The number the network is told for the noise level.

    ``clock``: "time" (``process.network_time(t)``), "half_log_snr" (lam clipped to [-20, 20]) or "log_sigma"
    (``log(sigma/alpha)/4``, EDM's, same clipping).
    """
    if clock == "time":
        return process.network_time(t)
    tiny = 1e-20
    lam = jnp.clip(jnp.log(jnp.maximum(alpha, tiny)) - jnp.log(jnp.maximum(sigma, tiny)), -20.0, 20.0)
    return lam if clock == "half_log_snr" else -lam / 4


def network_inputs(
    process: Process, target: str, clock: str, x: Any, t: Any, alpha: Any, sigma: Any, sigma_data: Any
) -> tuple[Any, Any]:
    """``(x_in, c_noise)``: the state and the noise level as the network is told them."""
    scale = input_scale(target, alpha, sigma, sigma_data)
    return x if scale is None else expand(scale, x) * x, told_time(process, clock, t, alpha, sigma)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """Everything a :class:`Denoiser` needs of the noise level: input scale, times told, the linear form."""

    scale: Any
    c_noise: Any
    c_noise_r: Any
    linear: tuple


# What a denoiser computes with is a copy of its process on the device, in float32; makers of tables want the numbers that
# were given, in float64. Copies made by jax (a denoiser put through jit or tree_map) have only themselves.
_GIVEN: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def on_device(process: Any) -> Any:
    """A copy of ``process`` with jax leaves, for a denoiser to keep: numpy ones would be transferred again at every call."""
    copy = jax.tree_util.tree_map(jnp.asarray, process)
    _GIVEN[copy] = given(process)
    return copy


def given(process: Any) -> Any:
    """The process of which ``process`` is :func:`on_device`'s copy, itself if it is none."""
    return _GIVEN.get(process, process)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A network with the meaning of its output: ``d(x, t, r=None) -> Prediction``. Build with :func:`denoiser`."""

    path: Process
    params: Any
    cond: Any
    sigma_data: Any
    apply: Callable = dataclasses.field(metadata={"static": True})
    target: str = dataclasses.field(metadata={"static": True})
    clock: str = dataclasses.field(metadata={"static": True})
    two_time: bool = dataclasses.field(metadata={"static": True})

    @property
    def process(self) -> Process:
        """The process it was built with: tables and grids may be made on it."""
        return given(self.path)

    def __repr__(self) -> str:
        """One line, without the parameters' values."""
        count = sum(math.prod(np.shape(leaf)) for leaf in jax.tree_util.tree_leaves(self.params))
        owner = getattr(self.apply, "owner", self.apply)
        network = getattr(owner, "__name__", type(owner).__name__)
        return f"Denoiser({network} of {count:,} parameters, {self.target!r} on {self.process.name!r})"

    def __call__(self, x: Any, t: Any, r: Any = None) -> Prediction:
        """Predict at state ``x`` (B, ...) and time ``t`` (left-aligned); alpha and sigma follow from t."""
        c = self.process.coefficients(t)
        return self.at(x, Query(t, r, c.alpha, c.sigma))

    def at(self, x: Any, query: Query) -> Prediction:
        """Predict as a solver's row asks, with the row's own (float64-made) alpha and sigma."""
        form = self.tabulate(query) if query.form is None else query.form
        return self.mean(x, self._raw(x, form), form)

    @property
    def linear(self) -> bool:
        """Whether the prediction is ``mean(x, raw(x, query), form)``, linear in state and output with weights known before
        the state: a solver then folds them into its rows."""
        return True

    def raw(self, x: Any, query: Query) -> Any:
        """The network's output F before it is given a meaning."""
        return self._raw(x, self.tabulate(query) if query.form is None else query.form)

    def mean(self, x: Any, raw: Any, form: Form) -> Prediction:
        """What output ``raw`` means at state ``x``: ``(a x + b F, g x + h F)`` with ``form.linear``."""
        a, b, g, h = (expand(v, x) for v in form.linear)
        return Prediction(a * x + b * raw, g * x + h * raw)

    def tabulate(self, query: Query) -> Form:
        """The noise level as this denoiser uses it; elementwise in the query's times, so a solver asks for all its
        rows at once, before its loop, and hands each row back in ``query.form``."""
        alpha, sigma = query.alpha, query.sigma
        c_noise_r = None
        if self.two_time:
            r = query.t if query.r is None else query.r
            at_r = self.path.coefficients(r)
            c_noise_r = told_time(self.path, self.clock, r, at_r.alpha, at_r.sigma)
        if self.target == "velocity":
            c = dataclasses.replace(self.path.coefficients(query.t), alpha=alpha, sigma=sigma)
        else:
            c = Coefficients(alpha, sigma, None, None, None)
        return Form(
            input_scale(self.target, alpha, sigma, self.sigma_data),
            told_time(self.path, self.clock, query.t, alpha, sigma),
            c_noise_r,
            linear_form(self.target, c, self.sigma_data),
        )

    def _raw(self, x: Any, form: Form) -> Any:
        x_in = x if form.scale is None else expand(form.scale, x) * x
        times = {"c_noise_r": form.c_noise_r} if self.two_time else {}
        out = self.apply(self.params, x_in, form.c_noise, self.cond, **times)
        raw = getattr(out, "raw", out)
        if np.shape(raw) != np.shape(x):  # where the shapes broadcast, the estimates would be wrong without a word
            raise ValueError(
                f"apply: the network gives shape {np.shape(raw)} for a state {np.shape(x)}; need the state's"
            )
        return raw

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
    deviation, used by the edm target alone. Raises ValueError for unknown names, unidentifiable targets and labels
    (``cond``) out of range.
    """
    from jaxdiff.network.apply import as_apply

    check_process(process)
    check_target(target, process)
    clock = clock or ("log_sigma" if target == "edm" else "time")
    if clock not in CLOCKS:
        raise unknown("clock", clock, CLOCKS)
    check_sigma_data(sigma_data)
    path, spread = on_device(process), jnp.asarray(leaf(sigma_data))
    made = Denoiser(path, params, cond, spread, as_apply(apply), target, clock, bool(two_time))
    check_labels(made, cond)
    return made


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Lifted:
    """A plain function ``fn(x, t, r) -> Prediction`` as a denoiser pytree (``fn`` is compared by identity)."""

    fn: Callable = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Any, t: Any, r: Any = None) -> Prediction:
        """Call the function."""
        return self.fn(x, t, r)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LiftedPair:
    """A stateful denoiser that is no pytree of arrays: its two functions, static and compared by identity."""

    start: Callable = dataclasses.field(metadata={"static": True})
    step: Callable = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Any, t: Any, r: Any = None) -> Prediction:
        """Predict once, from a fresh state; alpha and sigma are not known here."""
        return self.step(self.start(x), x, Query(t, r))[0]


def lift(d: Any) -> Any:
    """``d`` itself if it is a pytree of arrays, else its :class:`Lifted` form, or :class:`LiftedPair` for any object
    with ``start`` and ``step``. Raises ValueError for what is neither."""
    functions = isinstance(d, tuple) and hasattr(
        d, "step"
    )  # a named pair of functions is a pytree, but not of arrays
    if d is not None and not functions and not jax.tree_util.all_leaves([d]):
        return d
    if hasattr(d, "start") and hasattr(d, "step"):
        return LiftedPair(d.start, d.step)
    if not callable(d):
        raise ValueError(f"d: {type(d).__name__} given; a denoiser is d(x, t, r) -> Prediction, or start and step")
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
    """``d`` told ``cond`` (labels (B,), or any pytree its network takes).

    Raises ValueError for a denoiser that takes none, and for labels that its network's ``num_classes`` does not know.
    """
    if not hasattr(d, "condition"):
        raise ValueError(f"cond: given, but a denoiser of type {type(d).__name__} takes no condition")
    check_labels(d, cond)
    return d.condition(cond)


def check_labels(d: Any, cond: Any, field: str = "cond") -> None:
    """Refuse labels above ``num_classes`` (the null label) of a network inside ``d``: in a compiled call they could only
    become NaN. Labels not known while tracing, and conditions that are not labels () or (B,), pass."""
    is_denoiser = lambda node: isinstance(node, Denoiser)
    for part in filter(is_denoiser, jax.tree_util.tree_leaves(d, is_leaf=is_denoiser)):
        check_known(part.apply, cond, field)


def check_known(apply: Any, cond: Any, field: str) -> None:
    """:func:`check_labels` for one network, by its ``apply`` as ``network.as_apply`` gives it."""
    classes = getattr(getattr(apply, "owner", None), "num_classes", None)
    if not isinstance(classes, int) or classes < 1:
        return
    labels = [c for c in jax.tree_util.tree_leaves(cond) if not isinstance(c, jax.core.Tracer)]
    labels = [c for c in map(np.asarray, labels) if c.dtype.kind in "iu" and c.ndim <= 1 and c.size]
    wrong = [n for c in labels for n in (c.min(), c.max()) if not 0 <= n <= classes]
    if wrong:
        raise ValueError(
            f"{field}: label {wrong[0]} given; this network knows 0..{classes - 1}, and {classes} for none"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CrossPath:
    """A denoiser trained on one path, asked on another; see :func:`on_path`."""

    inner: Any
    trained: Process
    sampled: Process

    @property
    def process(self) -> Process:
        """The process it is asked on, as given."""
        return given(self.sampled)

    def __call__(self, x: Any, t: Any, r: Any = None) -> Prediction:
        """Predict at a state and time of the sampling path."""
        c = self.process.coefficients(t)
        return self.step(self.start(x), x, Query(t, r, c.alpha, c.sigma))[0]

    def start(self, x: Any) -> Any:
        """The inner denoiser's state, which must hold nothing: what it carries would belong to its own path."""
        state = start(self.inner, x)
        if jax.tree_util.tree_leaves(state):
            raise ValueError("inner: a stateful denoiser cannot change paths; wrap its plain part instead")
        return state

    def step(self, state: Any, x: Any, query: Query) -> tuple[Prediction, Any]:
        """``(prediction, state)`` as a row of a table on the sampling path asks."""
        return evaluate(self.inner, state, *self._translate(x, query))

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
    ``inner`` may be guided. Raises ValueError for unequal noise laws and, when a run starts, for denoisers that carry a
    state (it belongs to one path).
    """
    trained = getattr(inner, "process", None) if trained is None else trained
    if trained is None:
        raise ValueError(f"trained: missing, and a denoiser of type {type(inner).__name__} has no process of its own")
    if trained.noise.name != sampled.noise.name:
        raise ValueError(f"sampled: noise law {sampled.noise.name!r} given; the model's is {trained.noise.name!r}")
    return CrossPath(lift(inner), on_device(trained), on_device(sampled))
