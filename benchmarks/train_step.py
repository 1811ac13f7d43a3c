"""Train steps against bare hand-written ones: same network, Adam, moving average, donation; one process.

Both steps draw one key per example from (step, global index), as both must to be restartable. The hand-written
step has no guard against updates that are not finite, no players, no mesh; ``guarded`` is the hand-written step
with the guard written in as selections, to show what that costs on this device. Medians of alternating pairs.

    python benchmarks/train_step.py [--pairs 31] [--out benchmarks/results/train_step.json]
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff.network import NETWORKS
from jaxdiff.train import Player, averages, create_state, decay, make_mesh, make_step, put_batch, replicated

WIDTH, DIM = 256, 64


def mlp(key):
    """Parameters and apply of a three-layer MLP, 64 -> 256 -> 256 -> 64: a step of about a millisecond."""
    keys = jax.random.split(key, 3)
    shapes = ((DIM, WIDTH), (WIDTH, WIDTH), (WIDTH, DIM))
    params = {
        f"layer_{i}": {"kernel": jax.random.normal(k, s) / s[0] ** 0.5, "bias": jnp.zeros(s[1])}
        for i, (k, s) in enumerate(zip(keys, shapes))
    }

    def apply(params, x, t):
        for name in ("layer_0", "layer_1"):
            x = jax.nn.silu(x @ params[name]["kernel"] + params[name]["bias"])
        return x @ params["layer_2"]["kernel"] + params["layer_2"]["bias"]

    return params, apply


def unet(key):
    """Parameters and apply of the network of ``configs/digits.py``."""
    net = NETWORKS["unet"](channels=24, multipliers=(1, 2), blocks=1)
    return net.init(key, jnp.zeros((1, 8, 8, 1)), jnp.zeros(())), lambda p, x, t: net.apply(p, x, t).raw


CASES = (
    ("mlp", mlp, (DIM,), 64, 50),
    ("mlp", mlp, (DIM,), 256, 40),
    ("mlp", mlp, (DIM,), 1024, 12),
    ("digits unet", unet, (8, 8, 1), 128, 2),
)


def regression(apply):
    """Rectified-flow regression."""

    def loss(params, batch, keys, ctx):
        x0 = batch["x0"]

        def draw(key):
            time_key, noise_key = jax.random.split(key)
            return jax.random.uniform(time_key), jax.random.normal(noise_key, x0.shape[1:])

        t, eps = jax.vmap(draw)(keys)
        mixed = t.reshape(-1, *(1,) * (x0.ndim - 1))
        x_t = (1 - mixed) * x0 + mixed * eps
        return jnp.mean((apply(params, x_t, t) - (eps - x0)) ** 2), {}

    return loss


def bare_step(loss, optimiser, rate, guard):
    """What a person would write for this one case."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        count, params, opt, ema = state
        step_key = jax.random.fold_in(key, count)
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(batch["index"])
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, keys, None)
        updates, new_opt = optimiser.update(grads, opt, params)
        new = optax.apply_updates(params, updates)
        new_ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, new)
        if guard:
            good = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(grads))
            keep = functools.partial(jax.tree.map, lambda a, b: jnp.where(good, a, b))
            new, new_opt, new_ema = keep((new, new_opt, new_ema), (params, opt, ema))
        return (count + 1, new, new_opt, new_ema), value

    return step


def measure(name, network, shape, batch_size, steps, pairs):
    """Seconds a step of each variant, and ratios to the bare step."""
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    optimiser = optax.adam(1e-3)
    key = jax.device_put(jax.random.key(0), replicated(mesh))
    data = np.random.default_rng(0).normal(size=(batch_size, *shape)).astype(np.float32)
    batch = put_batch({"x0": data, "index": np.arange(batch_size, dtype=np.uint32)}, mesh)
    init, apply = network(jax.random.key(1))
    loss = regression(apply)
    game = {"net": Player(loss, optimiser, ema=averages(decay(0.999, warmup=False)))}

    def bare_state():
        params, copy = (jax.tree.map(jnp.copy, init) for _ in range(2))
        return jax.device_put((jnp.zeros((), jnp.int32), params, optimiser.init(params), copy))

    variants = {
        "bare": [bare_step(loss, optimiser, 0.999, guard=False), bare_state()],
        "guarded": [bare_step(loss, optimiser, 0.999, guard=True), bare_state()],
        "jaxdiff": [make_step(game, mesh), create_state(game, {"net": jax.tree.map(jnp.copy, init)}, key, mesh)],
    }

    def run(variant):
        step, state = variants[variant]
        begun = time.perf_counter()
        for _ in range(steps):
            state, out = step(state, batch, key)
        jax.block_until_ready((state, out))
        variants[variant][1] = state
        return (time.perf_counter() - begun) / steps

    for variant in variants:
        run(variant)
    ours, bare = jax.tree.leaves(variants["jaxdiff"][1].params), jax.tree.leaves(variants["bare"][1][1])
    gap = max(float(jnp.abs(a - b).max()) for a, b in zip(ours, bare, strict=True))
    times = {variant: [] for variant in variants}
    for pair in range(pairs):
        names = list(variants)
        for variant in names[pair % 3 :] + names[: pair % 3]:
            times[variant].append(run(variant))
    ratios = {v: statistics.median(a / b for a, b in zip(times[v], times["bare"])) for v in variants}
    return {
        "network": name,
        "batch": batch_size,
        "pairs": pairs,
        "steps": steps,
        "milliseconds": {v: round(1e3 * statistics.median(t), 4) for v, t in times.items()},
        "ratio_to_bare": {v: round(r, 4) for v, r in ratios.items()},
        "largest_parameter_gap_after_first_run": gap,
    }


def main():
    """Measure and print; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(measure(*case, arguments.pairs))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
