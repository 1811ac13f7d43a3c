"""``sample``: the compiled public entry, from a key and a shape to samples, and the two programs behind it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from jaxdiff import prediction
from jaxdiff.solver.executor import Hooks, draw_leaves, hooks, per_leaf, run
from jaxdiff.solver.streams import check_key, sample_indices, sample_keys
from jaxdiff.solver.table import Table, device, is_block

__all__ = ["programs", "sample"]


def sample(
    table: Table,
    d: Any,
    key: jax.Array,
    shape: Any,
    *,
    index: Any = None,
    sharding: jax.sharding.Sharding | None = None,
    cond: Any = None,
    init: Any = None,
    hooks: Hooks | None = None,
    record: Sequence[str] = (),
    dtype: Any = jnp.float32,
) -> Any:
    """Draw samples with one compiled scan.

    ``table`` must lie on the denoiser's own path, which is not checked (replayed grids lie on none); a model of another path is
    wrapped with :func:`jaxdiff.prediction.on_path`.
    ``shape``: (B, ...) of the samples, or a pytree of shapes for multi-block states. ``key``: typed threefry key;
    ``index``: as in :func:`run`, so that chunks of one large set are ``index=0, B, 2B, ...``. ``sharding`` lays out the batch
    axis; its mesh may have Explicit axes. ``cond`` is handed to ``condition(d, cond)``. ``init`` (B, ...): clean data to start
    from at the grid's first (intermediate) time, ``alpha init + sigma noise``; without it the start is the process's prior.
    ``record``: as in :func:`run`. New parameters, scales, conditions, grids or solvers of the same table structure do not
    retrace. Raises ValueError naming the argument for bad keys, shapes, laws and names.
    """
    if not isinstance(table, Table):
        raise ValueError(f"table: {type(table).__name__} given; need a Table, such as solver.ddim(process, grid)")
    if not isinstance(key, jax.Array):
        check_key(key)
    process = getattr(d, "process", None)
    if process is not None and process.noise.name != table.law_name:
        raise ValueError(
            f"table: made for {table.law_name} noise, but the denoiser's process has {process.noise.name}"
        )
    if cond is not None:
        d = prediction.condition(d, cond)
    if isinstance(index, (int, np.integer)):
        if not 0 <= index < 2**32:
            raise ValueError(f"index: {index} given; an offset lies in [0, 2^32)")
        index = np.uint32(index)
    shape = _shape(shape) if isinstance(shape, tuple) else _tree_shape(shape)
    kind = "float32" if dtype is jnp.float32 else jnp.dtype(dtype).name
    draw, go = programs(shape, sharding, (record,) if isinstance(record, str) else tuple(record), kind)
    table, given = device(table, hooks=hooks is not None), _wrapped(hooks)
    x, index = draw(table, key, index, init)
    return go(table, prediction.lift(d), x, key, index, given)


def _wrapped(given: Hooks | None) -> Hooks | None:
    """Hooks that were built of plain functions as :func:`hooks` builds them: a jitted function takes no others."""
    if given is None:
        return None
    if not isinstance(given, Hooks):
        raise ValueError(f"hooks: {type(given).__name__} given; build them with solver.hooks(project=..., ...)")
    return hooks(**{f.name: getattr(given, f.name) for f in dataclasses.fields(given)})


class _Shapes(tuple):
    """A pytree of shapes made hashable: ``(treedef, shapes)``."""


@functools.cache
def _shape(shape: tuple) -> Any:
    """Validated ``(batch, ...)``; a tuple of tuples is a tree of shapes."""
    if not all(isinstance(n, (int, np.integer)) for n in shape):
        return _tree_shape(shape)
    if len(shape) < 1 or min(shape) < 1:
        raise ValueError(f"shape: {shape} given; need (batch, ...) with positive sizes")
    return shape


def _tree_shape(shape: Any) -> Any:
    is_shape = lambda s: isinstance(s, (tuple, list)) and all(isinstance(n, (int, np.integer)) for n in s)
    if isinstance(shape, list) and is_shape(shape):
        return _shape(tuple(shape))
    leaves, structure = jax.tree_util.tree_flatten(shape, is_leaf=is_shape)
    if (
        not leaves
        or not all(is_shape(s) and len(s) and min(s) > 0 for s in leaves)
        or len({s[0] for s in leaves}) != 1
    ):
        raise ValueError(f"shape: {shape} given; need (batch, ...) or a pytree of such with one batch size")
    return _Shapes((structure, tuple(tuple(s) for s in leaves)))


def _with_dtypes(table: Table, x: Any, dtype: Any) -> Any:
    """The shapes ``x`` with every block's own dtype of states; ``dtype`` is that of the continuous ones."""
    leaves, structure = jax.tree_util.tree_flatten(x)
    try:
        kinds = per_leaf(table, x, lambda block: block.dtype(dtype))
    except ValueError:
        blocks = jax.tree_util.tree_structure(table.blocks, is_leaf=is_block)
        raise ValueError(f"shape: a tree {structure} given; the table's blocks are a tree {blocks}") from None
    typed = [jax.ShapeDtypeStruct(leaf.shape, kind) for leaf, kind in zip(leaves, kinds)]
    return jax.tree_util.tree_unflatten(structure, typed)


@functools.lru_cache(maxsize=1024)
def programs(shape: Any, sharding: Any, record: tuple[str, ...], dtype: str) -> tuple[Any, Any]:
    """``(draw, go)``: the jitted start and the jitted run of one shape.

    Two programs, because one is slower: XLA's CPU runtime spreads a program whose start and rows can be computed side by
    side over threads, and the loop then pays for it (1.07 of hand-written at batch 16, against 1.02). Jits of their own,
    because static arguments of a shared one are compared in Python at every call.
    """
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types

    @jax.jit
    def draw(table: Table, key: jax.Array, index: Any, init: Any) -> Any:
        check_key(key)  # while tracing: a key's type is part of what is compiled, so every kind passes here once
        # Python checks, made once a trace
        if np.ndim(table.tau) != 1:
            raise ValueError(
                f"table: a stack of {np.shape(table.tau)[0]} given; sample() takes one table, run a stack with "
                "jax.vmap(lambda tb: run(tb, d, x, key))(tables)"
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype: {dtype} given; states are floating point")
        if isinstance(sharding, NamedSharding) and len(sharding.spec) > 1:
            raise ValueError(f"sharding: spec {sharding.spec} given; need one entry, the layout of the batch axis")
        if isinstance(shape, _Shapes):
            x = shape[0].unflatten([jax.ShapeDtypeStruct(s, dtype) for s in shape[1]])
        else:
            x = jax.ShapeDtypeStruct(shape, dtype)
        x = _with_dtypes(table, x, dtype)
        given, needed = (jax.tree_util.tree_map(np.shape, tree) for tree in (init, x))
        if init is not None and given != needed:
            raise ValueError(f"init: shape {given} given; need that of the samples, {needed}")
        index = sample_indices(index, jax.tree_util.tree_leaves(x)[0].shape[0])
        if sharding is not None:
            # where axes are Explicit this runs under auto_axes, and a spec refers to the mesh of the context
            index = jax.lax.with_sharding_constraint(index, sharding.spec if explicit else sharding)
        place = lambda block, own, leaf, clean=None: block.place(own, leaf, clean)
        clean = () if init is None else (init,)
        return draw_leaves(table, sample_keys(key, index), x, place, *clean), index

    @jax.jit
    def go(table: Table, d: Any, x: Any, key: Any, index: jax.Array, hooks: Hooks | None) -> Any:
        return run(table, d, x, key, index=index, hooks=hooks, record=record)

    if explicit:
        rows = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))

        def under(f: Any, out: Any) -> Any:
            return jax.jit(auto_axes(f, axes=sharding.mesh.axis_names, out_sharding=out), out_shardings=out)

        draw, go = under(draw, sharding), under(go, (sharding, rows) if record else sharding)
    return draw, go
