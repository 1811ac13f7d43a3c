"""Join the processes of one job into one program: the single place where a network port may be opened.

Which job this process belongs to is read from the environment, first match wins:

1. ``JAX_COORDINATOR_ADDRESS`` (``host:port`` of process 0), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``: said
   outright. ``launch/two_processes.sh`` and ``launch/jobset.yaml`` (Kubernetes JobSet) set these.
2. a SLURM step of several tasks (``srun``; ``launch/slurm.sh``): JAX reads the step's own variables. A task alone on
   its node uses all GPUs of ``SLURM_GPUS_ON_NODE``, several on one node a GPU each.
3. ``TPU_WORKER_HOSTNAMES`` with several names (GKE), or ``JAXDIFF_DISTRIBUTED=auto`` (TPU pods elsewhere,
   ``launch/tpu_pod.sh``; anything JAX can detect).

Otherwise, and with one process, nothing is done and no port is opened. ``JAXDIFF_DISTRIBUTED=off`` forces that.
``JAXDIFF_HEARTBEAT_SECONDS`` (default 100, JAX's own) is how long a silent process may live before the others end
themselves: they cannot go on without it, and what starts them again is ``jaxdiff train --restarts N``.
"""

import atexit
import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax

__all__ = ["Job", "agree", "detect", "initialise", "leave_at_exit"]

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Job:
    """How the processes of a job find each other: where that was read, and arguments of jax's initialize."""

    found: str
    arguments: dict[str, Any]


def _integer(environ: Mapping[str, str], name: str, least: int) -> int:
    try:
        value = int(environ[name])
    except ValueError:
        value = least - 1
    if value < least:
        raise ValueError(f"{name}={environ[name]!r}: allowed are integers >= {least}")
    return value


def _whole_node(environ: Mapping[str, str]) -> dict[str, Any]:
    """Under SLURM jax gives each task the one GPU of its local number; a task alone on its node shall have them all."""
    if (
        re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        and "SLURM_GPUS_ON_NODE" in environ
    ):
        return {"local_device_ids": list(range(_integer(environ, "SLURM_GPUS_ON_NODE", 1)))}
    return {}


def detect(environ: Mapping[str, str] | None = None) -> Job | None:
    """The job that the environment describes, or None for a process on its own.

    Raises:
        ValueError: naming the variable that is missing or has a value out of range.
    """
    environ = os.environ if environ is None else environ
    mode = environ.get("JAXDIFF_DISTRIBUTED", "")
    if mode not in ("", "auto", "off"):
        raise ValueError(f"JAXDIFF_DISTRIBUTED={mode!r}: allowed are 'auto', 'off', or leave it unset")
    if mode == "off":
        return None
    common: dict[str, Any] = {}
    if environ.get("JAXDIFF_HEARTBEAT_SECONDS"):
        common["heartbeat_timeout_seconds"] = _integer(environ, "JAXDIFF_HEARTBEAT_SECONDS", 1)
    given = [name for name in _EXPLICIT if environ.get(name)]
    if given:
        missing = [name for name in _EXPLICIT if name not in given]
        if missing:
            raise ValueError(f"{' and '.join(given)} given without {' and '.join(missing)}; set all three or none")
        address, count = environ[_EXPLICIT[0]], _integer(environ, _EXPLICIT[1], 1)
        number = _integer(environ, _EXPLICIT[2], 0)
        if number >= count:
            raise ValueError(f"JAX_PROCESS_ID={number}: allowed are 0..{count - 1} (JAX_NUM_PROCESSES={count})")
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"JAX_COORDINATOR_ADDRESS={address!r}: need host:port")
        if count == 1:
            return None
        own = {"coordinator_address": address, "num_processes": count, "process_id": number}
        # one process a host or several: the user has said which devices each sees, jax need not guess
        return Job("explicit", common | own | {"cluster_detection_method": "deactivate"})
    # inside srun only: the batch script itself is one process although it has SLURM_NTASKS
    if environ.get("SLURM_STEP_NODELIST") and environ.get("SLURM_STEP_NUM_TASKS"):
        if _integer(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
            return Job("slurm", common | {"cluster_detection_method": "slurm"} | _whole_node(environ))
    if mode == "auto" or "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return Job("auto", common)
    return None


def initialise(environ: Mapping[str, str] | None = None) -> Job | None:
    """Join the job the environment describes, if any; call before anything touches a device.

    Afterwards ``jax.process_index()``, ``jax.process_count()`` and ``jax.devices()`` speak of the whole job. Calling
    it again, or after the user's own ``jax.distributed.initialize``, does nothing.

    Returns:
        The ``Job``, or None for a process on its own.

    Raises:
        ValueError: see ``detect``.
        RuntimeError: if devices were touched before, or the other processes do not appear in time.
    """
    job = detect(environ)
    if job is not None and not jax.distributed.is_initialized():
        jax.distributed.initialize(**job.arguments)
    return job


def leave_at_exit() -> None:
    """For a process that failed among others: end, when Python ends, without waiting for them (status 1).

    They wait for this one in a collective, and jax would wait for them for five minutes while it still shows signs of
    life; gone, it is missed at once or after ``JAXDIFF_HEARTBEAT_SECONDS``. Does nothing in a process on its own.
    """
    if jax.process_count() == 1:
        return

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    atexit.register(leave)  # the last registered is called first, before jax's own


def agree(value: int) -> int:
    """Process 0's integer on every process: how it tells the others what it decided."""
    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
