"""Keys of single samples are jax's own fold_in, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.solver.streams import fold_each


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5])
def test_equals_fold_in(seed):
    key = jax.random.fold_in(jax.random.key(seed), 7)
    index = jnp.asarray([0, 1, 2, 17, 2**16, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)
    ours, theirs = fold_each(key, index), jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    np.testing.assert_array_equal(jax.random.key_data(ours), jax.random.key_data(theirs))
    assert ours.dtype == key.dtype
