"""The launch scripts, run as far as one machine can: for real, under a stand-in ``srun``, or read and checked."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import job
import numpy as np
import pytest
import yaml

from jaxdiff import cli
from jaxdiff.train.checkpoint import Checkpointer
from jaxdiff.train.distributed import detect

LAUNCH = job.ROOT / "launch"

# starts as many local tasks as SLURM_NTASKS says, each with the variables that the real one gives to a task
SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
options = [w for w in words if w.startswith("--kill-on-bad-exit")]
assert words[: len(options)] == options == ["--kill-on-bad-exit=0"], words
count = int(os.environ["SLURM_NTASKS"])
step = dict(SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_TASKS=str(count), SLURM_STEP_NUM_NODES=str(count),
            SLURM_STEP_TASKS_PER_NODE=f"1(x{{count}})")
tasks = [
    subprocess.Popen(words[len(options):], env=os.environ | step | dict(SLURM_PROCID=str(n), SLURM_LOCALID="0"))
    for n in range(count)
]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(job.CONFIG)
    return path


def commands(folder, **programs):
    """A folder with the given programs in front of PATH, where ``jaxdiff`` is this one."""
    folder.mkdir()
    jaxdiff = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m jaxdiff.cli "$@"\n'
    for name, text in ({"jaxdiff": jaxdiff} | programs).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def launch(script, *arguments, **variables):
    return subprocess.Popen(
        [LAUNCH / script, *map(str, arguments)], env=job.environment(devices=2) | variables, cwd=job.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def mesh_of(workdir):
    """Step and mesh of the newest checkpoint."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as reader:
        step = reader.latest_verified_step()
        return step, reader.meta(step)["mesh"]


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_pod.sh", "two_processes.sh"])
def test_scripts_are_programs_that_parse(script):
    assert os.access(LAUNCH / script, os.X_OK)
    assert subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True).stderr == ""


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(config, tmp_path):
    workdir, path = tmp_path / "run", commands(tmp_path / "bin")
    train = ["two_processes.sh", "--config", config, "--workdir", workdir]
    more = ["--config.train.steps=20000", "--config.train.save_every=20000"]
    first = launch(*train, *more, PATH=path, PORT=str(job.free_port()))
    beat, deadline = workdir / "heartbeat.json", time.monotonic() + 600
    while first.poll() is None and time.monotonic() < deadline:
        if beat.exists() and json.loads(beat.read_text())["step"] >= 10:
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)  # to the script, as a job manager does; it passes it on to both
    ((status, output),) = job.finish([first])
    assert status == 0, output
    step, mesh = mesh_of(workdir)
    assert f"preempted: saved step {step}" in output and 10 <= step < 20000 and mesh["data"] == 4
    last = step + 20
    second = launch(
        *train, f"--config.train.steps={last}", "--allow-config-change", PATH=path, PORT=str(job.free_port())
    )
    ((status, output),) = job.finish([second])
    assert status == 0 and f"continuing from step {step} (restart 1)" in output, output
    assert mesh_of(workdir)[0] == last


def test_two_processes_reports_failure(config, tmp_path):
    told = '#!/bin/sh\necho "$JAX_COORDINATOR_ADDRESS"\nexit $((JAX_PROCESS_ID * 3))\n'
    ((status, output),) = job.finish([launch("two_processes.sh", PATH=commands(tmp_path / "bin", jaxdiff=told))])
    assert status == 3, output
    first, second = output.split()  # and without PORT it finds one itself
    assert first == second and re.fullmatch(r"127\.0\.0\.1:\d+", first)


@pytest.mark.slow
def test_slurm_tasks_train_as_one(config, tmp_path):
    """The batch script under a stand-in ``srun``; jax itself reads the step's variables. Equal to one process."""
    workdir = tmp_path / "run"
    path = commands(tmp_path / "bin", srun=SRUN.format(python=sys.executable))
    port = job.free_port(range(61440, 65536))  # jax takes it from the job's number
    slurm = {"SLURM_JOB_ID": str(port - 61440), "SLURM_NTASKS": "2", "RESTARTS": "1", "STALL": "900"}
    ((status, output),) = job.finish(
        [launch("slurm.sh", "--config", config, "--workdir", workdir, PATH=path, **slurm)]
    )
    assert status == 0 and "step 100/100" in output, output
    assert mesh_of(workdir) == (100, {"data": 4, "fsdp": 1, "tensor": 1})
    ((status, output),) = job.finish([job.start(config, tmp_path / "alone", devices=4)])
    assert status == 0, output
    one, two = job.losses(tmp_path / "alone"), job.losses(workdir)
    assert one.keys() == two.keys() and len(one) == 10
    np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=1e-6)


def options_of(script):
    """``#SBATCH`` lines as a dictionary."""
    lines = [line.split(maxsplit=1)[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


def test_slurm_asks_for_what_the_code_expects(tmp_path):
    options = options_of(LAUNCH / "slurm.sh")
    assert options["ntasks-per-node"] == "1" and "requeue" in options
    assert options["signal"].startswith("TERM@")  # the signal that training saves on
    # what a task of that job sees: all the devices of its node
    nodes, gpus = options["nodes"], options["gpus-per-node"]
    task = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": nodes, "SLURM_GPUS_ON_NODE": gpus}
    found = detect(task | {"SLURM_STEP_TASKS_PER_NODE": f"1(x{nodes})"})
    assert found.found == "slurm" and found.arguments["local_device_ids"] == list(range(int(gpus)))


def test_jobset_describes_a_job_that_training_joins():
    (jobset,) = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    assert jobset["apiVersion"].startswith("jobset.x-k8s.io/") and jobset["kind"] == "JobSet"
    (group,) = jobset["spec"]["replicatedJobs"]
    job_spec = group["template"]["spec"]
    pod = job_spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry for entry in container["env"]}
    # each pod knows its number by the annotation that an Indexed job gives it
    assert job_spec["completionMode"] == "Indexed" and group["replicas"] == 1
    field = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    count = job_spec["completions"]
    assert job_spec["parallelism"] == count
    plain = {name: entry["value"] for name, entry in variables.items() if "value" in entry}
    assert all(isinstance(value, str) for value in plain.values())  # Kubernetes refuses numbers here
    for number in range(count):
        arguments = detect(plain | {"JAX_PROCESS_ID": str(number)}).arguments
        assert (arguments["num_processes"], arguments["process_id"]) == (count, number)
    # pod 0 of the JobSet is the coordinator, at the port that its container opens
    name = jobset["metadata"]["name"]
    host, port = plain["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{group['name']}-0-0.{name}"
    assert int(port) in [entry["containerPort"] for entry in container["ports"]]
    # a whole set restarted by Kubernetes, its processes by the supervisor, with time to save before SIGKILL
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    program, command = container["command"]
    arguments, rest = cli._parser().parse_known_args([command, *container["args"]])
    assert program == "jaxdiff" and not rest and arguments.restarts > 0 and arguments.stall_timeout > 0
    assert (job.ROOT / arguments.config).is_file()
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(pathlib.Path(arguments.workdir).is_relative_to(path) for path in mounted)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_tpu_pod_starts_on_every_worker(config, tmp_path):
    """The command in the script's head, with a stand-in ``gcloud`` that runs it where two hosts would."""
    text = (LAUNCH / "tpu_pod.sh").read_text()
    shown = "".join(line.removeprefix("#").rstrip("\\\n") for line in text.splitlines(True)[3:5])
    assert "gcloud compute tpus tpu-vm ssh" in shown and "--worker=all" in shown
    words = shlex.split(shown)
    remote = words[words.index("--command") + 1]
    gcloud = '#!/bin/sh\nwhile [ "$1" != "--command" ]; do shift; done\nfor host in 0 1; do sh -c "$2"; done\n'
    told = '#!/bin/sh\necho "$JAXDIFF_DISTRIBUTED $JAXDIFF_HEARTBEAT_SECONDS" "$@"\n'
    path = commands(tmp_path / "bin", gcloud=gcloud, jaxdiff=told)
    (tmp_path / "jaxdiff").symlink_to(job.ROOT)  # the remote command changes into the checkout
    environ = job.environment(devices=1) | {"PATH": path}
    environ.pop("JAXDIFF_HEARTBEAT_SECONDS", None)
    done = subprocess.run(["sh", "-c", shown], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and len(set(lines)) == 1
    mode, beat, *arguments = lines[0].split()
    assert detect({"JAXDIFF_DISTRIBUTED": mode, "JAXDIFF_HEARTBEAT_SECONDS": beat}).found == "auto"
    parsed, rest = cli._parser().parse_known_args(arguments)
    assert not rest and parsed.command == "train" and parsed.restarts > 0
    assert remote.endswith(f"--config {parsed.config} --workdir {parsed.workdir}")
