"""The benchmark scripts still fit each other and the library: imported, their cases bound and compiled, none timed."""

import collections
import inspect
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxdiff import guidance, prediction, process, solver
from jaxdiff.solver.sampling import programs
from jaxdiff.solver.table import device

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


def loop_operations(compiled, steps):
    """How often the compiled loop over ``steps`` rows does what: fusions, matrix products, copies, calls, inner loops."""
    text = compiled.as_text()
    bodies = [re.search(r"body=%([\w.]+)", line)[1] for line in text.splitlines() if f'"n":"{steps}"' in line]
    assert len(bodies) == 1
    body = re.search(rf"\n%{re.escape(bodies[0])} \(.*?\n\}}", text, re.S)[0]
    named = {"parameter", "get-tuple-element", "constant", "tuple", "bitcast"}  # no work
    return collections.Counter(kind for kind in re.findall(r" = .*? ([\w-]+)\(", body) if kind not in named)


@pytest.mark.parametrize("name", ["euler", "dpm_solver_pp", "ancestral", "euler+cfg"])
def test_the_compiled_loop_is_no_longer_than_a_hand_written_one(name, monkeypatch):
    """Whatever a clock says on a busy machine: operation for operation, the table costs nothing (CPU; XLA's own text)."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sampling

    shape, steps, key, path = (64, 2), 11, jax.random.key(0), process.linear()
    net = sampling.Labelled() if name.endswith("cfg") else sampling.Mlp()
    labels, null = (jnp.full(64, n, jnp.int32) for n in (1, 4))
    given = (labels,) if name.endswith("cfg") else ()
    params = net.init(key, jnp.zeros(shape), jnp.zeros(()), *given)
    apply = lambda p, x, t, c=None: net.apply(p, x, t, c)
    d = prediction.denoiser(path, net.apply, params, target="velocity")
    table = getattr(solver, name.removesuffix("+cfg"))(path, solver.grid.uniform(path, steps))
    if given:
        d = guidance.cfg(d, 2.0, cond=labels, null=null)
        theirs = sampling.hand_cfg(apply, shape, steps).lower(params, key, 2.0, labels, null)
    elif name == "euler":
        theirs = sampling.hand_euler(apply, shape, steps).lower(params, key)
    else:
        write = sampling.hand_2m if name == "dpm_solver_pp" else sampling.hand_ancestral
        theirs = write(apply, shape, table).lower(params, key)
    draw, go = programs(shape, None, (), "float32")
    table = device(table, hooks=False)
    ours = go.lower(
        table, prediction.lift(d), *draw(table, key, None, None)[:1], key, jnp.arange(64, dtype=jnp.uint32), None
    )
    found, wanted = (loop_operations(lowered.compile(), steps) for lowered in (ours, theirs))
    assert found["fusion"] > 3 and found <= wanted, (found, wanted)
