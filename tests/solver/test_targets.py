"""Every process with every target it allows samples what the exact denoiser samples.

The "network" is the target itself, computed from the closed-form posterior: what a perfectly trained network of that
target would output. Then one sampler must return one answer whatever the target.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import PROCESSES

from jaxdiff import exact, prediction, solver

WORLD = exact.GaussianMixture(
    np.array([0.4, 0.6]), np.array([[-1.0, 0.5], [0.8, -0.3]]), np.stack([0.1 * np.eye(2), [[0.2, 0.1], [0.1, 0.3]]])
)


def perfect(process, target):
    """An apply function whose output is the exact target at the state it is shown."""

    def apply(params, x_in, c_noise, cond):
        t = (c_noise + 1) / process.path.steps if process.name == "ddpm" else c_noise
        c = process.coefficients(t)
        x = x_in * jnp.sqrt(c.sigma**2 + c.alpha**2 * 0.25) if target == "edm" else x_in
        known = WORLD.predict(x, c.alpha, c.sigma)
        return prediction.target_of(target, c, known.data, known.noise)

    return apply


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_targets_agree(name):
    process = PROCESSES[name]
    grid = solver.grid.logsnr(process, 12)
    ends_blind = float(process.coefficients(process.t_max).alpha) == 0
    targets = [t for t in prediction.TARGETS if not (ends_blind and t in ("noise", "score"))]
    if ends_blind:
        with pytest.raises(ValueError, match="t_max"):
            prediction.denoiser(process, perfect(process, "noise"), target="noise")
    denoisers = [
        prediction.denoiser(process, perfect(process, t), target=t, clock="time", sigma_data=0.5) for t in targets
    ]
    table = solver.dpm_solver_pp(process, grid)
    x1 = float(table.blocks.start_scale) * jax.random.normal(jax.random.key(1), (64, 2))
    truth = exact.denoiser(WORLD, process)
    results = jax.jit(lambda x: [solver.run(table, d, x) for d in (truth, *denoisers)])(x1)
    base = np.asarray(results[0])
    scale = np.sqrt(np.mean(base**2))
    assert 0.5 < scale < 2
    for target, result in zip(targets, results[1:]):
        error = np.sqrt(np.mean((np.asarray(result) - base) ** 2)) / scale
        assert error < 1e-4, (name, target, error)


def all_finite(name, lengths):
    """A few solvers of every kind at many lengths, in float32, one stack and one program for each path."""
    process = PROCESSES[name]
    makers = [solver.ddim, solver.ancestral, solver.edm, solver.dpm_solver_pp, solver.unipc, solver.dpm_solver_pp_sde]
    tables = [make(process, solver.grid.logsnr(process, n)) for make in makers for n in lengths]
    ends_blind = float(process.coefficients(process.t_max).alpha) == 0
    targets = [t for t in prediction.TARGETS if not (ends_blind and t in ("noise", "score"))]
    denoisers = [
        prediction.denoiser(process, perfect(process, t), target=t, clock="time", sigma_data=0.5) for t in targets
    ]
    x = float(tables[0].blocks.start_scale) * jax.random.normal(jax.random.key(1), (16, 2))
    run = lambda table, d: solver.run(table, d, x, jax.random.key(0))
    many = jax.jit(lambda tables, ds: [jax.vmap(run, (0, None))(tables, d) for d in ds])
    truth, *results = map(np.asarray, many(solver.stack(tables), [exact.denoiser(WORLD, process), *denoisers]))
    for target, out in zip(targets, results):
        assert out.dtype == np.float32 and np.all(np.isfinite(out)), (name, target)
        error = np.sqrt(np.mean((out - truth) ** 2, (1, 2)) / np.mean(truth**2, (1, 2)))
        assert error.max() < 1e-3, (name, target, error.max(), np.argmax(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_every_target_is_finite_for_every_length_to_200(name):
    for low, high in ((1, 31), (31, 101), (101, 201)):
        all_finite(name, range(low, high))


@pytest.mark.parametrize("name", ["linear", "vp", "edm"])
def test_every_target_is_finite(name):
    all_finite(name, (1, 2, 3, 7, 20))
