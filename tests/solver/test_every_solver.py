"""Every maker with its options in one stack: float32 execution follows float64 on every kind of path."""

import dataclasses
import functools

import deterministic_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import solver_cases
import stochastic_cases
from solver_cases import PATHS, PROCESSES, rms

from jaxdiff import exact, solver
from jaxdiff.solver import grid
from jaxdiff.solver.tape import Tape

MAKERS = {**solver_cases.SOLVERS, **deterministic_cases.ALL, **stochastic_cases.ALL}
WORLD = exact.GaussianMixture([0.5, 0.5], [-0.6, 0.7], [0.4, 0.3])


@jax.jit
def ends(tables, d, x, noise):
    hook = solver.hooks(noise=lambda keys, row, y: noise[row.k])
    return jax.vmap(lambda table: solver.run(table, d, x, jax.random.key(0), hooks=hook))(tables)


@pytest.mark.parametrize(
    "path", [p if p in ("linear", "vp") else pytest.param(p, marks=pytest.mark.slow) for p in PATHS]
)
def test_float32_follows_float64(path):
    """Relative RMS over 64 samples, with the same start and draws, on full grids of 12 steps."""
    p = PROCESSES[path]
    many = solver.stack([make(p, grid.logsnr(p, 12)) for make in MAKERS.values()])
    many = dataclasses.replace(many, blocks=dataclasses.replace(many.blocks, start_noise=None, start_gain=None))
    x = np.random.default_rng(7).normal(size=(64, 1)).astype(np.float32) * np.float32(many.blocks.start_scale[0])
    noise = np.random.default_rng(1).normal(size=(many.rows, 64, 1)).astype(np.float32)
    low = np.asarray(ends(many, exact.denoiser(WORLD, p), jnp.asarray(x), jnp.asarray(noise)))
    with jax.enable_x64(True):
        wide = (jnp.asarray(v, jnp.float64) for v in (x, noise))
        high = np.asarray(ends(many, exact.denoiser(WORLD, p), *wide))
    assert low.dtype == np.float32 and high.dtype == np.float64
    errors = {name: rms(a, b) for name, a, b in zip(MAKERS, low, high)}
    assert len(errors) > 130
    assert not {n: e for n, e in errors.items() if not e < 2e-5}


@pytest.mark.parametrize("name", ["deis_t", "deis_t_4", "velocity_ab_4", "dpm_solver"])
def test_what_a_row_keeps_does_not_change_the_solver(name, monkeypatch):
    """Where weights are large, rows keep x0_hat for eps_hat; every state is the same combination of predictions."""
    make = {**MAKERS, "deis_t_4": functools.partial(solver.deis, order=4)}[name]
    for path in ("linear", "cosine", "subvp"):
        p = PROCESSES[path]
        inferred = make(p, grid.logsnr(p, 12))
        with monkeypatch.context() as patch:
            patch.setattr(Tape, "infer", Tape.evaluate)
            kept = make(p, grid.logsnr(p, 12))
        one, two = solver.unroll(inferred, rows=True), solver.unroll(kept, rows=True)
        np.testing.assert_allclose(one.W, two.W, rtol=0, atol=1e-12 * np.max(np.abs(two.W)))
        np.testing.assert_allclose(one.a, two.a, rtol=0, atol=1e-12)
        if path == "linear":
            assert np.count_nonzero(inferred.blocks.q) < np.count_nonzero(kept.blocks.q)
