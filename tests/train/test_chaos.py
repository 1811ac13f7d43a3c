"""Random kills, SIGTERMs and flipped bits, one seed: the run must end exactly where an undisturbed one ends.

In the second test every restart also finds another number of devices; the undisturbed run then changes devices at the
same steps. CHAOS_SECONDS=300, as .ci/run sets it, makes each five minutes of disturbance; the run grows with it.
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
STEPS = 20 * SECONDS
LEG = 100  # steps after which a run that is to be disturbed waits for it
PATIENCE = 900 + 3 * SECONDS
CONFIG = job.CONFIG.replace("train.steps = 100", f"train.steps = {STEPS}").replace(
    "save_every = 25", "save_every = 20"
)
DEVICES = (1, 2, 4, 8)

# a run that waits for a signal once it has done so many steps, or has come to a step: however fast the machine, and
# however late the signal, it does not slip away
WAITING = """
import sys, time
from jaxdiff import cli
from jaxdiff.train.preempt import Preemption

begun, ask = [], Preemption.requested

def requested(self, step):
    begun.append(step)
    while not self.received and (step >= begun[0] + int(sys.argv[1]) or step >= int(sys.argv[2])):
        time.sleep(0.01)
    return ask(self, step)

Preemption.requested = requested
sys.exit(cli.main(sys.argv[3:]))
"""

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


def disturb(worker, workdir, rng, signals):
    """Kill it one way or another, a random number of steps and a random moment after its first heartbeat."""
    beat, first, more = workdir / "heartbeat.json", None, rng.choice([0, 1, *range(10, LEG, 10)])
    deadline = time.monotonic() + PATIENCE
    while worker.poll() is None and time.monotonic() < deadline:
        now = json.loads(beat.read_text()) if beat.exists() else {}
        if now.get("pid") == worker.pid:
            first = now["step"] if first is None else first
            if now["step"] >= first + more:
                break
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    if worker.poll() is None:
        worker.send_signal(rng.choice(signals))


class History:
    """Which stretch of steps that lasted was trained on how many devices."""

    def __init__(self):
        self.stretches = []  # (first step, devices), ascending; none is empty

    def began(self, output, fresh, devices):
        """Note where a run went on, from what it printed; what it did not go on from is forgotten."""
        said = re.search(r"continuing from step (\d+) ", output)
        if said or fresh:
            start = int(said[1]) if said else 0
            self.stretches = [s for s in self.stretches if s[0] < start]
            if start < STEPS:
                self.stretches.append((start, devices))

    def until(self, step):
        """The numbers of devices on which the steps before ``step`` were trained."""
        return {devices for start, devices in self.stretches if start < step}

    def schedule(self):
        """(step at which it ends, devices) of each stretch."""
        ends = [start for start, _ in self.stretches[1:]] + [STEPS]
        return [(end, devices) for end, (_, devices) in zip(ends, self.stretches, strict=True)]


def chaos(config, workdir, seed, devices=(1,)):
    """Disturb a run for SECONDS, four times at least, then let it end; returns what was done and on what it was trained.

    It is killed once and, where there are several numbers of devices, trained on two of them, whatever the machine's
    speed: until that is done it can neither end nor be let end.
    """
    rng, begun, deeds, history = random.Random(seed), time.monotonic(), [], History()
    turns = itertools.cycle(rng.sample(devices, len(devices)))  # every restart finds another number
    flipped = None
    for leg in itertools.count():
        count, steps = next(turns), [int(path.name) for path in committed(workdir)]
        start = [0, *steps][-2 if flipped else -1]  # the least from which it can go on
        numbers = history.until(start) | ({count} if start < STEPS else set())
        enough = -signal.SIGKILL in deeds and len(numbers) >= min(2, len(devices))
        last = enough and bool(steps) and leg >= 4 and time.monotonic() - begun >= SECONDS
        if last:
            worker = job.start(config, workdir, devices=count)
        else:
            until = 10 * STEPS if enough else STEPS - 1
            worker = job.start(config, workdir, program=["-c", WAITING, str(LEG), str(until)], devices=count)
            kinds = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
            disturb(worker, workdir, rng, kinds if -signal.SIGKILL in deeds else kinds[:1])
        ((status, output),) = job.finish([worker], PATIENCE)
        assert status in (0, -signal.SIGKILL, -signal.SIGTERM), output  # -15: before the handler stood
        history.began(output, not steps, count)
        assert status == 0 or not last, output
        if last or (status == 0 and f"step {STEPS}/{STEPS} " in output):  # a kill may fall after the last step's line
            return deeds, history.schedule()
        deeds.append(status)
        flipped = flip_one_bit(workdir, rng) if rng.random() < 0.4 else None
        if flipped:
            deeds.append(flipped)
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
