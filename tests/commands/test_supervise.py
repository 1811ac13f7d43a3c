"""The supervisor: restarts what died, kills what hangs, passes signals on, gives up when restarting does not help."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from jaxdiff import cli
from jaxdiff.commands import supervise as module
from jaxdiff.commands.supervise import supervise
from jaxdiff.train import loop, metrics

# a stand-in for training: counts its starts, writes a heartbeat, then does what it is told at that start
CHILD = """
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1])
count = workdir / "starts"
start = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(start))

def beat(step):
    part = workdir / "part"
    part.write_text(json.dumps({"step": step, "start": start}))
    os.replace(part, workdir / "heartbeat.json")

def saved(*_):
    (workdir / "saved").write_text("yes")
    sys.exit(0)

signal.signal(signal.SIGTERM, saved)
exec(sys.argv[2])
"""


@pytest.fixture
def run(tmp_path):
    def run(body, restarts, timeout=None):
        lines = []
        command = [sys.executable, "-S", "-c", CHILD, str(tmp_path), body]
        status = supervise(command, str(tmp_path), restarts, timeout, backoff=0.01, say=lines.append)
        return status, int((tmp_path / "starts").read_text()), lines

    return run


def test_names_agree():
    assert module.HEARTBEAT == loop.HEARTBEAT


def test_restarts_until_done(run):
    status, starts, lines = run("beat(start); start < 3 and os.kill(os.getpid(), 9)", 1)
    assert (status, starts) == (0, 3)  # each run got further, so one restart in a row was enough
    assert "SIGKILL after step 1; restart 1 of 1" in lines[0]


def test_gives_up_without_progress(run):
    status, starts, lines = run("beat(7); sys.exit(1)", 2)
    assert status == 1 and starts == 3  # one start and two restarts, neither of which got further
    assert "giving up" in lines[-1]


def test_signal_status(run):
    assert run("os.kill(os.getpid(), 9)", 0)[:2] == (128 + 9, 1)


@pytest.mark.parametrize("status", [0, 2, 3])
def test_finished_or_refused_is_not_restarted(run, status):
    assert run(f"sys.exit({status})", 5) == (status, 1, [])


def test_a_disk_that_fails_in_the_middle_of_training_is_tried_again(run):
    """One line and status 2, as an error of the system is, but after training began: then also where nothing begins."""
    status, starts, _ = run("start == 1 and beat(5); sys.exit(2 if start < 4 else 0)", 3)
    assert (status, starts) == (0, 4)


def test_losses_that_are_not_finite_are_not_tried_again(run, monkeypatch, capsys):
    assert run("beat(5); sys.exit(3)", 5)[:2] == (3, 1)

    def diverged(*_):
        raise metrics.NonFinite("training stopped at step 29")

    monkeypatch.setattr(cli, "_run", diverged)
    assert cli.main(["train", "--config", "c", "--workdir", "w"]) == module.DIVERGED
    assert capsys.readouterr().err == "jaxdiff train: training stopped at step 29\n"


@pytest.fixture
def skip(monkeypatch):
    """``skip(seconds)`` puts the supervisor's clock forward; whatever the machine's load, nothing else takes an hour."""
    ahead, real = [0.0], time.monotonic

    def put(seconds):
        ahead[0] += seconds

    clock = types.SimpleNamespace(monotonic=lambda: real() + ahead[0], sleep=time.sleep)
    monkeypatch.setattr(module, "time", clock)
    return put


@pytest.fixture
def looks(monkeypatch):
    """``looks(then)``: call ``then(step)`` after each of the supervisor's looks at the heartbeat (-1: there is none)."""
    look = module._beat

    def install(then):
        def watched(path):
            found = look(path)
            then(found[1])
            return found

        monkeypatch.setattr(module, "_beat", watched)

    return install


def test_hung_run_is_killed(run, skip, looks):
    seen = []

    def two_hours_without_a_beat(step):
        seen.append(step)
        if seen.count(1) == 2:  # the first look finds what run 1 wrote; by the second, nothing has come for long
            skip(7200)

    looks(two_hours_without_a_beat)
    status, starts, lines = run("beat(start); start == 1 and time.sleep(600)", 1, timeout=3600.0)
    assert (status, starts) == (0, 2)
    assert "no heartbeat for 3600 s" in lines[0] and "SIGKILL after step 1" in lines[1]


def test_slow_run_with_heartbeats_is_left_alone(run, skip, looks, tmp_path):
    """A beat every 40 minutes for hours; the run waits after each until the supervisor has seen it, and again."""
    seen = []

    def forty_minutes_later(step):
        seen.append(step)
        if step >= 0 and seen.count(step) == 1:
            skip(2400)
        elif step >= 0:
            (tmp_path / f"seen{step}").touch()

    looks(forty_minutes_later)
    body = (
        "end = time.monotonic() + 600\n"
        "for i in range(8):\n"
        "    beat(i)\n"
        "    while not (workdir / f'seen{i}').exists() and time.monotonic() < end:\n"
        "        time.sleep(0.01)"
    )
    assert run(body, 0, timeout=3600.0) == (0, 1, [])
    assert set(range(8)) <= set(seen)


def test_backoff_doubles(tmp_path):
    lines = []
    supervise(
        [sys.executable, "-c", "raise SystemExit(1)"], str(tmp_path), 4, backoff=0.02, longest=0.1, say=lines.append
    )
    assert [line.rsplit(" in ", 1)[1] for line in lines[:-1]] == ["0.02 s", "0.04 s", "0.08 s", "0.1 s"]


def test_sigterm_is_passed_on_and_ends_it(tmp_path):
    script = (
        "import sys; from jaxdiff.commands.supervise import supervise\n"
        f"sys.exit(supervise({[sys.executable, '-c', CHILD, str(tmp_path), 'beat(1); time.sleep(600)']!r}, "
        f"{str(tmp_path)!r}, 5))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "heartbeat.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0
    assert (tmp_path / "saved").exists() and (tmp_path / "starts").read_text() == "1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--restarts=-1"], "--restarts=-1"),
        (["--restarts=1", "--stall-timeout=0"], "--stall-timeout=0.0"),
        (["--stall-timeout=5"], "needs --restarts"),
        (["--profile=5:3"], "train.profile"),
        (["--profile=x"], "train.profile"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, message):
    config = pathlib.Path(__file__).parents[2] / "configs" / "toy2d.py"
    assert cli.main(["train", "--config", str(config), "--workdir", str(tmp_path / "r"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not (tmp_path / "r").exists()


def test_supervisor_imports_no_jax():
    code = "import sys, jaxdiff.commands.supervise; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.slow
def test_training_with_profile_under_the_supervisor(tmp_path):
    """The whole command: heartbeat, traces and retention options arrive; flags reach the child."""
    (tmp_path / "c.py").write_text(
        "from jaxdiff.config import default\n"
        "def get_config():\n"
        "    c = default()\n"
        "    c.data.name, c.network.name, c.solver.name = 'toy2d:two_moons', 'mlp', 'euler'\n"
        "    c.data.batch_size, c.network.width, c.network.depth = 32, 8, 1\n"
        "    c.train.steps, c.train.log_every, c.train.save_every = 40, 10, 10\n"
        "    c.train.tensorboard, c.optimiser.warmup = False, 5\n"
        "    return c\n"
    )
    workdir = tmp_path / "run"
    more = ["--restarts", "1", "--stall-timeout", "300", "--profile", "15:18"]
    more += ["--config.train.keep_last=1", "--config.train.keep_every=20"]
    command = [sys.executable, "-m", "jaxdiff.cli", "train", "--config", str(tmp_path / "c.py")]
    environ = dict(os.environ) | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run([*command, "--workdir", str(workdir), *more], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "heartbeat.json").read_text())["step"] == 40
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()) == [20, 40]
