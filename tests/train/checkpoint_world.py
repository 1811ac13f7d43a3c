"""A small state with every kind of leaf, and ways to compare and to break checkpoints."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class State:
    step: Any
    params: Any
    opt: Any
    ema: Any
    key: Any


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16),
        "odd.name/x": jnp.asarray(rng.integers(0, 255, (8,)), jnp.uint8),
        "empty": jnp.zeros((0, 3)),
    }
    mu = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    ema = {"model": (jax.tree.map(jnp.copy, params), jax.tree.map(lambda x: x + jnp.ones_like(x), params))}
    return State(
        step=jnp.asarray(seed, jnp.int32),
        params=params,
        opt=(mu, None, {"count": np.int64(seed), "rate": 0.5, "flags": np.array([True, False])}),
        ema=ema,
        key=jax.random.key(seed),
    )


def bits(tree: Any) -> list[bytes]:
    def one(x: Any) -> bytes:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return str(np.asarray(x).dtype).encode() + np.asarray(x).tobytes()

    return [one(x) for x in jax.tree.leaves(tree)]


def same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and bits(a) == bits(b)


def mesh_of(count: int) -> jax.sharding.Mesh:
    return jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


def spread(tree: Any, count: int, abstract: bool = False) -> Any:
    """Put a state on ``count`` devices, first axis split where it divides; host leaves stay."""
    mesh = mesh_of(count)

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        split = x.ndim and x.shape[0] and x.shape[0] % count == 0
        sharding = NamedSharding(mesh, P("data") if split else P())
        if abstract:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree.map(one, tree)


def files_of(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip_bit(path: pathlib.Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << (position % 8)
    path.write_bytes(bytes(data))
