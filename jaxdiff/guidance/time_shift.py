"""Time-shift sampling: the network is asked at the time that a state looks like, not the one the grid says."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import prediction
from jaxdiff.guidance.mix import ask
from jaxdiff.prediction import Prediction, Query, evaluate, given, lift, on_device
from jaxdiff.process.coefficients import expand
from jaxdiff.process.process import Process
from jaxdiff.solver.hooks_time import matched_time

__all__ = ["TimeShift", "time_shift"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TimeShift:
    """``inner`` asked at the time of the state's own variance; build with :func:`time_shift`."""

    inner: Any
    path: Process
    cutoff: Any
    data_variance: Any
    window: float = dataclasses.field(metadata={"static": True})
    resolution: float = dataclasses.field(metadata={"static": True})

    @property
    def process(self) -> Process:
        """The process it was built with."""
        return given(self.path)

    def __call__(self, x: Any, t: Any, r: Any = None) -> Any:
        """Predict at state ``x`` (B, ...) and time ``t``."""
        return ask(self, x, t, r)

    def start(self, x: Any) -> Any:
        """The inner denoiser's state."""
        return prediction.start(self.inner, x)

    def time(self, x: Any, t: Any) -> jax.Array:
        """The times (B,) at which the inner denoiser is asked for ``x`` at ``t``."""
        u = matched_time(
            self.path, x, t, window=self.window, data_variance=self.data_variance, resolution=self.resolution
        )
        t = jnp.broadcast_to(jnp.asarray(t, u.dtype), u.shape)
        return jnp.where((t > self.cutoff) & (t < self.path.t_max), u, t)

    def step(self, state: Any, x: Any, query: Query) -> tuple:
        """``(prediction, state)``: one evaluation, whose noise is kept and whose data follows at the nominal level."""
        t = self.time(x, query.t)
        here = jnp.broadcast_to(jnp.asarray(query.t, t.dtype), t.shape)
        c = self.path.coefficients(t)
        moved = t != here
        # where nothing moved, the row's own coefficients, made in float64
        alpha, sigma = (jnp.where(moved, v, w) for v, w in ((c.alpha, query.alpha), (c.sigma, query.sigma)))
        told, state = evaluate(self.inner, state, x, Query(t, query.r, alpha, sigma, query.mode))
        signal = jnp.broadcast_to(jnp.asarray(query.alpha, t.dtype), t.shape)
        moved = moved & (signal > 0)
        data = (x - expand(query.sigma, x) * told.noise) / expand(jnp.where(moved, signal, 1), x)
        return Prediction(jnp.where(moved.reshape(-1, *[1] * (x.ndim - 1)), data, told.data), told.noise), state

    def condition(self, cond: Any) -> TimeShift:
        """The same, told ``cond``."""
        return dataclasses.replace(self, inner=prediction.condition(self.inner, cond))


def time_shift(
    d: Any,
    *,
    window: float = 0.02,
    cutoff: Any = 0.3,
    data_variance: Any = 0.0,
    resolution: float = 1e-3,
    process: Process | None = None,
) -> TimeShift:
    """Time-shift sampling: ``eps_hat`` from the time within ``window`` whose variance is the state's (2305.15583 [89]).

    Counters exposure bias: sampled states have other variances than training's at the same time. The solver's coefficients
    stay the grid's: ``x0_hat = (x - sigma_t eps_hat)/alpha_t`` at the nominal level. Shifts only while ``cutoff < t < t_max``,
    since the variance of the data is unknown (``data_variance``; 0 is published) and counts at low noise. Published windows
    are 5 to 30 of 1000 indices (0.005 to 0.03), cutoffs 0.3 to 0.9. Window 0 is ``d``. For states of many numbers; the network
    is told times (B,). See :func:`jaxdiff.solver.matched_time`.

    ``process``: the denoiser's own by default. Raises ValueError without one, and for windows out of range.
    """
    d = lift(d)
    process = getattr(d, "process", None) if process is None else process
    if process is None:
        raise ValueError(f"process: missing, and a denoiser of type {type(d).__name__} has none of its own")
    if not 0 <= window <= process.t_max or not resolution > 0:
        raise ValueError(
            f"window, resolution: {window}, {resolution} given; need 0 <= window <= t_max, resolution > 0"
        )
    leaf = lambda v: jnp.asarray(v, jnp.float32)
    return TimeShift(d, on_device(process), leaf(cutoff), leaf(data_variance), float(window), float(resolution))
