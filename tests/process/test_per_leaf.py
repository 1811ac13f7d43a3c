"""A process for each leaf: every answer is the tree of its parts' answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import discrete, process

PARTS = {"image": process.vp(), "label": discrete.masked(5, "cosine")}
X0 = {"image": jnp.arange(12.0).reshape(4, 3), "label": jnp.arange(20).reshape(4, 5) % 5}


def test_leaves_are_corrupted_by_their_own_process():
    joint = process.per_leaf(PARTS)
    keys = jax.random.split(jax.random.key(0), 4)
    shape, dtype = (jax.tree.map(lambda v, name=name: getattr(v[0], name), X0) for name in ("shape", "dtype"))
    n = jax.vmap(lambda key: joint.noise.sample(key, shape, dtype))(keys)
    for i, name in enumerate(("image", "label")):
        one = lambda key, i=i, name=name: PARTS[name].noise.sample(
            jax.random.fold_in(key, i), shape[name], dtype[name]
        )
        np.testing.assert_array_equal(n[name], jax.vmap(one)(keys))
    for t in (0.3, jnp.array([0.0, 0.3, 0.7, 1.0])):
        c, x = joint.coefficients(t), joint.corrupt(X0, n, t)
        for name, part in PARTS.items():
            np.testing.assert_array_equal(x[name], part.corrupt(X0[name], n[name], t))
            for field in ("alpha", "sigma", "da", "ds", "pace"):
                np.testing.assert_array_equal(getattr(c, field)[name], getattr(part.coefficients(t), field))
    assert joint.noise.name == joint.prior.name == {"image": "gaussian", "label": "mask"} and not joint.noise.gaussian
    start = joint.prior.sample(keys[0], shape, dtype)
    assert start["label"].dtype == jnp.int32 and np.all(start["label"] == 5)
    assert joint.name == {"image": "vp", "label": "masked"}


def test_a_tree_of_processes_shares_its_end():
    cases = {
        "parts: t_max 0.9, 1.0 given": {"a": process.linear(t_max=0.9), "b": process.vp()},
        "parts: {} given": {},
        "parts: {'a': 3} given": {"a": 3},
    }
    for message, parts in cases.items():
        with pytest.raises(ValueError) as error:
            process.per_leaf(parts)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
