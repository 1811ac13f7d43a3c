"""Random kills, SIGTERMs and flipped bits, one seed: the run must end exactly where an undisturbed one ends.

In the second test every restart also finds another number of devices; the undisturbed run then changes devices at the
same steps. CHAOS_SECONDS=300 makes each five minutes of disturbance; the run grows with it.
"""

import itertools
import json
import os
import random
import re
import signal
import time

import job
import pytest

SECONDS = int(os.environ.get("CHAOS_SECONDS", "25"))
STEPS = 30 * SECONDS
PATIENCE = 120 + 3 * SECONDS
CONFIG = job.CONFIG.replace("train.steps = 100", f"train.steps = {STEPS}").replace(
    "save_every = 25", "save_every = 20"
)
DEVICES = (1, 2, 4, 8)

# trains each stretch on its own number of devices and hands over at its last step: stopped as planned, never disturbed
SCHEDULED = """
import json, sys
from jaxdiff import cli
from jaxdiff.train.preempt import Preemption

for stop, devices in json.loads(sys.argv[1]):
    Preemption.requested = lambda self, step: step == stop
    status = cli.main([*sys.argv[2:], f"--config.mesh.data={devices}"])
    if status:
        sys.exit(status)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def committed(workdir):
    """Directories of the checkpoints there are, oldest first."""
    return sorted((p for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()), key=lambda p: int(p.name))


def flip_one_bit(workdir, rng):
    """Damage the newest checkpoint, if an older one is there to go back to; says what was done."""
    steps = committed(workdir)
    if len(steps) < 2:
        return None
    files = sorted(p for p in steps[-1].rglob("*") if p.is_file() and p.stat().st_size)
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{steps[-1].name}/{path.name}"


def disturb(worker, workdir, rng, longest):
    """Kill it one way or another: mostly a random while after its first step, sometimes while it starts."""
    beat, beats = workdir / "heartbeat.json", set()
    enough = rng.choice([1, 2, 2, 2])  # it beats before its first step and after it
    deadline = time.monotonic() + 120
    while worker.poll() is None and time.monotonic() < deadline and len(beats) < enough:
        text = beat.read_text() if beat.exists() else "{}"
        if json.loads(text).get("pid") == worker.pid:
            beats.add(text)
        time.sleep(0.01)
    time.sleep(rng.uniform(0, longest))
    if worker.poll() is None:
        worker.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))


class History:
    """Which stretch of steps that lasted was trained on how many devices."""

    def __init__(self):
        self.stretches = []  # (first step, devices), ascending

    def began(self, output, fresh, devices):
        """Note where a run went on, from what it printed; what it did not go on from is forgotten."""
        said = re.search(r"continuing from step (\d+) ", output)
        if said or fresh:
            start = int(said[1]) if said else 0
            self.stretches = [s for s in self.stretches if s[0] < start] + [(start, devices)]

    def schedule(self):
        """(step at which it ends, devices) of each stretch."""
        ends = [start for start, _ in self.stretches[1:]] + [STEPS]
        return [(end, devices) for end, (_, devices) in zip(ends, self.stretches, strict=True)]


def chaos(config, workdir, seed, devices=(1,), longest=2.0):
    """Disturb a run for SECONDS, then let it end; returns what was done to it and on what it was trained."""
    rng, begun, deeds, history = random.Random(seed), time.monotonic(), [], History()
    turns = itertools.cycle(rng.sample(devices, len(devices)))  # every restart finds another number
    for leg in itertools.count():
        count, fresh = next(turns), not committed(workdir)
        varied = len({count} | {n for _, n in history.stretches}) >= min(2, len(devices))
        last = time.monotonic() - begun >= SECONDS and not fresh and varied
        worker = job.start(config, workdir, devices=count)
        if not last:
            disturb(worker, workdir, rng, longest)
        ((status, output),) = job.finish([worker], PATIENCE)
        assert status in (0, -signal.SIGKILL, -signal.SIGTERM), output  # -15: before the handler stood
        history.began(output, fresh, count)
        assert status == 0 or not last, output
        if last or (status == 0 and f"step {STEPS}/{STEPS} " in output):  # a kill may fall after the last step's line
            return deeds, history.schedule()
        deeds.append(status)
        if rng.random() < 0.4 and (done := flip_one_bit(workdir, rng)):
            deeds.append(done)
        assert leg < 10 * SECONDS


def equal(straight, disturbed):
    """The same last step and the same digest of every leaf of the state, and no row of the log lost."""
    (step, expected), (last, found) = job.whole_state(straight), job.whole_state(disturbed)
    assert step == last == STEPS
    assert {name.split("/")[0] for name in expected} == {"state", "ema"} and "state/step" in expected
    assert {name.split("/")[1] for name in expected} >= {"step", "params", "opt"}
    assert found == expected
    assert job.losses(straight).keys() <= job.losses(disturbed).keys()  # a stop logs a row of its own


@pytest.mark.slow
def test_chaos_ends_where_the_undisturbed_run_ends(config, tmp_path):
    straight = job.start(config, tmp_path / "straight", devices=1)
    assert job.finish([straight], PATIENCE)[0][0] == 0
    deeds, _ = chaos(config, tmp_path / "chaos", 0)
    print(deeds)
    assert -signal.SIGKILL in deeds
    equal(tmp_path / "straight", tmp_path / "chaos")


@pytest.mark.slow
def test_chaos_on_changing_devices_ends_where_the_undisturbed_schedule_ends(config, tmp_path):
    deeds, schedule = chaos(config, tmp_path / "chaos", 1, DEVICES)
    print(deeds, schedule)
    assert -signal.SIGKILL in deeds and len({devices for _, devices in schedule}) > 1
    planned = job.start(
        config, tmp_path / "planned", program=["-c", SCHEDULED, json.dumps(schedule)], devices=max(DEVICES)
    )
    ((status, output),) = job.finish([planned], PATIENCE + 20 * len(schedule))
    assert status == 0, output
    equal(tmp_path / "planned", tmp_path / "chaos")
    # the numbers of devices matter, or the test could not fail: on one device throughout other digests come out
    straight = job.start(config, tmp_path / "straight", devices=1)
    assert job.finish([straight], PATIENCE)[0][0] == 0
    assert job.whole_state(tmp_path / "straight")[1] != job.whole_state(tmp_path / "chaos")[1]
