"""A fixed-grid solver as a table of coefficients, and the operations on tables that need no network.

Row k evaluates the denoiser at the carried state ``y_k``, stores the record ``d_k = p_k x0_hat + q_k eps_hat`` and
forms the next state from the last few states and records, newest first (age order):

``y_{k+1} = sum_h A[k, h] y_{k-h} + sum_h B[k, h] d_{k-h} + C[k] z + E[k]``

That is an :class:`AffineBlock`, for continuous data; a part of the state that is tokens has a
:class:`~jaxdiff.solver.categorical.CategoricalBlock`, whose rows mix probabilities. A block says itself what its rows record
and how they combine, so the executor knows of no kind: ``registers, draws, start_noise``, ``rows()``, ``dtype``, ``place``,
``churn``, ``empty``, ``noise``, ``record``, ``combine`` and, for stacks, ``union`` and ``lift``.

A feature a table does not use is ``None``, so structure is part of the pytree and a one-register deterministic
table compiles to the loop a person would write. Makers produce numpy float64; :func:`device` converts once.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdiff.solver.affine_block import COLUMNS, AffineBlock
from jaxdiff.solver.padding import pad_rows

__all__ = ["COLUMNS", "AffineBlock", "Table", "device", "join", "stack"]


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A solver on a grid. ``blocks`` is a block, or a tree prefix of the state with blocks as leaves.

    ``tau`` (K,): time told to the network at each row; ``time`` (K+1,): time of each state; ``out`` (K,) bool:
    the row ends on a grid point (hooks act there only); ``live`` (K,) bool: False on padding rows; ``r`` (K,)
    jump-to times of two-time networks, None means tau; ``mode`` a static tuple of ints, one a row, or None.
    """

    blocks: Any
    tau: Any
    time: Any
    out: Any
    live: Any
    r: Any = None
    mode: tuple[int, ...] | None = _static(None)

    def __repr__(self) -> str:
        """Its shape in one line, not its numbers."""
        mode = "" if self.mode is None else f", mode={self.mode}"
        return f"Table({self.rows} rows{' of a stack' if np.ndim(self.tau) > 1 else ''}, {self.blocks!r}{mode})"

    @property
    def rows(self) -> int:
        """K, padding included."""
        return np.shape(self.tau)[-1]

    @property
    def nfe(self) -> Any:
        """Network evaluations that count, without padding; an array for a stack."""
        return np.sum(np.asarray(self.live), -1)

    @property
    def law(self) -> Any:
        """The noise law of the first block."""
        return (self.blocks if is_block(self.blocks) else blocks_of(self)[0]).law

    @property
    def law_name(self) -> Any:
        """The name of the noise law if all blocks have one, else the tree of their laws' names."""
        if is_block(self.blocks):
            return self.blocks.law.name
        names = jax.tree_util.tree_map(lambda block: block.law.name, self.blocks, is_leaf=is_block)
        return names if len(set(jax.tree_util.tree_leaves(names))) > 1 else self.law.name


def is_block(node: Any) -> bool:
    """Whether ``node`` is a leaf of a table's tree of blocks."""
    return hasattr(node, "law") and hasattr(node, "combine")


def blocks_of(table: Table) -> list:
    """The blocks in tree order."""
    return jax.tree_util.tree_leaves(table.blocks, is_leaf=is_block)


def affine_block(table: Table, caller: str) -> AffineBlock:
    """The table's one affine block, or a ValueError in the name of ``caller``."""
    if not isinstance(table.blocks, AffineBlock):
        kinds = ", ".join(sorted({type(block).__name__ for block in blocks_of(table)}))
        raise ValueError(f"table: {caller} takes a table of one affine block; this one is a tree of blocks ({kinds})")
    return table.blocks


# A table is immutable, so its device copy is kept as long as the table lives: the documented call with a host
# table then costs no transfer after the first.
_DEVICE: weakref.WeakKeyDictionary[Table, dict] = weakref.WeakKeyDictionary()


def device(table: Table, *, hooks: bool = True) -> Table:
    """The table with jax leaves in the default float dtype (float32; float64 under x64). Memoised by identity.

    ``hooks=False`` leaves out the columns that only hooks and reports read: every argument of a compiled call costs.
    """
    memo = _DEVICE.get(table)
    kind = (bool(jax.config.jax_enable_x64), hooks)  # type: ignore[attr-defined]
    if memo is not None and kind in memo:
        return memo[kind]
    slim = table if hooks else dataclasses.replace(table, time=None, out=None, live=None)
    leaves, structure = jax.tree_util.tree_flatten(slim)
    if any(isinstance(leaf, np.ndarray) for leaf in leaves):
        with jax.ensure_compile_time_eval():
            slim = jax.tree_util.tree_unflatten(structure, jax.device_put(leaves))  # all leaves in one transfer
    elif hooks or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return slim  # nothing to convert; a tracer must not outlive its trace in a memo
    return _DEVICE.setdefault(table, {}).setdefault(kind, slim)


def freeze(table: Table) -> Table:
    """Make the numpy leaves read-only, so that a memoised device copy cannot go stale."""
    for leaf in jax.tree_util.tree_leaves(table):
        if isinstance(leaf, np.ndarray):
            leaf.setflags(write=False)
    return table


def stack(tables: Sequence[Table]) -> Table:
    """Tables as one table with a leading axis, for ``jax.vmap(lambda tb: run(tb, ...))(stack(tables))``.

    Shorter tables get padding rows that keep the state (each still costs an evaluation: bucket by length), and
    all get the union of their structures. Raises ValueError naming the first two tables whose modes, noise laws or
    block kinds differ. ``time`` of padding repeats the last grid time.
    """
    tables = list(tables)
    if not tables:
        raise ValueError("tables: none given; stack() needs at least one")
    first = tables[0]
    shape: Any = jax.tree_util.tree_structure(first.blocks, is_leaf=is_block)
    for i, other in enumerate(tables[1:], 1):
        if jax.tree_util.tree_structure(other.blocks, is_leaf=is_block) != shape:
            raise ValueError(f"tables: table {i} has another tree of blocks than table 0")
        for a, b in zip(blocks_of(first), blocks_of(other)):
            if type(a) is not type(b):
                raise ValueError(f"tables: table 0 has a {type(a).__name__}, table {i} a {type(b).__name__}")
            if a.law.name != b.law.name:
                raise ValueError(f"tables: table 0 assumes {a.law.name} noise, table {i} {b.law.name}")
        if (first.mode is None) != (other.mode is None):
            raise ValueError(f"tables: mode is {first.mode} in table 0, {other.mode} in table {i}")
    rows = max(t.rows for t in tables)
    modes = {None if t.mode is None else t.mode + t.mode[-1:] * (rows - t.rows) for t in tables}
    if len(modes) > 1:
        raise ValueError("tables: modes differ between tables; modes are static, run such tables separately")
    likes = [group[0].union(group) for group in zip(*(blocks_of(t) for t in tables))]
    lifted = []
    for t in tables:
        blocks = [block.lift(like, rows) for block, like in zip(blocks_of(t), likes)]
        tau = np.asarray(t.tau)
        lifted.append(
            Table(
                blocks=jax.tree_util.tree_unflatten(shape, blocks),
                tau=pad_rows(tau, rows),
                time=pad_rows(t.time, rows + 1),
                out=pad_rows(t.out, rows, False),
                live=pad_rows(t.live, rows, False),
                r=None if all(u.r is None for u in tables) else pad_rows(tau if t.r is None else t.r, rows),
                mode=modes.copy().pop(),
            )
        )
    return freeze(jax.tree_util.tree_map(lambda *leaves: np.stack([np.asarray(v) for v in leaves]), *lifted))


def join(tables: Any) -> Table:
    """One table for a state of several parts, from a tree of tables: ``join({"image": a, "label": b})``.

    The state, the shapes given to ``sample`` and the predictions of the denoiser are then trees like it. One network call
    serves all parts, so the tables need equal rows, times and modes: make them from grids with the same times, by solvers
    with one call a step. Raises ValueError naming the two tables and what differs.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(tables, is_leaf=lambda node: isinstance(node, Table))
    named = [(jax.tree_util.keystr(path) or "the only table", table) for path, table in found]
    if not named or not all(isinstance(table, Table) for _, table in named):
        raise ValueError(f"tables: {structure} given; join() needs a tree of tables")
    name, first = named[0]
    for other, table in named[1:]:
        _check_alike(name, first, other, table)
    jumps = [table.r for _, table in named if table.r is not None]
    joined = dataclasses.replace(
        first,
        blocks=jax.tree_util.tree_unflatten(structure, [table.blocks for _, table in named]),
        r=jumps[0] if jumps else None,
    )
    return freeze(joined)


def _check_alike(name: str, first: Table, other: str, table: Table) -> None:
    """Refuse two tables that cannot be rows of one."""
    if table.rows != first.rows:
        raise ValueError(
            f"tables: {name} has {first.rows} rows, {other} {table.rows}; joined tables share their rows"
        )
    if table.mode != first.mode:
        raise ValueError(f"tables: mode is {first.mode} in {name}, {table.mode} in {other}; joined tables share it")
    for column in ("tau", "time", "out", "live", "r"):
        ours, theirs = getattr(first, column), getattr(table, column)
        if ours is None or theirs is None:
            continue  # jump-to times: the network is told those that are given
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if ours.shape != theirs.shape:
            raise ValueError(f"tables: {column} has shape {ours.shape} in {name}, {theirs.shape} in {other}")
        apart = np.abs(ours - theirs) > 1e-9
        if np.any(apart):
            k = int(np.argmax(apart))
            raise ValueError(
                f"tables: {column} of row {k} is {ours.flat[k]:g} in {name}, {theirs.flat[k]:g} in {other}; joined tables "
                "share it: make them from grids with the same times"
            )
