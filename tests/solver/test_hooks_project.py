"""Constraints hold at every grid state of every solver; known coordinates are bitwise; what is not on is not there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import rms

from jaxdiff import exact, guidance, process, solver
from jaxdiff.solver import grid

LINEAR = process.linear()
A = np.array([[1.0, 1.0, 0.0, 0.0], [0.5, 0.0, -1.0, 2.0], [2.0, 1.0, -1.0, 2.0]])[:2]
B = np.array([0.3, -0.7])
COV = np.array([[1.0, 0.6, 0, 0.1], [0.6, 0.8, 0.2, 0], [0, 0.2, 0.5, 0.3], [0.1, 0, 0.3, 0.6]])
WORLD = exact.Gaussian([0.2, -0.4, 0.0, 0.6], COV)
TABLES = [make(LINEAR, grid.uniform(LINEAR, 6)) for make in solver.SOLVERS.values()]
X = jax.random.normal(jax.random.key(0), (3, 4))
KEY = jax.random.key(1)


def test_a_linear_constraint_holds_at_every_grid_state_of_every_solver():
    """All solvers in one vmapped call, float64: on grid rows A y = b to rounding; stages inside a step are left alone."""
    with jax.enable_x64(True):
        d, tables, x = exact.denoiser(WORLD, LINEAR), solver.stack(TABLES), X.astype(jnp.float64)
        go = lambda hook: jax.jit(
            jax.vmap(lambda tb: solver.run(tb, d, x, KEY, hooks=hook, record=("states",))[1]["states"])
        )(tables)
        held, free = np.asarray(go(solver.keep(solver.affine(A, B)))), np.asarray(go(None))
    grid_rows = np.asarray(tables.out & tables.live)
    miss = np.max(np.abs(held @ A.T - B), (2, 3))
    assert np.max(miss[grid_rows]) < 1e-13 and np.max(miss[np.asarray(~tables.out & tables.live)]) > 1e-3
    assert np.all(np.max(np.abs(free @ A.T - B), (1, 2, 3)) > 1e-2)
    # orthogonal: of the first row's states, nothing along the null space of A has moved
    null = np.linalg.svd(A)[2][2:]
    for i, table in enumerate(TABLES):
        if table.out[0]:
            np.testing.assert_allclose(held[i, 0] @ null.T, free[i, 0] @ null.T, atol=1e-12)


def test_constrained_data_ends_on_the_constraint_with_every_solver():
    with jax.enable_x64(True):
        d = guidance.constrain(exact.denoiser(WORLD, LINEAR), solver.affine(A, B))
        tables, x = solver.stack(TABLES), X.astype(jnp.float64)
        out = np.asarray(jax.jit(jax.vmap(lambda tb: solver.run(tb, d, x, KEY)))(tables))
        kept = dataclasses.replace(d, noise="kept")
        ddim, noisy = solver.ddim(LINEAR, grid.uniform(LINEAR, 6)), solver.lms(LINEAR, grid.uniform(LINEAR, 6))
        published, missed = (np.asarray(solver.run(table, kept, x)) @ A.T - B for table in (ddim, noisy))
    assert np.max(np.abs(out @ A.T - B)) < 1e-11
    assert np.max(np.abs(published)) < 1e-12 and np.max(np.abs(missed)) > 1e-2  # as the docstring says


def test_known_coordinates_are_bitwise_and_the_rest_knows_of_them():
    """Gaussian data, one coordinate known: the others move towards their conditional mean."""
    values = jnp.array([1.5, 0.0, 0.0, 0.0])
    known = solver.known(jnp.array([True, False, False, False]), values)
    table, d = solver.ancestral(LINEAR, grid.uniform(LINEAR, 40)), exact.denoiser(WORLD, LINEAR)
    go = jax.jit(lambda x, hook: solver.run(table, d, x, KEY, hooks=hook, record=("states",)))
    x = jax.random.normal(jax.random.key(2), (2000, 4))
    out, history = go(x, solver.inpaint(table, known))
    assert np.all(np.asarray(out[:, 0]) == 1.5)
    # the known coordinate is at each level's own law
    for k in (9, 29):
        t = float(table.time[k + 1])
        seen = np.asarray(history["states"][k, :, 0])
        assert abs(seen.mean() - (1 - t) * 1.5) < 4 * t / np.sqrt(2000)
        assert abs(seen.std() / t - 1) < 4 / np.sqrt(4000)
    mean, plain = -0.4 + 0.6 * (1.5 - 0.2), -0.4
    got = float(out[:, 1].mean())
    assert abs(got - mean) < 0.5 * abs(mean - plain)  # the rest is replacement's known bias
    fixed, straight = go(x[:4], solver.inpaint(table, known, noise=jnp.full(4, 0.8)))
    t = np.asarray(table.time[1:])
    np.testing.assert_allclose(straight["states"][:, 0, 0], (1 - t) * 1.5 + t * 0.8, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(fixed[:, 0]) == 1.5)


def test_inpainting_a_linear_measurement_and_a_mask_agree():
    mask = np.array([True, False, True, False])
    values = np.array([1.0, 0, -0.5, 0])
    table, d = solver.ddim(LINEAR, grid.uniform(LINEAR, 8)), exact.denoiser(WORLD, LINEAR)
    noise = jnp.array([0.1, 0.2, 0.3, 0.4])
    go = jax.jit(lambda hook: solver.run(table, d, X, hooks=hook))
    one = go(solver.inpaint(table, solver.known(mask, values), noise=noise))
    other = go(solver.inpaint(table, solver.affine(np.eye(4)[mask], values[mask]), noise=noise))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_range_and_combination():
    table, d = solver.ddim(LINEAR, grid.uniform(LINEAR, 8)), exact.denoiser(WORLD, LINEAR)
    first, second = solver.keep(solver.box(-0.4, 0.4)), solver.keep(lambda y: y.at[:, 0].set(0.25))
    go = jax.jit(lambda hook: solver.run(table, d, X, KEY, hooks=hook, record=("states",))[1]["states"])
    both = np.asarray(go(solver.combine(first, second)))
    assert np.max(np.abs(both)) <= 0.4 + 1e-7 and np.all(both[..., 0] == 0.25)
    held = np.asarray(go(first))
    assert np.max(np.abs(held)) <= 0.4 + 1e-7 and rms(held, both) > 1e-2
    known = solver.known(np.array([True, False, False, False]), 0.1)
    chained = solver.combine(solver.inpaint(table, known), counted := counting(), first)
    out = np.asarray(go(chained))
    assert np.all(out[-1, :, 0] == np.float32(0.1)) and counted.correct is not None


def counting():
    """Counts rows in its own state and shows the count in coordinate 3 of the state."""

    def correct(keys, row, y, predicted, y_next, s):
        return y_next.at[:, 3].set(s.astype(y_next.dtype)), s + 1

    return solver.hooks(correct=correct, start=lambda x: jnp.zeros(x.shape[0]))


def test_hook_states_are_kept_apart():
    table, d = solver.ddim(LINEAR, grid.uniform(LINEAR, 5)), exact.denoiser(WORLD, LINEAR)
    hook = solver.combine(counting(), solver.inpaint(table, solver.known(np.array([True, False, False, False]), 0.0)))
    states = jax.jit(lambda: solver.run(table, d, X, KEY, hooks=hook, record=("states",))[1]["states"])()
    np.testing.assert_array_equal(states[:, 0, 3], np.arange(5))


@pytest.mark.parametrize("kind, wide", [(jnp.bfloat16, False), (jnp.float32, True)])
def test_states_keep_their_dtype(kind, wide):
    """Of states narrower than the coefficients: bfloat16, and float32 where jax computes in float64."""
    with jax.enable_x64(wide):
        table, d = solver.ddim(LINEAR, grid.uniform(LINEAR, 2)), exact.denoiser(WORLD, LINEAR)
        hook = solver.combine(
            solver.inpaint(table, solver.known(np.array([True, False, False, False]), 0.25)),
            solver.corrector(table, d),
            solver.keep(solver.box(-3, 3)),
        )
        out = solver.sample(table, d, KEY, (3, 4), hooks=hook, dtype=kind)
        assert out.dtype == kind
        np.testing.assert_array_equal(np.asarray(out[:, 0], np.float64), 0.25)


def test_refusals():
    table = TABLES[1]
    both = solver.join({"a": table, "b": table})
    for text, call in {
        "no x has A x = b": lambda: solver.affine([[1.0, 0.0], [2.0, 0.0]], [1.0, 3.0]),
        r"A, b: shapes \(2, 4\), \(3,\)": lambda: solver.affine(A, [1.0, 2.0, 3.0]),
        r"need \(m, 2\)": lambda: solver.affine(A, B)(jnp.zeros((1, 2))),
        "low < high": lambda: solver.box(1, -1),
        "mask: dtype": lambda: solver.known([1.0], 0.0),
        r"table: inpaint\(\) takes a table of one affine block": lambda: solver.inpaint(both, solver.affine(A, B)),
        r"table: corrector\(\) takes": lambda: solver.corrector(both, exact.denoiser(WORLD, LINEAR)),
        "constraint: a Box": lambda: solver.inpaint(table, solver.box()),
        "key: missing": lambda: solver.run(
            table, exact.denoiser(WORLD, LINEAR), X, hooks=solver.inpaint(table, solver.known([True] * 4, 0.0))
        ),
        "retime: 2": lambda: solver.combine(*[solver.hooks(retime=lambda y, row: row.tau)] * 2),
        "noise: 'some'": lambda: guidance.constrain(exact.denoiser(WORLD, LINEAR), solver.box(), noise="some"),
        "constraint: 3": lambda: guidance.constrain(exact.denoiser(WORLD, LINEAR), 3),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()
