"""What never losing work costs: a restart's way to its first step, waiting for input, the stall of a checkpoint.

    python benchmarks/restart.py [--runs 7] [--cases digits mnist] [--json benchmarks/results/restart_cpu.json]

A restart is ``jaxdiff train`` in a fresh process on a run that was stopped at step 5, timed from the start of the
process to the end of its first step, and to its beginning (``begun``): the state restored and verified, the batch there,
the step loaded. What lies between is the step's own work, as long as the network makes it, and what XLA prepares in a
program's first call. It is compared, in alternation, with a fresh process that imports exactly the modules which the
restart has imported by then and restores the same checkpoint with its digests verified (``import + restore``), and with
one that imports jax, flax, optax and orbax (and the data set's library) and restores with bare orbax, verifying nothing
(``bare``). The compile cache is the working directory's own. The share of waiting for input is what the run itself logs.
The stall is how long an asynchronous save of 34 MB in 123 leaves holds its caller.
MNIST needs TFDS_DATA_DIR.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# trains as planned up to a step and saves, as a preemption would
PREPARE = """
import sys
from jaxdiff import cli
from jaxdiff.train.preempt import Preemption
Preemption.requested = lambda self, step: step == int(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""
RESTART = """
import json, os, sys, time
from jaxdiff import cli
from jaxdiff.commands import program
from jaxdiff.train import metrics

def first(self, step, row):
    if "first_step_seconds" in row:
        said = {"now": time.monotonic(), "begun": begun[0], "step": step, "modules": list(sys.modules)}
        print(json.dumps(said), flush=True)
        os._exit(0)

def ready(self, *given):
    step = loaded(self, *given)  # returns when the kept step can be called
    assert self._linking is not None, "the step was not kept"
    begun.append(time.monotonic())
    return step

begun, loaded = [], program.Program.ready
program.Program.ready = ready
metrics.JsonlWriter.write = first
sys.exit(cli.main(sys.argv[1:]))
"""
IMPORT_AND_RESTORE = """
import importlib, json, pathlib, pickle, sys, time
for name in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    try:
        importlib.import_module(name)
    except ImportError:  # names that packages make up, and what is absent and asked for all the same
        pass
import jax
from jaxdiff.train.checkpoint import Checkpointer
from jaxdiff.train.mesh import make_mesh, replicated
workdir = pathlib.Path(sys.argv[2])
structure = pickle.loads(pickle.loads((workdir / "step.program").read_bytes()[64:])["structure"])
whole = replicated(make_mesh())
is_spec = lambda node: type(node).__name__ == "_Spec"
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), structure, is_leaf=is_spec)
found = Checkpointer(workdir / "checkpoints", read_only=True).restore_latest(target)
jax.block_until_ready(found.state)
print(json.dumps({"now": time.monotonic(), "step": found.step}))
"""
BARE = """
import json, pathlib, sys, time
import jax, flax.linen, optax, orbax.checkpoint as ocp
if sys.argv[1] != "digits":
    import tensorflow_datasets
    tensorflow_datasets.data_source
steps = [p for p in (pathlib.Path(sys.argv[2]) / "checkpoints").iterdir() if p.name.isdecimal()]
folder = max(steps, key=lambda p: int(p.name))
trees = [jax.device_put(ocp.PyTreeCheckpointHandler().restore(folder / item)) for item in ("state", "ema")]
jax.block_until_ready(trees)
print(json.dumps({"now": time.monotonic(), "step": int(folder.name)}))
"""


def environment() -> dict[str, str]:
    """This one's, on one CPU device, without a compile cache chosen outside."""
    drop = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "CI", "PYTHONDONTWRITEBYTECODE")
    return {k: v for k, v in os.environ.items() if k not in drop} | {"JAX_PLATFORMS": "cpu"}


def fresh(code: str, *arguments: object) -> tuple[float, dict]:
    """Seconds from the start of a fresh process to the moment it names, and all it says."""
    begin = time.monotonic()
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr[-3000:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return said["now"] - begin, said


def restart(case: str, runs: int, folder: pathlib.Path) -> dict:
    """Median seconds and ratios of a restart of ``configs/<case>.py``, and the share of time its run waits for input."""
    workdir, names = folder / case, folder / f"{case}.modules.json"
    train = ["train", "--config", f"configs/{case}.py", "--workdir", workdir, "--config.train.log_every=10"]
    subprocess.run(
        [sys.executable, "-c", PREPARE, "5", *map(str, train)],
        env=environment(),
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert (workdir / "step.program").is_file(), "the prepared run kept no program"
    _, said = fresh(RESTART, *train)
    names.write_text(json.dumps([name for name in said["modules"] if name != "__main__"]))
    rows = []
    for _ in range(runs):
        ours, at = fresh(RESTART, *train)
        both, restored = fresh(IMPORT_AND_RESTORE, names, workdir)
        bare, _ = fresh(BARE, case, workdir)
        assert at["step"] == restored["step"] + 1 == 6
        rows.append((ours - at["now"] + at["begun"], ours, both, bare))
    waited = input_wait(train, workdir, 65 if case == "digits" else 25)
    median = lambda values: round(statistics.median(values), 4)
    return {
        "restart_to_first_step_s": median(ours for _, ours, _, _ in rows),
        "restart_to_first_step_begun_s": median(begun for begun, _, _, _ in rows),
        "import_and_restore_s": median(both for _, _, both, _ in rows),
        "bare_import_and_restore_s": median(bare for _, _, _, bare in rows),
        "ratio_to_import_and_restore": median(ours / both for _, ours, both, _ in rows),
        "ratio_to_bare": median(ours / bare for _, ours, _, bare in rows),
        "ratio_begun_to_import_and_restore": median(begun / both for begun, _, both, _ in rows),
        "ratio_begun_to_bare": median(begun / bare for begun, _, _, bare in rows),
        "runs": runs,
        "input_wait_fraction": waited,
    }


def input_wait(train: list, workdir: pathlib.Path, until: int) -> dict:
    """Waiting for input as logged by a run that goes on to a step, over its intervals."""
    subprocess.run(
        [sys.executable, "-c", PREPARE, str(until), *map(str, train)], env=environment(), cwd=ROOT, check=True,
        capture_output=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    shares = [row["input_wait_fraction"] for row in rows if row["step"] > 6 and "input_wait_fraction" in row]
    step = statistics.median(
        1 / row["steps_per_second"] for row in rows if row["step"] > 6 and "steps_per_second" in row
    )
    count = {"intervals_of_10_steps": len(shares), "step_s": step}
    return {"median": statistics.median(shares), "largest": max(shares), **count}


def stall(runs: int, folder: pathlib.Path) -> dict:
    """Seconds that asynchronous saves of 34.2 MB in 123 leaves hold the caller."""
    import jax
    import numpy as np

    from jaxdiff.train.checkpoint import Checkpointer

    rng = np.random.default_rng(0)
    sizes = [70_000] * 122 + [34_200_000 // 4 - 122 * 70_000]
    state = {f"leaf_{i}": jax.device_put(rng.normal(size=size).astype(np.float32)) for i, size in enumerate(sizes)}
    state["ema"] = {name: state.pop(name) for name in list(state)[:41]}
    bytes_held = sum(x.nbytes for x in jax.tree.leaves(state))
    held = []
    with Checkpointer(folder / "stall", keep_last=2) as saver:
        for step in range(runs + 1):
            saver.save(step, state, meta={})
            saver.wait()
            held.append(saver.stall_seconds)
    held = held[1:]  # the first pays for orbax's start
    return {"megabytes": bytes_held / 1e6, "median_s": statistics.median(held), "largest_s": max(held), "saves": runs}


def main() -> None:
    """Measure and print; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=["digits", "mnist"], choices=["digits", "mnist"])
    parser.add_argument("--json")
    args = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxdiff-restart-"))
    report: dict = {"date": datetime.date.today().isoformat(), "load_before": os.getloadavg()[0], "cases": {}}
    try:
        for case in args.cases:
            report["cases"][case] = restart(case, args.runs, folder)
            print(json.dumps({case: report["cases"][case]}), flush=True)
        report["checkpoint_stall"] = stall(args.runs, folder)
        print(json.dumps({"checkpoint_stall": report["checkpoint_stall"]}))
    finally:
        shutil.rmtree(folder)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
