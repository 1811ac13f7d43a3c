"""The loop: bitwise resume, one host fetch a log interval, preemption, the stop, callbacks."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from tiny_training import POINTS, Pipeline, assert_bitwise, devices, host, init, loss, player

from jaxdiff.data import arrays, pipeline
from jaxdiff.train import Callback, Checkpointer, NonFinite, TrainState, make_mesh, train
from jaxdiff.train import loop as loop_module
from jaxdiff.train import metrics as metrics_module
from jaxdiff.train.checkpoint import CheckpointError
from jaxdiff.train.preempt import Preemption


class Memory:
    """A checkpointer that keeps host copies; the interface the loop is written against."""

    directory = "memory"

    def __init__(self):
        self.kept, self.blocked, self.closed = {}, [], False

    def save(self, step, state, *, meta, blocking=False):
        self.kept[step] = (host(state), json.loads(json.dumps(meta)))
        self.blocked.append((step, blocking))
        return True

    def restore_latest(self, target):
        if not self.kept:
            return None
        state, meta = self.kept[max(self.kept)]
        return jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), state, target), meta

    def latest_verified_step(self):
        return max(self.kept, default=None)

    def wait(self):
        pass


GAME = {"net": player()}


def go(steps, mesh, pipeline=None, **settings):
    settings = {"log_every": 10, "save_every": 20, "seed": 5, **settings}
    return train(GAME, init, pipeline or Pipeline(), steps=steps, mesh=mesh, **settings)


def test_fifty_and_fifty_is_a_hundred_bitwise(tmp_path):
    straight = go(100, devices(2), workdir=tmp_path / "straight")
    memory = Memory()
    go(50, devices(2), checkpointer=memory, workdir=tmp_path / "halves")
    pipeline = Pipeline()
    second = go(100, devices(2), pipeline, checkpointer=memory, workdir=tmp_path / "halves")
    assert pipeline.started == [50] and second.step == 100
    assert_bitwise(straight.state, second.state)
    losses = []
    for name in ("straight", "halves"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r])
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(10, 101, 10))
    # the first save after a restart, and the last of a run, do not return before they are on disk
    assert memory.blocked == [(20, False), (40, False), (50, True), (60, True), (80, False), (100, True)]
    meta = memory.kept[100][1]
    assert meta["step"] == 100 and meta["seed"] == 5 and meta["goodput"]["restarts"] == 1
    assert 0 < meta["goodput"]["goodput"] <= 1 and meta["metrics"]["loss"] == losses[0][-1][1]


def test_resume_from_checkpoints_on_disk(tmp_path):
    """The same through files and the data room: 20 + 20 = 40, bitwise, and averages travel too."""
    dataset = arrays({"x0": POINTS})
    halves = lambda: pipeline(dataset, 32, seed=3)
    straight = go(40, devices(2), halves())
    for steps in (20, 40):
        with Checkpointer(tmp_path) as checkpointer:
            outcome = go(steps, devices(2), halves(), checkpointer=checkpointer)
    assert_bitwise(straight.state, outcome.state)
    assert outcome.row["loss"] == straight.row["loss"] and outcome.row["epoch"] == 2.5
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.latest_verified_step() == 40
        assert checkpointer.meta(40)["goodput"]["restarts"] == 1
        assert checkpointer.meta(40)["metrics"]["loss"] == outcome.row["loss"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    with Checkpointer(tmp_path) as saver:
        go(40, devices(2), checkpointer=saver)
    for step in ("20", "40"):
        (tmp_path / step / "meta" / "record.json").write_text("{}")
    for _ in range(2):  # nor when it is started again
        with Checkpointer(tmp_path) as saver:
            with pytest.raises(CheckpointError, match=r"no checkpoint in .* 20\.corrupt, 40\.corrupt are kept"):
                go(60, devices(2), checkpointer=saver)
    for name in ("20.corrupt", "40.corrupt"):
        shutil.rmtree(tmp_path / name)
    with Checkpointer(tmp_path) as saver:
        assert go(10, devices(2), checkpointer=saver).step == 10


def test_batches_are_read_ahead_from_the_newest_checkpoint_and_anew_where_that_is_not_restored(tmp_path):
    """The guess is only a guess: with the newest checkpoint damaged the run begins where the older one ends."""
    straight = go(40, devices(1))
    begun, closed = [], []

    class Watched(Pipeline):
        def stream(self, start=0, stop=None):
            begun.append(start)
            return Closing(super().stream(start, stop), start)

    class Closing:
        def __init__(self, batches, start):
            self.batches, self.start = batches, start

        def __next__(self):
            return next(self.batches)

        def close(self):
            closed.append(self.start)

    def run(steps):
        with Checkpointer(tmp_path) as checkpointer:
            return go(steps, devices(1), Watched(), checkpointer=checkpointer)

    run(20)
    run(30)
    assert begun == closed == [0, 20]
    record = tmp_path / "30" / "meta" / "record.json"
    record.write_text(record.read_text()[:-10])
    resumed = run(40)
    assert begun == closed == [0, 20, 30, 20]
    assert_bitwise(straight.state, resumed.state)
    with pytest.raises(ValueError, match="trained with seed 5"):  # refused after the reading began
        with Checkpointer(tmp_path) as checkpointer:
            go(50, devices(1), Watched(), checkpointer=checkpointer, seed=6)
    assert begun == closed == [0, 20, 30, 20, 40]


def test_resume_on_another_device_count():
    memory = Memory()
    go(20, devices(8), checkpointer=memory)
    moved = go(40, make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]), checkpointer=memory, min_bytes=256)
    straight = go(40, devices(8))
    assert moved.row["loss"] == pytest.approx(straight.row["loss"], rel=1e-5)
    kernel = moved.state.params["net"]["inner"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    assert np.allclose(kernel, straight.state.params["net"]["inner"]["kernel"], atol=1e-4)


def test_host_reads_the_device_at_log_intervals_only(monkeypatch):
    """Counts every copy of a device array to the host, whoever makes it: there are none between logs."""
    array = type(jax.numpy.zeros(()))
    value = array._value
    calls, fetched = [], []
    fetch = metrics_module.fetch
    monkeypatch.setattr(array, "_value", property(lambda self: (calls.append(1), value.fget(self))[1]))
    monkeypatch.setattr(metrics_module, "fetch", lambda tree: (fetched.append(len(calls)), fetch(tree))[1])
    assert float(jax.numpy.ones(()) + 1) == 2.0 and len(calls) == 1  # the counter sees a float()
    calls.clear()
    watched = []
    # a callback at every step looks at the counter without touching the device
    spy = Callback(1, lambda step, state: watched.append((step, len(calls))))
    go(30, devices(2), callbacks=[spy])
    assert len(fetched) == 3
    counts = dict(watched)
    for interval in (range(1, 10), range(10, 20), range(20, 30)):
        assert len({counts[step] for step in interval}) == 1
    assert counts[10] > counts[9] and counts[20] > counts[19] and counts[30] > counts[29]


def test_transfers_are_guarded(monkeypatch):
    """A batch that was left on the host is an error, not a hidden copy at every step."""
    monkeypatch.setattr(loop_module, "put_batch", lambda batch, mesh: batch)
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device"):
        go(2, devices(2))


def test_sigterm_saves_and_returns():
    memory = Memory()
    before = signal.getsignal(signal.SIGTERM)
    strike = Callback(1, lambda step, state: os.kill(os.getpid(), signal.SIGTERM) if step == 13 else None)
    outcome = go(100, devices(2), checkpointer=memory, callbacks=[strike])
    assert outcome.preempted and outcome.step in (13, 14)
    assert max(memory.kept) == outcome.step and memory.blocked[-1] == (outcome.step, True)
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = go(40, devices(2), checkpointer=memory)
    assert not resumed.preempted
    assert_bitwise(resumed.state, go(40, devices(2)).state)


def test_ctrl_c_saves_first_and_twice_ends_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    for presses, kept in ((1, True), (2, False)):
        memory = Memory()

        def press(step, state, presses=presses):
            for _ in range(presses if step == 13 else 0):
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            go(100, devices(2), checkpointer=memory, callbacks=[Callback(1, press)])
        assert (max(memory.kept, default=0) in (13, 14)) == kept
        assert signal.getsignal(signal.SIGINT) is before
        assert "Ctrl-C again" in capfd.readouterr().err


def test_a_signal_that_was_ignored_stays_ignored():
    """As SIGINT in a background job of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_refused_updates_are_counted_and_survived(tmp_path):
    outcome = go(20, devices(2), Pipeline(poison=(3, 4, 12)), workdir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in rows if "skipped" in r] == [2, 1]
    assert np.isfinite(outcome.row["loss"]) and int(outcome.state.skipped["net"]) == 3


def test_too_many_refused_updates_stop_the_run():
    memory = Memory()
    with pytest.raises(NonFinite) as stopped:
        go(100, devices(2), Pipeline(poison=range(25, 100)), checkpointer=memory, nonfinite_limit=4)
    assert str(stopped.value) == (
        "training stopped at step 29: loss, largest_possible, grad_norm of player 'net' not finite, "
        "4 updates refused in a row (limit 4); last good checkpoint: step 20 in memory"
    )
    assert max(memory.kept) == 20
    with pytest.raises(NonFinite, match="there are no checkpoints"):
        go(20, devices(2), Pipeline(poison=range(5, 20)), nonfinite_limit=4)


class Device:
    """A device of 20 ms a step beside a host that takes no time, by a clock that only waiting for the device moves.

    It stands in for the loop's kept program, ``jax.block_until_ready`` and the fetch of metrics.
    """

    def __init__(self, monkeypatch):
        self.now, self.free, self.done = 100.0, 100.0, {}
        fetch = metrics_module.fetch
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(jax, "block_until_ready", self.wait)
        monkeypatch.setattr(metrics_module, "fetch", lambda tree: fetch(self.wait(tree)))

    def target(self, mesh):
        return None

    def ready(self, step, target, batch, key):
        def dispatched(*args):
            state, metrics = step(*args)
            self.free = max(self.free, self.now) + 0.02
            self.done |= {id(leaf): (self.free, leaf) for leaf in jax.tree.leaves(metrics)}
            return state, metrics

        return dispatched

    def wait(self, tree):
        ends = [self.done[id(leaf)][0] for leaf in jax.tree.leaves(tree) if id(leaf) in self.done]
        self.now = max([self.now, *ends])
        return tree


@pytest.mark.parametrize("in_flight", [8, 2])
def test_rates_are_the_device_s_however_short_the_log_interval(tmp_path, monkeypatch, in_flight):
    """Five steps an interval, eight in flight: they are dispatched at once, and the device's work still counts."""
    go(20, devices(1), log_every=5, workdir=tmp_path, in_flight=in_flight, program=Device(monkeypatch))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["steps_per_second"] for r in rows if "loss" in r] == pytest.approx([1 / 0.02] * 4)


def test_callbacks_see_the_state_and_their_numbers_are_written(tmp_path):
    seen = []

    def look(step, state):
        assert isinstance(state, TrainState) and int(state.step) == step
        seen.append(step)
        return {"quality": step / 10}

    go(25, devices(2), callbacks=[Callback(10, look)], workdir=tmp_path, tensorboard=True)
    assert seen == [10, 20, 25]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["quality"]) for r in rows if "quality" in r] == [(10, 1.0), (20, 2.0), (25, 2.5)]
    timed = next(r for r in rows if r["step"] == 20 and "loss" in r)
    assert timed["images_per_second"] > 0 and 0 <= timed["input_wait_fraction"] <= 1
    assert {"step_seconds_p50", "step_seconds_p90", "step_seconds_p99", "goodput", "grad_norm"} <= set(timed)
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_finished_run_does_nothing_more():
    memory = Memory()
    first = go(20, devices(2), checkpointer=memory)
    again = go(20, devices(2), Pipeline(end=0), checkpointer=memory)
    assert again.step == 20 and memory.blocked == [(20, True)]
    assert_bitwise(first.state, again.state)


def test_bad_settings_are_refused_before_anything_runs(tmp_path):
    memory = Memory()

    def never(params, batch, keys, ctx):
        raise AssertionError("traced")

    game = {"net": player(loss=never)}
    call = lambda **settings: train(game, init, Pipeline(), **{"steps": 10, "mesh": devices(2), **settings})
    for name in ("steps", "save_every", "log_every", "nonfinite_limit", "in_flight"):
        with pytest.raises(ValueError, match=rf"train.{name}=0: allowed are integers >= 1"):
            call(**{name: 0})
    with pytest.raises(ValueError, match=r"train.stats_every=-1"):
        call(stats_every=-1)
    with pytest.raises(ValueError, match=r"train.callbacks\[0\].every=0"):
        call(callbacks=[Callback(0, print)])
    with pytest.raises(ValueError, match=r"needs train\.workdir"):
        call(tensorboard=True)
    with pytest.raises(ValueError, match="batch size 32 is not divisible by 10"):
        call(accumulate=5)
    with pytest.raises(RuntimeError, match="the data pipeline ended at step 3, 10 were asked"):
        train({"net": player(loss=loss)}, init, Pipeline(end=3), steps=10, mesh=devices(2))
    go(20, devices(2), checkpointer=memory)
    with pytest.raises(ValueError, match=r"train.seed=6: the checkpoint was trained with seed 5"):
        go(40, devices(2), checkpointer=memory, seed=6)
