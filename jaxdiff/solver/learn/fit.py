"""Descent on a family of tables: any loss of a table, and the error of its endpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.executor import run
from jaxdiff.solver.learn.family import Family, family
from jaxdiff.solver.table import Table, device

__all__ = ["Learned", "endpoint", "fit"]


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """What a learner found: the ``table`` (numpy float64), its ``parameters``, and the ``losses`` on the way to it.

    One loss a step of a descent; learners that go through a table row by row say what theirs are.
    """

    table: Table
    parameters: dict[str, np.ndarray]
    losses: np.ndarray


def fit(
    tables: Family,
    loss: Callable[[Table, jax.Array], Any],
    *,
    steps: int = 400,
    rate: float = 5e-3,
    seed: int = 0,
) -> Learned:
    """Minimise ``loss(table, key)`` over a family by Adam with a cosine schedule, in one compiled scan.

    The same seed gives the same result, bitwise on one machine. The parameters of the smallest loss seen are
    kept (a noisy loss should be averaged over enough samples to compare). Raises ValueError if no loss was finite.
    """
    import optax

    if steps < 1 or rate <= 0:
        raise ValueError(f"steps, rate: {steps}, {rate} given; need at least one step and a rate above 0")
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry: tuple, key: jax.Array) -> tuple:
        parameters, state, best, least = carry
        value, gradient = jax.value_and_grad(lambda v: loss(device(tables.build(v)), key))(parameters)
        better = value < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), parameters, best)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state, best, jnp.where(better, value, least)), value

    @jax.jit
    def descend(parameters: dict, key: jax.Array) -> tuple:
        carry = (parameters, optimiser.init(parameters), parameters, jnp.asarray(jnp.inf))
        end, losses = jax.lax.scan(step, carry, jax.random.split(key, steps))  # type: ignore[var-annotated]
        _, _, best, least = end
        return best, least, losses

    first = jax.tree.map(lambda v: jnp.asarray(v), tables.start)
    best, least, losses = descend(first, jax.random.key(seed))
    if not np.isfinite(least):
        raise ValueError(f"loss: no finite value in {steps} steps; lower the rate ({rate}) or check the start")
    found = {name: np.asarray(v, np.float64) for name, v in best.items()}
    return Learned(tables.build(found), found, np.asarray(losses))


def endpoint(
    table: Table | Family,
    d: Any,
    x: Any,
    target: Any,
    *,
    process: Process | None = None,
    train: Sequence[str] = ("times", "B"),
    records: int | None = None,
    states: int | None = None,
    consistent: bool = True,
    batch: int | None = None,
    steps: int = 400,
    rate: float = 5e-3,
    seed: int = 0,
) -> Learned:
    """Learn the table whose run from ``x`` ends nearest to ``target``, in root mean square.

    ``table``: one to start from, or a family of tables; a family has made its choices already, and ``process``,
    ``train``, ``records``, ``states`` and ``consistent`` are then not read. ``x`` (N, ...): starts at the table's first time;
    ``target`` (N, ...): where an accurate solver takes them (``run`` of a table of many steps, say). ``batch``: starts used
    in a step of the descent, all by default. The rest: :func:`family`, :func:`fit`. Held-out starts tell whether N was
    enough.
    """
    x, target = jnp.asarray(x), jnp.asarray(target)
    if x.shape != target.shape:
        raise ValueError(f"target: shape {target.shape} given; need that of x, {x.shape}")
    tables = table
    if not isinstance(tables, Family):
        process = getattr(d, "process", None) if process is None else process
        tables = family(tables, process, train=train, records=records, states=states, consistent=consistent)

    def loss(made: Table, key: jax.Array) -> jax.Array:
        pick = slice(None) if batch is None else jax.random.randint(key, (batch,), 0, x.shape[0])
        return jnp.sqrt(jnp.mean((run(made, d, x[pick]) - target[pick]) ** 2))

    return fit(tables, loss, steps=steps, rate=rate, seed=seed)
