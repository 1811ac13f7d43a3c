"""The rows of a table for continuous data: next states are weighted sums of states, records and noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.coefficients import expand
from jaxdiff.solver.padding import pad_rows, pad_states, widen

__all__ = ["COLUMNS", "AffineBlock", "wide"]

# the arrays of an AffineBlock: all of it but the law
COLUMNS = ("p", "q", "A", "B", "C", "E", "alpha", "sigma", "start_scale", "start_noise", "start_gain")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AffineBlock:
    """The rows for one continuous block of the state; K rows, S carried states, R records.

    ``p``, ``q`` (K,): weights of data and noise in the stored record; None is zero throughout.
    ``A`` (K, S), ``B`` (K, R): age-ordered coefficients; ``C`` (K,) std of fresh noise, ``E`` (K,) an additive
    constant; None when unused. Trailing axes broadcast against x from the left.
    ``alpha``, ``sigma`` (K+1,): the path at each row's state and after the last. ``start_scale`` multiplies a
    unit-scale draw of ``law``. Churn before the first evaluation: ``y_0 = start_gain x + start_noise z``, at ``alpha[0]``
    and ``sigma[0]`` (``start_noise`` None: no churn; ``start_gain`` None: 1).
    """

    p: Any
    q: Any
    A: Any
    B: Any
    C: Any
    E: Any
    alpha: Any
    sigma: Any
    start_scale: Any
    start_noise: Any
    law: Any
    start_gain: Any = None

    def __repr__(self) -> str:
        """What a row reads, not its numbers."""
        kind = "stochastic" if self.stochastic else "deterministic"
        return f"AffineBlock(A {np.shape(self.A)}, B {np.shape(self.B)}, {kind})"

    @property
    def draws(self) -> bool:
        """Whether rows draw fresh noise."""
        return self.C is not None

    @property
    def stochastic(self) -> bool:
        """Whether a run draws fresh noise."""
        return self.C is not None or self.start_noise is not None

    @property
    def start(self) -> tuple[Any, Any]:
        """``(alpha, sigma)`` of the state a run is given: row 0's, or with churn those from which it is raised to row 0's."""
        if self.start_noise is None:
            return self.alpha[0], self.sigma[0]
        return self.alpha[0] if self.start_gain is None else self.alpha[0] / self.start_gain, self.start_scale

    @property
    def registers(self) -> tuple[int, int]:
        """States and records that a row reads."""
        return self.A.shape[1], self.B.shape[1]

    def rows(self) -> AffineBlock:
        """The columns alone, every leaf with the axis K first."""
        return dataclasses.replace(
            self,
            alpha=self.alpha[:-1],
            sigma=self.sigma[:-1],
            start_scale=None,
            start_noise=None,
            start_gain=None,
            law=None,
        )

    def dtype(self, floating: Any) -> Any:
        """Of the states: the one that is asked for."""
        return floating

    def noise(self, keys: jax.Array, leaf: Any) -> jax.Array:
        """Unit noise in the shape and dtype of ``leaf`` (B, ...), one stream a sample."""
        return jax.vmap(lambda key: self.law.sample(key, leaf.shape[1:], leaf.dtype))(keys)

    def place(self, keys: jax.Array, leaf: Any, clean: Any) -> jax.Array:
        """The start in the shape and dtype of ``leaf``: scaled noise, and ``clean`` data where it is given."""
        n = self.noise(keys, leaf)
        start = expand(self.start_scale, n) * n
        if clean is not None:
            start = start + expand(self.start[0], n) * jnp.asarray(clean, n.dtype)
        return start.astype(n.dtype)

    def churn(self, part: Any, noise: Any) -> Any:
        """``start_gain x + start_noise z`` on every leaf of the block's part of the start."""
        if self.start_noise is None:
            return part
        scaled = part
        if self.start_gain is not None:
            scaled = jax.tree_util.tree_map(lambda a: expand(self.start_gain, a) * a, part)
        return jax.tree_util.tree_map(lambda a, z: a + expand(self.start_noise, a) * z, scaled, noise)

    def empty(self, leaf: Any) -> jax.Array:
        """What an absent record of ``leaf`` holds."""
        return jnp.zeros(leaf.shape, wide(leaf))

    def record(self, predicted: Any, part: Any) -> Any:
        """``d = p data + q noise`` on every leaf of the block's part of the state."""
        if not (hasattr(predicted, "data") and hasattr(predicted, "noise")):
            raise ValueError(f"d: returned {type(predicted).__name__}; a denoiser returns Prediction(data, noise)")

        def one(leaf: Any, data: Any, noise: Any) -> Any:
            if np.shape(data) != np.shape(leaf) or np.shape(noise) != np.shape(leaf):
                raise ValueError(
                    f"d: returned data {np.shape(data)} and noise {np.shape(noise)} for a state {np.shape(leaf)}; "
                    "need the state's shape"
                )
            data, noise = (v.astype(wide(leaf)) for v in (data, noise))
            if self.q is None:
                return expand(self.p, data) * data
            if self.p is None:
                return expand(self.q, noise) * noise
            return expand(self.p, data) * data + expand(self.q, noise) * noise

        return jax.tree_util.tree_map(one, part, predicted.data, predicted.noise)

    def combine(self, states: Sequence, records: Sequence, z: Any) -> Any:
        """``sum A y + sum B d + C z + E`` on every leaf; at least float32, returned in the state's dtype."""
        S, R = self.A.shape[0], self.B.shape[0]

        def one(*values: Any) -> Any:
            ys, ds, noise = values[:S], values[S : S + R], values[S + R :]
            total = sum(expand(self.A[h], v) * v for h, v in enumerate(ys))
            total = total + sum(expand(self.B[h], v) * v for h, v in enumerate(ds))
            if self.C is not None:
                total = total + expand(self.C, ys[0]) * noise[0]
            if self.E is not None:
                total = total + expand(self.E, ys[0])
            return total.astype(ys[0].dtype)

        extra = () if self.C is None else (z,)
        return jax.tree_util.tree_map(one, *states[:S], *records[:R], *extra)

    @staticmethod
    def union(blocks: Sequence[AffineBlock]) -> dict[str, Any]:
        """Which optional columns any of ``blocks`` has, and the widest histories."""
        like = {
            name: next((True for b in blocks if getattr(b, name) is not None), None)
            for name in ("p", "q", "C", "E", "start_noise", "start_gain")
        }
        return {**like, "S": max(np.shape(b.A)[1] for b in blocks), "R": max(np.shape(b.B)[1] for b in blocks)}

    def lift(self, like: dict[str, Any], rows: int) -> AffineBlock:
        """The block with the union structure ``like`` and ``rows`` rows; appended rows keep the state as it is."""
        zero = np.zeros(np.shape(self.A)[0])

        def column(name: str, value: Any, fill: Any) -> Any:
            if like[name] is None:
                return None
            return pad_rows(zero if value is None else value, rows, fill)

        keep = np.zeros(like["S"])
        keep[0] = 1.0
        trailing = np.shape(self.A)[2:]
        keep = np.broadcast_to(keep.reshape((-1,) + (1,) * len(trailing)), (like["S"], *trailing))
        return dataclasses.replace(
            self,
            p=column("p", self.p, None),
            q=column("q", self.q, None),
            A=pad_rows(widen(self.A, like["S"]), rows, keep),
            B=pad_rows(widen(self.B, like["R"]), rows, 0.0),
            C=column("C", self.C, 0.0),
            E=column("E", self.E, 0.0),
            alpha=pad_states(self.alpha, rows),
            sigma=pad_states(self.sigma, rows),
            start_noise=None if like["start_noise"] is None else np.asarray(self.start_noise or 0.0, np.float64),
            start_gain=None if like["start_gain"] is None else np.asarray(self.start_gain or 1.0, np.float64),
        )


def wide(leaf: Any) -> Any:
    """The dtype of records of a state: its own, at least float32."""
    return jnp.promote_types(leaf.dtype, jnp.float32)
