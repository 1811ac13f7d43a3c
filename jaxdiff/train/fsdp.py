"""Fully-sharded data parallelism with its collectives written out, for use inside ``shard_map``.

Parameters rest in pieces, split over ``fsdp``. A block of them (a top-level entry of the tree: ``block_3``) is made
whole by ONE all-gather of its pieces laid end to end, and its gradients go back to pieces by ONE reduce-scatter,
whatever number of arrays it has. Whole parameters are not kept for the backward pass: where it needs them, the
block is gathered a second time. So a block costs two gathers and one scatter a microbatch. The loss is cut where its
blocks come into use (``jaxdiff.train.stages``), and its gradient taken a stage at a time::

    forward, first stage to last    whole = gather(pieces)          run the stage, keeping what its own remat says
    backward, last stage to first   whole = gather(pieces) again    gradient of whole
                                    pieces of the gradient = scatter(gradient), summed over devices in float32

A gather waits until the stage ``AHEAD`` of its own begins, and for the scatter two stages before, so that at most two
blocks of parameters and two of gradients are whole at once and each collective has a stage's work to hide behind. The
waiting is an ``optimization_barrier``; a compiler that takes these out before it orders operations (XLA's for CPU) is free
to gather all of them early, and does.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxdiff.train import stages
from jaxdiff.train.mesh import BATCH_AXES
from jaxdiff.train.sharding import axes_of, path_name, without_axis

AXIS = "fsdp"
AHEAD = 1  # stages


@dataclasses.dataclass(frozen=True)
class Block:
    """Arrays that travel together: their positions among the leaves, and the dimension each is split along."""

    name: str
    leaves: tuple[int, ...]
    dimensions: tuple[int, ...]


def split_blocks(layout: Any) -> tuple[Block, ...]:
    """The blocks of a tree of NamedShardings that are split over ``fsdp``.

    A block is a top-level entry below whatever all paths share. An array that is split over another axis too (``tensor``)
    travels alone: laying it end to end with others would undo that split.

    Raises:
        ValueError: if an array shares the dimension that it is split along with another axis, or is split over
            ``data``: parameters are whole along the axes that only copy them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(layout)
    paths = [path for path, _ in leaves]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    together: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for number, (path, sharding) in enumerate(leaves):
        used = [axes_of(entry) for entry in sharding.spec]
        if any("data" in axes or (AXIS in axes and len(axes) > 1) for axes in used):
            raise ValueError(
                f"mesh.fsdp_mode='explicit': {path_name(path)} is split as {sharding.spec}; allowed are 'fsdp' alone in "
                "a dimension, and 'tensor'"
            )
        if (AXIS,) in used:
            alone = any(used[d] for d in range(len(used)) if used[d] != (AXIS,))
            name = path_name(path) if alone else path_name(path[: shared + 1])
            together[name].append((number, used.index((AXIS,))))
    return tuple(
        Block(name, tuple(n for n, _ in members), tuple(d for _, d in members)) for name, members in together.items()
    )


def _wide(x: jax.Array) -> jax.Array:
    """In (at least) float32, as gradients are summed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _rows(x: jax.Array, dimension: int, count: int) -> jax.Array:
    """A whole array as (count, size of a piece): row k is the piece of device k."""
    shape = x.shape
    x = x.reshape(*shape[:dimension], count, shape[dimension] // count, *shape[dimension + 1 :])
    return jnp.moveaxis(x, dimension, 0).reshape(count, -1)


def _whole(rows: jax.Array, dimension: int, piece: tuple[int, ...]) -> jax.Array:
    """The inverse of ``_rows``, for pieces of shape ``piece``."""
    count = rows.shape[0]
    x = jnp.moveaxis(rows.reshape(count, *piece), 0, dimension)
    return x.reshape(*piece[:dimension], count * piece[dimension], *piece[dimension + 1 :])


def gather_block(block: Block, pieces: Sequence[jax.Array]) -> list[jax.Array]:
    """The block's arrays, whole, from this device's pieces of them: one all-gather for each dtype in it."""
    if len(pieces) == 1:
        return [jax.lax.all_gather(pieces[0], AXIS, axis=block.dimensions[0], tiled=True)]
    out: dict[int, jax.Array] = {}
    for dtype in dict.fromkeys(x.dtype for x in pieces):
        mine = [k for k, x in enumerate(pieces) if x.dtype == dtype]
        rows = jax.lax.all_gather(jnp.concatenate([pieces[k].ravel() for k in mine]), AXIS)
        start = 0
        for k in mine:
            own = rows[:, start : start + pieces[k].size]
            out[k], start = _whole(own, block.dimensions[k], pieces[k].shape), start + pieces[k].size
    return [out[k] for k in range(len(pieces))]


def scatter_block(block: Block, whole: Sequence[jax.Array]) -> jax.Array:
    """This device's pieces, end to end, of the means over ``fsdp`` of the block's arrays (one dtype): one reduce-scatter.

    The piece of a block of one array keeps its shape.
    """
    count = jax.lax.axis_size(AXIS)
    if len(whole) == 1:
        return jax.lax.psum_scatter(whole[0], AXIS, scatter_dimension=block.dimensions[0], tiled=True) / count
    rows = [_rows(x, d, count) for x, d in zip(whole, block.dimensions, strict=True)]
    return jax.lax.psum_scatter(jnp.concatenate(rows, axis=1), AXIS) / count


def join_pieces(pieces: Sequence[jax.Array]) -> jax.Array:
    """A block's pieces end to end; of one array, the piece as it is."""
    return pieces[0] if len(pieces) == 1 else jnp.concatenate([x.ravel() for x in pieces])


def split_pieces(pieces: jax.Array, like: Sequence[Any]) -> list[jax.Array]:
    """The inverse of ``join_pieces``, for pieces in the shapes of ``like``."""
    if len(like) == 1:
        return [pieces]
    starts = [0, *itertools.accumulate(math.prod(x.shape) for x in like)]
    return [pieces[a:b].reshape(x.shape) for a, b, x in zip(starts, starts[1:], like)]


def _whole_shapes(blocks: Sequence[Block], leaves: Sequence[jax.Array]) -> list[Any]:
    """Shapes of the leaves with the blocks' arrays whole."""
    count = jax.lax.axis_size(AXIS)
    along = {k: d for block in blocks for k, d in zip(block.leaves, block.dimensions, strict=True)}
    grown = lambda k, n, d: n * count if along.get(k) == d else n
    return [
        jax.ShapeDtypeStruct(tuple(grown(k, n, d) for d, n in enumerate(x.shape)), x.dtype)
        for k, x in enumerate(leaves)
    ]


def _gather_after(blocks: Sequence[Block], leaves: Sequence[jax.Array], events: Any) -> dict[int, jax.Array]:
    """Whole arrays of these blocks by position among ``leaves``, gathered when the events (arrays) are there."""
    mine = {k: leaves[k] for block in blocks for k in block.leaves}
    mine, _ = jax.lax.optimization_barrier((mine, events))
    out: dict[int, jax.Array] = {}
    for block in blocks:
        out.update(zip(block.leaves, gather_block(block, [mine[k] for k in block.leaves]), strict=True))
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class _Pullback:
    """A stage's pullback without the whole parameters in it: ``absent`` are their positions, None elsewhere."""

    treedef: Any
    kept: list
    absent: list

    def __call__(self, whole: dict[int, jax.Array], cotangents: tuple) -> tuple:
        kept = [x if k is None else whole[k] for x, k in zip(self.kept, self.absent, strict=True)]
        return jax.tree.unflatten(self.treedef, kept)(cotangents)


def _without(pullback: Any, whole: dict[int, jax.Array]) -> _Pullback:
    kept, treedef = jax.tree.flatten(pullback)
    known = {id(x): k for k, x in whole.items()}
    absent = [known.get(id(x)) for x in kept]
    return _Pullback(treedef, [x if k is None else None for x, k in zip(kept, absent, strict=True)], absent)


def value_and_grad(loss: Callable, blocks: Sequence[Block]) -> Callable:
    """Like ``jax.value_and_grad(loss, has_aux=True)``, of pieces, a stage of the loss at a time.

    The gradient is ``(an array for each block, as scatter_block gives it, an array for each leaf outside blocks)``;
    ``mean`` makes a tree like the parameters of it.
    """
    inside = {k for block in blocks for k in block.leaves}

    def differentiate(pieces: Any, *rest: Any) -> tuple:
        leaves, treedef = jax.tree.flatten(pieces)
        outside = [k for k in range(len(leaves)) if k not in inside]
        shapes = jax.tree.unflatten(treedef, _whole_shapes(blocks, leaves))
        cut = stages.cut(loss, shapes, rest, [block.leaves for block in blocks])
        values = cut.constants | dict(zip(cut.rest, jax.tree.leaves(rest), strict=True))
        values |= {cut.params[k]: leaves[k] for k in outside}

        pullbacks: list[_Pullback] = []
        events: list[Any] = [()]  # what is there when a stage begins
        for number, stage in enumerate(cut.stages):
            whole = _gather_after([blocks[n] for n in stage.blocks], leaves, events[max(number - AHEAD, 0)])
            other = [values[v] for v in stage.other]
            forward = lambda arrays, held, run=stage.run, other=other: run(arrays, held, other)
            arrays, held = [whole[k] for k in stage.leaves], [values[v] for v in stage.held]
            passed, pullback, made = jax.vjp(forward, arrays, held, has_aux=True)
            values |= dict(zip((*stage.passed, *stage.made), (*passed, *made), strict=True))
            pullbacks.append(_without(pullback, whole))
            events.append(passed)
        read = lambda v: v.val if isinstance(v, Literal) else values[v]
        value, metrics = jnp.asarray(read(cut.loss)), jax.tree.unflatten(cut.treedef, [read(v) for v in cut.metrics])

        cotangents = {} if isinstance(cut.loss, Literal) else {cut.loss: jnp.ones_like(value)}
        zero = lambda v: jnp.zeros(v.aval.shape, v.aval.dtype)
        grads: list = [None] * len(blocks)
        events = [(value,)]
        for number, (stage, pullback) in enumerate(reversed(list(zip(cut.stages, pullbacks, strict=True)))):
            needed = [blocks[n] for n in stage.blocks if set(blocks[n].leaves) & set(pullback.absent)]
            whole = _gather_after(needed, leaves, events[max(number - AHEAD, 0)])
            given = tuple(cotangents.pop(v) if v in cotangents else zero(v) for v in stage.passed)
            of_arrays, of_held = pullback(whole, given)
            for v, x in zip(stage.held, of_held, strict=True):
                cotangents[v] = cotangents[v] + x if v in cotangents else x
            of = dict(zip(stage.leaves, of_arrays, strict=True))
            for n in stage.blocks:
                grads[n] = scatter_block(blocks[n], [_wide(of[k]) for k in blocks[n].leaves])
            events.append((given, [grads[n] for n in stage.blocks]))
        for n, block in enumerate(blocks):
            if grads[n] is None:  # read by nothing
                grads[n] = join_pieces([jnp.zeros_like(_wide(leaves[k])) for k in block.leaves])
        of_outside = [cotangents.get(cut.params[k], jnp.zeros_like(leaves[k])) for k in outside]
        return (value, metrics), (grads, of_outside)

    return differentiate


def mean(blocks: Sequence[Block], grads: Any, pieces: Any) -> Any:
    """Gradients of ``value_and_grad`` as a tree like ``pieces``, of their means over all devices.

    Where there are copies along ``data``, one all-reduce of a block's pieces.
    """
    leaves, treedef = jax.tree.flatten(pieces)
    of_blocks, of_outside = grads
    inside = {k for block in blocks for k in block.leaves}
    for block, x in zip(blocks, of_blocks, strict=True):
        x = jax.lax.pmean(x, "data") if jax.lax.axis_size("data") > 1 else x
        for k, piece in zip(block.leaves, split_pieces(x, [leaves[k] for k in block.leaves]), strict=True):
            leaves[k] = piece
    outside = [k for k in range(len(leaves)) if k not in inside]
    for k, x in zip(outside, jax.lax.pmean(of_outside, BATCH_AXES), strict=True):
        leaves[k] = x
    return jax.tree.unflatten(treedef, leaves)


def pieces_spec(layout: Any) -> Any:
    """``shard_map`` specs of a tree of NamedShardings: the batch axes are manual there, ``tensor`` is not."""
    return jax.tree.map(lambda s: without_axis(s.spec, "tensor"), layout)
