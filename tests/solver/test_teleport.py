"""Gaussian teleport: the exact flow of Gaussian data, its statistics, and samples that start from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, process, solver
from jaxdiff.solver import grid

RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(3, 3))
WORLD = exact.Gaussian([0.5, -1.0, 2.0], ROOT @ ROOT.T)


@pytest.mark.parametrize("path", ["linear", "vp", "edm"])
def test_equals_the_fine_probability_flow(path):
    p = getattr(process, path)()
    whole = grid.logsnr(p, 400)
    stop = 200
    tail = grid.from_times(p, whole.time[stop:])
    with jax.enable_x64(True):
        z = jnp.asarray(RNG.normal(size=(5, 3)))
        start = whole.sigma[0] * z + whole.alpha[0] * WORLD.mean
        table = solver.dpm_solver_pp(p, tail)
        jumped = solver.teleport(p, WORLD, start, table)
        down = solver.dpm_solver_pp(p, grid.from_times(p, whole.time[: stop + 1]))
        fine = solver.run(down, exact.denoiser(WORLD, p), start)
        # the first-order first step of the table is what is left of the difference
        np.testing.assert_allclose(jumped, fine, atol=2e-3 * float(jnp.max(jnp.abs(fine))))
        flow = exact.gaussian_flow(WORLD, p)
        np.testing.assert_allclose(jumped, flow(start, whole.time[0], whole.time[stop]), rtol=1e-10)


def test_low_rank_moments():
    x = RNG.normal(size=(500, 2, 6)) * np.array([3.0, 2.0, 1.0, 0.3, 0.2, 0.1]) + 0.7
    flat = x.reshape(500, 12)
    whole = solver.data_moments(x)
    cov = (whole.basis * (whole.spectrum - whole.rest)) @ whole.basis.T + whole.rest * np.eye(12)
    np.testing.assert_allclose(cov, np.cov(flat.T, bias=True), atol=1e-12)
    np.testing.assert_allclose(whole.mean, flat.mean(0))
    for rank in (0, 4):
        low = solver.data_moments(x, rank=rank)
        assert low.basis.shape == (12, rank)
        total = low.spectrum.sum() + (12 - rank) * low.rest
        np.testing.assert_allclose(total, np.trace(np.cov(flat.T, bias=True)))
    # the jump with a remainder is that of the covariance it stands for
    p = process.vp()
    low = solver.data_moments(x, rank=4)
    cov = (low.basis * (low.spectrum - low.rest)) @ low.basis.T + low.rest * np.eye(12)
    table = solver.ddim(p, np.linspace(0.6, 0.0, 4))
    with jax.enable_x64(True):
        y = jnp.asarray(RNG.normal(size=(4, 2, 6)))
        one = solver.teleport(p, low, y, table)
        two = solver.teleport(p, exact.Gaussian(low.mean, cov), y.reshape(4, 12), table)
        np.testing.assert_allclose(one.reshape(4, 12), two, rtol=1e-9, atol=1e-12)


def test_samples_have_the_data_law_and_their_own_noise():
    p = process.edm()
    table = solver.dpm_solver_pp(p, grid.edm_rho(p, 12, sigma_max=5.0))
    d = exact.denoiser(WORLD, p)
    draw = jax.jit(lambda key, index: solver.teleport_sample(p, WORLD, table, d, key, (4000, 3), index=index))
    x = np.asarray(draw(jax.random.key(1), jnp.arange(4000, dtype=jnp.uint32)), np.float64)
    mean, cov = WORLD.moments()
    # 5 standard errors
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 5 * np.sqrt(np.diag(cov) / 4000))
    spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / 4000)
    np.testing.assert_array_less(np.abs(np.cov(x.T) - cov), 5 * spread)
    # the start of sample i is the one solver.sample gives it
    part = solver.teleport_sample(p, WORLD, table, d, jax.random.key(1), (3, 3), index=jnp.arange(7, 10))
    np.testing.assert_allclose(part, x[7:10], rtol=2e-5, atol=2e-5)
    top = solver.ddim(p, grid.edm_rho(p, 4))
    same = solver.teleport_sample(p, WORLD, top, d, jax.random.key(1), (3, 3))
    np.testing.assert_allclose(same, solver.sample(top, d, jax.random.key(1), (3, 3)), rtol=1e-4, atol=1e-4)


def test_refusals():
    p = process.vp()
    table = solver.ddim(p, np.linspace(0.6, 0.0, 4))
    x = np.ones((2, 3))
    student = dataclasses.replace(p, noise=process.student_t(5.0))
    with pytest.raises(ValueError, match="process: noise law 'student_t'"):
        solver.teleport(student, WORLD, x, table)
    with pytest.raises(ValueError, match="x: samples of 4 elements"):
        solver.teleport(p, WORLD, np.ones((2, 4)), table)
    with pytest.raises(ValueError, match="table: starts at"):
        solver.teleport(p, WORLD, x, table, time=0.3)
    with pytest.raises(ValueError, match="rank: 9 given"):
        solver.data_moments(np.ones((4, 3)), rank=9)
    with pytest.raises(ValueError, match="x: shape"):
        solver.data_moments(np.ones((1, 3)))
