"""Bespoke solvers: an ordinary solver run on a scaled and re-timed copy of the path (2310.19075 [3]).

With ``xbar(r) = s(r) x(t(r))`` the flow becomes ``dxbar/dr = (s'/s) xbar + t' s u(xbar/s, t)``, u the velocity. A base table
``xbar_{k+1} = sum_h A_kh xbar_{k-h} + sum_h B_kh kbar_{k-h}`` whose records are velocities is, written in x,

    ``A'_kh = (A_kh s_{k-h} + B_kh s'_{k-h})/s_{k+1}``,   ``B'_kh = B_kh t'_{k-h} s_{k-h}/s_{k+1}``,

evaluated at the times t(r_k): one formula for Euler, midpoint, Heun, RK4 and multistep methods in time, of the same
order as the base for any smooth s, t. r is the base's own time, so s = 1, t = r is the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.process.process import Process
from jaxdiff.solver.build import DATA, Rows, first_order, require_path
from jaxdiff.solver.executor import advance, begin, rows_of
from jaxdiff.solver.grid import Point, as_grid
from jaxdiff.solver.learn.family import Family, check_train, one_block, shifted
from jaxdiff.solver.learn.fit import Learned, fit
from jaxdiff.solver.learn.trajectory import Trajectory, check_ends, trajectory
from jaxdiff.solver.onestep import velocity_form
from jaxdiff.solver.table import Table, freeze

__all__ = ["bespoke", "midpoint", "scale_time", "step_bound"]

PARTS = ("time", "scale")


def midpoint(process: Process, grid: Any) -> Table:
    """The midpoint method in time, the paper's RK2: half an Euler step, then the whole step with the slope found there.

    Order 2, 2 evaluations a step; a step to sigma = 0 is the jump to x0_hat. Raises ValueError for grids off the path.
    """
    grid = as_grid(process, grid)
    require_path(grid, "midpoint", "points between the grid's")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        if to.sigma == 0:
            rows.add(at, *first_order(at, to), form=DATA)
            continue
        h = to.time - at.time
        c = process.coefficients(np.float64(at.time + h / 2))
        half = Point(at.time + h / 2, float(c.alpha), float(c.sigma))
        rows.add(at, [1.0], [h / 2], form=velocity_form(process, at), out=False)
        rows.add(half, [1.0], [h, -h / 2], form=velocity_form(process, half))
    return rows.table(grid[len(grid)])


def scale_time(table: Table, process: Process, *, train: Sequence[str] = PARTS) -> Family:
    """The tables that are ``table`` on a scaled and re-timed path.

    ``table``: deterministic, with velocity records (``euler``, :func:`midpoint`, ``heun``, ``rk4``, in the clock "time"). The
    last row may be the jump to sigma = 0, which no scale and no clock changes. ``train``: "time" (``time``: logits that
    stretch the gaps between the times evaluated at; ``pace``: log t' there) and "scale" (``scale``: log s after the start;
    ``slope``: s' times the gap). All start at 0, which gives ``table`` back. Raises ValueError for other records and
    unknown parts.
    """
    block = one_block(table, "scale_time()")
    check_train(train, PARTS)
    K = table.rows
    A, B = np.asarray(block.A, np.float64), np.asarray(block.B, np.float64)
    p, q = (np.zeros(K) if v is None else np.asarray(v, np.float64) for v in (block.p, block.q))
    time, alpha, sigma = (np.asarray(v, np.float64) for v in (table.time, block.alpha, block.sigma))
    jump = int(sigma[-1] == 0 and q[-1] == 0 and not A[-1].any() and not B[-1, 1:].any())
    moving = K - jump  # rows that step on the transformed path
    if block.E is not None or not _velocities(process, time[:moving], p[:moving], q[:moving]):
        raise ValueError(
            "table: scale_time() takes tables that record the velocity (euler, heun, rk4 with clock='time', on points of "
            "the path)"
        )
    # nodes: the distinct times of states; tables with stages come back to one
    nodes, at = np.unique(-time, return_inverse=True)
    nodes = -nodes
    gaps = -np.diff(nodes)
    width = np.append(gaps, gaps[-1])
    evaluated, scaled = int(at[:moving].max()) + 1, int(at[: moving + 1].max()) + 1
    start = {
        "time": np.zeros(gaps.size),
        "pace": np.zeros(evaluated),
        "scale": np.zeros(scaled - 1),
        "slope": np.zeros(evaluated),
    }
    start = {n: v for n, v in start.items() if ("time" if n in ("time", "pace") else "scale") in train}
    if "scale" in train:  # the slope of s reaches as many states as there are records
        A = np.pad(A, ((0, 0), (0, max(0, B.shape[1] - A.shape[1]))))

    def build(parameters: dict) -> Table:
        host = all(isinstance(v, np.ndarray) for v in parameters.values())
        xp: Any = np if host else jnp
        t = nodes
        if "time" in parameters:
            stretched = gaps * xp.exp(parameters["time"])
            total = nodes[0] - nodes[-1]
            moved = total * (xp.cumsum(stretched) / xp.sum(stretched) - np.cumsum(gaps) / np.sum(gaps))[:-1]
            t = nodes - xp.concatenate([np.zeros(1), moved, np.zeros(1)])
        c = process.coefficients(t[:evaluated])
        P, Q = (v[at[:moving]] for v in (c.da / c.pace, c.ds / c.pace))
        states = at[1 : K if jump else K + 1]
        path = process.coefficients(t[: max(evaluated, scaled)])
        ends = slice(K, None) if jump else slice(0, 0)
        al, si = (
            xp.concatenate([own[:1], new[states], own[ends]])
            for own, new in ((alpha, path.alpha), (sigma, path.sigma))
        )
        if host:  # what did not move keeps the table's own numbers, to the last bit
            al, si = (np.where(t[at] == time, v, w) for v, w in ((alpha, al), (sigma, si)))
            P, Q = (np.where(t[at[:moving]] == time[:moving], v[:moving], w) for v, w in ((p, P), (q, Q)))
        one = np.ones(1)
        s = xp.concatenate([one, xp.exp(parameters["scale"])])[at[: moving + 1]] if "scale" in parameters else None
        slope = (parameters["slope"] / width[:evaluated])[at[:moving]] if "slope" in parameters else None
        pace = xp.exp(parameters["pace"])[at[:moving]] if "pace" in parameters else np.ones(moving)
        if s is None:
            states_gain, records_gain = A[:moving], B[:moving] * _ages(xp, pace, B.shape[1])
        else:
            bent = xp.pad(B[:moving] * _ages(xp, slope, B.shape[1]), ((0, 0), (0, A.shape[1] - B.shape[1])))
            states_gain = (A[:moving] * _ages(xp, s[:-1], A.shape[1]) + bent) / s[1:, None]
            records_gain = B[:moving] * _ages(xp, pace * s[:-1], B.shape[1]) / s[1:, None]
        made = dataclasses.replace(
            block,
            p=xp.concatenate([P, p[moving:]]),
            q=xp.concatenate([Q, q[moving:]]),
            A=xp.concatenate([states_gain, A[moving:]]),
            B=xp.concatenate([records_gain, B[moving:]]),
            alpha=al,
            sigma=si,
        )
        made_table = dataclasses.replace(table, blocks=made, tau=t[at[:-1]], time=t[at])
        return freeze(made_table) if host else made_table

    return Family(build, start)


def _ages(xp: Any, v: Any, width: int) -> Any:
    """``v[k - h]`` (K, width), zero before the start."""
    return xp.stack([shifted(xp, v, h, v.shape[0]) for h in range(width)], 1)


def _velocities(process: Process, time: np.ndarray, p: np.ndarray, q: np.ndarray) -> bool:
    with np.errstate(divide="ignore", invalid="ignore"):
        c = process.coefficients(time)
        return bool(np.allclose(p, c.da / c.pace, 1e-9, 1e-12) and np.allclose(q, c.ds / c.pace, 1e-9, 1e-12))


def step_bound(table: Table, d: Any, lipschitz: float = 1.0) -> Callable[[Table, Trajectory], jax.Array]:
    """``bound(table, truth) = sum_i M_i e_i``, the published loss: no smaller than the RMS error of the endpoint.

    ``e_i``: RMS over samples and axes of one step's error from the true state, ``M_i = prod_{j > i} L_j`` how later steps
    can enlarge it. With u of Lipschitz constant ``lipschitz`` and a step that is ``x_{i+1} = a x_i + sum_l w_l u_l`` at stages
    ``a_l x_i + ...``, ``L = |a| + sum_l |w_l| lipschitz L_l``: the paper's factor where s' = 0, no larger elsewhere. ``table``
    gives the structure: one-step methods of equal stages, then perhaps the jump, whose factor is an Euler step's.
    """
    block = one_block(table, "step_bound()")
    K, out = table.rows, np.flatnonzero(np.asarray(table.out))
    jump = int(np.asarray(block.sigma)[-1] == 0)
    firsts = np.concatenate([[0], out[:-1] + 1])[: out.size - jump]
    stages = (out - np.concatenate([[0], out[:-1] + 1]) + 1)[: out.size - jump]
    if stages.size and np.any(stages != stages[0]):
        raise ValueError(f"table: steps of {sorted(set(stages.tolist()))} stages; the bound takes equal ones")
    count = int(stages[0]) if stages.size else 0
    inside = np.arange(K) - np.repeat(np.concatenate([[0], out[:-1] + 1]), np.diff(np.concatenate([[-1], out])))
    for column in (np.asarray(block.A), np.asarray(block.B)):
        if np.any((np.abs(column) > 0) & (np.arange(column.shape[1])[None] > inside[:, None])):
            raise ValueError("table: a multistep method; the bound takes one-step methods, endpoint() takes any")

    def gains(made: Table) -> jax.Array:
        """L of every step."""
        A, B, factors = made.blocks.A, made.blocks.B, []
        # stage states as vectors over (state at the start of the step, its records)
        vectors, sizes = [jnp.zeros((firsts.size, 1 + count)).at[:, 0].set(1.0)], [jnp.ones(firsts.size)]
        for j in range(count):
            a, b = A[firsts + j], B[firsts + j]
            vector = sum(a[:, h, None] * vectors[j - h] for h in range(min(j + 1, A.shape[1])))
            for h in range(min(j + 1, B.shape[1])):
                vector = vector.at[:, 1 + j - h].add(b[:, h])
            vectors.append(vector)
            reach = jnp.stack([jnp.ones(firsts.size), *(lipschitz * s for s in sizes)], 1)
            sizes.append(jnp.sum(jnp.abs(vector[:, : 2 + j]) * reach, 1))
        factors = [sizes[-1]] if count else []
        if jump:
            factors.append(1 + lipschitz * (made.time[K - 1] - made.time[K])[None])
        return jnp.concatenate(factors)

    def bound(made: Table, truth: Trajectory) -> jax.Array:
        L = gains(made)
        later = jnp.concatenate([jnp.cumprod(L[:0:-1])[::-1], jnp.ones(1)])
        errors = _step_errors(made, d, truth)[out]
        return jnp.sum(later * errors)

    return bound


def _step_errors(table: Table, d: Any, truth: Trajectory) -> jax.Array:
    """RMS error (K,) of every grid row's state when each step starts from the true one."""
    d = prediction.lift(d)
    states = truth.at(table.blocks.alpha, table.blocks.sigma)

    def step(state: Any, row: Any) -> tuple:
        state, _ = advance(table, d, None, state, row)
        true = states[row.k + 1]
        error = jnp.sqrt(jnp.mean((state.y[0] - true) ** 2) + 1e-20)
        return dataclasses.replace(state, y=(jnp.where(row.out, true, state.y[0]), *state.y[1:])), error

    return jax.lax.scan(step, begin(table, d, states[0]), rows_of(table))[1]


def bespoke(
    table: Table | Family,
    d: Any,
    x: Any,
    reference: Table,
    *,
    process: Process | None = None,
    train: Sequence[str] = PARTS,
    lipschitz: float = 1.0,
    batch: int | None = None,
    steps: int = 400,
    rate: float = 1e-2,
    seed: int = 0,
) -> Learned:
    """Learn the scale and the clock on which a base solver makes the least errors (2310.19075 [3]).

    Minimises :func:`step_bound` over :func:`scale_time`: every step starts from the true state, so errors do not run
    through the whole solver. ``table``: the base (or a family around one). ``x`` (N, ...): starts; ``reference``: an
    accurate table between the same ends, whose states, interpolated, are the truth at the moving times. The rest:
    :func:`scale_time`, :func:`fit`. ``endpoint(scale_time(table, process), ...)`` trains the same family on the endpoint.
    """
    process = getattr(d, "process", None) if process is None else process
    if process is None:
        raise ValueError("process: missing; moving times need the path they lie on")
    tables = table if isinstance(table, Family) else scale_time(table, process, train=train)
    base = tables.build(tables.start)
    check_ends(base, reference)
    bound = step_bound(base, d, lipschitz)
    truth = trajectory(reference, d, x)
    count = truth.states.shape[1]

    def loss(made: Table, key: jax.Array) -> jax.Array:
        if batch is None:
            return bound(made, truth)
        pick = jax.random.randint(key, (batch,), 0, count)
        return bound(made, dataclasses.replace(truth, states=truth.states[:, pick]))

    return fit(tables, loss, steps=steps, rate=rate, seed=seed)
