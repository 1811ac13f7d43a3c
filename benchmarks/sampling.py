"""Public ``sample`` against bare hand-written JAX in one process: medians of alternating pairs.

    python benchmarks/sampling.py [--pairs 15] [--json benchmarks/results/sampling.json]

Each case times the documented call (host table, typed key, parameters) and a loop a person would write for the same
solver and network, ``@jax.jit`` over ``lax.scan``; the ratio is ours / hand-written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd


class Mlp(nn.Module):
    """The 2-D network of both sides: 3 hidden layers of 128."""

    @nn.compact
    def __call__(self, x, t, cond=None):
        """Velocity at x, t."""
        h = jnp.concatenate([x, jnp.broadcast_to(t, x.shape[:1])[:, None]], -1)
        for _ in range(3):
            h = nn.gelu(nn.Dense(128)(h))
        return nn.Dense(x.shape[-1])(h)


def hand_euler(apply, shape, steps):
    times = jnp.linspace(1.0, 0.0, steps + 1)

    @jax.jit
    def sample(params, key):
        x = jax.random.normal(key, shape)

        def step(x, ts):
            t, s = ts
            return x + (s - t) * apply(params, x, t), None

        return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]

    return sample


def hand_cfg(apply, shape, steps):
    times = jnp.linspace(1.0, 0.0, steps + 1)

    @jax.jit
    def sample(params, key, scale, labels, null):
        x = jax.random.normal(key, shape)

        def step(x, ts):
            t, s = ts
            v = apply(params, x, t, labels)
            u = apply(params, x, t, null)
            return x + (s - t) * (u + scale * (v - u)), None

        return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]

    return sample


def hand_2m(apply, shape, table):
    columns = jax.tree_util.tree_map(jnp.asarray, (table.tau, table.blocks.A[:, 0], table.blocks.B))

    @jax.jit
    def sample(params, key):
        x = jax.random.normal(key, shape)

        def step(carry, row):
            x, old = carry
            t, a, b = row
            data = x - t * apply(params, x, t)
            return (a * x + b[0] * data + b[1] * old, data), None

        return jax.lax.scan(step, (x, jnp.zeros_like(x)), columns)[0][0]

    return sample


def hand_ancestral(apply, shape, table):
    columns = jax.tree_util.tree_map(
        jnp.asarray, (table.tau, table.blocks.A[:, 0], table.blocks.B[:, 0], table.blocks.C)
    )

    @jax.jit
    def sample(params, key):
        key, first = jax.random.split(key)
        x = jax.random.normal(first, shape)

        def step(carry, row):
            x, key = carry
            key, now = jax.random.split(key)
            t, a, b, c = row
            data = x - t * apply(params, x, t)
            return (a * x + b * data + c * jax.random.normal(now, shape), key), None

        return jax.lax.scan(step, (x, key), columns)[0][0]

    return sample


def measure(ours, theirs, pairs, inner):
    """Median over pairs of ours/theirs, each the time of ``inner`` calls; order alternates."""

    def once(f):
        begin = time.perf_counter()
        for _ in range(inner):
            out = f()
        jax.block_until_ready(out)
        return time.perf_counter() - begin

    jax.block_until_ready(ours())
    jax.block_until_ready(theirs())
    once(ours), once(theirs)
    ratios, base = [], []
    for i in range(pairs):
        if i % 2:
            a, b = once(ours), once(theirs)
        else:
            b, a = once(theirs), once(ours)
        ratios.append(a / b)
        base.append(b / inner)
    return {"ratio": statistics.median(ratios), "hand_ms": 1e3 * statistics.median(base), "pairs": pairs, "inner": inner}


def cases(unet: bool):
    key = jax.random.key(0)
    net = Mlp()
    params = net.init(key, jnp.zeros((1, 2)), jnp.zeros(()))
    path = jd.process.linear()
    apply = lambda p, x, t, c=None: net.apply(p, x, t, c)
    grid = jd.solver.grid.uniform(path, 50)
    d = jd.prediction.denoiser(path, net.apply, params, target="velocity")
    for batch in (4096, 16):
        shape = (batch, 2)
        inner = 1 if batch > 1000 else 40
        table = jd.solver.euler(path, grid)
        hand = hand_euler(apply, shape, 50)
        yield f"euler/mlp/{batch}", (lambda t=table, s=shape: jd.solver.sample(t, d, key, s)), (lambda h=hand: h(params, key)), inner
        table = jd.solver.dpm_solver_pp(path, grid)
        hand = hand_2m(apply, shape, table)
        yield f"dpm_solver_pp_2m/mlp/{batch}", (lambda t=table, s=shape: jd.solver.sample(t, d, key, s)), (lambda h=hand: h(params, key)), inner
        table = jd.solver.ancestral(path, grid)
        hand = hand_ancestral(apply, shape, table)
        yield f"ancestral/mlp/{batch}", (lambda t=table, s=shape: jd.solver.sample(t, d, key, s)), (lambda h=hand: h(params, key)), inner
    if unet:
        net = jd.network.NETWORKS["unet"](channels=32)
        x = jnp.zeros((16, 28, 28, 1))
        weights = net.init(key, x, jnp.zeros(()))
        du = jd.prediction.denoiser(path, net.apply, weights, target="velocity")
        table = jd.solver.euler(path, jd.solver.grid.uniform(path, 20))
        hand = hand_euler(lambda p, x, t: net.apply(p, x, t).raw, x.shape, 20)
        yield "euler/unet28/16", (lambda: jd.solver.sample(table, du, key, x.shape)), (lambda: hand(weights, key)), 1


def main() -> None:
    """Run every case and print or store the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--no-unet", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    report = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "cases": {},
    }
    for name, ours, theirs, inner in cases(not args.no_unet):
        report["cases"][name] = result = measure(ours, theirs, args.pairs, inner)
        print(f"{name:28s} ratio {result['ratio']:.3f}   hand-written {result['hand_ms']:.3f} ms", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
