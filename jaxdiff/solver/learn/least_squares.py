"""Coefficients by least squares, one row after the other: improved integration approximation (2304.11328 [17])."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.solver.executor import run
from jaxdiff.solver.learn.family import family
from jaxdiff.solver.learn.fit import Learned
from jaxdiff.solver.learn.trajectory import check_ends, cut, trajectory
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
    local: bool = False,
) -> Learned:
    """Refit the rows of ``table`` in closed form, so that every step ends nearest to an accurate trajectory.

    Going through the rows on the solver's own states and records, the free coefficients of a row that ends on a grid
    point minimise ``||T - A y - B d||^2`` over samples and axes; the next row starts from the state the new ones give.
    T is the reference's state there, from the same ``x``, so that a step also mends what those before it left; or
    (``local``, the paper's) where the reference's steps lead from the state this step starts from, which needs a one-step
    ``reference`` that passes the table's grid points. Stages inside steps keep their coefficients.

    ``train`` ("A", "B"), ``records``, ``states``, ``consistent``: as in :func:`family`; with ``consistent`` the two sum rules
    stay exact and are not spent on the fit. ``x`` (N, ...): starts; ``reference``: an accurate table between the same ends
    (the table itself changes nothing). ``cutoff``: combinations of coefficients whose effect is below it, relative to
    the strongest's, stay as they are. ``losses`` (grid rows,): the RMS error of each fit. Nothing is drawn.

    Each step is best for its own end, which need not be best for the run's: :func:`endpoint` from here, if that matters.
    """
    unknown = [name for name in train if name not in ("A", "B")]
    if unknown:
        raise ValueError(f"train: {unknown[0]!r} given; least_squares() fits A, B (endpoint() also times and form)")
    tables = family(table, train=train, records=records, states=states, consistent=consistent)
    check_ends(table, reference)
    block, out, x = table.blocks, np.asarray(table.out), jnp.asarray(x)
    run_from = jax.jit(lambda table, y: run(table, d, y))
    evaluate = jax.jit(lambda row, y: run(row, d, y, record=("predictions",))[1]["predictions"])
    if local:
        stops = _stops(table, reference)
    else:
        truth = np.asarray(trajectory(reference, d, x).at(block.alpha, block.sigma), np.float64)
    p, q = (np.zeros(table.rows) if v is None else np.asarray(v) for v in (block.p, block.q))
    found = {name: v.copy() for name, v in tables.start.items()}
    ways = _directions(tables)
    losses: list[float] = []
    ys, ds = [np.asarray(x, np.float64)], []  # type: ignore[var-annotated]
    base = 0  # the grid row that the step under way started from
    for k in range(table.rows):
        guess = evaluate(device(cut(table, k, k + 1)), jnp.asarray(ys[0], x.dtype))
        ds.insert(0, p[k] * np.asarray(guess.data[0], np.float64) + q[k] * np.asarray(guess.noise[0], np.float64))
        A, B = (np.asarray(getattr(tables.build(found).blocks, name))[k] for name in "AB")
        y = _combine(A, ys) + _combine(B, ds)
        if out[k]:
            if local:
                part = device(cut(reference, stops[base], stops[k + 1]))
                target = np.asarray(run_from(part, jnp.asarray(ys[k - base], x.dtype)), np.float64)
            else:
                target = truth[k + 1]
            features = [_combine(a[k], ys) + _combine(b[k], ds) for _, _, a, b in ways]
            beta = _solve(features, target - y, cutoff)
            for (name, column, _, _), gain, feature in zip(ways, beta, features):
                found[name][k, column] += gain
                y = y + gain * feature
            losses.append(float(np.sqrt(np.mean((target - y) ** 2))))
            base = k + 1
        ys.insert(0, y)
    return Learned(tables.build(found), found, np.array(losses))


def _stops(table: Table, reference: Table) -> dict[int, int]:
    """The reference's row that starts at each grid state of ``table``, by the table's row."""
    out = np.asarray(reference.out)
    grid_states = np.concatenate([[0], np.flatnonzero(out) + 1])
    inside = np.arange(reference.rows) - np.concatenate([[0], grid_states])[np.cumsum(np.append(False, out[:-1])) + 1]
    for column in (np.asarray(reference.blocks.A), np.asarray(reference.blocks.B)):
        if np.any((column != 0) & (np.arange(column.shape[1]) > inside[:, None])):
            raise ValueError("reference: a multistep method; with local=True steps start anywhere, use heun or rk4")
    angle = lambda block: np.arctan2(np.asarray(block.sigma), np.asarray(block.alpha))
    own, theirs = angle(table.blocks), angle(reference.blocks)[grid_states]
    stops = {}
    for k in [0, *(np.flatnonzero(np.asarray(table.out)) + 1)]:
        i = int(np.argmin(np.abs(theirs - own[k])))
        if abs(theirs[i] - own[k]) > 1e-9:
            raise ValueError(
                f"reference: passes no point at t={float(np.asarray(table.time)[k]):g}, a grid point of the table; with "
                "local=True its grid must refine the table's"
            )
        stops[int(k)] = int(grid_states[i])
    return stops


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
