"""The time whose marginal has the variance of a state: what time-shift sampling tells the network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.process.process import Process

__all__ = ["matched_time"]


def matched_time(
    process: Process, x: Any, t: Any, *, window: float, data_variance: Any = 0.0, resolution: float = 1e-3
) -> jax.Array:
    """The time u near ``t`` with ``alpha_u^2 data_variance + sigma_u^2`` nearest the variance of each sample.

    Source: 2305.15583 [89]. Variances are taken over a sample's own numbers, less their mean. Candidates are
    ``t + resolution j`` within ``window`` (full width, in t), clipped to [0, t_max]; of equally good ones the nearest to t.
    ``data_variance`` 0 is published, right where noise dominates. Window 0 gives ``t`` itself. x (B, ...) with many numbers
    a sample, t () or (B,); returns (B,).

    As a hook, ``hooks(retime=lambda y, row: matched_time(process, y, row.tau, window=0.03))`` tells it to networks with
    the clock "time"; ``guidance.time_shift`` serves every denoiser. Raises ValueError for sizes out of range.
    """
    if not 0 <= window <= process.t_max or not resolution > 0:
        raise ValueError(
            f"window, resolution: {window}, {resolution} given; need 0 <= window <= t_max, resolution > 0"
        )
    x = jnp.asarray(x)
    count = int(window / (2 * resolution) + 1e-9)
    order = sorted(range(-count, count + 1), key=abs)
    t = jnp.broadcast_to(jnp.asarray(t, jnp.promote_types(x.dtype, jnp.float32)), x.shape[:1])
    near = jnp.clip(t[:, None] + resolution * np.asarray(order, t.dtype), 0, process.t_max)
    c = process.coefficients(near)
    spread = jnp.var(x.reshape(x.shape[0], -1).astype(t.dtype), 1)
    miss = jnp.abs(c.alpha**2 * data_variance + c.sigma**2 - spread[:, None])
    return jnp.take_along_axis(near, jnp.argmin(miss, 1)[:, None], 1)[:, 0]
