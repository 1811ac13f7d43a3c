"""Fully-sharded data parallelism with its collectives written out, for use inside ``shard_map``.

Parameters rest in pieces, split over ``fsdp``. A block of them (a top-level entry of the tree: ``block_3``) is made
whole by ONE all-gather of its pieces laid end to end, and its gradients go back to pieces by ONE reduce-scatter,
whatever number of arrays it has. Whole parameters are not kept for the backward pass: where it needs them, the
block is gathered a second time. So a block costs two gathers and one scatter a step::

    forward    whole = gather(pieces);          loss(whole), keeping activations as the network's own remat says
    backward   whole = gather(pieces) again;    gradient of whole
    after      pieces of the gradient = scatter(gradient), summed over devices in float32

Which block is gathered when is the scheduler's choice: nothing but its own use orders a gather, and the second ones
wait for the end of the forward pass.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.train.mesh import BATCH_AXES
from jaxdiff.train.sharding import axes_of, path_name, without_axis

AXIS = "fsdp"


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


def mean_block(block: Block, whole: Sequence[jax.Array]) -> list[jax.Array]:
    """This device's pieces of the means over all devices of the block's arrays (one dtype): one reduce-scatter.

    Where there are copies along ``data``, one all-reduce of the pieces follows.
    """
    count = jax.lax.axis_size(AXIS)
    reduced = lambda x: (jax.lax.pmean(x, "data") if jax.lax.axis_size("data") > 1 else x) / count
    if len(whole) == 1:
        return [reduced(jax.lax.psum_scatter(whole[0], AXIS, scatter_dimension=block.dimensions[0], tiled=True))]
    rows = [_rows(x, d, count) for x, d in zip(whole, block.dimensions, strict=True)]
    own = reduced(jax.lax.psum_scatter(jnp.concatenate(rows, axis=1), AXIS))
    out, start = [], 0
    for x, d, row in zip(whole, block.dimensions, rows, strict=True):
        shape = (*x.shape[:d], x.shape[d] // count, *x.shape[d + 1 :])
        out.append(own[start : start + row.shape[1]].reshape(shape))
        start += row.shape[1]
    return out


def gather(blocks: Sequence[Block], pieces: Any) -> Any:
    """A tree of pieces with its split arrays whole."""
    leaves, treedef = jax.tree.flatten(pieces)
    for block in blocks:
        for k, x in zip(block.leaves, gather_block(block, [leaves[k] for k in block.leaves]), strict=True):
            leaves[k] = x
    return jax.tree.unflatten(treedef, leaves)


def value_and_grad(loss: Callable, blocks: Sequence[Block]) -> Callable:
    """Like ``jax.value_and_grad(loss, has_aux=True)``, of pieces; the gradient is this device's, and whole.

    What ``jax.vjp`` keeps of the whole parameters is dropped and gathered again when the backward pass begins.
    """

    def differentiate(pieces: Any, *rest: Any) -> tuple:
        whole = gather(blocks, pieces)
        value, pullback, metrics = jax.vjp(lambda p: loss(p, *rest), whole, has_aux=True)
        kept, treedef = jax.tree.flatten(pullback)
        known = {id(x): k for k, x in enumerate(jax.tree.leaves(whole))}
        needed = {known[id(x)] for x in kept if id(x) in known}
        again = [block for block in blocks if needed & set(block.leaves)]
        # a second gather that did not wait for the loss would be merged with the first
        waited, _ = jax.lax.optimization_barrier((pieces, value))
        fresh = jax.tree.leaves(gather(again, waited))
        pullback = jax.tree.unflatten(treedef, [fresh[known[id(x)]] if id(x) in known else x for x in kept])
        (grads,) = pullback(jnp.ones_like(value))
        return (value, metrics), grads

    return differentiate


def mean(blocks: Sequence[Block], grads: Any) -> Any:
    """Whole gradients of every device's share, as pieces of their mean over all devices."""
    leaves, treedef = jax.tree.flatten(grads)
    rest = set(range(len(leaves)))
    for block in blocks:
        for k, x in zip(block.leaves, mean_block(block, [leaves[k] for k in block.leaves]), strict=True):
            leaves[k] = x
        rest -= set(block.leaves)
    for k, x in zip(sorted(rest), jax.lax.pmean([leaves[k] for k in sorted(rest)], BATCH_AXES), strict=True):
        leaves[k] = x
    return jax.tree.unflatten(treedef, leaves)


def pieces_spec(layout: Any) -> Any:
    """``shard_map`` specs of a tree of NamedShardings: the batch axes are manual there, ``tensor`` is not."""
    return jax.tree.map(lambda s: without_axis(s.spec, "tensor"), layout)
