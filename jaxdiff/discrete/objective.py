"""What training minimises on masked tokens: cross-entropy, weighted into a bound of the likelihood.

With ``sigma = 1 - alpha`` the share of masks, mu the network's posterior and ``C(sigma) = E[sum over masked d of
-log mu_d(x0_d)]``, the bound of the continuous chain (2406.04329, 2406.07524; [140] in the limit of many steps) is

    E[-log p(x0)] <= integral_0^1 (-alpha'/(1 - alpha)) C dt = integral_0^1 C(sigma) dsigma/sigma

It knows shares and no times: all schedules have one value, if mu ignores t, and with the exact posterior it is the entropy of
the data. Schedule and time density are matters of variance alone.

**Close to data** a draw is a rare mask times 1/sigma: its variance diverges as t_min -> 0. But a chain may stop at t_min and
reveal all that is left in one call, whose bound is C(sigma_min) with ``sigma_min = sigma(t_min)``, and

    integral_{sigma_min}^1 C(sigma) dsigma/sigma + C(sigma_min) = integral_0^1 C(s) dsigma/s,   s = max(sigma, sigma_min)

So a time below t_min is masked as t_min is and weighted by ``sigma'(t)/sigma(t_min)``: a bound, not an approximation, for every
t_min. Its excess is what tokens that are masked together at t_min tell of each other: of second order in sigma_min.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.discrete.denoiser import log_probabilities
from jaxdiff.discrete.masked import Masked
from jaxdiff.objective.context import Ctx
from jaxdiff.objective.examples import (
    check_density,
    check_examples,
    choose,
    condition_of,
    data_of,
    drop_labels,
    in_bins,
    one_of,
    random_streams,
    split_keys,
    uniforms,
)
from jaxdiff.objective.time import TIMES, density_at
from jaxdiff.prediction import check_known
from jaxdiff.process.coefficients import resolve

__all__ = ["WEIGHTINGS", "elbo", "flat", "level", "masked_elbo"]

Weight = Callable[[Any, Any, Any], Any]
NEVER = 2.0**-32  # the smallest share at which a position is ever masked: positions compare 32 bits with it


def elbo() -> Weight:
    """``sigma'/(sigma p)``: the loss is the bound, whatever density p(t) times are drawn from."""
    return lambda slope, sigma, density: slope / (sigma * density)


def flat() -> Weight:
    """1: plain cross-entropy of the masked tokens at the times drawn (2202.04200's, but for its division by their count)."""
    return lambda slope, sigma, density: jnp.ones_like(sigma)


WEIGHTINGS: dict[str, Callable[[], Weight]] = {"elbo": elbo, "flat": flat}


def level(process: Masked, t: Any, t_min: Any) -> tuple[Any, Any, Any]:
    """``(at, slope, sigma)``: a draw t is masked as at time ``at = max(t, t_min)``, where the share is ``sigma``; ``slope`` is
    ``sigma'`` at t itself. numpy float64 when given numpy."""
    xp, t, t_min = resolve(t, t_min)
    at = xp.maximum(t, t_min)
    c = process.coefficients(t)
    return at, c.ds / c.pace, xp.maximum(process.coefficients(at).sigma, NEVER)


def masked_elbo(
    process: Masked,
    apply: Any,
    *,
    time: Any = "uniform",
    weighting: Any = "elbo",
    cond_key: str | None = None,
    label_drop: float = 0.1,
    null_label: Any = None,
    draw: str = "stratified",
    t_min: float = 1e-3,
    data_key: str | None = None,
    reduce: str = "mean",
    bins: int = 0,
    rngs: tuple[str, ...] = (),
    seed: int = 0,
) -> Callable:
    """``objective(params, batch, keys, ctx) -> (loss, metrics)``: ``E w(t) sum over masked d of -log mu_d(x0_d)``, in nats.

    MD4's and MDLM's loss (2406.04329, 2406.07524; extra-3). The loss is a mean over *all* positions of an example, nats a
    token, as those papers report it; a mean over the masked ones would be no bound. mu is what
    :func:`jaxdiff.discrete.denoiser` reads from the same ``apply``, so logits are normalised in float32 at least and shown
    tokens cost nothing. An example's draws depend on its key (time also on its index and the step, when stratified), never
    on the rest of the batch, save for dropout.

    Args:
        process: of :func:`jaxdiff.discrete.masked`.
        apply: ``apply(params, x, c_noise, cond)`` gets tokens 0..V (V masked), int32, and gives logits (B, ..., V).
        time: a name of TIMES or a density ``(u, process) -> t`` with a slope above 0 that reaches all of (0, t_max).
        weighting: a name of WEIGHTINGS ("elbo", "flat") or a function ``(slope, sigma, density) -> weight``: sigma' and sigma
            of the draw (see :func:`level`) and p(t).
        cond_key: the batch field given to the network as condition, "label" say; None for none.
        label_drop: probability, example by example, of giving ``null_label`` instead, for guidance.
        null_label: the condition that means none.
        draw: "stratified" low-discrepancy times by (step, batch["index"]), or "iid" by key.
        t_min: times below are masked as t_min is, see the module. 0 is allowed and of large variance.
        data_key: the batch field with tokens, integers 0..V-1 of any dtype and shape (B, ...); None takes "x0", else "image",
            else "x". Tokens out of range cannot raise here: masked, they make the loss NaN, which a train step refuses.
        reduce: "mean" over positions (nats a token) or "sum" (nats an example); examples are always averaged, once.
        bins: if positive, also ``loss_bin0`` (cleanest) to ``loss_bin{bins-1}``, as in :func:`jaxdiff.objective.regression`.
        rngs: names of the network's random streams, ("dropout",) say.
        seed: of the shifts of stratified draws.

    The batch: tokens (B, ...), ``cond_key``, and "index" (B,) global example indices when stratified; ``keys`` (B,) typed.
    Metrics: "loss"; "nats_per_token" and "bits_per_token", the bound whatever the weighting, tokens still shown at t_max < 1
    counted as log V each; bins.

    Raises:
        ValueError: processes without a mask, unknown names and values out of range, when built; a field the batch lacks and
            a mismatch of shapes, when traced. TypeError: tokens that are not integers.
    """
    from jaxdiff.network.apply import as_apply

    if not isinstance(process, Masked):
        raise ValueError(
            f"process: {getattr(process, 'name', process)!r} given; masked_elbo() needs a masked process"
        )
    one_of("reduce", reduce, ("mean", "sum"))
    check_examples(t_min, process.t_max, draw, bins, cond_key, label_drop, null_label)
    time, weighting = choose("time", time, TIMES), choose("weighting", weighting, WEIGHTINGS)
    if not callable(time):
        raise ValueError(f"time: {time!r} given; need a name of TIMES or a function (u, process) -> t")
    if not callable(weighting):
        raise ValueError(
            f"weighting: {weighting!r} given; need a name of WEIGHTINGS or a function (slope, sigma, density) -> weight"
        )
    check_density(time, process, "the bound divides by")
    network, bound = as_apply(apply), elbo()
    check_known(network, null_label, "null_label")
    left = process.coefficients(process.t_max).alpha * np.log(process.tokens)

    def objective(params: Any, batch: Mapping, keys: jax.Array, ctx: Ctx) -> tuple[jax.Array, dict]:
        x0 = data_of(batch, data_key, jnp.integer, f"tokens, integers in 0..{process.tokens - 1}")
        x0 = x0.astype(jnp.int32)  # the mask may not fit the dtype tokens are stored in
        at, noising, dropping, streams = split_keys(keys, x0.shape[0], 4)

        u = uniforms(draw, at, batch, ctx.step, seed)
        t = jnp.clip(time(u, process), 0.0, process.t_max)
        density = density_at(time, u, process, 0.0, process.t_max)
        t_masked, slope, sigma = level(process, t, t_min)
        noise = jax.vmap(lambda key: process.noise.sample(key, x0.shape[1:]))(noising)
        x = process.corrupt(x0, noise, t_masked)

        cond = drop_labels(condition_of(batch, cond_key), dropping, label_drop, null_label)
        out = network(params, x, process.network_time(t_masked), cond, **random_streams(streams, rngs))
        log_mu = log_probabilities(process, out, x)
        known = (x0 >= 0) & (x0 < process.tokens)
        own = jnp.take_along_axis(log_mu, jnp.where(known, x0, 0)[..., None], -1)[..., 0]
        nats = jnp.where(x == process.mask_id, jnp.where(known, -own, jnp.nan), 0)

        axes = tuple(range(1, nats.ndim))
        mean = jnp.mean(nats, axes)
        losses = weighting(slope, sigma, density) * (mean if reduce == "mean" else jnp.sum(nats, axes))
        loss = jnp.mean(losses)
        per_token = jnp.mean(bound(slope, sigma, density) * mean) + left
        metrics = {"loss": loss, "nats_per_token": per_token, "bits_per_token": per_token / np.log(2)}
        return loss, metrics | in_bins(losses, u, bins)

    return objective
