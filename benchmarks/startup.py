"""Start-up costs in fresh processes: imports, ``--help``, and the first call of ``sample`` without a compile cache.

    python benchmarks/startup.py [--runs 5] [--json benchmarks/results/startup.json]

Ratios are medians over alternating fresh processes: importing jaxdiff and touching process, prediction, solver and network
against ``import jax, flax, optax``; the first call (trace + compile + run) against the hand-written loop of
``benchmarks/sampling.py``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent

FIRST = """
import sys, time
sys.path.insert(0, {here!r})
import jax, jax.numpy as jnp, jaxdiff as jd, sampling
key = jax.random.key(0)
net = sampling.Mlp()
params = net.init(key, jnp.zeros((1, 2)), jnp.zeros(()))
path = jd.process.linear()
d = jd.prediction.denoiser(path, net.apply, params, target="velocity")
grid = jd.solver.grid.uniform(path, 50)
table = getattr(jd.solver, {solver!r})(path, grid)
shape = ({batch}, 2)
apply = lambda p, x, t, c=None: net.apply(p, x, t, c)
make = dict(euler=lambda: sampling.hand_euler(apply, shape, 50), dpm_solver_pp=lambda: sampling.hand_2m(apply, shape, table),
            ancestral=lambda: sampling.hand_ancestral(apply, shape, table))
hand = make[{solver!r}]()
jax.block_until_ready(jax.random.normal(key, (3, 3)))
begin = time.perf_counter()
if {ours}:
    out = jd.solver.sample(table, d, key, shape)
else:
    out = hand(params, key)
jax.block_until_ready(out)
print(time.perf_counter() - begin)
"""
OURS = "import jaxdiff as jd; jd.process.linear; jd.prediction.denoiser; jd.solver.sample; jd.network.MLP"
THEIRS = "import jax, flax, flax.linen, optax"
TIMED = "import time; begin = time.perf_counter()\n{body}\nprint(time.perf_counter() - begin)"


def fresh(code: str) -> float:
    """The number a fresh interpreter prints: no compile cache, but Python's bytecode cache, as installed packages have."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
    clean = {k: v for k, v in os.environ.items() if k not in unset} | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", code], env=clean, check=True, capture_output=True, text=True)
    return float(out.stdout.split()[-1])


def pairs(ours: str, theirs: str, runs: int) -> dict:
    """Median ratio of alternating fresh runs, and the base's median seconds."""
    both = [(fresh(ours), fresh(theirs)) for _ in range(runs)]
    return {
        "ratio": statistics.median(a / b for a, b in both),
        "base_s": statistics.median(b for _, b in both),
        "runs": runs,
    }


def main() -> None:
    """Measure and print or store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    report: dict = {"date": datetime.date.today().isoformat(), "cases": {}}
    report["cases"]["import"] = pairs(TIMED.format(body=OURS), TIMED.format(body=THEIRS), args.runs)
    for solver in ("euler", "dpm_solver_pp", "ancestral"):
        for batch in (4096, 16):
            code = [FIRST.format(here=str(HERE), solver=solver, batch=batch, ours=ours) for ours in (True, False)]
            report["cases"][f"first call {solver} {batch}"] = pairs(*code, args.runs)
    times = []
    for _ in range(args.runs):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "jaxdiff.cli", "train", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    report["cases"]["--help"] = {"seconds": statistics.median(times), "runs": args.runs}
    for name, case in report["cases"].items():
        print(f"{name:32s} " + "  ".join(f"{k} {v:.3f}" for k, v in case.items() if k != "runs"))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
