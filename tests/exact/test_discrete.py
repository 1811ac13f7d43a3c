"""The listed law of tokens: posteriors against brute force, and worlds of several parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import discrete, exact, process

PROBS = np.random.default_rng(0).dirichlet(np.ones(27) / 2).reshape(3, 3, 3)


def posterior(x):
    """``mu`` (L, V) at one state by going through every sequence."""
    mu = np.zeros((3, 3))
    for s in itertools.product(range(3), repeat=3):
        if all(shown in (token, 3) for shown, token in zip(x, s)):
            for d, token in enumerate(s):
                mu[d, token] += PROBS[s]
    return mu / mu.sum(-1, keepdims=True)


def test_posteriors_are_those_of_brute_force():
    world = exact.enumerable(5 * PROBS)
    states = np.array(list(itertools.product(range(4), repeat=3)))
    wanted = np.array([posterior(x) for x in states])
    np.testing.assert_allclose(np.exp(world.predict(states).log_probs), wanted, rtol=0, atol=1e-14)
    traced = jax.jit(world.predict)(jnp.asarray(states)).log_probs
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(traced), wanted, rtol=0, atol=1e-6)
    revealed = states[:, 0] < 3  # and a token that is shown is certain, not only nearly
    np.testing.assert_array_equal(traced[revealed, 0], world.predict(states).log_probs[revealed, 0])


def test_impossible_states_are_uniform():
    sparse = np.zeros((2, 2))
    sparse[0, 1] = 1.0
    mu = np.exp(exact.enumerable(sparse).predict(np.array([[1, 2], [2, 1], [2, 2]])).log_probs)
    np.testing.assert_allclose(mu, [[[0, 1], [0.5, 0.5]], [[1, 0], [0, 1]], [[1, 0], [0, 1]]])


def test_parts_are_predicted_each_by_its_own_world():
    image, label = exact.GaussianMixture([0.4, 0.6], [-1.0, 0.8], [0.2, 0.1]), exact.enumerable(PROBS)
    path = process.per_leaf({"image": process.linear(), "label": discrete.masked(3)})
    d = exact.denoiser(exact.Independent({"image": image, "label": label}), path)
    x = {"image": jnp.array([[0.3], [-2.0]]), "label": jnp.array([[0, 3, 3], [3, 3, 3]])}
    got = d(x, 0.6)
    np.testing.assert_array_equal(got["image"].data, image.predict(x["image"], 0.4, 0.6).data)
    np.testing.assert_array_equal(got["label"].log_probs, label.predict(x["label"]).log_probs)


def test_parts_of_one_law_make_a_denoiser():
    path = process.linear()
    one, two = exact.Gaussian([0.5], 0.2), exact.Gaussian([-1.0], 0.6)
    d = exact.denoiser(exact.Independent({"a": one, "b": two}), process.per_leaf({"a": path, "b": path}))
    x = {"a": np.full((2, 1), 0.3, np.float32), "b": np.full((2, 1), -0.4, np.float32)}
    told = d(x, 0.25)
    for name, world in {"a": one, "b": two}.items():
        np.testing.assert_array_equal(told[name].data, world.predict(x[name], 0.75, 0.25).data)


def test_worlds_and_processes_of_other_laws_are_refused():
    tokens = exact.enumerable(PROBS)
    cases = {
        "process: noise law 'gaussian' given; exact worlds need 'mask'": lambda: exact.denoiser(
            tokens, process.linear()
        ),
        "process: noise law 'mask' given; exact worlds need 'gaussian'": lambda: exact.denoiser(
            exact.Gaussian(0.0, 1.0), discrete.masked(3)
        ),
        "probs: shape (2, 3) given": lambda: exact.enumerable(np.ones((2, 3))),
        "probs: shape (7, 7, 7, 7, 7) given": lambda: exact.enumerable(np.ones((7,) * 5)),
        "probs: need finite numbers >= 0": lambda: exact.enumerable([0.5, -0.1]),
    }
    for message, build in cases.items():
        with pytest.raises(ValueError) as error:
            build()
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
