"""Gradients through a table in little memory: the exact gradient of the discrete sampler, checkpointed in segments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import prediction
from jaxdiff.solver.executor import _query, advance, begin, rows_of
from jaxdiff.solver.streams import check_key, row_keys, sample_indices
from jaxdiff.solver.table import Table, blocks_of, device

__all__ = ["checkpointed"]


def checkpointed(
    table: Table,
    d: Any,
    x: Any,
    key: jax.Array | None = None,
    *,
    index: Any = None,
    hooks: Any = None,
    segments: int | None = None,
) -> Any:
    """``run(table, d, x, key)``, whose reverse-mode gradient stores ``segments + K/segments`` states instead of K.

    The rows are scanned in ``segments`` groups (default: the root of K), each recomputed when the gradient comes
    back through it, and its rows again one at a time: three evaluations of the network a row instead of one, never
    more than one evaluation's residuals alive. The gradient is that of the discrete sampler itself, to rounding, with
    respect to ``x``, the table and everything in ``d`` (2307.10711 [70], the discrete one of its two). Arguments as in
    ``run``. Raises ValueError for segments outside 1..K and a missing key.
    """
    table, d, x = device(table), prediction.lift(d), jax.tree.map(jnp.asarray, x)
    K = table.rows
    segments = max(1, math.isqrt(K)) if segments is None else segments
    if not 1 <= segments <= K:
        raise ValueError(f"segments: {segments} given; need 1..{K}, the rows of the table")
    if key is not None:
        check_key(key)
        index = sample_indices(index, jax.tree.leaves(x)[0].shape[0])
    elif any(b.stochastic for b in blocks_of(table)) and (hooks is None or hooks.noise is None):
        raise ValueError("key: missing; this table draws noise, give a typed key (jax.random.key(seed))")
    rows = rows_of(table, key)
    if key is not None and hooks is not None and rows.key is None:
        rows = dataclasses.replace(rows, key=row_keys(key, K))
    if hasattr(d, "tabulate") and (hooks is None or hooks.retime is None):
        rows = dataclasses.replace(rows, form=d.tabulate(_query(rows, rows.tau)))
    rows = jax.tree.map(jnp.asarray, rows)

    @jax.checkpoint
    def step(state: Any, row: Any) -> tuple:
        return advance(table, d, hooks, state, row, index)[0], None

    @jax.checkpoint
    def segment(state: Any, part: Any) -> tuple:
        return jax.lax.scan(step, state, part)

    length = K // segments
    whole = length * segments
    groups = jax.tree.map(lambda v: v[:whole].reshape(segments, length, *v.shape[1:]), rows)
    state, _ = jax.lax.scan(segment, begin(table, d, x, key, index, hooks), groups)
    if whole < K:
        state, _ = segment(state, jax.tree.map(lambda v: v[whole:], rows))
    return state.y[0]
