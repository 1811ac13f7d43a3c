"""Two real processes train as one: which job the environment describes, equal losses, stopping, dying, resuming."""

import atexit
import json
import os

import jax
import job
import numpy as np
import pytest

from jaxdiff.data import load, pipeline
from jaxdiff.train.distributed import detect, initialise, leave_at_exit
from jaxdiff.train.mesh import make_mesh

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}

# a process that tells itself to stop at a step of our choosing. The news takes a second or more to reach the other one:
# until then it goes slowly, or a fast machine would be done first
AT_STEP = """
import os, signal, sys, time
from jaxdiff import cli
from jaxdiff.train import loop

class Marked(loop.MetricLog):
    def add(self, step, metrics):
        super().add(step, metrics)
        if step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGTERM)
        if step >= int(sys.argv[1]):
            time.sleep(1)

loop.MetricLog = Marked
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(job.CONFIG)
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """One process with the four devices that a pair has together."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    ((status, output),) = job.finish([job.start(config, workdir, devices=4)])
    assert status == 0, output
    return workdir


def agrees(workdir, alone):
    pair, one = job.losses(workdir), job.losses(alone)
    assert pair.keys() == one.keys() and len(one) == 10
    for step, loss in one.items():
        assert abs(pair[step] / loss - 1) < 1e-6, step
    (last, a), (_, b) = job.digests(workdir), job.digests(alone)
    assert last == 100
    for name, value in b.items():
        np.testing.assert_allclose(a[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_environment():
    assert detect({}) is None and initialise({}) is None
    assert detect(EXPLICIT).found == "explicit"
    assert detect(EXPLICIT).arguments["process_id"] == 1
    assert detect(EXPLICIT | {"JAXDIFF_HEARTBEAT_SECONDS": "7"}).arguments["heartbeat_timeout_seconds"] == 7
    assert detect(EXPLICIT | {"JAXDIFF_DISTRIBUTED": "off"}) is None
    assert detect(EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    assert detect(slurm).arguments["cluster_detection_method"] == "slurm"
    assert "local_device_ids" not in detect(slurm).arguments
    node = {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert detect(slurm | node).arguments["local_device_ids"] == list(range(8))  # one task a node has all of it
    assert "local_device_ids" not in detect(slurm | node | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}).arguments
    assert detect(slurm | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert detect({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "3"}) is None  # the batch script, outside srun
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b"}).found == "auto"
    assert detect({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert detect({"JAXDIFF_DISTRIBUTED": "auto"}).found == "auto"


BAD = [
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
    (EXPLICIT | {"JAX_PROCESS_ID": "2"}, r"JAX_PROCESS_ID=2: allowed are 0\.\.1"),
    (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
    (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host"}, "need host:port"),
    (EXPLICIT | {"JAXDIFF_HEARTBEAT_SECONDS": "0"}, "JAXDIFF_HEARTBEAT_SECONDS"),
    ({"JAXDIFF_DISTRIBUTED": "on"}, "JAXDIFF_DISTRIBUTED='on'"),
]


@pytest.mark.parametrize(("environ", "message"), BAD)
def test_bad_environment(environ, message):
    with pytest.raises(ValueError, match=message):
        detect(environ)


def test_shards_are_one_epoch():
    source = load("toy2d:two_moons", "train")
    size = next(b for b in range(512, 8192, 2) if len(source) % b == 0)
    steps = len(source) // size
    split = [pipeline(source, size, seed=3, process_index=p, process_count=2).stream(0, steps) for p in range(2)]
    seen = []
    for first, second, whole in zip(*split, pipeline(source, size, seed=3).stream(0, steps), strict=True):
        for name in ("index", "x0"):
            np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), whole[name])
        seen += [first["x0"], second["x0"]]
    stored = source.examples(np.arange(len(source)))["x0"]
    rows = lambda x: x[np.lexsort(x.T)]
    np.testing.assert_array_equal(rows(np.concatenate(seen)), rows(np.asarray(stored)))  # each example once


def test_one_process_opens_no_port(config, tmp_path):
    script = (
        "import os, sys\n"
        "from jaxdiff import cli\n"
        "from jaxdiff.train import loop\n"
        "old = loop.MetricLog.add\n"
        "def add(self, step, metrics):\n"
        "    old(self, step, metrics)\n"
        "    if step == 5:\n"
        "        paths = [f'/proc/self/fd/{n}' for n in os.listdir('/proc/self/fd')]\n"
        "        links = [os.readlink(p) for p in paths if os.path.lexists(p)]\n"
        "        inodes = {l[8:-1] for l in links if l.startswith('socket:')}\n"
        "        rows = open('/proc/self/net/tcp').read().splitlines()[1:]\n"
        "        if os.path.exists('/proc/self/net/tcp6'):\n"
        "            rows += open('/proc/self/net/tcp6').read().splitlines()[1:]\n"
        "        print('listening', sum(r.split()[9] in inodes for r in rows))\n"
        "loop.MetricLog.add = add\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    more = ["--config.train.steps=10"]
    ((status, output),) = job.finish([job.start(config, tmp_path / "r", *more, program=["-c", script], devices=1)])
    assert status == 0 and "listening 0" in output, output


def test_a_process_that_failed_leaves_the_others_at_once(monkeypatch):
    """jax would wait five minutes at the exit for processes that wait for this one in a collective."""
    registered, ended = [], []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(os, "_exit", ended.append)
    leave_at_exit()  # alone: there is nobody to leave
    assert not registered
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    leave_at_exit()
    registered[0]()
    assert ended == [1]


def test_tensor_axis_inside_a_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"mesh\.tensor=8: must divide the 4 devices of one process"):
        make_mesh(1, 1, 8)


@pytest.mark.slow
def test_pair_equals_one_process_and_only_process_0_writes(config, alone, tmp_path):
    workdir = tmp_path / "run"
    (first, out), (second, other) = job.finish(job.start_pair(config, workdir, "--config.train.sample_every=50"))
    assert (first, second) == (0, 0), out + other
    assert "step 100/100" in out and "step 100/100" not in other
    agrees(workdir, alone)
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len([s for s in steps if s == 50]) == 1  # one writer, one row
    beat = json.loads((workdir / "heartbeat.json").read_text())
    assert beat["step"] == 100
    assert sorted(path.name for path in (workdir / "progress").iterdir()) == ["00000050.png", "00000100.png"]


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_sigterm_to_one_saves_on_both_at_one_step(config, alone, tmp_path, process):
    workdir = tmp_path / "run"
    programs = [None, None]
    programs[process] = ["-c", AT_STEP, "41"]
    ends = job.finish(job.start_pair(config, workdir, program=programs))
    assert [status for status, _ in ends] == [0, 0], ends
    step, _ = job.digests(workdir)
    assert 41 <= step < 100
    assert f"preempted: saved step {step}" in ends[0][1]
    # and one process with other devices carries the run to its end
    ((status, output),) = job.finish([job.start(config, workdir, devices=4)])
    assert status == 0 and f"continuing from step {step}" in output, output
    agrees_at_the_end(workdir, alone)


def agrees_at_the_end(workdir, alone):
    a, b = job.losses(workdir)[100], job.losses(alone)[100]
    assert abs(a / b - 1) < 1e-6
    for name, value in job.digests(alone)[1].items():
        np.testing.assert_allclose(job.digests(workdir)[1][name], value, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_killed_pair_is_restarted_by_its_supervisors(config, alone, tmp_path, process):
    workdir, flag = tmp_path / "run", tmp_path / "killed"
    # the child that the supervisor starts kills itself at step 41, the first time only
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('JAX_PROCESS_ID') == os.environ.get('VICTIM') and '--restarts' not in sys.orig_argv:\n"
        f"    flag = {str(flag)!r}\n"
        "    def arm():\n"
        "        from jaxdiff.train import loop\n"
        "        old = loop.MetricLog.add\n"
        "        def add(self, step, metrics):\n"
        "            old(self, step, metrics)\n"
        "            if step == 41 and not os.path.exists(flag):\n"
        "                open(flag, 'w').close()\n"
        "                os.kill(os.getpid(), 9)\n"
        "        loop.MetricLog.add = add\n"
        "    if 'jaxdiff.cli' in sys.orig_argv:\n"
        "        import jaxdiff.train.distributed as d\n"
        "        begin = d.initialise\n"
        "        def initialise(*a):\n"
        "            arm()\n"
        "            return begin(*a)\n"
        "        d.initialise = initialise\n"
    )
    os.environ |= {"VICTIM": str(process), "PYTHONPATH": str(tmp_path)}
    try:
        ends = job.finish(job.start_pair(config, workdir, "--restarts", 4, heartbeat=10))
    finally:
        del os.environ["VICTIM"], os.environ["PYTHONPATH"]
    assert flag.exists()
    assert [status for status, _ in ends] == [0, 0], ends
    assert "SIGKILL" in ends[process][1] and "restart 1 of 4" in ends[process][1]
    assert "continuing from step 25" in ends[0][1]
    agrees_at_the_end(workdir, alone)
