"""The benchmark scripts still fit each other and the library: imported, their cases bound, none timed."""

import inspect
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accelerator

    return accelerator


def test_the_accelerator_benchmark_refuses_a_cpu(accelerator, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accelerator.py"])
    with pytest.raises(SystemExit) as stopped:
        accelerator.main()
    assert stopped.value.code == 2 and "--cpu" in capsys.readouterr().err


def test_the_accelerator_benchmark_calls_the_others_as_they_are(accelerator):
    for case in accelerator.train_step.CASES:
        inspect.signature(accelerator.train_step.measure).bind(*case, 1)
    inspect.signature(accelerator.sampling.measure).bind(None, None, 1, 1)
    inspect.signature(accelerator.sampling.cases).bind("")
    assert "cpu" in accelerator.described()["platform"]


def test_a_part_that_fails_is_recorded_and_costs_no_other(accelerator):
    found = accelerator.attempt("DiT-Q/4", lambda: accelerator.dit("Q/4", 4, (8, 8, 4), 1, 1, 1))
    assert "Q/4" in found["error"]
