"""The accurate trajectories that learned solvers are held against, readable at any noise level."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.coefficients import expand
from jaxdiff.solver.executor import run
from jaxdiff.solver.table import AffineBlock, Table, device

__all__ = ["Trajectory", "check_ends", "cut", "trajectory"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """States (M+1, N, ...) at the points ``alpha``, ``sigma`` (M+1,) of a path, noise first."""

    alpha: Any
    sigma: Any
    states: Any

    def at(self, alpha: Any, sigma: Any) -> jax.Array:
        """States (n, N, ...) at points (n,): between two of its own, the first-order step that joins them.

        ``x = (sigma/sigma_a) x_a + (alpha - alpha_a sigma/sigma_a) D``, D the constant prediction that leads from point a
        to b. Exact at its points, second-order between them, finite at alpha = 0 and at sigma = 0, differentiable in
        the point.
        """
        alpha, sigma = jnp.asarray(alpha), jnp.asarray(sigma)
        angle = lambda a, s: jnp.arctan2(s, a)  # falls along the path, finite at both ends
        own = angle(self.alpha, self.sigma)
        a = jnp.clip(jnp.searchsorted(-own, -angle(alpha, sigma), side="right") - 1, 0, own.shape[0] - 2)
        alpha_a, sigma_a, alpha_b, sigma_b = self.alpha[a], self.sigma[a], self.alpha[a + 1], self.sigma[a + 1]
        part = (alpha * sigma_a - alpha_a * sigma) / (alpha_b * sigma_a - alpha_a * sigma_b)
        start, end = self.states[a], self.states[a + 1]
        move = end - expand(sigma_b / sigma_a, start) * start
        return expand(sigma / sigma_a, start) * start + expand(part, start) * move


def trajectory(reference: Table, d: Any, x: Any) -> Trajectory:
    """The states of ``run(reference, d, x)`` at its grid points; ``reference``: an accurate solver of many steps."""
    block = reference.blocks
    if not isinstance(block, AffineBlock) or block.stochastic:
        raise ValueError("reference: need a deterministic table of one affine block")
    grid_rows = np.flatnonzero(np.asarray(reference.out))
    points = np.concatenate([[0], grid_rows + 1])
    go = jax.jit(lambda table, x: run(table, d, x, record=("states",))[1]["states"][grid_rows])
    x = jnp.asarray(x)
    states = go(device(reference), x)
    alpha, sigma = (jnp.asarray(np.asarray(v)[points], states.dtype) for v in (block.alpha, block.sigma))
    return Trajectory(alpha, sigma, jnp.concatenate([x[None].astype(states.dtype), states]))


def check_ends(table: Table, reference: Table) -> None:
    """Refuse a reference that does not run between the points that ``table`` runs between."""
    for name, i in (("starts", 0), ("ends", -1)):
        ours, theirs = ((float(b.alpha[i]), float(b.sigma[i])) for b in (table.blocks, reference.blocks))
        if not np.allclose(ours, theirs, 1e-6, 1e-9):
            raise ValueError(
                f"reference: {name} at alpha, sigma = {theirs[0]:g}, {theirs[1]:g}; need the table's own, "
                f"{ours[0]:g}, {ours[1]:g}"
            )


def cut(table: Table, first: int, last: int) -> Table:
    """Rows ``first`` to ``last`` - 1 as a table of their own, which starts without history."""
    part = lambda v, extra=0: None if v is None else np.asarray(v)[first : last + extra]
    block = table.blocks
    rows = {name: part(getattr(block, name)) for name in ("p", "q", "A", "B", "C", "E")}
    ends = {name: part(getattr(block, name), 1) for name in ("alpha", "sigma")}
    columns = {name: part(getattr(table, name)) for name in ("tau", "out", "live", "r")}
    mode = None if table.mode is None else table.mode[first:last]
    made = dataclasses.replace(block, **rows, **ends)
    return dataclasses.replace(table, blocks=made, time=part(table.time, 1), mode=mode, **columns)
