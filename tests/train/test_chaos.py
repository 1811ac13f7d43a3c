"""Random kills, SIGTERMs and flipped bits, one seed: the run must end exactly where an undisturbed one ends.

CHAOS_SECONDS=300 makes it five minutes; the run grows with it.
"""

import os
import random
import signal
import time

import job
import numpy as np
import pytest

SECONDS = int(os.environ.get("CHAOS_SECONDS", "40"))
STEPS = 30 * SECONDS
PATIENCE = 120 + 3 * SECONDS
CONFIG = job.CONFIG.replace("train.steps = 100", f"train.steps = {STEPS}").replace(
    "save_every = 25", "save_every = 20"
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def flip_one_bit(workdir, rng):
    """Damage the newest checkpoint, if an older one is there to go back to; says what was done."""
    steps = sorted((p for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()), key=lambda p: int(p.name))
    if len(steps) < 2:
        return None
    files = sorted(p for p in steps[-1].rglob("*") if p.is_file() and p.stat().st_size)
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{steps[-1].name}/{path.name}"


def disturb(worker, workdir, rng, longest):
    """Let it train for a random while after its first step, then kill it one way or another."""
    beat = workdir / "heartbeat.json"
    before = beat.read_text() if beat.exists() else ""
    deadline = time.monotonic() + 120
    while worker.poll() is None and time.monotonic() < deadline:
        if beat.exists() and beat.read_text() != before:
            break
        time.sleep(0.01)
    time.sleep(rng.uniform(0, longest))
    if worker.poll() is None:
        worker.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))


def chaos(config, workdir, seed, longest=3.0):
    """Disturb a run for SECONDS, then let it end; returns what was done to it."""
    rng, begun, deeds = random.Random(seed), time.monotonic(), []
    while time.monotonic() - begun < SECONDS:
        worker = job.start(config, workdir, devices=1)
        disturb(worker, workdir, rng, longest)
        ((status, output),) = job.finish([worker], PATIENCE)
        assert status in (0, -signal.SIGKILL, -signal.SIGTERM), output  # -15: before the handler stood
        if f"step {STEPS}/{STEPS} " in output:
            break
        deeds.append(status)
        if rng.random() < 0.4 and (done := flip_one_bit(workdir, rng)):
            deeds.append(done)
    ((status, output),) = job.finish([job.start(config, workdir, devices=1)], PATIENCE)
    assert status == 0, output
    return deeds


def equal(a, b):
    (step, x), (other, y) = job.digests(a), job.digests(b)
    assert step == other and x.keys() == y.keys()
    for name, value in x.items():
        np.testing.assert_array_equal(value, y[name], err_msg=name)
    assert job.losses(a).keys() <= job.losses(b).keys()  # a stop logs a row of its own


@pytest.mark.slow
def test_chaos_ends_where_the_undisturbed_run_ends(config, tmp_path):
    straight = job.start(config, tmp_path / "straight", devices=1)
    assert job.finish([straight], PATIENCE)[0][0] == 0
    deeds = chaos(config, tmp_path / "chaos", 0)
    print(deeds)
    assert -signal.SIGKILL in deeds
    equal(tmp_path / "straight", tmp_path / "chaos")
