"""DC-Solver's ratios, learned: which point of its history the newest prediction is read at (2409.03755 [69])."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.algebra import plain_block
from jaxdiff.solver.build import first_order
from jaxdiff.solver.executor import run
from jaxdiff.solver.exponential import Node, frame
from jaxdiff.solver.grid import Grid, as_grid
from jaxdiff.solver.learn.family import Family
from jaxdiff.solver.learn.fit import Learned
from jaxdiff.solver.learn.trajectory import check_ends, trajectory
from jaxdiff.solver.multistep import allowed_order, combine
from jaxdiff.solver.table import Table, stack
from jaxdiff.solver.unipc import dc_solver, step_weights, to_data

__all__ = ["compensated", "dc"]


def compensated(
    process: Process,
    grid: Any,
    *,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool | Sequence[bool] = True,
    prediction: str = "data",
    lower_order_final: str = "always",
) -> Family:
    """The tables of :func:`jaxdiff.solver.dc_solver` on a grid, by their ratios; the start, ratios 1, is UniPC.

    One parameter, "compensation": a ratio for every step that has three predictions to interpolate. Options as in
    :func:`jaxdiff.solver.unipc`. Raises ValueError for grids on which no step has three.
    """
    grid = as_grid(process, grid)
    options: dict[str, Any] = {"order": order, "variant": variant, "corrector": corrector, "prediction": prediction}
    options["lower_order_final"] = lower_order_final
    base = dc_solver(process, grid, **options)
    count = len(grid)
    first = 2 + int(np.argmax(np.asarray(grid.alpha) > 0))  # a row at alpha = 0 leaves no node behind
    if first >= count:
        raise ValueError(f"grid: {count} steps given; no step of dc_solver() has three predictions on it")
    corrected = [bool(flag) for flag in np.broadcast_to(corrector, count)]
    data = plain_block(base).q == 0  # the rows that keep x0_hat: in noise form those that float32 asks it of

    def build(parameters: dict) -> Table:
        free = parameters["compensation"]
        if isinstance(free, np.ndarray):
            return dc_solver(process, grid, compensation=np.concatenate([np.ones(first), free]), **options)
        ratios = [1.0] * first + [free[i] for i in range(count - first)]
        states = _states(grid, ratios, order, variant, corrected, prediction, lower_order_final, data)
        A = states[1:, 0] / states[:-1, 0]
        own = states[1:] - A[:, None] * states[:-1]  # what row k adds, on the records d_0..d_{K-1}
        ages = np.arange(count)[:, None] - np.arange(count)[None]
        B = jnp.where(ages >= 0, jnp.take_along_axis(own[:, 1:], jnp.maximum(ages, 0), 1), 0.0)
        return dataclasses.replace(base, blocks=dataclasses.replace(base.blocks, A=A[:, None], B=B))

    return Family(build, {"compensation": np.ones(count - first)})


def _states(
    grid: Grid, ratios: Sequence, order: int, variant: str, corrected: Sequence, form: str, tail: str, data: Sequence
) -> jax.Array:
    """The states (K+1, 1+K) of :func:`jaxdiff.solver.unipc` as vectors over the start and the records: of x0_hat in rows
    with ``data``, otherwise in ``form``.

    The same steps as the maker's, on vectors that may be traced; a test holds the two together.
    """
    count = len(grid)
    unit = jnp.eye(1 + count)
    states: list[Any] = [unit[0]]
    history: list[Node] = []
    before = None
    for i in range(count):
        at, to, base = grid[i], grid[i + 1], states[-1]
        value = unit[1 + i]
        if at.alpha == 0:
            A, B = first_order(at, to)
            states.append(A[0] * base + B[0] * value)
            continue
        if data[i] and form == "noise":
            value = (base - at.alpha * value) / at.sigma
        if before is not None and corrected[i - 1]:
            start, state, used = before
            gains = step_weights(start, at, history[:used], form, variant, at)
            ratio, scale, _ = frame(start, at, form)
            base = combine(ratio * state, scale * gains, [Node(at, value), *history[:used]])
        history = [Node(at, value), *history][: max(order, 3)]
        if len(history) >= 3:
            history[0] = Node(at, _read(history[:3], ratios[i]))
        used = allowed_order(grid, i, order, tail)
        before = (at, base, used)
        if to.sigma == 0:
            states.append(to_data(base, history[0], to, form))
            continue
        gains = step_weights(at, to, history[:used], form, variant, None)
        ratio, scale, _ = frame(at, to, form)
        states.append(combine(ratio * base, scale * gains, history))
    return jnp.stack(states)


def _read(nodes: Sequence[Node], ratio: Any) -> Any:
    """The quadratic in time through three predictions, read at ``ratio t_0 + (1 - ratio) t_1``."""
    t0, t1, t2 = (node.at.time for node in nodes)
    t = ratio * t0 + (1 - ratio) * t1
    total = (t - t1) * (t - t2) / ((t0 - t1) * (t0 - t2)) * nodes[0].value
    total = total + (t - t0) * (t - t2) / ((t1 - t0) * (t1 - t2)) * nodes[1].value
    return total + (t - t0) * (t - t1) / ((t2 - t0) * (t2 - t1)) * nodes[2].value


def dc(tables: Family, d: Any, x: Any, reference: Table, *, reach: float = 1.0) -> Learned:
    """Learn the ratios one after the other, each from the state it leads to (2409.03755 [69]).

    For each step in order, the ratio that brings ``y_{k+1}`` nearest to the reference's state there, the earlier ratios
    being fixed. The state is a quadratic in the ratio, so its mean squared error is a quartic, whose least value for
    ratios within ``reach`` of 1 is taken (the paper descends 40 steps of Adam on it; where a step hardly depends on its
    ratio, an unbounded minimum is far out and harms later steps). ``tables``: from :func:`compensated`; ``x`` (N, ...): starts,
    a few suffice; ``reference``: an accurate table between the same ends. ``losses``: the RMS error of each ratio's state.
    Nothing is drawn. ``endpoint(tables, ...)`` trains all ratios on the endpoint instead.
    """
    if not reach > 0:
        raise ValueError(f"reach: {reach} given; need > 0")
    if set(tables.start) != {"compensation"}:
        raise ValueError("tables: dc() learns the ratios of compensated(); endpoint() takes any family")
    base = tables.build(tables.start)
    check_ends(base, reference)
    count, x = base.rows, jnp.asarray(x)
    ratios = tables.start["compensation"].copy()
    first = count - ratios.size
    truth = np.asarray(trajectory(reference, d, x).at(base.blocks.alpha, base.blocks.sigma), np.float64)
    probes = np.array([0.5, 1.0, 1.5])
    go = jax.jit(jax.vmap(lambda table: run(table, d, x, record=("states",))[1]["states"]))
    losses = []
    for k in range(first, count):
        tried = []
        for ratio in probes:
            ratios[k - first] = ratio
            tried.append(_widened(tables.build({"compensation": ratios.copy()})))
        ends = np.asarray(go(stack(tried))[:, k], np.float64).reshape(3, -1)
        # y(ratio) - truth = sum_m c_m (ratio - 1)^m through the three probes
        c = np.linalg.solve(np.vander(probes - 1, increasing=True), ends - truth[k + 1].reshape(1, -1))
        G = c @ c.T / c.shape[1]
        quartic = np.polynomial.Polynomial([sum(G[i, m - i] for i in range(3) if 0 <= m - i < 3) for m in range(5)])
        stationary = quartic.deriv().roots()
        real = stationary.real[np.abs(stationary.imag) <= 1e-9 * (1 + np.abs(stationary.real))]
        near = np.array([*real[np.abs(real) < reach], 0.0, -reach, reach])
        best = near[np.argmin(quartic(near))]
        ratios[k - first] = 1 + best
        losses.append(np.sqrt(max(quartic(best), 0.0)))
    return Learned(tables.build({"compensation": ratios}), {"compensation": ratios}, np.array(losses))


def _widened(table: Table) -> Table:
    """With one record a row, so that tables of all ratios share a structure and a compiled call."""
    B = np.asarray(table.blocks.B)
    wide = np.pad(B, ((0, 0), (0, table.rows - B.shape[1])))
    return dataclasses.replace(table, blocks=dataclasses.replace(table.blocks, B=wide))
