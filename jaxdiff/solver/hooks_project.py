"""Constraints as hooks: states held on a linear constraint, in a range, or on known coordinates, and hooks combined.

A constraint is a function ``x -> x`` of samples (B, ...), a pytree of arrays. :func:`keep` applies it to the states of a run,
:func:`inpaint` holds noisy states to what it says of the data, ``guidance.constrain`` applies it to the data estimate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.coefficients import expand
from jaxdiff.solver.executor import Hooks, hooks
from jaxdiff.solver.table import Table, affine_block, device

__all__ = ["Affine", "Box", "Known", "affine", "box", "combine", "inpaint", "keep", "known"]

STREAM = np.uint32(0xD0A7F00D)  # apart from the row's own draw, which uses the key itself


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """``x - A^+ (A x - b)``; build with :func:`affine`."""

    matrix: Any
    inverse: Any
    value: Any

    def __call__(self, x: Any) -> jax.Array:
        """Project samples (B, ...), each read as one vector."""
        x = jnp.asarray(x)
        flat = x.reshape(x.shape[0], -1)
        A, inverse, b = (jnp.asarray(v, flat.dtype) for v in (self.matrix, self.inverse, self.value))
        if flat.shape[1] != A.shape[1]:
            raise ValueError(
                f"A: shape {A.shape} given for samples of {flat.shape[1]} numbers; need (m, {flat.shape[1]})"
            )
        dot = lambda v, m: jnp.matmul(v, m.T, precision=jax.lax.Precision.HIGHEST)
        return (flat - dot(dot(flat, A) - b, inverse)).reshape(x.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Box:
    """``clip(x, low, high)``; build with :func:`box`."""

    low: Any
    high: Any

    def __call__(self, x: Any) -> jax.Array:
        """Clip."""
        return jnp.clip(x, jnp.asarray(self.low, x.dtype), jnp.asarray(self.high, x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """``values`` where ``mask``, ``x`` elsewhere; build with :func:`known`."""

    mask: Any
    values: Any

    def __call__(self, x: Any) -> jax.Array:
        """Replace; bitwise."""
        return jnp.where(self.mask, jnp.asarray(self.values, x.dtype), x)


def affine(A: Any, b: Any) -> Affine:
    """The orthogonal projection of samples, as vectors of n numbers, onto ``A x = b``.

    ``A`` (m, n), rows may depend on each other; ``b`` (m,), or (B, m) one a sample. The pseudo-inverse is made once on the
    host in float64; in a run ``A x = b`` holds to the rounding of the states. Raises ValueError for shapes that do not
    fit and for a ``b`` that no x satisfies.
    """
    A, b = np.asarray(A, np.float64), np.asarray(b, np.float64)
    if A.ndim != 2 or not A.size or b.shape[-1:] != A.shape[:1] or b.ndim > 2:
        raise ValueError(f"A, b: shapes {A.shape}, {b.shape} given; need (m, n) and (m,) or (B, m)")
    inverse = np.linalg.pinv(A)
    miss = np.max(np.abs(b @ inverse.T @ A.T - b))
    if not miss <= 1e-9 * max(1.0, np.max(np.abs(b))):
        raise ValueError(f"b: no x has A x = b, the nearest misses by {miss:.3g}; the rows of A depend on each other")
    return Affine(A, inverse, b)


def box(low: Any = -1.0, high: Any = 1.0) -> Box:
    """The range [low, high], numbers or arrays that broadcast against x. Raises ValueError unless low < high."""
    if not np.all(np.asarray(low) < np.asarray(high)):
        raise ValueError(f"low, high: {low}, {high} given; box() needs low < high")
    return Box(jnp.asarray(low, float), jnp.asarray(high, float))


def known(mask: Any, values: Any) -> Known:
    """Coordinates that are known: ``mask`` (bool) and ``values``, both broadcast against x. Raises ValueError for
    a mask that is not bool."""
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"mask: dtype {mask.dtype} given; need bool, True where the value is known")
    return Known(mask, jnp.asarray(values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Keep:
    constraint: Any

    def __call__(self, y: Any, row: Any) -> Any:
        return self.constraint(y)


def keep(constraint: Callable[[Any], Any]) -> Hooks:
    """Hooks that put every grid state of a run back on ``constraint``: of :func:`affine`, :func:`box`, :func:`known`, or any
    function.

    For constraints that noisy states obey too: zero centre of mass, a subspace, the domain of a process. One on clean data
    alone is :func:`inpaint`'s or ``guidance.constrain``'s. Stages inside a step are left alone.
    """
    leaf = jax.tree_util.all_leaves([constraint])
    return hooks(project=_Keep(jax.tree_util.Partial(constraint) if leaf else constraint))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Inpaint:
    constraint: Any
    alpha: Any
    sigma: Any
    noise: Any

    def __call__(self, keys: Any, row: Any, y: Any, predicted: Any, y_next: Any, s: Any) -> tuple:
        alpha, sigma = (expand(v[row.k + 1], y_next) for v in (self.alpha, self.sigma))
        if self.noise is not None:
            n = jnp.broadcast_to(jnp.asarray(self.noise, y_next.dtype), y_next.shape)
        elif keys is None:
            raise ValueError("key: missing; inpaint() draws noise, give a typed key or a fixed noise")
        else:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, STREAM)
            n = jax.vmap(lambda k: jax.random.normal(k, y_next.shape[1:], y_next.dtype))(own)
        # P(x) = (I - N) x + v: keep (I - N) y, and put alpha v + sigma N n in the rest
        v = self.constraint(jnp.zeros_like(y_next))
        held = (self.constraint(y_next) - v) + alpha * v + sigma * (n - self.constraint(n) + v)
        return held.astype(y_next.dtype), s


def inpaint(table: Table, constraint: Any, *, noise: Any = None) -> Hooks:
    """Hooks that hold each noisy grid state to what is known of the data: ``A y = A (alpha x0 + sigma n)`` with ``A x0 = b``.

    With :func:`known`, replacement sampling: known coordinates are the data's own, noised to the row's level, and the last
    state (sigma = 0) has them bitwise (RePaint without its resampling, 2201.09865). With :func:`affine`, the same for any
    linear measurement. Fresh noise a row, from the run's key; or one fixed ``noise`` broadcast against x, with which known
    coordinates follow one straight trajectory and no key is needed. Samples approximate the conditional law only: the unknown
    part never hears of the known part's noise.

    Raises ValueError for constraints that are not affine; at the run, without key and noise.
    """
    if not isinstance(constraint, Affine | Known):
        raise ValueError(
            f"constraint: a {type(constraint).__name__} given; inpaint() takes those of affine() and known()"
        )
    block = affine_block(device(table), "inpaint()")
    return hooks(correct=_Inpaint(constraint, block.alpha, block.sigma, noise))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Projects:
    parts: tuple

    def __call__(self, y: Any, row: Any) -> Any:
        for part in self.parts:
            y = part(y, row)
        return y


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Corrects:
    parts: tuple

    def __call__(self, keys: Any, row: Any, y: Any, predicted: Any, y_next: Any, s: Any) -> tuple:
        states = []
        for part, own in zip(self.parts, s):
            if part is not None:
                y_next, own = part(keys, row, y, predicted, y_next, own)
            states.append(own)
        return y_next, tuple(states)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Starts:
    parts: tuple

    def __call__(self, x: Any) -> tuple:
        return tuple(() if part is None else part(x) for part in self.parts)


def combine(*parts: Hooks) -> Hooks:
    """Several hooks as one: all corrections in order, each with a state of its own, then all projections in order.

    Raises ValueError where two of them set the time or draw the noise, which only one can.
    """
    only = {}
    for name in ("retime", "noise"):
        given = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{name}: {len(given)} of the hooks set it; only one may")
        only[name] = given[0] if given else None
    projects = tuple(part.project for part in parts if part.project is not None)
    corrects = tuple(part.correct for part in parts)
    found = any(part is not None for part in corrects)
    return hooks(
        project=_Projects(projects) if projects else None,
        correct=_Corrects(corrects) if found else None,
        start=_Starts(tuple(part.start for part in parts)) if found else None,
        **only,
    )
