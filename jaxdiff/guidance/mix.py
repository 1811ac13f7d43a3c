"""Guidance is arithmetic on predictions: ``D = sum_i w_i(t) D_i`` with ``sum_i w_i = 1``.

Weights that sum to one keep data, noise and velocity forms interchangeable, because every form is the same
affine function of the prediction at a given (x, t). Classifier-free guidance, autoguidance, composition and
negative prompts are this one function with different parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.prediction import DiscretePrediction, Prediction, Query, condition, evaluate, lift, start
from jaxdiff.process.coefficients import expand

__all__ = ["Mix", "Schedule", "Window", "ask", "linear_mix", "mix_predictions", "scale_at", "scale_leaf"]

LEVELS = ("sigma", "half_log_snr", "time")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A weight that is a function of the query: ``fn(query) -> () or (B,)``; ``fn`` is compared by identity."""

    fn: Callable = dataclasses.field(metadata={"static": True})

    def __call__(self, query: Query) -> Any:
        """The weight at ``query``."""
        return self.fn(query)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """``scale`` while the noise level is in (lo, hi], ``outside`` elsewhere (2404.07724).

    ``by``: "sigma" is the level of the equivalent alpha = 1 path, ``sigma/alpha``; "half_log_snr" is
    ``log(alpha/sigma)``; "time" is t. The choice is a ``where`` on the scale, so that windows can be vmapped
    over and never change what is compiled (and save no evaluations). Raises ValueError when asked at an unknown level.
    """

    scale: Any
    lo: Any
    hi: Any
    outside: Any = 1.0
    by: str = dataclasses.field(default="sigma", metadata={"static": True})

    def __call__(self, query: Query) -> Any:
        """The scale at ``query``; raises ValueError if the level in use is not known there."""
        if self.by == "time":
            level = jnp.asarray(query.t)
        elif query.alpha is None or query.sigma is None:
            raise ValueError(
                f"interval: by={self.by!r} needs alpha and sigma, and a plain function has none; use by='time'"
            )
        else:
            tiny = 1e-20
            rho = jnp.asarray(query.sigma) / jnp.maximum(query.alpha, tiny)
            level = rho if self.by == "sigma" else -jnp.log(jnp.maximum(rho, tiny))
        inside = (level > self.lo) & (level <= self.hi)
        return jnp.where(inside, scale_at(self.scale, query), self.outside)


def scale_leaf(value: Any, name: str = "scale") -> Any:
    """A guidance scale as a pytree: numbers and arrays of shape () or (B,) become float32 arrays.

    One type whatever was given, so that a new value never compiles anything; functions of the query become a
    :class:`Schedule`. Raises ValueError for other shapes and values that are not finite.
    """
    if isinstance(value, Schedule | Window):
        return value
    if callable(value):
        return Schedule(value)
    if not isinstance(value, jax.core.Tracer):
        try:
            finite = bool(np.all(np.isfinite(np.asarray(value, np.float64))))
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise ValueError(f"{name}: {value!r} given; need finite numbers, shape () or (B,)")
    value = jnp.asarray(value, jnp.float32)
    if value.ndim > 1:
        raise ValueError(f"{name}: shape {value.shape} given; need () or one number per sample, (B,)")
    return value


def scale_at(scale: Any, query: Query) -> Any:
    """The scale's value at ``query``."""
    return scale(query) if callable(scale) else scale


def _is_prediction(value: Any) -> bool:
    return isinstance(value, Prediction | DiscretePrediction)


def _mix_arrays(parts: Sequence[jax.Array], weights: Sequence[Any]) -> jax.Array:
    """``base + sum_i w_i (D_i - base)``, base being the part of largest weight, sample by sample.

    Equal to ``sum_i w_i D_i``; written like this it is bitwise a part when that part's weight is one and the
    others' are zero, and bitwise the common value when all parts are equal.
    """
    heaviest, base = expand(weights[0], parts[0]), parts[0]
    aligned = [expand(w, part) for w, part in zip(weights, parts)]
    for w, part in zip(aligned[1:], parts[1:]):
        base = jnp.where(w > heaviest, part, base)
        heaviest = jnp.maximum(w, heaviest)
    return (base + sum(w * (part - base) for w, part in zip(aligned, parts))).astype(base.dtype)


def _mix_log_probs(parts: Sequence[jax.Array], weights: Sequence[Any]) -> jax.Array:
    """Log of the normalised ``prod_i p_i^w_i``; a token forbidden by any part of non-zero weight stays forbidden."""
    forbidden = sum(jnp.isneginf(p) & (expand(w, p) != 0) for w, p in zip(weights, parts)) > 0
    finite = [jnp.where(jnp.isneginf(p), 0, p) for p in parts]
    return jax.nn.log_softmax(jnp.where(forbidden, -jnp.inf, _mix_arrays(finite, weights)), -1)


def mix_predictions(predictions: Sequence[Any], weights: Sequence[Any]) -> Any:
    """``sum_i w_i D_i`` of predictions of equal structure, block by block; weights () or (B,), summing to one.

    Continuous blocks mix ``data`` and ``noise``; token blocks mix log-probabilities and normalise.
    """

    def block(*parts: Any) -> Any:
        if isinstance(parts[0], DiscretePrediction):
            return DiscretePrediction(_mix_log_probs([p.log_probs for p in parts], weights))
        return jax.tree.map(lambda *arrays: _mix_arrays(arrays, weights), *parts)

    return jax.tree.map(block, *predictions, is_leaf=_is_prediction)


def tabulated(d: Any, query: Query) -> Any:
    """The denoiser's own view of the query; None if it has none."""
    return d.tabulate(query) if hasattr(d, "tabulate") else None


def ask(d: Any, x: Any, t: Any, r: Any = None) -> Any:
    """Evaluate wrapper ``d`` once, outside a trajectory: the query's alpha and sigma follow from its process."""
    process = getattr(d, "process", None)
    c = None if process is None else process.coefficients(t)
    query = Query(t, r) if c is None else Query(t, r, c.alpha, c.sigma)
    return evaluate(d, start(d, x), x, query)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Mix:
    """``D_0 + sum_{i>0} w_i (D_i - D_0)``: several denoisers and one scale for each after the first."""

    parts: tuple
    scales: tuple

    @property
    def process(self) -> Any:
        """The process of the first part, None for plain functions."""
        return getattr(self.parts[0], "process", None)

    def __call__(self, x: Any, t: Any, r: Any = None) -> Any:
        """Predict at state ``x`` (B, ...) and time ``t``."""
        return ask(self, x, t, r)

    def start(self, x: Any) -> tuple:
        """The states of the parts."""
        return tuple(start(part, x) for part in self.parts)

    def step(self, state: tuple, x: Any, query: Query) -> tuple:
        """``(prediction, state)``: every part asked once, then mixed."""
        forms = query.form or (None,) * len(self.parts)
        outs = [
            evaluate(part, s, x, dataclasses.replace(query, form=form))
            for part, s, form in zip(self.parts, state, forms)
        ]
        scales = [scale_at(scale, query) for scale in self.scales]
        predictions = [prediction for prediction, _ in outs]
        return mix_predictions(predictions, [1 - sum(scales), *scales]), tuple(s for _, s in outs)

    def tabulate(self, query: Query) -> tuple:
        """Each part's own view of the query, None for parts without."""
        return tuple(tabulated(part, query) for part in self.parts)

    def condition(self, cond: Any) -> Mix:
        """The same, every part told ``cond``."""
        return dataclasses.replace(self, parts=tuple(condition(part, cond) for part in self.parts))


def check_one_process(parts: Sequence[Any]) -> None:
    """Refuse denoisers of processes of different kinds: their predictions at a time belong to different states."""
    names = [getattr(getattr(part, "process", None), "name", None) for part in parts]
    first, *others = [name for name in names if name is not None] or [None]
    for other in others:
        if other != first:
            raise ValueError(
                f"parts: processes {first!r} and {other!r} given; need one (prediction.on_path() moves a denoiser)"
            )


def linear_mix(parts: Sequence[Any], weights: Sequence[Any]) -> Mix:
    """``D = sum_i w_i D_i`` of denoisers on one process, with ``sum_i w_i = 1``.

    Args:
        parts: denoisers (pytrees or plain functions ``d(x, t, r)``), at least one.
        weights: one for each part: a number, an array () or (B,), or a function of the query
            (``query.t``, ``.alpha``, ``.sigma``). ``weights[0]`` may be None, meaning one minus the others,
            and has to be when the others are functions or traced, since their sum cannot be checked.

    Raises:
        ValueError: counts differ, processes of different kinds, a sum that is not one, a weight of the wrong shape.
    """
    parts, weights = tuple(lift(part) for part in parts), tuple(weights)
    if not parts or len(parts) != len(weights):
        raise ValueError(f"weights: {len(weights)} given for {len(parts)} parts; need one for each, at least one")
    check_one_process(parts)
    if any(w is None for w in weights[1:]):
        raise ValueError("weights: None given after the first; only weights[0] may be None (one minus the others)")
    if weights[0] is not None:
        if any(callable(w) or isinstance(w, jax.core.Tracer) for w in weights):
            raise ValueError("weights[0]: given, but the sum cannot be checked; pass None (one minus the others)")
        total = sum(np.asarray(w, np.float64) for w in weights)
        if not np.allclose(total, 1, atol=1e-5):
            raise ValueError(f"weights: {list(weights)} given, of sum {total}; they must sum to one")
    return Mix(parts, tuple(scale_leaf(w, f"weights[{i}]") for i, w in enumerate(weights[1:], 1)))
