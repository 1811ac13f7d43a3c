"""Averages over an interval, the stop after refused updates, timing, goodput, and files."""

import json
import math
import sys
import time

import numpy as np
import pytest

from jaxdiff.train import JsonlWriter, MetricLog, TensorBoardWriter
from jaxdiff.train.metrics import Clock, Goodput


def own(loss, active=1, skipped=0, in_a_row=0, **more):
    values = {"loss": loss, "grad_norm": loss, "active": active, "skipped": skipped, **more}
    return {name: np.asarray(value) for name, value in values.items()} | {"skipped_in_a_row": np.asarray(in_a_row)}


def test_averages_leave_out_rests_and_refused_updates():
    log = MetricLog()
    log.add(1, {"a": own(1.0), "b": own(10.0)})
    log.add(2, {"a": own(np.nan, skipped=1, in_a_row=1), "b": own(0.0, active=0)})
    log.add(3, {"a": own(2.0), "b": own(0.0, active=0)})
    row, trouble = log.drain()
    assert trouble is None
    assert row["a/loss"] == 1.5 and row["a/skipped"] == 1
    assert row["b/loss"] == 10.0 and row["b/skipped"] == 0
    assert log.drain() == ({}, None)


def test_lone_player_vectors_norms_and_learning_rate():
    log = MetricLog()
    for step in (1, 2):
        measured = {"stats/active": step - 1, "stats/param_norm": 7.0 * (step - 1)}
        log.add(step, {"net": own(1.0, by_level=[step, 2.0], learning_rate=0.1 * step, **measured)})
    row, _ = log.drain()
    assert row["loss"] == 1.0 and row["by_level/0"] == 1.5 and row["by_level/1"] == 2.0
    assert row["stats/param_norm"] == 7.0  # the step at which it was measured, not diluted by the other
    assert row["learning_rate"] == pytest.approx(0.2)  # the last
    assert "stats/active" not in row and "active" not in row


def test_stop_names_step_metric_and_count():
    log = MetricLog(limit=3)
    for step in range(5, 10):
        log.add(step, {"net": own(np.nan if step > 5 else 1.0, skipped=int(step > 5), in_a_row=step - 5)})
    _, trouble = log.drain()
    assert trouble.startswith("step 8: loss, grad_norm of player 'net' not finite, 3 updates refused in a row")
    log.add(10, {"net": own(np.nan, skipped=1, in_a_row=2)})
    row, trouble = log.drain()
    assert trouble is None and math.isnan(row["loss"])
    with pytest.raises(ValueError, match="nonfinite_limit=0"):
        MetricLog(0)


def test_clock_measures_rate_wait_and_leaves_pauses_out(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    for step in range(4):
        now[0] += 0.01 * (step + 1)
        clock.waited(0.005)
        clock.tick()
        now[0] += 0.02
        clock.pause()
    now[0] += 0.06  # the device catches up
    clock.settle()
    row = clock.summary(100)
    assert clock.productive_seconds == pytest.approx(0.16)
    assert row["images_per_second"] == pytest.approx(400 / 0.16) and row["steps_per_second"] == pytest.approx(25)
    assert row["step_seconds_p50"] == pytest.approx(0.025)
    assert row["step_seconds_p50"] < row["step_seconds_p90"] < row["step_seconds_p99"] < 0.04
    assert row["input_wait_fraction"] == pytest.approx(0.02 / 0.16)
    clock.start_interval()
    assert clock.summary(100) == {}


def test_goodput_spans_restarts(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    first = Goodput()
    now[0] = 1100.0
    saved = first.summary(60.0)
    assert saved["goodput"] == 0.6 and saved["restarts"] == 0
    now[0] = 1150.0  # down for 50 s, then 50 s of good work
    second = Goodput(json.loads(json.dumps(saved)))
    now[0] = 1200.0
    again = second.summary(50.0)
    assert again["goodput"] == pytest.approx(110 / 200) and again["restarts"] == 1
    now[0] = 0.0  # a clock that was set back
    assert second.summary(50.0)["goodput"] == 1.0


def test_jsonl_rows_are_valid_and_a_restart_writes_each_step_once(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": np.float32(0.5), "bad": float("nan"), "count": 3, "note": "x"})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    writer = JsonlWriter(path, resume_step=20)
    writer.write(30, {"loss": 0.25})
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[0] == {"step": 10, "loss": 0.5, "bad": None, "count": 3, "note": "x"}
    assert rows[2]["loss"] == 0.25
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_lines_that_are_no_text_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\xfe\n{}\n[1]\n')
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 1)
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_row_torn_from_the_end_of_its_line_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}')
    writer = JsonlWriter(path, resume_step=20)
    writer.write(30, {})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


@pytest.mark.parametrize("resume_step", [0, 20])
def test_tensorboard_forgets_the_steps_that_are_written_again(tmp_path, resume_step):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    TensorBoardWriter(tmp_path, resume_step).close()
    (file,) = tmp_path.iterdir()
    data, starts = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        starts += [event.step] if event.session_log.status == SessionLog.START else []
        data = data[16 + length :]
    assert starts == [resume_step + 1]


def test_tensorboard_files_without_tensorflow(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(5, {"loss": 0.5, "note": "left out"})
    writer.close()
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("events.out.tfevents") and b"loss" in file.read_bytes()
    assert "tensorflow" not in sys.modules
