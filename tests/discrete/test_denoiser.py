"""Logits as a denoiser of tokens: with the exact posterior's logits it is the exact denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import discrete, exact, process, solver
from jaxdiff.solver import grid

MASKED = discrete.masked(3)
WORLD = exact.enumerable(np.random.default_rng(0).dirichlet(np.ones(27) / 2).reshape(3, 3, 3))
KEY = jax.random.key(3)


def network(params, x, t, cond):
    """The exact log mu plus what softmax does not see, and nonsense where tokens are shown."""
    logits = WORLD.predict(x).log_probs + params * jnp.sum(x, -1)[:, None, None] + t
    return jnp.where((x == 3)[..., None], logits, 7.0 * jnp.arange(3)) + (0 if cond is None else cond)


def test_logits_of_the_posterior_sample_as_the_posterior():
    d, truth = discrete.denoiser(MASKED, network, jnp.float32(2.5)), exact.denoiser(WORLD, MASKED)
    x = jnp.array([[0, 3, 3], [3, 3, 3], [1, 2, 0]])
    got, wanted = d(x, 0.5).log_probs, truth(x, 0.5).log_probs
    np.testing.assert_allclose(np.exp(got), np.exp(wanted), rtol=0, atol=1e-5)
    shown = np.asarray(x) < 3
    np.testing.assert_array_equal(got[shown], wanted[shown])
    table = discrete.ancestral(MASKED, grid.uniform(MASKED, 3), remask=0.5)
    np.testing.assert_array_equal(solver.sample(table, d, KEY, (32, 3)), solver.sample(table, truth, KEY, (32, 3)))
    # a condition reaches the network: here it forbids token 1
    none = solver.sample(table, d, KEY, (32, 3), cond=jnp.array([0.0, -jnp.inf, 0.0]))
    assert not np.any(none == 1) and np.any(none == 2)


def test_half_precision_logits_are_normalised_in_float32():
    logits = jax.random.normal(KEY, (4, 2, 3)).astype(jnp.bfloat16)
    d = discrete.denoiser(MASKED, lambda params, x, t, cond: logits)
    log_probs = d(jnp.full((4, 2), 3), 1.0).log_probs
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=0, atol=1e-6)


def test_bad_networks_are_one_line_errors():
    wide = discrete.denoiser(MASKED, lambda params, x, t, cond: jnp.zeros((*x.shape, 4)))
    cases = {
        "apply: the network gives shape (2, 3, 4) for tokens (2, 3); need (2, 3, 3)": lambda: wide(
            jnp.full((2, 3), 3), 1.0
        ),
        "process: 'linear' given; denoiser() needs a masked process": lambda: discrete.denoiser(
            process.linear(), network
        ),
    }
    for message, build in cases.items():
        with pytest.raises(ValueError) as error:
            build()
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
