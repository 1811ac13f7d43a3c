"""Gradients through a table in little memory: the exact gradient of the discrete sampler, checkpointed in segments."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import prediction
from jaxdiff.solver.executor import advance, begin, rows_for
from jaxdiff.solver.streams import sample_indices
from jaxdiff.solver.table import Table, device

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
    rows = jax.tree.map(jnp.asarray, rows_for(table, d, key, hooks))
    if key is not None:
        index = sample_indices(index, jax.tree.leaves(x)[0].shape[0])

    @jax.checkpoint
    def step(state: Any, row: Any) -> tuple:
        return advance(table, d, hooks, state, row, index=index)[0], None

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
