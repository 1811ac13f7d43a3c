"""Guidance by a weaker model, and guidance at some noise levels only."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.guidance.branches import Cfg, Compose
from jaxdiff.guidance.mix import LEVELS, Mix, Window, linear_mix, scale_leaf
from jaxdiff.near import unknown

__all__ = ["autoguidance", "interval"]


def autoguidance(main: Any, weak: Any, scale: Any) -> Mix:
    """A model guided by a worse version of itself: ``D = D_weak + w (D_main - D_weak)`` (2406.02507).

    Both are told the same condition. w = 1 is ``main`` bitwise, and so is every w when the two are equal. The weak
    model should have the main one's kind of faults (smaller, trained less), not others (quantised, say).
    ``scale`` as in :func:`jaxdiff.guidance.cfg`.
    """
    return linear_mix((weak, main), (None, scale))


def interval(d: Any, lo: Any, hi: Any, *, by: str = "sigma", outside: Any = 1.0) -> Any:
    """``d`` with its guidance on only at noise levels in (lo, hi] (2404.07724).

    Args:
        d: a guided denoiser: of cfg, cfg_rescale, cfg_pp, autoguidance, linear_mix or compose.
        lo, hi: the ends, numbers or (B,). ``by="sigma"``: ``sigma/alpha``, the paper's sigma on any path (EDM2-XXL at
            512 px: (0.19, 1.61] with scale 2.0); "half_log_snr": ``log(alpha/sigma)``; "time": t in [0, 1].
        outside: the scale elsewhere; 1 is the conditional (or main) prediction, bitwise.

    The window is data: changing it does not retrace. Both branches are still evaluated outside it. Multistep solvers
    see one change of prediction at each edge, and lose an order there.

    Raises:
        ValueError: unknown ``by``, lo >= hi, a denoiser without scales; on evaluation, an unknown noise level.
    """
    if by not in LEVELS:
        raise unknown("by", by, LEVELS)
    if not any(isinstance(v, jax.core.Tracer) for v in (lo, hi)) and not bool(jnp.all(jnp.less(lo, hi))):
        raise ValueError(f"lo, hi: {lo}, {hi} given; interval() needs lo < hi")
    ends = (jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32), scale_leaf(outside, "outside"))
    if isinstance(d, Cfg):
        return dataclasses.replace(d, scale=Window(d.scale, *ends, by))
    if isinstance(d, Mix | Compose):
        return dataclasses.replace(d, scales=tuple(Window(scale, *ends, by) for scale in d.scales))
    raise ValueError(f"d: a {type(d).__name__} given; interval() needs a guided denoiser, of cfg or linear_mix, say")
