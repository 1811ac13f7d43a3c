"""Between a training state and the named arrays that a checkpoint holds."""

import dataclasses
import json
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxdiff.train.checkpoint_errors import CheckpointError
from jaxdiff.train.digest import Leaf, leaf_of, nest

__all__ = ["empty", "join_ema", "like", "place", "plain_json", "readable", "savable", "split_ema"]


def split_ema(state: Any) -> tuple[Any, Any]:
    """Take the averages out of a state: ``(state with ema=None, ema)``; a state without ``ema`` gives None."""
    if isinstance(state, Mapping):
        return {k: v for k, v in state.items() if k != "ema"}, state.get("ema")
    if dataclasses.is_dataclass(state) and hasattr(state, "ema"):
        return dataclasses.replace(state, ema=None), state.ema  # type: ignore[type-var]
    return state, None


def join_ema(rest: Any, ema: Any) -> Any:
    """Put the averages back: the inverse of ``split_ema``."""
    if ema is None:
        return rest
    return {**rest, "ema": ema} if isinstance(rest, Mapping) else dataclasses.replace(rest, ema=ema)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def place(name: str, leaf: Any) -> jax.ShapeDtypeStruct | None:
    """Where to read a leaf of the target: shape, dtype and sharding of its data, or None for host memory."""
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return None
    sharding = leaf.sharding
    if sharding is None:
        if jax.process_count() > 1:
            raise CheckpointError(f"target leaf {name} has no sharding; with several processes each needs one")
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def like(target: Any, array: Any) -> Any:
    """Turn what was read into the kind of thing the target is."""
    if _is_key(target):
        kinds: list[Any] = []  # an abstract key tells its implementation only under a trace
        jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), target)
        return jax.random.wrap_key_data(array, impl=kinds[0])
    if isinstance(target, (jax.Array, jax.ShapeDtypeStruct, np.ndarray)):
        return array
    return array[()] if isinstance(target, np.generic) else type(target)(array.item())


def savable(item: str, name: str, leaf: Any) -> Any:
    """What orbax is given for a leaf: key data of typed keys, numpy for numbers; refuses what it cannot save."""
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            raise ValueError(f"{item}/{name} was donated before it was saved; save the state the step returned")
        if jax.process_count() > 1 and leaf.is_fully_addressable:
            raise ValueError(
                f"{item}/{name} is an array of one process; build it under jit with out_shardings over the mesh"
            )
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"{item}/{name} is an abstract {leaf_of(leaf)}; only arrays can be saved")
    return np.asarray(leaf)


def plain_json(payload: dict[str, Any]) -> dict[str, Any]:
    """Check that a payload is JSON, with numpy and jax numbers as plain ones."""

    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray, jax.Array)):
            return np.asarray(value).tolist()
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise TypeError(f"meta holds a {type(value).__name__}; allowed are JSON values and arrays")

    try:
        return json.loads(json.dumps(payload, default=plain))
    except TypeError as error:
        raise ValueError(f"checkpoint meta is not JSON: {error}") from None


def empty(leaf: Leaf, place: jax.ShapeDtypeStruct | None) -> Any:
    """An array without elements, which is never written."""
    if place is None:
        return np.zeros(leaf.shape, jax.numpy.dtype(leaf.dtype))
    return jax.device_put(np.zeros(place.shape, place.dtype), place.sharding)


def readable(arrays: Mapping[str, Any]) -> Any:
    """Nested dictionaries with the original spelling of the names."""

    def walk(node: Any) -> Any:
        return {urllib.parse.unquote(k): walk(v) for k, v in node.items()} if isinstance(node, dict) else node

    tree = walk(nest(arrays))
    return tree["%root"] if set(tree) == {"%root"} else tree
