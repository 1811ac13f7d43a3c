"""Coefficients by least squares, one row after the other: improved integration approximation (2304.11328 [17])."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.solver.executor import run
from jaxdiff.solver.learn.family import family
from jaxdiff.solver.learn.fit import Learned
from jaxdiff.solver.learn.trajectory import check_ends, trajectory
from jaxdiff.solver.table import Table, device

__all__ = ["least_squares"]


def least_squares(
    table: Table,
    d: Any,
    x: Any,
    reference: Table,
    *,
    train: Sequence[str] = ("B",),
    records: int | None = None,
    states: int | None = None,
    consistent: bool = True,
    cutoff: float = 1e-5,
) -> Learned:
    """Refit the rows of ``table`` in closed form, so that every step ends nearest to an accurate trajectory.

    Going through the rows on the solver's own states and records, the free coefficients of a row that ends on a grid
    point minimise ``||T - A y - B d||^2`` over samples and axes, T the reference's state at that point; the next
    row starts from the state the new ones give. Stages inside steps keep their coefficients. ``train`` ("A", "B"),
    ``records``, ``states``, ``consistent``: as in :func:`family`; with ``consistent`` the two sum rules stay exact and are not
    spent on the fit. ``x`` (N, ...): starts; ``reference``: an accurate table between the same ends (the table itself
    changes nothing). ``cutoff``: combinations of coefficients whose effect is below it, relative to the
    strongest's, stay as they are. ``losses`` (grid rows,): the RMS error of each state. Nothing is drawn.

    Each step is best for its own end, which need not be best for the run's: :func:`endpoint` from here, if that matters.
    """
    unknown = [name for name in train if name not in ("A", "B")]
    if unknown:
        raise ValueError(f"train: {unknown[0]!r} given; least_squares() fits A, B (endpoint() also times and form)")
    tables = family(table, train=train, records=records, states=states, consistent=consistent)
    check_ends(table, reference)
    block, out = table.blocks, np.asarray(table.out)
    truth = np.asarray(trajectory(reference, d, x).at(block.alpha, block.sigma), np.float64)
    evaluate = jax.jit(lambda row, y: run(row, d, y, record=("predictions",))[1]["predictions"])
    p, q = (np.zeros(table.rows) if v is None else np.asarray(v) for v in (block.p, block.q))
    found = {name: v.copy() for name, v in tables.start.items()}
    ways = _directions(tables)
    ys, ds, losses = [np.asarray(x, np.float64)], [], []
    for k in range(table.rows):
        guess = evaluate(device(_row(table, k)), jnp.asarray(ys[0], truth.dtype if _wide() else np.float32))
        ds.insert(0, p[k] * np.asarray(guess.data[0], np.float64) + q[k] * np.asarray(guess.noise[0], np.float64))
        A, B = (np.asarray(getattr(tables.build(found).blocks, name))[k] for name in "AB")
        y = _combine(A, ys) + _combine(B, ds)
        if out[k]:
            features = [_combine(a[k], ys) + _combine(b[k], ds) for _, _, a, b in ways]
            beta = _solve(features, truth[k + 1] - y, cutoff)
            for (name, column, _, _), gain, feature in zip(ways, beta, features):
                found[name][k, column] += gain
                y = y + gain * feature
            losses.append(np.sqrt(np.mean((truth[k + 1] - y) ** 2)))
        ys.insert(0, y)
    return Learned(tables.build(found), found, np.array(losses))


def _wide() -> bool:
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]


def _row(table: Table, k: int) -> Table:
    """Row k as a table of its own, to ask what its query answers."""
    cut = lambda v, stop: None if v is None else np.asarray(v)[k:stop]
    block = table.blocks
    own = {name: cut(getattr(block, name), k + 1) for name in ("p", "q", "C", "E")}
    ends = {name: cut(getattr(block, name), k + 2) for name in ("alpha", "sigma")}
    made = dataclasses.replace(
        block, A=np.asarray(block.A)[k : k + 1, :1], B=np.asarray(block.B)[k : k + 1, :1], **own, **ends
    )
    mode = None if table.mode is None else table.mode[k : k + 1]
    columns = {name: cut(getattr(table, name), k + 1) for name in ("tau", "out", "live", "r")}
    return dataclasses.replace(table, blocks=made, time=cut(table.time, k + 2), mode=mode, **columns)


def _combine(gains: np.ndarray, history: Sequence[np.ndarray]) -> np.ndarray:
    """``sum_h gains[h] history[h]`` over the history there is."""
    return sum((g * v for g, v in zip(gains, history)), np.zeros_like(history[0]))


def _directions(tables: Any) -> list[tuple[str, int, np.ndarray, np.ndarray]]:
    """For each free column: how a unit of it changes A and B of every row, what the sum rules ask in return included."""
    base = tables.build(tables.start).blocks
    ways = []
    for name, start in tables.start.items():
        for column in range(start.shape[1]):
            moved = {**tables.start, name: start + (np.arange(start.shape[1]) == column)}
            made = tables.build(moved).blocks
            ways.append((name, column, made.A - base.A, made.B - base.B))
    return ways


def _solve(features: Sequence[np.ndarray], rest: np.ndarray, cutoff: float) -> np.ndarray:
    """The least-norm least-squares gains; features that a row does not have are zero and get none."""
    matrix = np.stack([f.ravel() for f in features], 1)
    if not np.any(matrix):
        return np.zeros(len(features))
    return np.linalg.lstsq(matrix, rest.ravel(), rcond=cutoff)[0]
