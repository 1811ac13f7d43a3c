"""The mixture world that learned tables are tried on: starts to learn from, others to judge by."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import exact, solver
from jaxdiff.process.process import Process

WORLD = exact.GaussianMixture(
    [0.4, 0.6], [[-1.0, 0.5], [0.8, -0.3]], [[[0.2, 0.05], [0.05, 0.1]], [[0.1, 0.0], [0.0, 0.3]]]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """Starts ``x`` and their ends ``target``; ``held_out(table)``: RMS error of the end on other starts."""

    d: Any
    reference: Any
    x: Any
    target: Any
    held_out: Any


@functools.cache
def trial(p: Process, make: Any, *, steps: int = 128, count: int = 256) -> Trial:
    """``count`` starts to learn from and 512 held out, their ends by Heun in ``steps`` steps of the grid ``make``."""
    d, reference = exact.denoiser(WORLD, p), solver.heun(p, make(p, steps))
    x = jax.random.normal(jax.random.key(0), (count + 512, 2)) * reference.blocks.start_scale
    target = jax.jit(lambda x: solver.run(reference, d, x))(x)
    go = jax.jit(lambda tb: jnp.sqrt(jnp.mean((solver.run(tb, d, x[count:]) - target[count:]) ** 2)))
    return Trial(d, reference, x[:count], target[:count], lambda tb: float(go(solver.device(tb))))


def same(one: Any, other: Any) -> bool:
    """Whether two tables are equal to the last bit, but for columns of zeros that only one of them has."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        width = min(a.shape[-1:], b.shape[-1:])
        if not np.array_equal(a[..., : width[0]] if width else a, b[..., : width[0]] if width else b):
            return False
        if width and (a[..., width[0] :].any() or b[..., width[0] :].any()):
            return False
    return True
