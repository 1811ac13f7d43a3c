"""Chains that end in pure noise (alpha_T = 0): every maker on the published rescaling of Stable Diffusion's betas."""

import dataclasses

import deterministic_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import solver_cases
import stochastic_cases
from solver_cases import rms

from jaxdiff import exact, prediction, process, solver
from jaxdiff.solver import grid

MAKERS = {**solver_cases.SOLVERS, **deterministic_cases.ALL, **stochastic_cases.ALL}
CHAIN = process.ddpm(schedule="scaled_linear", zero_terminal_snr=True)
WORLD = exact.GaussianMixture([0.5, 0.5], [-0.6, 0.7], [0.4, 0.3])


@jax.jit
def ends(tables, d, x, noise):
    hook = solver.hooks(noise=lambda keys, row, y: noise[row.k])
    return jax.vmap(lambda table: solver.run(table, d, x, jax.random.key(0), hooks=hook))(tables)


@pytest.mark.slow
def test_every_solver_starts_at_pure_noise():
    """Float32 follows float64 from the prior itself, on the trailing indices the rescaling is meant for."""
    points = grid.discrete(CHAIN, 20)
    assert points.alpha[0] == 0 and points.sigma[0] == 1
    many = solver.stack([make(CHAIN, points) for make in MAKERS.values()])
    many = dataclasses.replace(many, blocks=dataclasses.replace(many.blocks, start_noise=None, start_gain=None))
    x = np.random.default_rng(7).normal(size=(64, 1)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=(many.rows, 64, 1)).astype(np.float32)
    low = np.asarray(ends(many, exact.denoiser(WORLD, CHAIN), jnp.asarray(x), jnp.asarray(noise)))
    with jax.enable_x64(True):
        wide = (jnp.asarray(v, jnp.float64) for v in (x, noise))
        high = np.asarray(ends(many, exact.denoiser(WORLD, CHAIN), *wide))
    errors = {name: rms(a, b) for name, a, b in zip(MAKERS, low, high)}
    assert not {n: e for n, e in errors.items() if not e < 2e-5}


def test_log_snr_grids_start_at_the_last_index_with_a_finite_one_and_then_move_to_pure_noise():
    points = grid.logsnr(CHAIN, 8)
    lam = np.log(points.alpha[1:-1] / points.sigma[1:-1])
    assert points.time[0] == 1 and points.alpha[0] == 0 and np.all(np.diff(points.time) < 0)
    np.testing.assert_allclose(np.diff(lam), lam[1] - lam[0], rtol=1e-9)
    np.testing.assert_allclose(2 * lam[0] - lam[1], CHAIN.half_log_snr(0.999), rtol=1e-9)


def test_follows_the_exact_map_from_pure_noise_and_refuses_what_it_cannot_identify():
    world = exact.Gaussian(0.4, 0.3)
    d, flow = exact.denoiser(world, CHAIN), exact.gaussian_flow(world, CHAIN)
    # down to index 100, as the last step to data is of first order for all
    lam = CHAIN.half_log_snr(np.array([0.999, 0.1]))
    times = np.append(1.0, CHAIN.time(np.linspace(*lam, 250)))
    end = CHAIN.coefficients(0.1)
    # measured: euler 4.5e-3, ddim 7.6e-3, heun 1.1e-4, dpm_solver_pp 3.6e-5, unipc 1.6e-4, deis 1.2e-5
    bounds = {"euler": 7e-3, "ddim": 1.2e-2, "heun": 2e-4, "dpm_solver_pp": 6e-5, "unipc": 3e-4, "deis": 2e-5}
    tables = solver.stack([getattr(solver, name)(CHAIN, times) for name in bounds])
    with jax.enable_x64(True):
        x = jnp.linspace(-2.0, 2.0, 9)[:, None]
        found = jax.jit(jax.vmap(lambda table: solver.run(table, d, x)))(tables)
        errors = np.abs(found - flow.between(x, 0.0, 1.0, end.alpha, end.sigma)).max((1, 2))
    assert np.all(errors < list(bounds.values())), errors
    for target in ("data", "vpred"):
        prediction.denoiser(CHAIN, lambda p, x, t, c: x, target=target)
    with pytest.raises(ValueError, match="t_max"):
        prediction.denoiser(CHAIN, lambda p, x, t, c: x, target="noise")
