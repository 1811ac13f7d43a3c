"""From data back to noise: DDIM inversion, exact fixed-point inversion, noise encoding, direct inversion."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.process.coefficients import expand
from jaxdiff.process.process import Process
from jaxdiff.solver.adaptive import stateless, tell
from jaxdiff.solver.affine_block import wide
from jaxdiff.solver.build import NOISE, Rows
from jaxdiff.solver.executor import Hooks, advance, begin, draw_noise, hooks, rows_of, run
from jaxdiff.solver.grid import as_grid
from jaxdiff.solver.kernel import row_mean
from jaxdiff.solver.learn import one_block
from jaxdiff.solver.streams import check_key, sample_indices, sample_keys
from jaxdiff.solver.table import Table, device

__all__ = ["Encoding", "ddim_invert", "decode_noise", "direct", "encode_noise", "fixed_point"]


def ddim_invert(process: Process, grid: Any, *, evaluate: str = "next") -> Table:
    """DDIM from data to noise on ``grid`` reversed: ``y_t = r y_s + (sigma_t - r sigma_s) eps_hat``, ``r = alpha_t/alpha_s``.

    ``grid``: a Grid or decreasing times, as for sampling; run the table from clean data. ``evaluate``: where the
    noise of a step s -> t is estimated, at the cleaner state y_s in either case: "next" asks for the level t (the
    published choice, allowed at sigma_s = 0), "current" for the level s. Inverts DDIM to O(h) (2310.01506 [294]).
    Raises ValueError where the level asked for does not determine the noise: "next" on grids from alpha = 0,
    "current" on grids to sigma = 0.
    """
    grid = as_grid(process, grid)
    if evaluate not in ("next", "current"):
        raise ValueError(f"evaluate: {evaluate!r} given; allowed: next, current")
    last = grid[len(grid)]
    if evaluate == "next" and grid[0].alpha == 0:
        raise ValueError("grid: starts at alpha = 0, where a state tells nothing of the data; start at t < 1")
    if evaluate == "current" and last.sigma == 0:
        raise ValueError("grid: ends at sigma = 0, where noise is not determined; use evaluate='next', or end above")
    rows = Rows(process, last)
    for i in range(len(grid), 0, -1):
        at, to = grid[i], grid[i - 1]
        ratio = to.alpha / at.alpha
        rows.add(to if evaluate == "next" else at, [ratio], [to.sigma - at.sigma * ratio], form=NOISE)
    return rows.table(grid[0])


def fixed_point(
    table: Table,
    d: Any,
    x: Any,
    *,
    iterations: int = 100,
    tolerance: float = 0.0,
) -> jax.Array:
    """The start from which ``table`` ends at ``x``, by undoing its rows one by one: ``run(table, d, result) = x``.

    A row ``y' = a y + b eps_hat(y)`` is solved by ``y <- (y' - b eps_hat(y))/a``, which converges while
    ``|b/a| Lip(eps_hat) < 1``, that is for steps that are not too long; in data form where alpha = 0. Stops at
    ``iterations``, or when no element moves by more than ``tolerance`` (0: until nothing moves).

    Raises ValueError for tables that carry earlier states or records or draw noise, and for stateful denoisers.
    """
    block = one_block(table, "fixed_point()")
    if np.shape(block.A)[1] > 1 or np.shape(block.B)[1] > 1 or block.E is not None:
        raise ValueError("table: fixed_point() undoes one-step rows (ddim, euler); this one carries a history")
    d = stateless(d, jnp.asarray(x), "fixed_point()")
    zero = np.zeros(table.rows)
    p, q = (zero if v is None else np.asarray(v) for v in (block.p, block.q))
    alpha, sigma = np.asarray(block.alpha)[:-1], np.asarray(block.sigma)[:-1]
    A, B = np.asarray(block.A)[:, 0], np.asarray(block.B)[:, 0]
    data = alpha == 0  # the row in the form that its own state determines
    safe, noise = np.where(data, 1.0, alpha), np.where(data, sigma, 1.0)
    a = np.where(data, A + B * q / noise, A + B * p / safe)
    b = np.where(data, B * (p - q * alpha / noise), B * (q - p * sigma / safe))
    if np.any(a == 0):
        raise ValueError("table: a row forgets its state (weight 0), so nothing leads back; use another grid")
    rows = [jnp.asarray(v[::-1]) for v in (np.asarray(table.tau), alpha, sigma, a, b, data)]

    def undo(y_next: jax.Array, row: tuple) -> tuple:
        tau, al, si, gain, weight, pure = row
        query = prediction.Query(tau, None, al, si)

        def improve(carry: tuple) -> tuple:
            y, _, count = carry
            told = tell(d, y, query)
            new = (y_next - weight.astype(y.dtype) * jnp.where(pure, told.data, told.noise)) / gain.astype(y.dtype)
            return new, jnp.max(jnp.abs(new - y)), count + 1

        more = lambda carry: (carry[2] < iterations) & (carry[1] > tolerance)
        y, *_ = jax.lax.while_loop(more, improve, (y_next, jnp.asarray(jnp.inf, y_next.dtype), 0))
        return y, None

    return jax.lax.scan(undo, jnp.asarray(x), tuple(rows))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
    """A sample as what a stochastic sampler drew: ``start`` (B, ...), unit ``noise`` (K, B, ...), and ``residual``
    (K, B, ...), what the rows without noise could not reach (and rounding)."""

    start: jax.Array
    noise: jax.Array
    residual: jax.Array


def encode_noise(table: Table, d: Any, x0: Any, key: jax.Array, *, index: Any = None) -> Encoding:
    """DPM-Encoder: the noises with which a stochastic table generates ``x0`` exactly (2210.05559 [195]).

    Draws ``x_T ~ q(x_T|x0)``, then for each row ``x_s = alpha_s x0 + sqrt(sigma_s^2 - C^2) eps_t + C n`` with
    ``eps_t = (x_t - alpha_t x0)/sigma_t``, and keeps ``z = (x_s - mean(x_t))/C`` of the row's own mean. Any table that
    draws noise, multistep too. Under the true denoiser and a true posterior row, z is standard normal.

    ``x0`` (B, ...), encoded in float32 at least; ``key``, ``index`` as in ``run``. Decode with :func:`decode_noise`, under
    this denoiser or another.
    Raises ValueError for tables that draw no noise.
    """
    check_key(key)
    table = device(table)
    block = table.blocks
    if getattr(block, "C", None) is None or block.start_noise is not None:
        raise ValueError("table: encode_noise() needs one that draws noise in its rows (ddim(eta=1), ancestral, ...)")
    d, x0 = prediction.lift(d), jnp.asarray(x0)
    x0 = x0.astype(wide(x0))
    index = sample_indices(index, x0.shape[0])
    fresh = draw_noise(table, sample_keys(key, index), x0)
    start = expand(block.alpha[0], x0) * x0 + expand(block.sigma[0], x0) * fresh
    later = (block.alpha[1:], block.sigma[1:])

    def step(carry: tuple, xs: tuple) -> tuple:
        (state, eps, placed), (row, (alpha, sigma)) = carry, xs
        y = state.y[0]
        alpha, sigma, C, here, level = (
            expand(v, y) for v in (alpha, sigma, row.blocks.C, row.blocks.alpha, row.blocks.sigma)
        )
        n = draw_noise(table, sample_keys(row.key, index), y)
        # the state after a stage without noise is not one of the path's: its step's start tells the noise
        eps = jnp.where(placed, (y - here * x0) / level, eps)
        to = alpha * x0 + jnp.sqrt(jnp.maximum(sigma**2 - C**2, 0)) * eps + C * n
        mean = row_mean(table, d, state, row)
        z = jnp.where(C > 0, (to - mean) / jnp.where(C > 0, C, 1), 0)
        moved, _ = advance(table, d, _noise_hook(z), state, row, index=index)
        # decoding can add a residual to the ends of steps only, which make up for their stages
        residual = jnp.where(row.out, to - moved.y[0], 0)
        moved = dataclasses.replace(moved, y=(moved.y[0] + residual, *moved.y[1:]))
        return (moved, eps, row.out | (row.blocks.C > 0)), (z, residual)

    rows = rows_of(table, key)
    first = (begin(table, d, start, key, index), fresh, jnp.asarray(True))
    found: tuple[Any, Any] = jax.lax.scan(step, first, (rows, later))[1]
    noise, residual = found
    return Encoding(start, noise, residual)


def _noise_hook(z: Any) -> Hooks:
    return hooks(noise=lambda keys, row, y: z)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Replay:
    noise: Any

    def __call__(self, keys: Any, row: Any, y: Any) -> Any:
        return self.noise[row.k]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Add:
    residual: Any

    def __call__(self, keys: Any, row: Any, y: Any, predicted: Any, y_next: Any, s: Any) -> tuple:
        return y_next + self.residual[row.k], s


def decode_noise(table: Table, d: Any, encoding: Encoding, *, residual: bool = True) -> jax.Array:
    """Run ``table`` on an encoding: gives back the encoded sample under the same denoiser, its translation under another.

    ``residual=False`` leaves out what the encoder's noiseless rows could not reach, which belongs to the source.
    """
    hook = hooks(noise=_Replay(encoding.noise), correct=_Add(encoding.residual) if residual else None)
    return run(table, d, encoding.start, hooks=hook)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Pin:
    trajectory: Any

    def __call__(self, keys: Any, row: Any, y: Any, predicted: Any, y_next: Any, s: Any) -> tuple:
        count = self.trajectory.shape[1]
        return y_next.at[:count].set(self.trajectory[row.k + 1]), s


def direct(table: Table, d: Any, trajectory: Any) -> tuple[jax.Array, jax.Array]:
    """Direct inversion: edit with the source branch held on its inverted trajectory (2310.01506 [294]).

    Source and target run side by side as one batch, sources first, from the same inverted noise; after every row the
    source branch is given the discrepancy to ``trajectory`` back (that is, set to it), the target branch is left alone.
    Branches interact only through ``d`` (attention sharing), which is told conditions of both, (2B,).

    ``trajectory`` (K+1, B, ...): the states of an inversion from noise to data, ``trajectory[-1]`` the data itself.
    Returns ``(source, target)``; source is ``trajectory[-1]`` bitwise, whatever the guidance. Raises ValueError for
    lengths that do not match the table's.
    """
    trajectory = jnp.asarray(trajectory)
    one_block(table, "direct()")
    if trajectory.shape[0] != table.rows + 1 or not np.all(np.asarray(table.out)):
        raise ValueError(
            f"trajectory: {trajectory.shape[0]} states given; need one a grid point ({table.rows + 1}) of a table "
            "without inner stages"
        )
    first = jnp.concatenate([trajectory[0], trajectory[0]])
    out = run(table, d, first, hooks=hooks(correct=_Pin(trajectory)))
    return out[: trajectory.shape[1]], out[trajectory.shape[1] :]
