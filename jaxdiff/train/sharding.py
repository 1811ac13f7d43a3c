r"""Which array is split how: readable path rules, and a table that says what they did.

A rule is ``(regular expression, specification)``; the expression is searched in the parameter's path
(``block_0/mlp/kernel``) and the first match wins. A specification is a ``PartitionSpec``, a tuple of mesh
axis names and None (``(None, "tensor")``), or the word ``"replicated"``. Whatever a rule leaves open, and
every path without a rule, gets the automatic treatment: arrays of at least ``min_bytes`` are split over
``fsdp`` along their largest free dimension that divides.

As text a specification is axis names between commas, ``*`` for a dimension left open: ``"*, tensor"``.

The same specification holds for a parameter, its moving averages and its optimiser moments: they are
found by path, so no layout has to be declared twice.
"""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rule = tuple[str, Any]
MIN_BYTES = 4 * 2**20


# Splitting over ``tensor`` where nothing else is asked: matrices that widen by column, those that narrow again by row, so
# that what lies between them stays split and one sum follows each pair. The paths are those of ``jaxdiff.network``.
_ATTENTION: tuple[Rule, ...] = (
    (r"attention/qkv/kernel$", (None, "tensor")),
    (r"attention/qkv/bias$", ("tensor",)),
    (r"attention/out/kernel$", ("tensor",)),
)
TENSOR_RULES: dict[str, tuple[Rule, ...]] = {
    "dit": (
        *_ATTENTION,
        (r"mlp_in/kernel$", (None, "tensor")),
        (r"mlp_in/bias$", ("tensor",)),
        (r"mlp_out/kernel$", ("tensor",)),
    ),
    "unet": (
        *_ATTENTION,
        (r"conv_0/kernel$", (None, None, None, "tensor")),
        (r"conv_0/bias$", ("tensor",)),
        (r"conv_1/kernel$", (None, None, "tensor")),
    ),
    "mlp": (
        (r"block_\d+_(0|c)/kernel$", (None, "tensor")),
        (r"block_\d+_0/bias$", ("tensor",)),
        (r"block_\d+_1/kernel$", ("tensor",)),
    ),
}


def parse_rules(given: Any, where: str = "mesh.rules") -> tuple[Rule, ...]:
    """Rules as a config holds them, ``((regex, spec), ...)``, lists or tuples, with specs as text where that is handier.

    Raises:
        ValueError: naming the rule that is no pair, has no regular expression, or no specification.
    """
    out: list[Rule] = []
    for number, rule in enumerate(given):
        here = f"{where}[{number}]={rule!r}"
        if isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(f"{here}: need a pair (regular expression, specification)")
        pattern, spec = rule
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{here}: {pattern!r} is no regular expression ({error})") from None
        if isinstance(spec, str) and spec != "replicated":
            words = [word.strip() for word in spec.split(",")]
            if not all(word == "*" or word.isidentifier() for word in words):
                raise ValueError(f"{here}: need axis names and * between commas, or 'replicated'")
            spec = tuple(None if word == "*" else word for word in words)
        elif isinstance(spec, list | tuple):
            spec = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in spec)
        elif spec != "replicated":
            raise ValueError(f"{here}: need axis names and * between commas, a tuple of them, or 'replicated'")
        out.append((pattern, spec))
    return tuple(out)


def path_name(path: tuple) -> str:
    """A tree path as text: ``block_0/mlp/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _nbytes(leaf: Any) -> int:
    """Bytes of an array or abstract array (typed keys have no numpy item size)."""
    itemsize = getattr(leaf.dtype, "itemsize", 4)
    return math.prod(leaf.shape) * itemsize


def axes_of(entry: Any) -> tuple[str, ...]:
    """Mesh axes named by one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(axes: Sequence[str]) -> Any:
    """The entry of a PartitionSpec that names these axes."""
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


def _explicit(pattern: str, given: Any, path: str, shape: tuple[int, ...], mesh: Mesh) -> list:
    """Check one matched rule against one array and return its entries, one per dimension."""
    where = f"sharding rule {pattern!r} for {path} {shape}"
    if isinstance(given, str) or given is None:
        raise ValueError(f"{where}: got {given!r}; allowed are a tuple of axis names or 'replicated'")
    entries = list(given)
    if len(entries) > len(shape):
        raise ValueError(f"{where}: {len(entries)} entries for {len(shape)} dimensions")
    seen = [axis for entry in entries for axis in axes_of(entry)]
    for axis in seen:
        if axis not in mesh.shape:
            near = difflib.get_close_matches(str(axis), list(mesh.shape), 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown mesh axis {axis!r}; allowed {tuple(mesh.shape)}{hint}")
    if len(set(seen)) < len(seen):
        raise ValueError(f"{where}: an axis is used twice in {given}")
    for dimension, entry in enumerate(entries):
        parts = math.prod(mesh.shape[axis] for axis in axes_of(entry))
        if shape[dimension] % parts:
            raise ValueError(
                f"{where}: dimension {dimension} of size {shape[dimension]} is not divisible by "
                f"{parts} ({' x '.join(axes_of(entry))})"
            )
    return entries + [None] * (len(shape) - len(entries))


def leaf_spec(path: str, leaf: Any, mesh: Mesh, rules: Sequence[Rule] = (), min_bytes: int = MIN_BYTES) -> P:
    """PartitionSpec of one array: the first rule that matches its path, then automatic ``fsdp``.

    Raises:
        ValueError: if the matching rule names an unknown axis, has too many entries, or does not divide.
    """
    entries: list = [None] * len(leaf.shape)
    for pattern, given in rules:
        if re.search(pattern, path):
            if isinstance(given, str) and given == "replicated":
                return P()
            entries = _explicit(pattern, given, path, leaf.shape, mesh)
            # an axis of one device splits nothing; naming it would only make equal layouts unequal
            entries = [_entry([a for a in axes_of(entry) if mesh.shape[a] > 1]) for entry in entries]
            break
    used = {axis for entry in entries for axis in axes_of(entry)}
    fsdp = mesh.shape.get("fsdp", 1)
    if fsdp > 1 and "fsdp" not in used and _nbytes(leaf) >= min_bytes:
        free = [d for d, entry in enumerate(entries) if entry is None and leaf.shape[d] % fsdp == 0]
        if free:
            entries[max(free, key=lambda d: leaf.shape[d])] = "fsdp"
    while entries and entries[-1] is None:  # P(None) and P() mean the same; one spelling keeps them equal
        entries.pop()
    return P(*entries)


def tree_specs(tree: Any, mesh: Mesh, rules: Sequence[Rule] = (), min_bytes: int = MIN_BYTES) -> Any:
    """PartitionSpec of every array of a tree (arrays or ShapeDtypeStructs), by ``leaf_spec``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf_spec(path_name(path), leaf, mesh, rules, min_bytes), tree
    )


def specs_like(tree: Any, params: Any, param_specs: Any) -> Any:
    """Specs of a tree that mirrors parameters (optimiser state): same path ending and shape, same spec.

    An Adam moment at ``0/mu/dense/kernel`` gets the spec of the parameter ``dense/kernel``. Leaves that
    mirror no parameter (step counts, factored statistics) stay replicated.
    """
    known = {
        path: (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(param_specs, is_leaf=lambda x: isinstance(x, P)),
            strict=True,
        )
    }

    def find(path: tuple, leaf: Any) -> P:
        for start in range(len(path) + 1):
            shape, spec = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return spec
        return P()

    return jax.tree_util.tree_map_with_path(find, tree)


def without_axis(spec: P, axis: str) -> P:
    """The same specification with one mesh axis removed (the layout after gathering along it)."""
    return P(*[_entry([a for a in axes_of(entry) if a != axis]) for entry in spec])


def is_replicated(shardings: Any) -> bool:
    """Whether no array of a tree of NamedShardings is split at all."""
    return all(s.is_fully_replicated for s in jax.tree.leaves(shardings))


def sharding_table(tree: Any, shardings: Any, min_bytes: int = MIN_BYTES) -> str:
    """Text table of a tree's layout: path, shape, MB, spec, MB per device; then what stayed replicated.

    Paths that differ in numbers only (the blocks of a network) with equal shape and spec share a row.
    """
    rows: dict[tuple, list] = {}
    total = local = 0
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        size = _nbytes(leaf)
        share = size * math.prod(sharding.shard_shape(leaf.shape)) // max(math.prod(leaf.shape), 1)
        total, local = total + size, local + share
        name = re.sub(r"\d+", "*", path_name(path))
        row = rows.setdefault((name, tuple(leaf.shape), str(tuple(sharding.spec))), [0, 0, 0, sharding])
        row[0], row[1], row[2] = row[0] + 1, row[1] + size, row[2] + share
    width = max([len(name) for name, _, _ in rows] + [4])
    lines = [f"{'path':{width}}  count  {'shape':20}  {'MB':>9}  {'MB/device':>9}  split"]
    for (name, shape, spec), (count, size, share, sharding) in rows.items():
        split = "replicated" if sharding.is_fully_replicated else spec
        lines.append(f"{name:{width}}  {count:5d}  {shape!s:20}  {size / 1e6:9.3f}  {share / 1e6:9.3f}  {split}")
    lines.append(f"{'total':{width}}  {'':5}  {'':20}  {total / 1e6:9.3f}  {local / 1e6:9.3f}")
    for (name, shape, _), (count, size, _, sharding) in rows.items():
        if sharding.mesh.size > 1 and sharding.is_fully_replicated and size // count >= min_bytes:
            lines.append(
                f"stayed replicated although >= {min_bytes / 1e6:.3g} MB: {name} {shape} x{count} "
                f"({size / 1e6:.3f} MB on every device)"
            )
    return "\n".join(lines)


def named(specs: Any, mesh: Mesh) -> Any:
    """A tree of PartitionSpecs as a tree of NamedShardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
