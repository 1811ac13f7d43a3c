"""A fixed-grid solver as a table of coefficients, and the operations on tables that need no network.

Row k evaluates the denoiser at the carried state ``y_k``, stores the record ``d_k = p_k x0_hat + q_k eps_hat`` and
forms the next state from the last few states and records, newest first (age order):

``y_{k+1} = sum_h A[k, h] y_{k-h} + sum_h B[k, h] d_{k-h} + C[k] z + E[k]``

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

__all__ = ["COLUMNS", "AffineBlock", "Table", "device", "stack"]

# the arrays of an AffineBlock: all of it but the law
COLUMNS = ("p", "q", "A", "B", "C", "E", "alpha", "sigma", "start_scale", "start_noise", "start_gain")


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AffineBlock:
    """The rows for one continuous block of the state; K rows, S carried states, R records.

    ``p``, ``q`` (K,): weights of data and noise in the stored record; None is zero throughout.
    ``A`` (K, S), ``B`` (K, R): age-ordered coefficients; ``C`` (K,) std of fresh noise, ``E`` (K,) an additive
    constant; None when unused. Trailing axes broadcast against x from the left.
    ``alpha``, ``sigma`` (K+1,): the path at each row's state and after the last. ``start_scale`` multiplies a
    unit-scale draw of ``law``. Churn before the first evaluation: ``y_0 = start_gain x + start_noise z``, at ``alpha[0]``
    and ``sigma[0]`` (``start_noise`` None: no churn; ``start_gain`` None: 1).
    """

    p: Any
    q: Any
    A: Any
    B: Any
    C: Any
    E: Any
    alpha: Any
    sigma: Any
    start_scale: Any
    start_noise: Any
    law: Any
    start_gain: Any = None

    @property
    def stochastic(self) -> bool:
        """Whether a run draws fresh noise."""
        return self.C is not None or self.start_noise is not None

    @property
    def start(self) -> tuple[Any, Any]:
        """``(alpha, sigma)`` of the state a run is given: row 0's, unless churn raises it to them first."""
        if self.start_noise is None:
            return self.alpha[0], self.sigma[0]
        return self.alpha[0] if self.start_gain is None else self.alpha[0] / self.start_gain, self.start_scale


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


def is_block(node: Any) -> bool:
    """Whether ``node`` is a leaf of a table's tree of blocks."""
    return hasattr(node, "law") and hasattr(node, "start_scale")


def blocks_of(table: Table) -> list:
    """The blocks in tree order."""
    return jax.tree_util.tree_leaves(table.blocks, is_leaf=is_block)


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


def _pad_rows(column: Any, rows: int, fill: Any = None) -> np.ndarray | None:
    """``column`` with rows appended: ``fill``, or its last row repeated."""
    if column is None:
        return None
    column = np.asarray(column)
    extra = rows - column.shape[0]
    if extra == 0:
        return column
    last = column[-1:] if fill is None else np.broadcast_to(np.asarray(fill, column.dtype), (1, *column.shape[1:]))
    return np.concatenate([column, np.repeat(last, extra, 0)])


def _widen(column: Any, width: int) -> np.ndarray:
    column = np.asarray(column)
    extra = [(0, 0)] * column.ndim
    extra[1] = (0, width - column.shape[1])
    return np.pad(column, extra)


def _lift_block(block: AffineBlock, like: dict[str, Any], rows: int) -> AffineBlock:
    """``block`` with the union structure ``like`` and ``rows`` rows; appended rows keep the state as it is."""
    count = np.shape(block.A)[0]
    zero = np.zeros(count)

    def column(name: str, value: Any, fill: Any) -> Any:
        if like[name] is None:
            return None
        return _pad_rows(zero if value is None else value, rows, fill)

    keep = np.zeros(like["S"])
    keep[0] = 1.0
    trailing = np.shape(block.A)[2:]
    keep = np.broadcast_to(keep.reshape((-1,) + (1,) * len(trailing)), (like["S"], *trailing))
    return dataclasses.replace(
        block,
        p=column("p", block.p, None),
        q=column("q", block.q, None),
        A=_pad_rows(_widen(block.A, like["S"]), rows, keep),
        B=_pad_rows(_widen(block.B, like["R"]), rows, 0.0),
        C=column("C", block.C, 0.0),
        E=column("E", block.E, 0.0),
        # padding rows evaluate where the last live row did, a point every denoiser accepts
        alpha=_pad_states(block.alpha, rows),
        sigma=_pad_states(block.sigma, rows),
        start_noise=None if like["start_noise"] is None else np.asarray(block.start_noise or 0.0, np.float64),
        start_gain=None if like["start_gain"] is None else np.asarray(block.start_gain or 1.0, np.float64),
    )


def _pad_states(values: Any, rows: int) -> np.ndarray:
    values = np.asarray(values)
    extra = rows + 1 - values.shape[0]
    if extra == 0:
        return values
    return np.concatenate([values[:-1], np.repeat(values[-2:-1], extra, 0), values[-1:]])


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
    columns = [_union(group) for group in zip(*(blocks_of(t) for t in tables))]
    lifted = []
    for t in tables:
        blocks = [_lift_block(b, like, rows) for b, like in zip(blocks_of(t), columns)]
        tau = np.asarray(t.tau)
        lifted.append(
            Table(
                blocks=jax.tree_util.tree_unflatten(shape, blocks),
                tau=_pad_rows(tau, rows),
                time=_pad_rows(t.time, rows + 1),
                out=_pad_rows(t.out, rows, False),
                live=_pad_rows(t.live, rows, False),
                r=None if all(u.r is None for u in tables) else _pad_rows(tau if t.r is None else t.r, rows),
                mode=modes.copy().pop(),
            )
        )
    return freeze(jax.tree_util.tree_map(lambda *leaves: np.stack([np.asarray(v) for v in leaves]), *lifted))


def _union(blocks: Sequence[AffineBlock]) -> dict[str, Any]:
    """Which optional columns any of ``blocks`` has, and the widest histories."""
    like = {
        name: next((True for b in blocks if getattr(b, name) is not None), None)
        for name in ("p", "q", "C", "E", "start_noise", "start_gain")
    }
    return {**like, "S": max(np.shape(b.A)[1] for b in blocks), "R": max(np.shape(b.B)[1] for b in blocks)}
