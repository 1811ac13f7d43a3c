"""What every objective asks of its batch and draws for its examples: fields, labels, numbers that become times.

What an example draws depends on its key (its time, when stratified, on the step and its global index instead), never on the
rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.near import unknown
from jaxdiff.objective.time import density_at, iid, stratified

__all__ = [
    "check_density",
    "check_examples",
    "choose",
    "condition_of",
    "data_of",
    "drop_labels",
    "in_bins",
    "one_of",
    "random_streams",
    "split_keys",
    "uniforms",
]

DRAWS = ("stratified", "iid")


def choose(field: str, value: Any, table: Mapping[str, Callable]) -> Any:
    """A member of ``table`` built with its defaults if ``value`` is its name, else ``value``.

    Raises ValueError for a name that is not in it.
    """
    if not isinstance(value, str):
        return value
    one_of(field, value, tuple(table))
    return table[value]()


def one_of(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is ``allowed``."""
    if value not in allowed:
        raise unknown(field, value, allowed)


def check_examples(
    t_min: float, t_max: float, draw: str, bins: int, cond_key: str | None, label_drop: float, null_label: Any
) -> None:
    """Raise ValueError for options, common to objectives, that are out of range."""
    one_of("draw", draw, DRAWS)
    if not 0 <= t_min < t_max:
        raise ValueError(f"t_min: {t_min} given; need 0 <= t_min < {t_max} (t_max)")
    if not 0 <= label_drop <= 1:
        raise ValueError(f"label_drop: {label_drop} given; need a probability")
    if not isinstance(bins, int) or bins < 0:
        raise ValueError(f"bins: {bins!r} given; need an integer >= 0")
    if cond_key is not None and label_drop > 0 and null_label is None:
        raise ValueError(f"null_label: missing; label_drop={label_drop} needs it (or set label_drop=0)")


def check_density(time: Callable, process: Any, why: str) -> None:
    """Raise ValueError, which says ``why`` it matters, for times that have no density p(t): at discrete steps."""
    with jax.ensure_compile_time_eval():  # objectives may be built while something is traced
        density = density_at(time, jnp.float32(0.37), process, 0.0, 1.0)
        if not isinstance(density, jax.core.Tracer) and not bool(density < 1e20):
            raise ValueError(f"time: times at discrete steps have no density, which {why}")


def _field(batch: Mapping, name: str, why: str) -> Any:
    if name not in batch:
        raise ValueError(f"{why}: the batch has no field {name!r}; it has {', '.join(sorted(batch))}")
    return batch[name]


def data_of(batch: Mapping, data_key: str | None, kind: Any, need: str) -> jax.Array:
    """The batch's data (B, ...): the field ``data_key``; None takes "x0", else "image", else "x".

    Raises ValueError for a field the batch lacks, TypeError (which says ``need``) for data not of dtype ``kind``.
    """
    if data_key is None:
        data_key = next((name for name in ("x0", "image", "x") if name in batch), "x0")
    x0 = jnp.asarray(_field(batch, data_key, "data_key"))
    if not jnp.issubdtype(x0.dtype, kind):
        raise TypeError(f"batch[{data_key!r}]: dtype {x0.dtype} given; need {need}")
    return x0


def condition_of(batch: Mapping, cond_key: str | None) -> jax.Array | None:
    """The batch's field ``cond_key``, None for None; raises ValueError for a field the batch lacks."""
    return None if cond_key is None else jnp.asarray(_field(batch, cond_key, "cond_key"))


def split_keys(keys: jax.Array, size: int, count: int = 5) -> jax.Array:
    """``count`` typed keys from each example's own, (count, B); raises ValueError unless there are ``size`` of them."""
    if keys.shape != (size,):
        raise ValueError(f"keys: shape {keys.shape} given; need one typed key for each of {size} examples")
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def uniforms(draw: str, keys: jax.Array, batch: Mapping, step: Any, seed: int) -> jax.Array:
    """(B,) numbers in (0, 1) for a time density: "stratified" by (step, ``batch["index"]``), or "iid" by ``keys``."""
    if draw == "stratified":
        return stratified(step, _field(batch, "index", "draw='stratified'"), seed)
    return iid(keys)


def drop_labels(cond: jax.Array | None, keys: jax.Array, probability: float, null_label: Any) -> jax.Array | None:
    """``cond`` (B, ...) with ``null_label`` instead, example by example, with ``probability``; None stays None."""
    if cond is None or probability == 0:
        return cond
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    null = jnp.asarray(null_label, cond.dtype)
    return jnp.where(jnp.reshape(drop, (cond.shape[0],) + (1,) * (cond.ndim - 1)), null, cond)


def random_streams(keys: jax.Array, names: tuple[str, ...]) -> dict[str, Any]:
    """The keyword ``rngs`` of a network that takes random streams (of the first example's key), nothing for one without."""
    return {"rngs": {name: jax.random.fold_in(keys[0], i) for i, name in enumerate(names)}} if names else {}


def in_bins(losses: jax.Array, u: jax.Array, bins: int) -> dict[str, jax.Array]:
    """``loss_bin0`` to ``loss_bin{bins-1}``: the loss (B,) by equal ranges of u, so that their mean is the mean loss."""
    if not bins:
        return {}
    which = jnp.floor(u * bins).astype(jnp.int32)
    return {f"loss_bin{k}": bins * jnp.mean(jnp.where(which == k, losses, 0)) for k in range(bins)}
