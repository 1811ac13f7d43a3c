"""Optimisers and learning-rate schedules by name, through optax.

``optimiser("adamw", learning_rate=1e-3, schedule="cosine", steps=100_000, warmup=1000, clip=1.0)`` is an
ordinary ``optax.GradientTransformation``: [clip by global norm] -> the named rule with its schedule.
A new optimiser is one builder and one line of ``OPTIMISERS``.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdiff.near import near

Schedule = Callable[[Any], jax.Array]


def _constant(progress: jax.Array, **_: Any) -> jax.Array:
    return jnp.ones_like(progress)


def _cosine(progress: jax.Array, **_: Any) -> jax.Array:
    return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def _linear(progress: jax.Array, **_: Any) -> jax.Array:
    return 1.0 - progress


# shape of the decay after warm-up, as a function of progress in [0,1]: 1 at the start, 0 at the end
SCHEDULES: dict[str, Callable | None] = {"constant": _constant, "cosine": _cosine, "linear": _linear, "rsqrt": None}


def _lookup(table: dict, name: str, field: str) -> Any:
    """Entry of a plain dictionary, or a one-line error with the nearest name."""
    if name not in table:
        raise ValueError(f"{field}={name!r}: allowed are {', '.join(sorted(table))}{near(name, table)}")
    return table[name]


def schedule(
    name: str = "constant",
    *,
    peak: float = 1e-3,
    steps: int | None = None,
    warmup: int = 0,
    final: float = 0.0,
) -> Schedule:
    """Learning rate as a function of the update count c = 0, 1, ...

    For c < warmup: ``peak (c+1)/warmup``. Afterwards, with u = (c - warmup)/(steps - warmup) in [0,1]:
    ``final peak + (1 - final) peak shape(u)`` where shape is 1 (constant), (1+cos(pi u))/2 (cosine) or
    1 - u (linear); rsqrt is ``peak sqrt(w / max(c+1, w))`` with w = max(warmup, 1), and needs no ``steps``.

    Args:
        name: constant, cosine, linear or rsqrt.
        peak: the highest learning rate, > 0.
        steps: length of the run in updates; needed by cosine and linear.
        warmup: updates of linear warm-up, >= 0.
        final: last learning rate as a fraction of the peak, in [0, 1].

    Raises:
        ValueError: on an unknown name or a value out of range.
    """
    shape = _lookup(SCHEDULES, name, "optimiser.schedule")
    if not peak > 0:
        raise ValueError(f"optimiser.learning_rate={peak}: allowed are positive numbers")
    if warmup < 0:
        raise ValueError(f"optimiser.warmup={warmup}: allowed are integers >= 0")
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"optimiser.final={final}: allowed are 0 <= final <= 1, a fraction of the peak")
    if name in ("cosine", "linear") and (steps is None or steps <= warmup):
        raise ValueError(f"optimiser.schedule={name!r} needs steps > warmup, got {steps} and {warmup}")

    def rate(count: Any) -> jax.Array:
        c = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, (c + 1.0) / max(warmup, 1))
        if name == "rsqrt":
            w = float(max(warmup, 1))
            return peak * rise * jnp.sqrt(w / jnp.maximum(c + 1.0, w))
        u = jnp.clip((c - warmup) / max((steps or 0) - warmup, 1), 0.0, 1.0)
        return peak * rise * (final + (1.0 - final) * shape(u))

    return rate


def _matrices(params: Any) -> Any:
    """Weight decay on matrices only: biases, norms and scalars are left alone."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _adam(rate: Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Any:
    return optax.adam(rate, b1=b1, b2=b2, eps=eps)


def _adamw(
    rate: Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> Any:
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_matrices)


def _lion(rate: Schedule, *, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0) -> Any:
    return optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices)


def _muon(
    rate: Schedule,
    *,
    beta: float = 0.95,
    ns_steps: int = 5,
    weight_decay: float = 0.0,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
) -> Any:
    return optax.contrib.muon(
        rate, beta=beta, ns_steps=ns_steps, weight_decay=weight_decay, adam_b1=adam_b1, adam_b2=adam_b2
    )


def _sgd(rate: Schedule, *, momentum: float | None = None, nesterov: bool = False) -> Any:
    return optax.sgd(rate, momentum=momentum, nesterov=nesterov)


# name -> builder(schedule, **options); weight decay touches matrices only
OPTIMISERS: dict[str, Callable] = {"adam": _adam, "adamw": _adamw, "lion": _lion, "muon": _muon, "sgd": _sgd}


def optimiser(
    name: str = "adam",
    *,
    learning_rate: float | Schedule = 1e-3,
    schedule: str = "constant",
    steps: int | None = None,
    warmup: int = 0,
    final: float = 0.0,
    clip: float | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """The optimiser ``name`` with its schedule, behind a clip by global norm if ``clip`` is given.

    Args:
        name: adam, adamw, lion, muon (matrices; Nesterov Adam for the rest) or sgd.
        learning_rate: peak learning rate, or a function of the update count replacing the schedule.
        schedule: constant, cosine, linear or rsqrt, see ``schedule``.
        steps: updates in the run (cosine, linear).
        warmup: updates of linear warm-up.
        final: last learning rate as a fraction of the peak.
        clip: largest allowed global gradient norm, > 0, or None.
        **options: settings of the named optimiser (b1, b2, eps, weight_decay, momentum, ...).

    Raises:
        ValueError: on unknown names, options the optimiser does not have, or values out of range.
    """
    build = _lookup(OPTIMISERS, name, "optimiser.name")
    allowed = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"optimiser.{option}: {name} has no such option; allowed {allowed}{near(option, allowed)}"
            )
    if clip is not None and not clip > 0:
        raise ValueError(f"optimiser.clip={clip}: allowed are positive numbers or None")
    rate = (
        learning_rate
        if callable(learning_rate)
        else _schedule(schedule, peak=learning_rate, steps=steps, warmup=warmup, final=final)
    )
    rule = build(rate, **options)
    return rule if clip is None else optax.chain(optax.clip_by_global_norm(clip), rule)


_schedule = schedule  # `optimiser` takes a parameter of that name
