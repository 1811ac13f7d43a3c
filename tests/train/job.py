"""Real processes that train a tiny network through the command line, for tests."""

import concurrent.futures
import json
import os
import pathlib
import random
import signal
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


def free_port(ports=None):
    """A port that nobody holds, by default one that the system gives to nobody who does not ask for it by number.

    Process 0 binds it seconds later, and a port that the system gives out could be taken by then.
    """
    if ports is None:
        given_out = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
        first = int(given_out.read_text().split()[0]) if given_out.exists() else 32768
        ports = range(20000, first) if first > 21000 else range(20000, 65536)
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port is free in {ports}")


def environment(devices, port=None, process=None, count=2, heartbeat=300):
    """Variables of one process that sees ``devices`` simulated devices, alone or in a job.

    ``heartbeat``: seconds for which a process may be silent before the others take it for dead; long, because on a
    loaded machine one may not run for a while.
    """
    ours = ("JAX", "SLURM", "XLA", "TPU_")
    chosen = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in ("CI", "PORT")}
    chosen |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAXDIFF_HEARTBEAT_SECONDS": str(heartbeat),
    }
    if port is not None:
        chosen |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(process),
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


def start_pair(config, workdir, *more, devices=2, program=(None, None), heartbeat=300):
    where = {"devices": devices, "port": free_port(), "heartbeat": heartbeat}
    return [start(config, workdir, *more, program=program[p], process=p, **where) for p in range(2)]


def finish(workers, seconds=900):
    """(exit status, output) of each; what is not done after ``seconds``, far beyond any machine's need, has failed."""

    def end(worker):
        try:
            return worker.communicate(timeout=seconds)[0], False
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)  # its children too; each was started as a session of its own
            return worker.communicate()[0], True

    with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:  # one that nobody reads could not write on
        ends = list(pool.map(end, workers))
    assert not any(hung for _, hung in ends), f"not done after {seconds} s:\n" + "\n".join(text for text, _ in ends)
    return [(worker.returncode, text) for worker, (text, _) in zip(workers, ends)]


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
