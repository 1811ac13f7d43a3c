"""The rows of a table for tokens: probabilities are mixed, not vectors.

A state is an array of integers (B, ...): tokens 0..V-1, and ``mask_id`` = V for a masked position. Row k stores the
record ``mu_k = exp(log_probs)`` (B, ..., V) of a :class:`~jaxdiff.prediction.DiscretePrediction` and draws every position
on its own, given the state:

- a masked position becomes token v with probability ``w_v = sum_h B[k, h] mu_{k-h}(v)`` and stays masked with what is left,
  ``1 - sum_h B[k, h]``;
- a revealed position goes back to the mask with probability ``remask[k]`` and else keeps its token.

Both rows of the transition sum to one, since every mu does: a first-order step of a masked process is a table of
probabilities (methods, insight 5). With the exact posterior mu, a(t) the probability that a token is not masked, and
``B = u``, ``remask = c``, the fraction of revealed positions goes from ``a_t`` to ``a_s = (1 - c) a_t + u (1 - a_t)``:
hence ``u = (a_s - (1 - c) a_t)/(1 - a_t)``, which is the reverse chain's own step for c = 0 (extra-5) and ReMDM's
(2503.00307) for c > 0. Weights below 0 (a history that extrapolates) are cut off, and the rest keeps the sum of the row:

``P(reveal) = sum_h B[k, h]``,  ``P(token = v | reveal)`` proportional to ``max(w_v, 0)``.

It is drawn in these two stages, so that nothing rare is left to float32 Gumbel noise: one draw from ``[w, 1 - u]`` gives rare
tokens half their share at u = 1e-5 and none at 1e-7 (extra-2). Both read 32 uniform bits: a word for each position says where,
a word for each token says what, by a race of exponential times (:func:`pick`): the Gumbel draw without its logarithms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.coefficients import expand
from jaxdiff.solver.padding import pad_rows, pad_states, widen

__all__ = ["CategoricalBlock", "TokenNoise", "happens", "pick"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokenNoise:
    """The fresh noise of one row, uniform bits (uint32): ``place`` (B, ...) decides where something changes, ``token``
    (B, ..., V) what is revealed."""

    place: Any
    token: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CategoricalBlock:
    """The rows for one block of tokens; K rows, R records, vocabulary 0..mask_id-1 and the mask ``mask_id``.

    ``B`` (K, R): age-ordered weights of the records, whose sum is the probability that a masked position is revealed;
    ``remask`` (K,): probability that a revealed position is masked again, None for never. Trailing axes broadcast against
    the state from the left. ``alpha`` (K+1,): probability of a revealed position at each row's state and after the last, and
    ``sigma = 1 - alpha``, for denoisers that ask. ``law`` of the start: all masked.
    """

    B: Any
    remask: Any
    alpha: Any
    sigma: Any
    law: Any
    mask_id: int = dataclasses.field(metadata={"static": True})

    stochastic = draws = True
    start_noise = None

    @property
    def registers(self) -> tuple[int, int]:
        """States and records that a row reads."""
        return 1, self.B.shape[1]

    def rows(self) -> CategoricalBlock:
        """The columns alone, every leaf with the axis K first."""
        return dataclasses.replace(self, alpha=self.alpha[:-1], sigma=self.sigma[:-1], law=None)

    def dtype(self, floating: Any) -> Any:
        """Of the states: int32, whatever the continuous blocks have."""
        return jnp.int32

    def place(self, keys: jax.Array, leaf: Any, clean: Any) -> jax.Array:
        """The start in the shape and dtype of ``leaf``: all masked, or ``clean`` data with every token kept with
        probability ``alpha[0]``."""
        start = jax.vmap(lambda key: self.law.sample(key, leaf.shape[1:], leaf.dtype))(keys)
        if clean is None:
            return start
        self._check("init", clean)
        kept = happens(_bits(keys, leaf.shape[1:]), expand(self.alpha[0], _like(leaf)))
        return jnp.where(kept, jnp.asarray(clean, leaf.dtype), start)

    def _check(self, name: str, leaf: Any) -> None:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
            raise ValueError(
                f"{name}: dtype {jnp.result_type(leaf)} given for a block of tokens; need integers in "
                f"0..{self.mask_id}, {self.mask_id} for masked"
            )

    def churn(self, part: Any, noise: Any) -> Any:
        """The start as it is: tokens have no churn."""
        return part

    def empty(self, leaf: Any) -> jax.Array:
        """What an absent record of ``leaf`` holds: no probability for any of the V = ``mask_id`` tokens. Raises ValueError for
        states that are not integers."""
        self._check("x", leaf)
        return jnp.zeros((*leaf.shape, self.mask_id), jnp.float32)

    def noise(self, keys: jax.Array, leaf: Any) -> TokenNoise:
        """The fresh noise of a row for ``leaf`` (B, ...), one stream a sample."""
        place, token = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        return TokenNoise(_bits(place, leaf.shape[1:]), _bits(token, (*leaf.shape[1:], self.mask_id)))

    def record(self, predicted: Any, part: Any) -> Any:
        """``mu = exp(log_probs)`` in float32 for every leaf of the block's part of the state."""
        if not hasattr(predicted, "log_probs"):
            raise ValueError(
                f"d: returned {type(predicted).__name__} for a block of tokens; need DiscretePrediction(log_probs)"
            )

        def one(leaf: Any, log_probs: Any) -> Any:
            if np.shape(log_probs) != (*leaf.shape, self.mask_id):
                raise ValueError(
                    f"d: returned log_probs {np.shape(log_probs)} for tokens {leaf.shape}; need "
                    f"{(*leaf.shape, self.mask_id)}, one column a token and none for the mask"
                )
            return jnp.exp(log_probs.astype(jnp.float32))

        return jax.tree_util.tree_map(one, part, predicted.log_probs)

    def combine(self, states: Sequence, records: Sequence, z: Any) -> Any:
        """The next tokens, on every leaf of the block's part."""
        R = self.B.shape[0]

        def one(y: Any, *values: Any) -> Any:
            mu, noise = values[:R], values[R]
            reveal = sum(expand(self.B[h], _like(y)) for h in range(R))
            # the weights' common factor tells no token from another, so a lone record is its own law
            weights = mu[0] if R == 1 else sum(expand(self.B[h], m) * m for h, m in enumerate(mu))
            token = pick(noise.token, weights).astype(y.dtype)
            masked = y == self.mask_id
            hide = 0.0 if self.remask is None else expand(self.remask, _like(y))
            changes = happens(noise.place, jnp.where(masked, reveal, hide))
            return jnp.where(changes, jnp.where(masked, token, jnp.asarray(self.mask_id, y.dtype)), y)

        return jax.tree_util.tree_map(one, states[0], *records[:R], z)

    @staticmethod
    def union(blocks: Sequence[CategoricalBlock]) -> dict[str, Any]:
        """The widest history and whether any remasks. Raises ValueError for unequal vocabularies."""
        first = blocks[0].mask_id
        for i, block in enumerate(blocks):
            if block.mask_id != first:
                raise ValueError(f"tables: table 0 has mask_id {first}, table {i} {block.mask_id}")
        return {"R": max(b.B.shape[1] for b in blocks), "remask": any(b.remask is not None for b in blocks)}

    def lift(self, like: dict[str, Any], rows: int) -> CategoricalBlock:
        """The block with the union structure ``like`` and ``rows`` rows; appended rows change nothing."""
        hide = np.zeros(np.shape(self.B)[0]) if self.remask is None else self.remask
        return dataclasses.replace(
            self,
            B=pad_rows(widen(self.B, like["R"]), rows, 0.0),
            remask=pad_rows(hide, rows, 0.0) if like["remask"] else None,
            alpha=pad_states(self.alpha, rows),
            sigma=pad_states(self.sigma, rows),
        )


def happens(bits: Any, probability: Any) -> Any:
    """Whether an event of ``probability`` happens, by 32 uniform ``bits`` (uint32): exact at 0 and 1, else to 2^-32."""
    share = jnp.clip(probability, 0, 1 - 2.0**-24) * 2.0**32
    return (bits < share.astype(jnp.uint32)) | (probability >= 1)


def pick(bits: Any, weights: Any) -> Any:
    """An index of the last axis with probability proportional to ``max(weights, 0)``, by 32 uniform ``bits`` (uint32) an entry.

    The smallest of ``E_v / w_v`` with ``E = -log(1 - U)``, ``U = (bits + 1/2)/2^32``: independent exponential times at rates
    w_v. Float32 is finest at small U, where races are won: shares down to 1e-9 of the total are drawn without bias. A weight
    of 0 never wins.
    """
    u = jnp.minimum(
        (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32), 1 - 2.0**-24
    )  # 1 would take forever, as 0 does
    return jnp.argmin(-jnp.log1p(-u) / jnp.maximum(weights, 0), -1)


def _bits(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(keys)


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    """A floating array of the leaf's shape, to align coefficients with."""
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
