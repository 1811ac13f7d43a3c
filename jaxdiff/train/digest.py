"""Digests of arrays that do not depend on how the array is sharded, and the table of a tree's leaves.

A checkpoint written on one mesh must be verifiable on any other, by processes that each hold only a part of
every array. A digest of the byte stream (sha256, crc32) cannot be combined from parts, so each element is hashed
together with its *global* row-major position and the hashes are added: addition commutes, so any partition of
the array gives the same two sums. With ``w_i`` the i-th 32-bit word and ``mix`` the 32-bit finaliser of
MurmurHash3 (a bijection)::

    h_i = mix(w_i ^ 0x9e3779b9 * i)      digest = (sum_i h_i,  sum_i h_i * (2 i + 1))     both mod 2^32

For a fixed position both maps ``w -> h`` and ``h -> h * odd`` are bijections, so a change confined to one word,
hence every single flipped bit, *always* changes both sums; any other damage escapes with probability about
2^-63. It is a check against accidents, not against an adversary. Positions are taken mod 2^32.

Everything here is numpy on host copies: nothing compiles, the lock of the interpreter is released in the loops,
and a background thread can do it while the next step runs (about 1 GB/s on one core).
"""

import dataclasses
import difflib
import math
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

__all__ = [
    "Leaf",
    "combine",
    "digest",
    "first_mismatch",
    "host_parts",
    "leaf_of",
    "named_leaves",
    "nest",
    "part_digest",
]

_BLOCK = 1 << 15  # words hashed at a time: a few temporaries of this size stay in the L2 cache
_GOLDEN, _MIX1, _MIX2 = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_WORD_DTYPES: dict[int, type] = {1: np.uint8, 2: np.uint16, 4: np.uint32}

Part = tuple[tuple[slice, ...], np.ndarray]  # where in the global array, and the host copy of it


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a checkpoint records of one leaf: global shape, dtype name and (if known) the digest in hex."""

    shape: tuple[int, ...]
    dtype: str
    digest: str | None = None

    def __str__(self) -> str:
        """Write the type as ``float32[3,4]``."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


# ------------------------------------------------------------------------------------------- the names of leaves


def _segment(entry: Any) -> str:
    """Name one step of a key path; odd characters are percent-encoded so that joined names stay unique."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            text = str(getattr(entry, attribute))
            return urllib.parse.quote(text, safe="").replace(".", "%2E") or "%"
    raise TypeError(f"key path entry {entry!r} has no name")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Flatten a pytree to ``{"params/dense/kernel": leaf}`` in tree order.

    Raises:
        ValueError: two leaves share a name (dictionary keys ``1`` and ``"1"``, say), or a leaf is not an array
            or a number.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(_segment(entry) for entry in path) or "%root"
        if name in leaves:
            raise ValueError(f"two leaves of the state are both named {name!r}; rename one dictionary key")
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)) and not (
            hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        ):
            raise ValueError(f"leaf {name!r} of the state is a {type(leaf).__name__}; allowed are arrays and numbers")
        leaves[name] = leaf
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"a/b": x}`` into ``{"a": {"b": x}}``, the tree that is handed to orbax."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def leaf_of(leaf: Any) -> Leaf:
    """Shape and dtype of an array, a ``jax.ShapeDtypeStruct`` or a Python number (no values are read)."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return Leaf(tuple(leaf.shape), str(leaf.dtype))


def first_mismatch(stored: Mapping[str, Leaf], expected: Mapping[str, Leaf]) -> str | None:
    """Say in one line where two tables of leaves first differ (names, shapes, dtypes), or None if they agree."""
    faults = []
    for name in [*expected, *(n for n in stored if n not in expected)]:
        have, want = stored.get(name), expected.get(name)
        if have is None:
            near = difflib.get_close_matches(name, [n for n in stored if n not in expected], 1)
            faults.append(
                f"{name} is missing in the checkpoint, {want} is expected"
                + (f" (the checkpoint has {near[0]})" if near else "")
            )
        elif want is None:
            faults.append(f"{name} is {have} in the checkpoint, no such leaf is expected")
        elif (have.shape, have.dtype) != (want.shape, want.dtype):
            faults.append(f"{name} is {have} in the checkpoint, {want} is expected")
    if not faults:
        return None
    return faults[0] + (f" (and {len(faults) - 1} more leaves differ)" if len(faults) > 1 else "")


# --------------------------------------------------------------------------------------------------- the digest


def host_parts(x: Any, *, copy: bool, process: int | None = None) -> list[Part]:
    """The parts of a leaf for which this process answers, on the host: together, each element exactly once.

    Args:
        x: a jax array (any sharding), numpy array or number; typed keys are passed as their key data.
        copy: True where the device buffer may be donated while the parts are in use (on CPU the host view
            would be the buffer itself).
        process: index of this process; only process 0 answers for host arrays. Default: ask JAX.
    """
    if isinstance(x, jax.Array):
        # replica 0 of each piece lives on exactly one process of the whole job
        shards = [s for s in x.addressable_shards if s.replica_id == 0]
        for shard in shards:
            shard.data.copy_to_host_async()
        return [(s.index, np.array(s.data) if copy else np.asarray(s.data)) for s in shards]
    if (jax.process_index() if process is None else process) != 0:
        return []
    x = np.asarray(x)
    return [(tuple(slice(0, n) for n in x.shape), x.copy() if copy else x)]


def part_digest(shape: Sequence[int], parts: Sequence[Part]) -> tuple[int, int]:
    """The two sums over some parts of an array of global ``shape``; sums of disjoint parts add (``combine``)."""
    first = second = 0
    for index, data in parts:
        words, per_element = _words(data)
        spans = [sl.indices(n)[:2] for sl, n in zip(index, shape)]
        spans = [*spans, (0, per_element)] if per_element > 1 else spans
        whole = [*shape, per_element] if per_element > 1 else list(shape)
        starts, lengths, strides = _merge(spans, whole)
        words = words.reshape(lengths)
        for begin, block in _blocks(words):
            position = np.zeros((), np.uint32)
            for axis, (offset, count) in enumerate(zip(begin, block.shape)):
                line = np.arange(count, dtype=np.uint64) + np.uint64(starts[axis] + offset)
                line = (line * np.uint64(strides[axis])).astype(np.uint32)  # mod 2^32
                position = position + line.reshape((-1,) + (1,) * (block.ndim - axis - 1))
            a, b = _sums(block, position)
            first, second = first + a, second + b
    return first % 2**32, second % 2**32


def combine(parts: Sequence[tuple[int, int]]) -> str:
    """Add the sums of disjoint parts and write the digest as 16 hex digits."""
    return "".join(f"{sum(column) % 2**32:08x}" for column in zip(*parts)) if parts else "0" * 16


def digest(x: Any) -> str:
    """Digest of one fully addressable leaf: 16 hex digits, the same for every sharding of the same values."""
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return combine([part_digest(np.shape(x), host_parts(x, copy=False))])


def _words(data: np.ndarray) -> tuple[np.ndarray, int]:
    """View an array as unsigned words of at most 32 bits, and how many of them make one element."""
    data = np.ascontiguousarray(data)
    size = data.dtype.itemsize
    if size in _WORD_DTYPES:
        return data.reshape(-1).view(_WORD_DTYPES[size]), 1
    return data.reshape(-1).view(np.uint32), size // 4


def _merge(spans: Sequence[tuple[int, int]], shape: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Join each axis that is covered whole with the axis before it: (start, length, stride) per joined axis."""
    starts, lengths, strides = [0], [1], [1]  # innermost first; the first entry grows while axes are whole
    stride, whole = 1, True
    for (begin, end), size in zip(reversed(spans), reversed(shape)):
        if whole:  # everything further in is contiguous in the global array
            starts[-1], lengths[-1] = begin * lengths[-1], (end - begin) * lengths[-1]
        else:
            starts.append(begin)
            lengths.append(end - begin)
            strides.append(stride)
        whole = end - begin == size
        stride *= size
    return starts[::-1], lengths[::-1], strides[::-1]


def _blocks(words: np.ndarray, begin: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Cut an array into blocks of about ``_BLOCK`` words with their offsets, splitting the outermost axes."""
    if words.size == 0:
        return
    axis = len(begin)
    inner = math.prod(words.shape[axis + 1 :])
    if inner > _BLOCK and axis + 1 < words.ndim:
        for i in range(words.shape[axis]):
            yield from _blocks(words[(slice(None),) * axis + (slice(i, i + 1),)], (*begin, i))
        return
    step = max(1, _BLOCK // inner)
    for i in range(0, words.shape[axis], step):
        offsets = (*begin, i) + (0,) * (words.ndim - axis - 1)
        yield offsets, words[(slice(None),) * axis + (slice(i, i + step),)]


def _sums(words: np.ndarray, position: np.ndarray) -> tuple[int, int]:
    """Hash the words with their positions and add, in place on block-sized temporaries."""
    h = position * _GOLDEN
    h = np.bitwise_xor(h, words, out=h) if h.shape == words.shape else h ^ words.astype(np.uint32)
    t = np.empty_like(h)
    for shift, factor in ((16, _MIX1), (13, _MIX2), (16, None)):
        np.bitwise_xor(h, np.right_shift(h, np.uint32(shift), out=t), out=h)
        if factor is not None:
            np.multiply(h, factor, out=h)
    first = int(h.sum(dtype=np.uint64))
    odd = position * np.uint32(2) + np.uint32(1)
    second = int(np.multiply(h, odd, out=h).sum(dtype=np.uint64))
    return first, second
