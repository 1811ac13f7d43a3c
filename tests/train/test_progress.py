"""A bar on a terminal, rare lines in a pipe, silence in CI."""

import io
import itertools
import time

import pytest

from jaxdiff.train import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


ROW = {"loss": 0.123456, "images_per_second": 1234.5}


def show(stream, **settings):
    progress = Progress(100, 0, stream=stream, **settings)
    for step in range(1, 101):
        progress.update(step)
        if step % 10 == 0:
            progress.report(ROW)
    progress.say("done")
    progress.close()
    return stream.getvalue()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No CI, and a clock that goes on by 20 ms at every look, whatever the machine does meanwhile."""
    monkeypatch.delenv("CI", raising=False)
    now = itertools.count(100.0, 0.02)
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))


def test_pipe_gets_single_lines_now_and_then():
    lines = show(io.StringIO()).splitlines()
    assert len(lines) == 3  # the first report, the last, and what was said
    assert lines[0].startswith("step 10/100  loss 0.1235  1234 images/s  ETA 0:0")
    assert lines[1].startswith("step 100/100") and lines[2] == "done"


def test_every_asks_for_lines_also_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert show(io.StringIO()) == ""
    lines = show(io.StringIO(), every=20).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["20/100", "40/100", "60/100", "80/100", "100/100"]


def test_terminal_gets_a_bar():
    text = show(Terminal())
    assert "\r" in text and "100/100" in text and "loss=0.1235" in text and "img/s=1234" in text


def test_several_players_show_every_loss():
    stream = io.StringIO()
    Progress(10, stream=stream).report({"student/loss": 1.0, "critic/loss": 2.0, "critic/grad_norm": 3.0})
    assert "student/loss 1  critic/loss 2" in stream.getvalue() and "grad" not in stream.getvalue()
