"""A network's logits as a denoiser of masked tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.discrete.masked import Masked
from jaxdiff.prediction import DiscretePrediction, Query

__all__ = ["TokenDenoiser", "denoiser", "log_probabilities"]


def log_probabilities(process: Masked, out: Any, x: Any) -> jax.Array:
    """A network's output ``out`` at tokens ``x`` (B, ...) as log-probabilities (B, ..., V), in float32 at least.

    ``log_softmax``; what it says of shown positions is still in it. Raises ValueError for logits of another shape.
    """
    logits: Any = getattr(out, "raw", out)
    tokens = process.tokens
    if np.shape(logits) != (*np.shape(x), tokens):
        raise ValueError(
            f"apply: the network gives shape {np.shape(logits)} for tokens {np.shape(x)}; need "
            f"{(*np.shape(x), tokens)}, one logit a token and none for the mask"
        )
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokenDenoiser:
    """A network with its logits read as ``log mu``: ``d(x, t) -> DiscretePrediction``. Build with :func:`denoiser`."""

    process: Masked
    params: Any
    cond: Any
    apply: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Any, t: Any, r: Any = None) -> DiscretePrediction:
        """Predict at tokens ``x`` (B, ...) and time ``t``; ``r`` is not used."""
        return self.at(x, Query(t, r))

    def at(self, x: Any, query: Query) -> DiscretePrediction:
        """Predict as a solver's row asks."""
        out = self.apply(self.params, x, self.process.network_time(query.t), self.cond)
        log_mu = log_probabilities(self.process, out, x)
        shown = jnp.where(x[..., None] == jnp.arange(self.process.tokens), 0.0, -jnp.inf).astype(log_mu.dtype)
        return DiscretePrediction(jnp.where((x == self.process.mask_id)[..., None], log_mu, shown))

    def condition(self, cond: Any) -> TokenDenoiser:
        """The same denoiser told ``cond``."""
        return dataclasses.replace(self, cond=cond)


def denoiser(process: Masked, apply: Any, params: Any = None, *, cond: Any = None) -> TokenDenoiser:
    """Read a network's logits as the posterior of every token (SUBS, 2406.07524).

    ``apply(params, x, c_noise, cond)`` gets tokens 0..V (V masked) and gives logits (B, ..., V). A masked position has
    ``mu = softmax(logits)``, in float32 at least; a revealed one its own token for certain, whatever the network says of it.
    Raises ValueError for processes without a mask and, when asked, for logits of another shape.
    """
    from jaxdiff.network.apply import as_apply

    if not isinstance(process, Masked):
        raise ValueError(f"process: {getattr(process, 'name', process)!r} given; denoiser() needs a masked process")
    return TokenDenoiser(jax.tree_util.tree_map(jnp.asarray, process), params, cond, as_apply(apply))
