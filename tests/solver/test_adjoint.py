"""The checkpointed gradient is the plain one, and stores far fewer values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import PROCESSES

from jaxdiff import exact, solver
from jaxdiff.solver import adjoint, grid

LINEAR = PROCESSES["linear"]
MIXTURE = exact.GaussianMixture([0.3, 0.7], [[-1.5], [1.0]], [[[0.05]], [[0.1]]])


def stored(f, x):
    """Bytes that the forward pass keeps for the backward one."""
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(f, x)[1], x))
    return sum(v.size * v.dtype.itemsize for v in kept)


@pytest.mark.parametrize("make", [solver.dpm_solver_pp, solver.ancestral])
def test_gradient_is_that_of_run(make):
    table, key = make(LINEAR, grid.uniform(LINEAR, 11)), jax.random.key(0)
    with jax.enable_x64(True):
        x = jnp.linspace(-2, 2, 5)[:, None]
        loss = lambda f: lambda x, p: jnp.sum(jnp.sin(f(table, exact.denoiser(p, LINEAR), x, key)))
        plain = jax.jit(jax.value_and_grad(loss(solver.run), (0, 1)))(x, MIXTURE)
        spared = jax.jit(jax.value_and_grad(loss(adjoint.checkpointed), (0, 1)))(x, MIXTURE)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(spared)):
            np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-13)
        assert max(float(jnp.max(jnp.abs(v))) for v in jax.tree.leaves(plain[1])) > 1e-3


def test_stores_the_root_of_the_rows():
    d, x = exact.denoiser(MIXTURE, LINEAR), jnp.zeros((1024, 1))
    states = lambda f, n: stored(lambda x: f(solver.ddim(LINEAR, grid.uniform(LINEAR, n)), d, x), x) / x.nbytes
    plain, few, many = states(solver.run, 64), states(adjoint.checkpointed, 64), states(adjoint.checkpointed, 256)
    assert plain > 64 and few < 2 * 8 + 4 and many < 2 * 16 + 4
    assert many > few


def test_refusals():
    table = solver.ddim(LINEAR, grid.uniform(LINEAR, 4))
    with pytest.raises(ValueError, match="segments: 5"):
        adjoint.checkpointed(table, exact.denoiser(MIXTURE, LINEAR), jnp.zeros((1, 1)), segments=5)
