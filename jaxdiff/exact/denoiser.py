"""A closed-form world as a denoiser: what a perfectly trained network would say."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxdiff.prediction import Prediction, Query
from jaxdiff.process.process import Process

__all__ = ["ExactDenoiser", "denoiser"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ExactDenoiser:
    """The posterior means of ``world`` on ``process``; build with :func:`denoiser`."""

    world: Any
    process: Process
    cond: Any

    def __call__(self, x: Any, t: Any, r: Any = None) -> Prediction:
        """Predict at state ``x`` and time ``t`` (left-aligned); ``r`` is not used."""
        c = self.process.coefficients(t)
        return self.at(x, Query(t, r, c.alpha, c.sigma))

    def at(self, x: Any, query: Query) -> Prediction:
        """Predict at the query's own alpha and sigma."""
        if self.cond is None:
            return self.world.predict(x, query.alpha, query.sigma)
        return self.world.predict(x, query.alpha, query.sigma, self.cond)

    def condition(self, cond: Any) -> ExactDenoiser:
        """The same denoiser told the classes ``cond``, integers () or (B,), -1 for all classes."""
        labels = getattr(self.world, "labels", None)
        if cond is not None and labels is None:
            raise ValueError("cond: given, but this world has no labels; build a GaussianMixture with labels=")
        concrete = not any(isinstance(v, jax.core.Tracer) for v in (cond, labels))
        if cond is not None and concrete:
            known = sorted({-1, *np.asarray(labels).tolist()})
            unknown = np.setdiff1d(np.asarray(cond), known)
            if unknown.size:
                raise ValueError(
                    f"cond: {unknown.tolist()[:4]} given; this world's labels are {known} (-1 means all)"
                )
        return dataclasses.replace(self, cond=cond)


def denoiser(world: Any, process: Process, cond: Any = None) -> ExactDenoiser:
    """The exact denoiser ``d(x, t, r=None) -> Prediction`` of a world; of tokens it gives a DiscretePrediction, of an
    :class:`Independent` world a tree of predictions.

    ``cond``: classes of a labelled mixture, see :meth:`ExactDenoiser.condition`; None costs nothing.
    Raises ValueError for a process of another noise law than the world's: these posteriors are not its own.
    """
    need = getattr(world, "law", "gaussian")
    if process.noise.name != need:
        raise ValueError(f"process: noise law {process.noise.name!r} given; exact worlds need {need!r}")
    plain = ExactDenoiser(world, process, None)
    return plain if cond is None else plain.condition(cond)
