"""A stochastic row as a Gaussian transition kernel: its mean and log-density, all that steering and policy
gradients need."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.process.coefficients import expand
from jaxdiff.solver.executor import Row, State, advance
from jaxdiff.solver.table import AffineBlock, Table, blocks_of, device

__all__ = ["row_logprob", "row_mean"]


def row_mean(table: Table, d: Any, state: State, row: Row) -> Any:
    """The mean of the next state given the carried ``state``: the row without its noise. Raises ValueError for tokens, which
    have none."""
    if not all(isinstance(block, AffineBlock) for block in blocks_of(table)):
        raise ValueError("table: row_mean() takes tables of affine blocks; the next state of tokens has no mean")
    quiet = dataclasses.replace(row, blocks=_without_noise(row.blocks), key=None)
    table = dataclasses.replace(table, blocks=_without_noise(table.blocks))
    return advance(table, d, None, state, quiet)[0].y[0]


def row_logprob(table: Table, d: Any, state: State, row: Row, y_next: Any) -> jax.Array:
    """``log N(y_next; row_mean, C^2 I)`` in nats, summed over each sample's coordinates: shape (B,).

    Raises ValueError for deterministic tables and non-Gaussian laws. A row with C = 0 has no density: NaN.
    """
    block = blocks_of(table)[0]
    if not isinstance(row.blocks, AffineBlock):
        raise ValueError("table: row_logprob() takes tables of one affine block")
    if block.C is None or not block.law.gaussian:
        raise ValueError("table: row_logprob() needs a stochastic table with Gaussian noise")
    mean = row_mean(device(table), d, state, row)
    std = expand(row.blocks.C, mean)
    z = (y_next - mean) / std
    terms = -0.5 * z * z - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    return jnp.sum(jnp.reshape(terms, (terms.shape[0], -1)), -1)


def _without_noise(blocks: Any) -> Any:
    return jax.tree_util.tree_map(
        lambda b: dataclasses.replace(b, C=None), blocks, is_leaf=lambda n: isinstance(n, AffineBlock)
    )
