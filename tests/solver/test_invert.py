"""Inversion: round trips to rounding, noise encoding reproduces its sample, direct inversion is bitwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import PROCESSES

from jaxdiff import exact, guidance, solver
from jaxdiff.solver import grid, invert

LINEAR, VP = PROCESSES["linear"], PROCESSES["vp"]
WORLD = exact.GaussianMixture(
    [0.4, 0.6], [[-1.0, 0.5], [0.8, -0.3]], [[[0.2, 0.05], [0.05, 0.1]], [[0.1, 0.0], [0.0, 0.3]]], labels=[0, 1]
)
ABOVE = grid.uniform(LINEAR, 40, t_min=0.02)


@pytest.mark.parametrize("wide, bound", [(False, 1e-5), (True, 1e-10)])
def test_fixed_point_round_trip(wide, bound):
    table = solver.ddim(LINEAR, ABOVE)
    with jax.enable_x64(wide):
        d = exact.denoiser(WORLD, LINEAR)
        x = WORLD.sample(jax.random.key(0), 64, jnp.float64 if wide else jnp.float32)
        start = jax.jit(lambda x: invert.fixed_point(table, d, x))(x)
        back = solver.run(table, d, start)
        assert float(jnp.max(jnp.abs(back - x))) < bound
        assert float(jnp.std(start)) > 0.5  # noise, not the data itself


def test_fixed_point_undoes_a_guided_run():
    with jax.enable_x64(True):
        labels = jnp.arange(16) % 2
        guided = guidance.cfg(exact.denoiser(WORLD, LINEAR), 1.5, cond=labels, null=-1)
        table, start = solver.ddim(LINEAR, ABOVE), jax.random.normal(jax.random.key(0), (16, 2), jnp.float64)
        there = solver.run(table, guided, start)
        found = jax.jit(lambda x: invert.fixed_point(table, guided, x))(there)
        np.testing.assert_allclose(found, start, rtol=0, atol=1e-9)


def test_ddim_inversion_returns_to_first_order():
    with jax.enable_x64(True):
        d = exact.denoiser(WORLD, VP)
        x = WORLD.sample(jax.random.key(0), 64, jnp.float64)
        errors = []
        for n in (64, 128):
            g = grid.uniform(VP, n, t_min=0.02)
            start = solver.run(invert.ddim_invert(VP, g, evaluate="current"), d, x)
            errors.append(float(jnp.sqrt(jnp.mean((solver.run(solver.ddim(VP, g), d, start) - x) ** 2))))
    assert 0.8 < np.log2(errors[0] / errors[1]) < 1.3


@pytest.mark.parametrize(
    "make",
    [
        solver.ancestral,
        lambda p, g: solver.ddim(p, g, eta=0.5),
        solver.dpm2_ancestral,  # stages without noise
        lambda p, g: solver.dpm_solver_pp_sde(p, g, method="singlestep"),  # and with
    ],
)
def test_encoded_noise_gives_the_sample_back(make):
    table = make(LINEAR, grid.uniform(LINEAR, 8))
    with jax.enable_x64(True):
        d = exact.denoiser(WORLD, LINEAR)
        x = WORLD.sample(jax.random.key(0), 32, jnp.float64)
        code = invert.encode_noise(table, d, x, jax.random.key(1))
        np.testing.assert_allclose(invert.decode_noise(table, d, code), x, rtol=0, atol=1e-12)
        assert float(jnp.max(jnp.abs(code.residual[:-1]))) < 1e-12  # only the noiseless last row leaves one
        assert float(jnp.max(jnp.abs(code.residual[-1]))) > 1e-3


@pytest.mark.parametrize("kind, wide", [(jnp.bfloat16, False), (jnp.float32, True)])
def test_narrow_samples_are_encoded_in_float32(kind, wide):
    table = solver.ddim(LINEAR, grid.uniform(LINEAR, 3), eta=0.5)
    with jax.enable_x64(wide):
        d = exact.denoiser(WORLD, LINEAR)
        x = WORLD.sample(jax.random.key(0), 8, kind)
        back = invert.decode_noise(table, d, invert.encode_noise(table, d, x, jax.random.key(1)))
        assert back.dtype == jnp.float32
        np.testing.assert_allclose(back, np.asarray(x, np.float32), rtol=0, atol=2e-6)


def test_encoded_noise_has_the_law_of_the_true_reverse_process():
    # Gaussian data of variance v: x_s - mean(x_t) = B (x0 - x0_hat) + C n, so E z^2 = 1 + (B/C)^2 Var(x0 | x_t)
    world = exact.Gaussian([0.3], 0.5)
    table = solver.ancestral(VP, grid.uniform(VP, 12, t_min=0.05))
    x0 = world.sample(jax.random.key(0), 8192)
    code = invert.encode_noise(table, exact.denoiser(world, VP), x0, jax.random.key(1))
    block = table.blocks
    alpha, sigma = block.alpha[:-1], block.sigma[:-1]
    expected = 1 + (block.B[:, 0] / block.C) ** 2 * 0.5 * sigma**2 / (alpha**2 * 0.5 + sigma**2)
    assert expected.max() > 1.2
    # five standard errors of a mean of 8192 squares
    np.testing.assert_allclose(np.mean(code.noise[..., 0] ** 2, 1), expected, rtol=5 * np.sqrt(2 / 8192))
    assert np.max(np.abs(np.mean(code.noise[..., 0], 1))) < 5 * np.sqrt(expected.max() / 8192)


def test_direct_inversion_reconstructs_bitwise_under_any_guidance():
    g = grid.uniform(VP, 12, t_min=0.01)
    d = exact.denoiser(WORLD, VP, cond=jnp.zeros(8, jnp.int32))
    x = WORLD.sample(jax.random.key(0), 8)
    _, told = solver.run(invert.ddim_invert(VP, g), d, x, record=("states",))
    trajectory = jnp.concatenate([told["states"][::-1], x[None]])
    labels = jnp.repeat(jnp.array([0, 1]), 8)
    guided = guidance.cfg(exact.denoiser(WORLD, VP), 4.0, cond=labels, null=-1)
    source, target = invert.direct(solver.ddim(VP, g), guided, trajectory)
    assert np.array_equal(source, x)
    alone = solver.run(solver.ddim(VP, g), guided.condition(labels[8:]), trajectory[0])
    np.testing.assert_allclose(target, alone, rtol=0, atol=1e-5)  # without attention sharing: plain DDIM
    assert float(jnp.max(jnp.abs(target - x))) > 0.1


def test_refusals():
    with pytest.raises(ValueError, match="history"):
        invert.fixed_point(solver.dpm_solver_pp(LINEAR, ABOVE), None, None)
    with pytest.raises(ValueError, match="alpha = 0"):
        invert.ddim_invert(LINEAR, grid.uniform(LINEAR, 4))
    with pytest.raises(ValueError, match="evaluate='next'"):
        invert.ddim_invert(VP, grid.uniform(VP, 4), evaluate="current")
    with pytest.raises(ValueError, match="draws noise"):
        invert.encode_noise(solver.ddim(LINEAR, ABOVE), None, jnp.zeros((2, 2)), jax.random.key(0))
    with pytest.raises(ValueError, match="trajectory: 3 states"):
        invert.direct(solver.ddim(LINEAR, ABOVE), None, jnp.zeros((3, 2, 2)))
