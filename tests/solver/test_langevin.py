"""The corrector leaves an exact marginal alone as its step vanishes, sample by sample."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, guidance, process, solver
from jaxdiff.prediction import Prediction
from jaxdiff.solver import grid, langevin

VE = process.edm()
WORLD = exact.Gaussian(np.zeros(64), 0.5)


def test_variance_bias_is_of_second_order_in_the_step():
    v, bias = 0.7, []
    for e in (0.02, 0.01, 0.005):
        step = lambda y, z, e=e: langevin.langevin_step(y, -y / v, z, step=np.float32(e))
        one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
        gain, noise = float(step(one, zero)[0, 0]), float(step(zero, one)[0, 0])
        bias.append(gain**2 * v + noise**2 - v)
    np.testing.assert_allclose(bias, [e * e / v for e in (0.02, 0.01, 0.005)], rtol=2e-2)


def test_corrects_a_wrong_marginal_and_samples_do_not_meet():
    p, d = VE, exact.denoiser(WORLD, VE)
    table = solver.ddim(p, grid.edm_rho(p, 8))
    hook = langevin.corrector(table, d, snr=0.1, count=3)
    x = 40.0 * jax.random.normal(jax.random.key(0), (64, 64))  # half the scale it should have
    run = jax.jit(lambda x, hook: solver.run(table, d, x, jax.random.key(1), hooks=hook))
    spread = lambda x: float(jnp.var(x))
    plain, helped = spread(run(x, None)), spread(run(x, hook))
    assert abs(helped - 0.5) < abs(plain - 0.5)
    np.testing.assert_allclose(run(x, hook)[:4], run(x[:4], hook), rtol=1e-5, atol=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stateful:
    """Carries one number a sample."""

    def start(self, x):
        return jnp.zeros(x.shape[0])

    def step(self, state, x, query):
        return Prediction(x, x), state


def test_guided_denoisers_correct_and_stateful_ones_are_refused():
    table, plain = solver.ddim(VE, grid.edm_rho(VE, 4)), exact.denoiser(WORLD, VE)
    guided = guidance.linear_mix((plain, plain), (0.4, 0.6))
    x = 80.0 * jax.random.normal(jax.random.key(0), (2, 64))
    go = jax.jit(lambda d: solver.run(table, d, x, jax.random.key(1), hooks=langevin.corrector(table, d)))
    np.testing.assert_allclose(go(guided), go(plain), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="d: stateful; a Langevin corrector"):
        solver.run(table, plain, x, jax.random.key(1), hooks=langevin.corrector(table, Stateful()))


def test_refusals():
    table = solver.ddim(VE, grid.edm_rho(VE, 4))
    with pytest.raises(ValueError, match="exactly one"):
        langevin.langevin_step(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="snr, count"):
        langevin.corrector(table, exact.denoiser(WORLD, VE), snr=0)
