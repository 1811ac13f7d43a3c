"""Langevin correction of a state at its own noise level, and the hook that makes any table predictor-corrector."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.process.coefficients import expand
from jaxdiff.solver.adaptive import stateless, tell
from jaxdiff.solver.executor import Hooks, hooks
from jaxdiff.solver.table import Table, affine_block, device

__all__ = ["corrector", "langevin_step"]

STREAM = np.uint32(0xC0FFEE00)  # apart from the row's own draw, which uses the key itself


def langevin_step(y: Any, score: Any, z: Any, *, step: Any = None, snr: Any = None, scale: Any = 1.0) -> jax.Array:
    """``y + e score + sqrt(2 e) z``, e given as ``step``, or ``2 scale (snr |z|/|score|)^2`` with norms per sample.

    The law whose score it is stays invariant as e -> 0: one step from N(0, v) ends at variance ``v + e^2/v``
    (2011.13456). Shapes and dtype of y (B, ...). Raises ValueError unless exactly one of ``step``, ``snr`` is given.
    """
    if (step is None) == (snr is None):
        raise ValueError("step, snr: give exactly one of them")
    if step is None:
        norm = lambda v: jnp.sqrt(jnp.sum(v.reshape(v.shape[0], -1) ** 2, 1))
        size = norm(score)
        step = 2 * scale * (snr * norm(z) / jnp.where(size > 0, size, 1)) ** 2 * (size > 0)
    e = expand(step, y)
    return (y + e * score + jnp.sqrt(2 * e) * z).astype(y.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Corrector:
    d: Any
    levels: tuple
    snr: Any
    count: int = dataclasses.field(metadata={"static": True})

    def __call__(self, keys: Any, row: Any, y: Any, predicted: Any, y_next: Any, s: Any) -> tuple:
        if keys is None:
            raise ValueError("key: missing; a Langevin corrector draws noise, give a typed key")
        time, alpha, sigma, scale = (v[row.k + 1] for v in self.levels)
        noisy = sigma > 0  # there is no score to follow at the clean end
        query = prediction.Query(time, None, alpha, sigma)
        d = stateless(self.d, y_next, "a Langevin corrector")
        for i in range(self.count):
            told = tell(d, y_next, query)
            score = -told.noise / expand(jnp.where(noisy, sigma, 1), y)
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, STREAM + np.uint32(i))
            z = jax.vmap(lambda k: jax.random.normal(k, y.shape[1:], y.dtype))(own)
            moved = langevin_step(y_next, score, z, snr=self.snr, scale=scale)
            y_next = jnp.where(noisy, moved, y_next)
        return y_next, s


def corrector(table: Table, d: Any, *, snr: float = 0.16, count: int = 1) -> Hooks:
    """Hooks that follow every grid row of ``table`` by ``count`` Langevin steps: predictor-corrector (2011.13456).

    ``run(table, d, x, key, hooks=corrector(table, d))``; each step costs one more evaluation a row. ``snr``: 0.16 for VE on
    CIFAR in the paper. Meant for states of many coordinates: in one or two, a small score norm makes huge
    steps. The step is scaled by ``(alpha_s/alpha_next)^2``, 1 - beta on discrete VP and 1 on VE. Norms are each
    sample's own (the public code averages them over the batch). Raises ValueError for snr or count out of range; at the
    run, for denoisers that carry a state.
    """
    if not snr > 0 or count < 1:
        raise ValueError(f"snr, count: {snr}, {count} given; need snr > 0 and count >= 1")
    table = device(table)
    block = affine_block(table, "corrector()")
    alpha = np.asarray(block.alpha)
    scale = (alpha / np.append(alpha[1:], alpha[-1])) ** 2
    levels = tuple(jnp.asarray(v, block.alpha.dtype) for v in (np.asarray(table.time), alpha, block.sigma, scale))
    return hooks(correct=_Corrector(prediction.lift(d), levels, jnp.asarray(snr, block.alpha.dtype), count))
