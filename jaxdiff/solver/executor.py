"""One scan runs every table: evaluate, record, combine.

``run`` is pure and can be vmapped over tables, guidance scales or anything else; ``sampling.sample`` is the compiled
entry. Noise is a function of (key, global sample index, row) alone, so it is bitwise the same for any batch size,
chunking or device count.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.process.coefficients import expand
from jaxdiff.solver.affine_block import AffineBlock, wide
from jaxdiff.solver.streams import check_key, churn_key, row_keys, sample_indices, sample_keys
from jaxdiff.solver.table import Table, blocks_of, device, is_block

__all__ = [
    "Hooks",
    "Row",
    "State",
    "advance",
    "begin",
    "draw_leaves",
    "draw_noise",
    "hooks",
    "per_leaf",
    "query",
    "row_noise",
    "rows_for",
    "rows_of",
    "run",
]

RECORDS = ("states", "predictions")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Hooks:
    """Optional functions around a row; build with :func:`hooks`. Absent ones are None and compile to nothing."""

    retime: Any = None
    project: Any = None
    correct: Any = None
    noise: Any = None
    start: Any = None


def hooks(
    *, retime: Any = None, project: Any = None, correct: Any = None, noise: Any = None, start: Any = None
) -> Hooks:
    """Hooks of a run. Each is a function or a callable pytree (its arrays are then traced, not baked in).

    ``retime(y, row) -> tau``: the time told to the network at a row. ``project(y_next, row) -> y_next`` and
    ``correct(keys, row, y, prediction, y_next, s) -> (y_next, s)``, on rows that end on a grid point only, correct first;
    ``s`` is the hook's own state, ``start(x) -> s`` makes it (() by default). What they return is cast to the dtypes
    carried. ``noise(keys, row, y) -> z`` replaces the fresh unit noise. ``keys`` are the samples' typed keys (B,), or None
    in a run without key.
    """
    for name, f in {"retime": retime, "project": project, "correct": correct, "noise": noise, "start": start}.items():
        if f is not None and not callable(f):
            raise ValueError(f"{name}: {f!r} given; a hook is a function or a callable pytree")
    wrap = lambda f: f if f is None or not jax.tree_util.all_leaves([f]) else jax.tree_util.Partial(f)
    return Hooks(wrap(retime), wrap(project), wrap(correct), wrap(noise), wrap(start))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Row ``k`` of a table: scalars (or per-axis coefficients) of its columns; ``blocks`` in the table's tree; the row's
    typed ``key`` (None in a run without key); ``form``: the denoiser's own view of the row's noise level; ``fold``: for
    linear denoisers, the record's weights ``(u, v)`` of state and network output, or () where the record is the output."""

    k: Any
    tau: Any
    r: Any
    mode: Any
    out: Any
    blocks: Any
    key: Any = None
    form: Any = None
    fold: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What a run carries: current and earlier states, earlier records (newest first), denoiser and hook state."""

    y: tuple
    d: tuple
    denoiser: Any
    hook: Any


def rows_of(table: Table, key: jax.Array | None = None) -> Row:
    """The table's rows as one Row with a leading axis K, ready to scan over; ``key`` is the run's."""
    count = table.rows
    draws = any(block.draws for block in blocks_of(table))
    return Row(
        k=np.arange(count, dtype=np.uint32),
        tau=table.tau,
        r=table.r,
        # a constant, never a vmapped leaf: lax.cond on it stays a branch under vmap over tables
        mode=None if table.mode is None else np.asarray(table.mode, np.int32),
        out=table.out,
        blocks=jax.tree_util.tree_map(lambda block: block.rows(), table.blocks, is_leaf=is_block),
        key=row_keys(key, count) if draws and key is not None else None,
    )


def rows_for(table: Table, d: Any, key: jax.Array | None, hooks: Hooks | None) -> Row:
    """:func:`rows_of` for one run: with keys wherever a hook is promised them and the denoiser's ``form`` of every row.

    Raises ValueError for a key of another kind, and for a missing one where the table draws.
    """
    if key is not None:
        check_key(key)
    elif any(
        block.start_noise is not None or (block.draws and (hooks is None or hooks.noise is None))
        for block in blocks_of(table)
    ):
        raise ValueError("key: missing; this table draws noise, give a typed key (jax.random.key(seed))")
    rows = rows_of(table, key)
    if key is not None and hooks is not None and rows.key is None:  # hooks are promised keys on any table
        rows = dataclasses.replace(rows, key=row_keys(key, table.rows))
    if hasattr(d, "tabulate") and (hooks is None or hooks.retime is None):
        rows = dataclasses.replace(rows, form=d.tabulate(query(rows, rows.tau)))
        if hooks is None and getattr(d, "linear", False) and isinstance(rows.blocks, AffineBlock):
            rows = _fold(rows)
    return rows


def _fold(rows: Row) -> Row:
    """Rows of a linear denoiser with what multiplies the state and the network's output F multiplied out beforehand.

    With ``x0_hat = a y + b F`` and ``eps_hat = g y + h F`` a record is ``d = u y + v F``, ``u = p a + q g`` and
    ``v = p b + q h``. Where no later row reads it, the row is ``(A + B u) y + B v F``: its record is F itself. The four
    means and their two weights, element by element, cost 1.03 of a hand-written loop at batch 4096.
    """
    block, means = rows.blocks, rows.form.linear
    if any(np.ndim(v) != 1 for v in (*means, block.p, block.q) if v is not None) or np.ndim(block.A) != 2:
        return rows  # coefficients per axis: left-aligned with the state, not with one another
    weigh = lambda data, noise: sum(w * m for w, m in ((block.p, data), (block.q, noise)) if w is not None)
    a, b, g, h = means
    u, v = weigh(a, g), weigh(b, h)
    if block.B.shape[1] > 1:
        return dataclasses.replace(rows, fold=(u, v))
    B = block.B[:, 0]
    A = jnp.concatenate([block.A[:, :1] + (B * u)[:, None], block.A[:, 1:]], 1)
    return dataclasses.replace(rows, blocks=dataclasses.replace(block, A=A, B=(B * v)[:, None]), fold=())


def draw_leaves(table: Table, keys: Any, x: Any, how: Any, *rest: Any) -> Any:
    """``how(block, keys, leaf, ...)`` at every leaf of ``x`` and of the like trees ``rest``; leaves start with the batch axis
    of ``keys`` (B,), and get one independent stream per sample and leaf."""
    leaves, structure = jax.tree_util.tree_flatten(x)
    own = lambda i: keys if len(leaves) == 1 else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
    parts = zip(per_leaf(table, x, lambda block: block), leaves, *map(jax.tree_util.tree_leaves, rest))
    drawn = [how(block, own(i), *part) for i, (block, *part) in enumerate(parts)]
    return jax.tree_util.tree_unflatten(structure, drawn)


def draw_noise(table: Table, keys: Any, x: Any) -> Any:
    """A draw of every block's law in the shapes of ``x``, whose leaves start with the batch axis of ``keys`` (B,)."""
    unit = lambda block, own, leaf: jax.vmap(lambda key: block.law.sample(key, leaf.shape[1:], leaf.dtype))(own)
    return draw_leaves(table, keys, x, unit)


def row_noise(table: Table, keys: Any, x: Any) -> Any:
    """The fresh noise of a row; None at leaves whose rows draw none."""
    return draw_leaves(table, keys, x, lambda block, own, leaf: block.noise(own, leaf) if block.draws else None)


def per_leaf(table: Table, x: Any, read: Any) -> list:
    """``read(block)`` once for every leaf of ``x`` that the block covers."""
    out: list = []
    jax.tree_util.tree_map(
        lambda block, part: out.extend([read(block)] * len(jax.tree_util.tree_leaves(part))),
        table.blocks,
        x,
        is_leaf=is_block,
    )
    return out


def begin(table: Table, d: Any, x: Any, key: Any = None, index: Any = None, hook: Hooks | None = None) -> State:
    """The state before row 0, for ``x`` in path coordinates at the first grid time."""
    table = device(table)
    blocks = blocks_of(table)
    if any(block.start_noise is not None for block in blocks):
        noise = draw_noise(table, sample_keys(churn_key(key), index), x)
        x = jax.tree_util.tree_map(
            lambda block, *given: block.churn(*given), table.blocks, x, noise, is_leaf=is_block
        )
    states, records = (max(counts) for counts in zip(*(block.registers for block in blocks)))
    empty = lambda block, part: jax.tree_util.tree_map(block.empty, part)
    zero = jax.tree_util.tree_map(empty, table.blocks, x, is_leaf=is_block)
    hook_state = hook.start(x) if hook is not None and hook.start is not None else ()
    return State((x,) * states, (zero,) * (records - 1), prediction.start(d, x), hook_state)


def query(row: Row, tau: Any) -> prediction.Query:
    """What a row, or all rows at once, ask of the denoiser."""
    read = lambda name: jax.tree_util.tree_map(lambda b: getattr(b, name), row.blocks, is_leaf=is_block)
    return prediction.Query(tau, row.r, read("alpha"), read("sigma"), row.mode, row.form)


def advance(
    table: Table, d: Any, hook: Hooks | None, state: State, row: Row, key: Any = None, index: Any = None
) -> tuple[State, Any]:
    """One row: evaluate, store the record, form the next state. Returns ``(state, prediction)``.

    ``key``: the run's, for rows made without one (``rows_of(table)``); ``index`` (B,) uint32: the global sample indices,
    needed where there is a key.
    """
    if key is not None and row.key is None:
        row = dataclasses.replace(row, key=row_keys(key, table.rows)[row.k])
    y = state.y[0]
    tau = row.tau if hook is None or hook.retime is None else hook.retime(y, row)
    if row.fold is None:
        predicted, denoiser_state = prediction.evaluate(d, state.denoiser, y, query(row, tau))
        # every block sees its own part of each tree
        record = jax.tree_util.tree_map(
            lambda block, *of: block.record(*of), row.blocks, predicted, y, is_leaf=is_block
        )
    else:
        raw, denoiser_state = d.raw(y, query(row, tau)), state.denoiser
        predicted, record = d.mean(y, raw, row.form), _folded_record(row.fold, y, raw)
    keys = None if row.key is None else sample_keys(row.key, index)
    z = None
    if any(block.draws for block in blocks_of(table)):
        z = row_noise(table, keys, y) if hook is None or hook.noise is None else hook.noise(keys, row, y)
    history = (record, *state.d)
    y_next = jax.tree_util.tree_map(
        lambda block, *parts: block.combine(parts[: len(state.y)], parts[len(state.y) : -1], parts[-1]),
        row.blocks,
        *state.y,
        *history,
        jax.tree_util.tree_map(lambda _: None, y) if z is None else z,
        is_leaf=is_block,
    )
    hook_state = state.hook
    if hook is not None and (hook.project is not None or hook.correct is not None):
        fixed, changed = y_next, hook_state
        if hook.correct is not None:
            fixed, changed = hook.correct(keys, row, y, predicted, fixed, hook_state)
        if hook.project is not None:
            fixed = hook.project(fixed, row)
        choose = functools.partial(_choose, row.out)
        y_next = jax.tree_util.tree_map(choose, fixed, y_next)
        hook_state = jax.tree_util.tree_map(choose, changed, hook_state)
    states = (y_next, *state.y[:-1])
    return State(states, history[: len(state.d)], denoiser_state, hook_state), predicted


def _choose(at_end: Any, changed: Any, kept: Any) -> Any:
    """``changed`` on rows that end on a grid point, else ``kept``, in the latter's dtype: a scan's carry has one."""
    out, dtype = jnp.where(at_end, changed, kept), jnp.result_type(kept)
    return out if out.dtype == dtype else out.astype(dtype)


def _folded_record(fold: tuple, y: Any, raw: Any) -> Any:
    """``u y + v F``, or F itself; at least float32."""
    raw = raw.astype(wide(y))
    return raw if not fold else expand(fold[0], y) * y + expand(fold[1], y) * raw


def run(
    table: Table,
    d: Any,
    x: Any,
    key: jax.Array | None = None,
    index: Any = None,
    hooks: Hooks | None = None,
    record: Sequence[str] = (),
) -> Any:
    """Run a table from ``x``, distributed as x_t at the table's first time; returns the last state.

    ``x`` (B, ...) or a pytree of such leaves; ``key`` a typed threefry key, needed by stochastic tables only; ``index``
    (B,) global sample indices (default 0..B-1) or an integer offset. ``record``: any of "states", "predictions"; the
    result is then ``(x, {"states": (K, B, ...), ...})``, one entry a row (``table.out`` marks the grid rows). Pure: vmap it
    over a stack of tables, over scales, over starts. Raises ValueError for a missing key and unknown names.
    """
    record = (record,) if isinstance(record, str) else tuple(record)
    unknown = [name for name in record if name not in RECORDS]
    if unknown:
        raise ValueError(f"record: {unknown[0]!r} is unknown; allowed: {', '.join(RECORDS)}")
    table, d, x = device(table), prediction.lift(d), jax.tree_util.tree_map(jnp.asarray, x)
    rows = rows_for(table, d, key, hooks)
    if key is not None:
        index = sample_indices(index, jax.tree_util.tree_leaves(x)[0].shape[0])

    def step(state: State, row: Row) -> tuple[State, dict]:
        state, predicted = advance(table, d, hooks, state, row, index=index)
        kept = {"states": state.y[0], "predictions": predicted}
        return state, {name: kept[name] for name in record}

    state, history = jax.lax.scan(step, begin(table, d, x, key, index, hooks), rows)
    return (state.y[0], history) if record else state.y[0]
