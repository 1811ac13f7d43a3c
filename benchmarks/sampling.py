"""Public ``sample`` against bare hand-written JAX in one process: medians of alternating pairs.

    python benchmarks/sampling.py [--pairs 15] [--processes 5] [--only euler/mlp] [--json benchmarks/results/sampling.json]

Each case times the documented call (host table, typed key, parameters) and a loop a person would write for the same
solver and network, ``@jax.jit`` over ``lax.scan``; the ratio is ours / hand-written. Where buffers happen to lie favours one
side by a percent or two for the life of a process, so the figure is the median over fresh processes, their range beside it;
and the hand-written loop is timed against itself compiled a second time (``control``), which shows what the method resolves.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd

CASES = ("euler", "dpm_solver_pp_2m", "ancestral", "euler+cfg", "control")


class Mlp(nn.Module):
    """The 2-D network of both sides: 3 hidden layers of 128."""

    @nn.compact
    def __call__(self, x, t, cond=None):
        """Velocity at x, t."""
        h = jnp.concatenate([x, jnp.broadcast_to(t, x.shape[:1])[:, None]], -1)
        for _ in range(3):
            h = nn.gelu(nn.Dense(128)(h))
        return nn.Dense(x.shape[-1])(h)


class Labelled(nn.Module):
    """The same with a label embedding."""

    @nn.compact
    def __call__(self, x, t, label):
        """Velocity at x, t for labels (B,)."""
        told = jnp.broadcast_to(t, x.shape[:1])[:, None]
        h = jnp.concatenate([x, told, nn.Embed(5, 16)(label)], -1)
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
    return {
        "ratio": statistics.median(ratios),
        "hand_ms": 1e3 * statistics.median(base),
        "pairs": pairs,
        "inner": inner,
    }


def mlp_cases(batch: int):
    """``(name, ours, hand-written, calls a timing)`` of the 2-D network at 50 steps."""
    key, shape, inner = jax.random.key(0), (batch, 2), 1 if batch > 1000 else 40
    net, labelled = Mlp(), Labelled()
    params = net.init(key, jnp.zeros((1, 2)), jnp.zeros(()))
    path = jd.process.linear()
    apply = lambda p, x, t, c=None: net.apply(p, x, t, c)
    grid = jd.solver.grid.uniform(path, 50)
    d = jd.prediction.denoiser(path, net.apply, params, target="velocity")
    euler, multistep, ancestral = (
        make(path, grid) for make in (jd.solver.euler, jd.solver.dpm_solver_pp, jd.solver.ancestral)
    )
    rows = (
        ("euler", euler, hand_euler(apply, shape, 50)),
        ("dpm_solver_pp_2m", multistep, hand_2m(apply, shape, multistep)),
        ("ancestral", ancestral, hand_ancestral(apply, shape, ancestral)),
    )
    for name, table, hand in rows:
        ours = functools.partial(jd.solver.sample, table, d, key, shape)
        yield f"{name}/mlp/{batch}", ours, functools.partial(hand, params, key), inner
    weights = labelled.init(key, jnp.zeros((1, 2)), jnp.zeros(()), jnp.zeros((1,), jnp.int32))
    labels, null = jnp.arange(batch, dtype=jnp.int32) % 4, jnp.full((batch,), 4, jnp.int32)
    guided = jd.guidance.cfg(
        jd.prediction.denoiser(path, labelled.apply, weights, target="velocity"), 2.0, cond=labels, null=null
    )
    hand = hand_cfg(labelled.apply, shape, 50)
    ours = functools.partial(jd.solver.sample, euler, guided, key, shape)
    yield f"euler+cfg/mlp/{batch}", ours, functools.partial(hand, weights, key, 2.0, labels, null), inner
    again, hand = (functools.partial(hand_euler(apply, shape, 50), params, key) for _ in range(2))
    yield f"control/mlp/{batch}", again, hand, inner


def unet_cases():
    """The same for the small UNet at 20 steps."""
    key, path = jax.random.key(0), jd.process.linear()
    net = jd.network.NETWORKS["unet"](channels=16, multipliers=(1, 2), blocks=1)
    x = jnp.zeros((16, 28, 28, 1))
    weights = net.init(key, x, jnp.zeros(()))
    d = jd.prediction.denoiser(path, net.apply, weights, target="velocity")
    table = jd.solver.euler(path, jd.solver.grid.uniform(path, 20))
    apply = lambda p, x, t: net.apply(p, x, t).raw
    again, hand = (functools.partial(hand_euler(apply, x.shape, 20), weights, key) for _ in range(2))
    yield "euler/unet28/16", functools.partial(jd.solver.sample, table, d, key, x.shape), hand, 1
    yield "control/unet28/16", again, hand, 1


def cases(only: str):
    """Every case whose name contains ``only``."""
    families = {"mlp/4096": lambda: mlp_cases(4096), "mlp/16": lambda: mlp_cases(16), "unet28/16": unet_cases}
    for name, family in families.items():
        if any(only in f"{case}/{name}" for case in CASES):  # a network nobody asked for is not even made
            yield from (case for case in family() if only in case[0])


def fresh(arguments: list[str]) -> dict:
    """The cases of one fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "cases.json"
        subprocess.run([sys.executable, __file__, *arguments, "--processes", "1", "--json", str(out)], check=True)
        return json.loads(out.read_text())["cases"]


def over_processes(runs: list[dict]) -> dict:
    """Each case's median ratio over processes, and all of them sorted."""
    merged = {}
    for name, first in runs[0].items():
        ratios = sorted(run[name]["ratio"] for run in runs)
        hand = statistics.median(run[name]["hand_ms"] for run in runs)
        merged[name] = first | {"ratio": statistics.median(ratios), "ratios": ratios, "hand_ms": hand}
    return merged


def main() -> None:
    """Run every case and print or store the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--processes", type=int, default=1, help="fresh processes, each with all pairs")
    parser.add_argument("--only", default="", help="run the cases whose name contains this, e.g. euler/mlp/4096")
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
    line = lambda name, case: f"{name:28s} ratio {case['ratio']:.3f}   hand-written {case['hand_ms']:.3f} ms"
    if args.processes > 1:
        arguments = ["--pairs", str(args.pairs), "--only", args.only]
        report["cases"] = over_processes([fresh(arguments) for _ in range(args.processes)])
        for name, case in report["cases"].items():
            print(line(name, case) + f"   range {case['ratios'][0]:.3f}-{case['ratios'][-1]:.3f}", flush=True)
    else:
        for name, ours, theirs, inner in cases(args.only):
            report["cases"][name] = measure(ours, theirs, args.pairs, inner)
            print(line(name, report["cases"][name]), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
