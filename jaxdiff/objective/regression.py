"""Denoising regression: (time density) x (weighting in lam) x (target), three arguments and one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.objective.context import Ctx
from jaxdiff.objective.coupling import COUPLINGS
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
from jaxdiff.objective.weighting import WEIGHTINGS, Weighting, target_weight
from jaxdiff.prediction import CLOCKS, check_known, check_sigma_data, check_target, network_inputs, target_of
from jaxdiff.process.coefficients import expand
from jaxdiff.process.process import Process

__all__ = ["regression"]


def regression(
    process: Process,
    apply: Any,
    *,
    target: str,
    time: Any = "uniform",
    weighting: Any = "flat",
    cond_key: str | None = None,
    label_drop: float = 0.1,
    null_label: Any = None,
    coupling: Any = None,
    clock: str | None = None,
    sigma_data: Any = 0.5,
    draw: str = "stratified",
    t_min: float = 1e-5,
    data_key: str | None = None,
    reduce: str = "mean",
    bins: int = 0,
    rngs: tuple[str, ...] = (),
    seed: int = 0,
) -> Callable:
    """``objective(params, batch, keys, ctx) -> (loss, metrics)``: ``E w(t) |F(x_t, t, c) - target(x0, n, t)|^2``.

    ``x_t = alpha x0 + sigma n``; the network is told what :func:`jaxdiff.prediction.denoiser` with the same
    ``process, target, clock, sigma_data`` tells it. An example's draws depend on its key (time also on its index and
    the step, when stratified), never on the rest of the batch, save for a coupling's group and dropout.

    Args:
        process, apply, target, clock, sigma_data: as for :func:`jaxdiff.prediction.denoiser`.
        time: a name of TIMES or a density ``(u, process) -> t``; t is then clipped to [t_min, process.t_max].
        weighting: a name of WEIGHTINGS or a :class:`~jaxdiff.objective.weighting.Weighting`.
        cond_key: the batch field given to the network as condition, "label" say; None for none.
        label_drop: probability, example by example, of giving ``null_label`` instead, for guidance.
        null_label: the condition that means none: the null label, or an array that broadcasts with a condition.
        coupling: a name of COUPLINGS or a coupling; None is independent noise. It sees conditions before dropping.
        draw: "stratified" low-discrepancy times by (step, batch["index"]), or "iid" by key.
        t_min: the smallest time; velocities of VP paths are infinite at 0.
        data_key: the batch field with data, floating point; None takes "x0" (what `jaxdiff.data` calls it), else "image", else
            "x".
        reduce: "mean" or "sum" over the axes of one example; examples are always averaged, once, in float32.
        bins: if positive, also ``loss_bin0`` (cleanest) to ``loss_bin{bins-1}``: the loss by equally likely ranges of
            noise level, each an unbiased estimate that averages over microbatches and devices.
        rngs: names of the network's random streams, ("dropout",) say.
        seed: of the shifts of stratified draws.

    The batch: data (B, ...), ``cond_key``, and "index" (B,) global example indices when stratified; ``keys`` (B,) typed.
    Metrics: "loss", "mse" (the target's unweighted residual), bins.

    Raises:
        ValueError: unknown names and values out of range, when built; a field the batch lacks and a mismatch of
            shapes, when traced. TypeError: data that is not floating point.
    """
    from jaxdiff.network.apply import as_apply

    check_target(target, process)
    check_sigma_data(sigma_data)
    clock = clock or ("log_sigma" if target == "edm" else "time")
    one_of("clock", clock, CLOCKS)
    one_of("reduce", reduce, ("mean", "sum"))
    check_examples(t_min, process.t_max, draw, bins, cond_key, label_drop, null_label)
    time = choose("time", time, TIMES)
    weighting = choose("weighting", weighting, WEIGHTINGS)
    coupling = choose("coupling", coupling, COUPLINGS)
    if not callable(time):
        raise ValueError(f"time: {time!r} given; need a name of TIMES or a function (u, process) -> t")
    if not isinstance(weighting, Weighting):
        raise ValueError(f"weighting: {weighting!r} given; need a name of WEIGHTINGS or a Weighting")
    if weighting.over_lam:
        check_density(time, process, "this weighting divides by")
    network = as_apply(apply)
    check_known(network, null_label, "null_label")
    reduction = jnp.mean if reduce == "mean" else jnp.sum

    def objective(params: Any, batch: Mapping, keys: jax.Array, ctx: Ctx) -> tuple[jax.Array, dict]:
        x0 = data_of(batch, data_key, jnp.floating, "floating point, scaled to [-1, 1] say")
        at, noising, dropping, pairing, streams = split_keys(keys, x0.shape[0])

        u = uniforms(draw, at, batch, ctx.step, seed)
        t = jnp.clip(time(u, process), t_min, process.t_max)

        cond = condition_of(batch, cond_key)
        noise = jax.vmap(lambda key: process.noise.sample(key, x0.shape[1:], x0.dtype))(noising)
        if coupling is not None:
            noise = coupling(pairing, x0, noise, cond)
        cond = drop_labels(cond, dropping, label_drop, null_label)

        c = process.coefficients(t)
        x = process.corrupt(x0, noise, t)
        x_in, c_noise = network_inputs(process, target, clock, x, t, c.alpha, c.sigma, sigma_data)
        out = network(params, x_in, c_noise, cond, **random_streams(streams, rngs))
        raw: Any = getattr(out, "raw", out)
        wanted = target_of(target, c, x0, noise, sigma_data)
        if raw.shape != wanted.shape:
            raise ValueError(f"apply: the network gives shape {raw.shape}; target {target!r} has {wanted.shape}")

        square = jnp.square(raw.astype(jnp.float32) - wanted.astype(jnp.float32))
        density = density_at(time, u, process, t_min, process.t_max) if weighting.over_lam else None
        weight = target_weight(weighting, target, c, sigma_data, density)
        axes = tuple(range(1, square.ndim))
        losses = reduction(square * expand(weight, square), axes)
        loss = jnp.mean(losses)
        return loss, {"loss": loss, "mse": jnp.mean(square)} | in_bins(losses, u, bins)

    return objective
