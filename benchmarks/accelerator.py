"""The benchmarks on whatever accelerator is present, written as one JSON: device, versions, date, figures.

    python benchmarks/accelerator.py [--sizes S/2 B/2] [--batch 64] [--latent 32x32x4] [--pairs 15] [--out FILE]

Three parts. ``sampling``: public ``sample`` over a hand-written loop (benchmarks/sampling.py). ``train_step``: our step
over a hand-written one (benchmarks/train_step.py). ``dit``: published DiT sizes on latents, images/s of training (bfloat16
compute, float32 parameters, Adam, one average) and of sampling, with their share of the chip's published peak; FLOPs are
counted from the traced program, matrix products alone. Parts that do not fit the memory are recorded as their error.

It refuses a CPU, whose figures belong in the other scripts, unless told ``--cpu`` (to try the script itself).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import sampling
import train_step

import jaxdiff as jd
from jaxdiff import config as config_lib
from jaxdiff.commands import assemble
from jaxdiff.train import create_state, make_mesh, make_step, put_batch, replicated
from jaxdiff.train.chips import peak_flops
from jaxdiff.train.cost import flops

VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy")


def described() -> dict:
    """What ran: device, how many, its memory, versions, date."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "date": datetime.date.today().isoformat(),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "memory_bytes": stats.get("bytes_limit"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "float32_products": str(jax.config.jax_default_matmul_precision or "the device's default"),
    }


def median_seconds(call, repeats: int) -> float:
    """Median over ``repeats`` of one call, after one to compile and one to warm up."""
    for _ in range(2):
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def dit(size: str, batch: int, shape: tuple[int, ...], repeats: int, inner: int, steps: int) -> dict:
    """Training and sampling of one DiT on all devices, data-parallel; ``inner`` train steps a timing."""
    config = config_lib.default()
    given = {"network.name": "dit", "network.size": size, "train.precision": "bfloat16", "optimiser.warmup": "1"}
    config_lib.check(config_lib.apply_overrides(config, given))
    config.data.batch_size = batch
    made = assemble.setup(config, types.SimpleNamespace(shape=shape, num_classes=1000))
    game, mesh = assemble.game(made), make_mesh()
    step = make_step(game, mesh, compute_dtype=jnp.bfloat16)
    key = jax.device_put(jax.random.key(0), replicated(mesh))
    state = create_state(game, made.init, key, mesh)
    generator = np.random.default_rng(0)
    examples = {
        "x0": generator.normal(size=(batch, *shape)).astype(np.float32),
        "label": generator.integers(0, 1000, batch).astype(np.int32),
        "index": np.arange(batch, dtype=np.uint32),
    }
    examples = put_batch(examples, mesh)
    work = flops(jax.make_jaxpr(step.jitted)(state, examples, key, step.fixed))
    carried = [state]

    def train():
        for _ in range(inner):
            carried[0], metrics = step(carried[0], examples, key)
        return carried[0], metrics

    seconds = median_seconds(train, repeats) / inner
    top = peak_flops(jax.devices()[0].device_kind, bfloat16=True)
    row = {
        "size": size,
        "batch": batch,
        "shape": list(shape),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(carried[0].params)),
        "train_images_per_second": batch / seconds,
        "train_flops_per_image": work / batch,
        "train_share_of_peak": work / seconds / (top * jax.device_count()) if top else None,
    }
    params = carried[0].ema["model"][0]
    d = assemble.denoiser(made, params)
    table = jd.solver.device(jd.solver.euler(made.process, jd.solver.grid.uniform(made.process, steps)))
    label, noise_key = examples["label"], jax.random.key(1)
    sharding = examples["x0"].sharding if mesh.size > 1 else None
    draw = lambda: jd.solver.sample(table, d, noise_key, (batch, *shape), cond=label, sharding=sharding)
    seconds = median_seconds(draw, max(3, repeats // 3))
    work = steps * flops(jax.make_jaxpr(lambda x, t: d.condition(label)(x, t).data)(examples["x0"], jnp.float32(0.5)))
    row |= {
        "sample_nfe": steps,
        "sample_images_per_second": batch / seconds,
        "sample_share_of_peak": work / seconds / (top * jax.device_count()) if top else None,
        "peak_memory_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    return row


def attempt(name: str, call) -> dict:
    """The part's figures, or its error: one part that does not fit must not cost the others."""
    try:
        found = call()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    print(name, json.dumps(found), flush=True)
    return found


def main() -> None:
    """Measure, print each figure as it is known, write the JSON after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["S/2", "B/2", "XL/2"], metavar="SIZE")
    parser.add_argument("--batch", type=int, default=128, help="images a DiT step, over all devices")
    parser.add_argument("--latent", default="32x32x4", help="shape of one example, HxWxC")
    parser.add_argument("--nfe", type=int, default=50, help="network evaluations of a DiT sample")
    parser.add_argument("--pairs", type=int, default=15, help="timed repetitions")
    parser.add_argument("--out", type=pathlib.Path, help="default benchmarks/results/accelerator_DEVICE.json")
    parser.add_argument("--cpu", action="store_true", help="run on a CPU too")
    args = parser.parse_args()
    if jax.default_backend() == "cpu" and not args.cpu:
        parser.exit(2, "accelerator.py: no accelerator here; --cpu runs it all the same\n")
    kind = jax.devices()[0].device_kind.lower().replace(" ", "_")
    out = args.out or pathlib.Path(__file__).parent / "results" / f"accelerator_{kind}.json"
    shape = tuple(int(n) for n in args.latent.split("x"))
    report = described() | {"sampling": {}, "train_step": [], "dit": []}

    def store() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")

    for name, ours, theirs, inner in sampling.cases(""):
        measure = lambda: sampling.measure(ours, theirs, args.pairs, inner)  # noqa: B023
        report["sampling"][name] = attempt(name, measure)
        store()
    for case in train_step.CASES:
        measure = lambda: train_step.measure(*case, args.pairs)  # noqa: B023
        report["train_step"].append(attempt(f"train step {case[0]} {case[3]}", measure))
        store()
    for size in args.sizes:
        measure = lambda: dit(size, args.batch, shape, args.pairs, 5, args.nfe)  # noqa: B023
        report["dit"].append(attempt(f"DiT-{size}", measure))
        store()
    print(out)


if __name__ == "__main__":
    main()
