"""A stochastic row is a Gaussian kernel: its mean, its log-density, and what it says where there is no density."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import PROCESSES

from jaxdiff import exact, process, solver
from jaxdiff.solver import grid

LINEAR, EDM = PROCESSES["linear"], PROCESSES["edm"]
KEY = jax.random.key(5)
WORLD = exact.Gaussian([0.3, -0.2, 0.5], 0.4)
INDEX = jnp.arange(4, dtype=jnp.uint32)


def rows(table):
    table = solver.device(table)
    all_rows = solver.rows_of(table, KEY)
    return table, [jax.tree_util.tree_map(lambda leaf, k=k: leaf[k], all_rows) for k in range(table.rows)]


@pytest.mark.parametrize(
    ("p", "table"),
    [
        (LINEAR, solver.ancestral(LINEAR, grid.uniform(LINEAR, 4))),
        (EDM, solver.edm(EDM, grid.edm_rho(EDM, 3), s_churn=1.0)),
    ],
)
def test_density_along_a_run(p, table):
    d = exact.denoiser(WORLD, p)
    table, each = rows(table)
    state = solver.begin(table, d, float(table.blocks.start_scale) * jnp.ones((4, 3)), KEY, INDEX)
    total = 0.0
    for row in each:
        mean = solver.row_mean(table, d, state, row)
        moved, _ = solver.advance(table, d, None, state, row, index=INDEX)
        y, std = np.asarray(moved.y[0], np.float64), float(row.blocks.C)
        logp = solver.row_logprob(table, d, state, row, moved.y[0])
        assert logp.shape == (4,) and mean.shape == (4, 3)
        if std > 0:
            z = (y - np.asarray(mean)) / std
            expected = np.sum(-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi), 1)
            np.testing.assert_allclose(logp, expected, rtol=1e-4, atol=1e-3)
            assert 0.2 < np.sqrt(np.mean(z**2)) < 2.2  # and the draw has that scale
            total = total + logp
        else:
            np.testing.assert_array_equal(y, mean)
            assert np.all(np.isnan(logp))  # no density: documented
        state = moved
    assert np.all(np.isfinite(total))


def test_mean_by_formula():
    table, each = rows(solver.ddim(LINEAR, [0.8, 0.5], eta=1.0))
    x = jax.random.normal(KEY, (4, 3))
    d = exact.denoiser(WORLD, LINEAR)
    state = solver.begin(table, d, x)
    said = d(x, jnp.float32(0.8))
    # alpha .2 -> .5, sigma .8 -> .5; posterior std c
    c = 0.5 / 0.8 * np.sqrt(0.8**2 - (0.2 / 0.5) ** 2 * 0.5**2)
    expected = 0.5 * said.data + np.sqrt(0.5**2 - c**2) * said.noise
    np.testing.assert_allclose(solver.row_mean(table, d, state, each[0]), expected, atol=1e-6)


def test_density_integrates_to_one():
    p = LINEAR
    table, each = rows(solver.ancestral(p, [0.8, 0.5]))
    d = exact.denoiser(exact.Gaussian(0.3, 0.4), p)
    points = jnp.linspace(-6, 6, 4001)[:, None]
    state = solver.begin(table, d, jnp.full((4001, 1), 0.7))
    logp = np.asarray(solver.row_logprob(table, d, state, each[0], points), np.float64)
    np.testing.assert_allclose(np.trapezoid(np.exp(logp), np.asarray(points)[:, 0]), 1.0, rtol=1e-4)


def test_gradient_is_the_score_of_the_kernel():
    table, each = rows(solver.ancestral(LINEAR, [0.8, 0.5]))
    d = exact.denoiser(WORLD, LINEAR)
    state = solver.begin(table, d, jnp.ones((4, 3)))
    y = jax.random.normal(KEY, (4, 3))
    score = jax.grad(lambda y: jnp.sum(solver.row_logprob(table, d, state, each[0], y)))(y)
    mean, std = solver.row_mean(table, d, state, each[0]), each[0].blocks.C
    np.testing.assert_allclose(score, -(y - mean) / std**2, rtol=1e-4, atol=1e-5)


def test_refusals():
    d = exact.denoiser(WORLD, LINEAR)
    x = jnp.ones((4, 3))
    deterministic, plain = rows(solver.ddim(LINEAR, [0.8, 0.5]))
    student = process.linear(noise=process.student_t(3.0))
    silent, other = rows(solver.ddim(student, [0.8, 0.5], stochastic=True))
    for table, row in ((deterministic, plain[0]), (silent, other[0])):
        state = solver.begin(table, d, x)
        with pytest.raises(ValueError, match=r"^table: row_logprob.. needs a stochastic table with Gaussian noise$"):
            solver.row_logprob(table, d, state, row, x)
    tree = dataclasses.replace(silent, blocks={"a": silent.blocks})
    with pytest.raises(ValueError, match=r"^table: row_logprob.. takes tables of one affine block$"):
        solver.row_logprob(tree, d, None, dataclasses.replace(other[0], blocks={"a": other[0].blocks}), x)
