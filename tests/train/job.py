"""Real processes that train a tiny network through the command line, for tests."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import tiny_run

from jaxdiff.train.checkpoint import Checkpointer
from jaxdiff.train.checkpoint_files import read_record

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = tiny_run.config()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices, port=None, process=None, count=2):
    """Variables of one process that sees ``devices`` simulated devices, alone or in a job."""
    chosen = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "SLURM", "XLA")) and k != "CI"}
    chosen |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    if port is not None:
        chosen |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(process),
            "JAXDIFF_HEARTBEAT_SECONDS": "5",
        }
    return chosen


def start(config, workdir, *more, program=None, **where):
    """One training process; ``program`` replaces ``-m jaxdiff.cli`` (arguments follow it)."""
    argv = ["train", "--config", str(config), "--workdir", str(workdir), *map(str, more)]
    return subprocess.Popen(
        [sys.executable, *(program or ["-m", "jaxdiff.cli"]), *argv],
        env=environment(**where), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip


def start_pair(config, workdir, *more, devices=2, program=(None, None)):
    port = free_port()
    return [
        start(config, workdir, *more, program=program[p], devices=devices, port=port, process=p) for p in range(2)
    ]


def finish(workers, seconds=120):
    """(exit status, output) of each; whatever is left after ``seconds`` is killed, which fails the test."""
    try:
        outputs = [worker.communicate(timeout=seconds)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, output) for worker, output in zip(workers, outputs)]


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def digests(workdir):
    """Step and leaf digests of the newest checkpoint, every one verified."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as reader:
        step = reader.latest_verified_step()
        ema = reader.restore_ema(step).state
        return step, {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(ema)}


def whole_state(workdir):
    """Step of the newest checkpoint and the digest of every leaf of its state: parameters, optimiser, averages, counters.

    The data position is a function of ``state/step``. What is on disk is read and compared with these digests first.
    """
    with Checkpointer(workdir / "checkpoints", read_only=True) as reader:
        step = reader.latest_verified_step()
    leaves = read_record(workdir / "checkpoints" / str(step)).leaves
    return step, {f"{item}/{name}": leaf.digest for item, table in leaves.items() for name, leaf in table.items()}
