"""The public call: new values never retrace, and bad arguments are one-line errors before any compile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import PROCESSES, rms

from jaxdiff import exact, process, solver
from jaxdiff.prediction import Prediction, denoiser
from jaxdiff.solver import grid

LINEAR, EDM = PROCESSES["linear"], PROCESSES["edm"]
KEY = jax.random.key(7)
ANCESTRAL = solver.ancestral(LINEAR, grid.uniform(LINEAR, 6))
CHURN = solver.edm(EDM, grid.edm_rho(EDM, 5), s_churn=4.0)


def test_new_values_do_not_retrace():
    traces = []

    def net(params, x, t, cond):
        traces.append(1)
        return x * params["w"] + t

    one = denoiser(LINEAR, net, {"w": jnp.ones(2)}, target="velocity")
    table = solver.ddim(LINEAR, grid.uniform(LINEAR, 6))
    first = np.asarray(solver.sample(table, one, KEY, (4, 2)))
    count = len(traces)
    assert count >= 1
    changed = [
        (table, dataclasses.replace(one, params={"w": 2 * jnp.ones(2)}), KEY),
        (table, one, jax.random.key(99)),
        (solver.ddim(LINEAR, grid.logsnr(LINEAR, 6)), one, KEY),
        (solver.dpm_solver_pp(LINEAR, grid.shift(LINEAR, 6), order=1), one, KEY),
        (table, denoiser(LINEAR, net, {"w": jnp.zeros(2)}, target="velocity"), KEY),
    ]
    for case in changed:
        assert rms(solver.sample(*case, (4, 2)), first) > 1e-3  # a new answer from the old program
    assert len(traces) == count
    for offset in (0, 4, np.int64(8), 12):  # chunks share one program
        solver.sample(table, one, KEY, (4, 2), index=offset)
    assert len(traces) == count
    solver.sample(solver.heun(LINEAR, grid.uniform(LINEAR, 6)), one, KEY, (4, 2))
    assert len(traces) > count  # another structure is another program: the counter works


def test_stochastic_strength_does_not_retrace():
    traces = []

    def net(params, x, t, cond):
        traces.append(1)
        return x

    d = denoiser(LINEAR, net, target="velocity")
    outs = [
        np.asarray(
            solver.sample(solver.ddim(LINEAR, grid.uniform(LINEAR, 5), eta=eta, stochastic=True), d, KEY, (2, 1))
        )
        for eta in (0.0, 0.5, 1.0)
    ]
    count = len(traces)
    solver.sample(solver.ancestral(LINEAR, grid.logsnr(LINEAR, 5)), d, KEY, (2, 1))
    assert len(traces) == count and rms(outs[0], outs[2]) > 1e-3
    plain = np.asarray(solver.sample(solver.ddim(LINEAR, grid.uniform(LINEAR, 5)), d, KEY, (2, 1)))
    np.testing.assert_allclose(outs[0], plain, atol=1e-6)


D2 = exact.denoiser(exact.Gaussian([0.0, 1.0], 0.5), LINEAR)
DDIM = solver.ddim(LINEAR, grid.uniform(LINEAR, 3))
STUDENT = solver.ddim(process.linear(noise=process.student_t(4.0)), [0.9, 0.1])
BAD = {
    "raw key": (lambda: solver.sample(DDIM, D2, jax.random.PRNGKey(0), (2, 2)), "key: uint32 of shape (2,) given"),
    "other generator": (lambda: solver.sample(DDIM, D2, jax.random.key(0, impl="rbg"), (2, 2)), "key: key<rbg>"),
    "many keys": (lambda: solver.sample(DDIM, D2, jax.random.split(KEY), (2, 2)), "key: key<fry> of shape (2,)"),
    "a seed": (lambda: solver.sample(DDIM, D2, 0, (2, 2)), "key: int of shape () given"),
    "no key": (lambda: solver.run(ANCESTRAL, D2, jnp.ones((2, 2))), "key: missing; this table draws noise"),
    "no key for churn": (
        lambda: solver.run(CHURN, D2, jnp.ones((2, 2)), hooks=solver.hooks(noise=lambda k, row, y: y)),
        "key: missing; this table draws noise",
    ),
    "empty batch": (lambda: solver.sample(DDIM, D2, KEY, (0, 2)), "shape: (0, 2) given"),
    "no batch": (lambda: solver.sample(DDIM, D2, KEY, ()), "shape: () given"),
    "a number": (lambda: solver.sample(DDIM, D2, KEY, 4), "shape: 4 given"),
    "unequal batches": (lambda: solver.sample(DDIM, D2, KEY, {"a": (2, 1), "b": (3, 1)}), "shape: {'a': (2, 1)"),
    "dtype": (lambda: solver.sample(DDIM, D2, KEY, (2, 2), dtype=jnp.int32), "dtype: int32 given"),
    "index shape": (lambda: solver.sample(DDIM, D2, KEY, (2, 2), index=jnp.arange(3)), "index: shape (3,) given"),
    "index sign": (lambda: solver.sample(DDIM, D2, KEY, (2, 2), index=-1), "index: -1 given"),
    "index type": (lambda: solver.sample(DDIM, D2, KEY, (2, 2), index=0.5), "index: dtype float32 given"),
    "init shape": (lambda: solver.sample(DDIM, D2, KEY, (2, 2), init=np.ones((3, 2))), "init: shape (3, 2) given"),
    "init rank": (lambda: solver.sample(DDIM, D2, KEY, (2, 2), init=np.ones((3, 2, 2))), "init: shape (3, 2, 2)"),
    "record": (lambda: solver.sample(DDIM, D2, KEY, (2, 2), record=("state",)), "record: 'state' is unknown"),
    "stack": (lambda: solver.sample(solver.stack([DDIM] * 2), D2, KEY, (2, 2)), "table: a stack of 2 given"),
    "no table": (lambda: solver.sample(solver.ddim, D2, KEY, (2, 2)), "table: function given; need a Table"),
    "no hooks": (lambda: solver.sample(DDIM, D2, KEY, (2, 2), hooks={"project": 1}), "hooks: dict given; build them"),
    "law": (lambda: solver.sample(STUDENT, D2, KEY, (2, 2)), "table: made for student_t noise"),
    "cond": (lambda: solver.sample(DDIM, lambda x, t, r: x, KEY, (2, 2), cond=1), "cond: given, but a denoiser"),
    "not a prediction": (lambda: solver.run(DDIM, lambda x, t, r: x, jnp.ones((2, 2))), "d: returned"),
    "wrong prediction": (
        lambda: solver.run(DDIM, lambda x, t, r: Prediction(x[:1], x[:1]), jnp.ones((2, 2))),
        "d: returned data (1, 2) and noise (1, 2) for a state (2, 2)",
    ),
    "hook": (lambda: solver.hooks(project=3), "project: 3 given"),
    "misspelt option": (
        lambda: solver.unipc(LINEAR, grid.uniform(LINEAR, 3), variant="lagrang"),
        "variant: 'lagrang' given; allowed: bh1, bh2, lagrange; did you mean 'lagrange'?",
    ),
    "sharding": (
        lambda: solver.sample(DDIM, D2, KEY, (8, 2), sharding=jax.sharding.NamedSharding(
            jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
            jax.sharding.PartitionSpec("data", None))),
        "sharding: spec",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_one_line_errors(case):
    call, message = BAD[case]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_table_prints_its_shape():
    whole = solver.heun(LINEAR, grid.uniform(LINEAR, 4))
    assert repr(whole) == "Table(7 rows, AffineBlock(A (7, 1), B (7, 2), deterministic))"
    assert repr(solver.stack([whole, DDIM])).startswith("Table(7 rows of a stack, AffineBlock(A (2, 7, 1)")


def test_tools_that_load_late_are_listed():
    assert set(solver.__all__) <= set(dir(solver))
