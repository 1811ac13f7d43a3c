"""A sample's numbers are a row of one enormous draw of jax.random, whatever batch asks for them."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff.solver import sample_keys, streams

KEY = jax.random.key(11)


def normals(key, index, shape=(8,)):
    return jax.vmap(lambda k: jax.random.normal(k, shape))(sample_keys(key, jnp.asarray(index, jnp.uint32)))


def hashed(key, position, low):
    words = jax.random.key_data(key)
    return np.asarray(jax.extend.random.threefry_2x32(words, jnp.array([position, low], jnp.uint32)))


def test_sample_0_holds_the_first_numbers_of_a_plain_draw():
    with jax.threefry_partitionable(True):
        np.testing.assert_array_equal(normals(KEY, [0])[0], jax.random.normal(KEY, (8,)))
        np.testing.assert_array_equal(
            jax.random.bits(sample_keys(KEY, jnp.arange(1))[0], (5,), jnp.uint16),
            jax.random.bits(KEY, (5,), jnp.uint16),
        )
        with jax.enable_x64(True):
            ours = jax.random.bits(sample_keys(KEY, jnp.arange(1))[0], (5,), jnp.uint64)
            np.testing.assert_array_equal(ours, jax.random.bits(KEY, (5,), jnp.uint64))


def test_sample_i_owns_the_counters_i_0_i_1_and_on():
    bits = jax.vmap(lambda k: jax.random.bits(k, (2, 2)))(sample_keys(KEY, jnp.array([5, 2**32 - 2], jnp.uint32)))
    for i, position in enumerate((5, 2**32 - 2)):
        for j in range(4):
            high, low = hashed(KEY, position, j)
            assert int(bits[i].reshape(-1)[j]) == int(high ^ low)


def test_old_and_new_lowering_of_random_bits_do_not_matter():
    with jax.threefry_partitionable(False):
        old = normals(KEY, [3, 4])
    np.testing.assert_array_equal(old, normals(KEY, [3, 4]))


def test_row_keys_come_from_the_position_no_sample_takes():
    keys = jax.random.key_data(streams.row_keys(KEY, 3))
    high, low = hashed(KEY, 2**32 - 1, 0)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(keys, [[high, low + np.uint32(k)] for k in range(3)])
    churn = jax.random.key_data(streams.churn_key(KEY))
    np.testing.assert_array_equal(churn, hashed(KEY, 2**32 - 1, 2**32 - 1))


def test_derived_keys_differ_and_survive_vmap():
    keys = sample_keys(KEY, jnp.arange(4))
    folded = jax.vmap(jax.random.fold_in, (None, 0))(keys[1], jnp.arange(3))
    for i in range(3):
        np.testing.assert_array_equal(
            jax.random.key_data(folded[i]), jax.random.key_data(jax.random.fold_in(keys[1], i))
        )
    halves = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
    words = {tuple(map(int, w)) for w in np.asarray(jax.random.key_data(halves)).reshape(-1, 3)}
    assert len(words) == 8


def test_streams_are_normal_and_uncorrelated():
    """1,024 samples of 64 numbers: law, and correlation between neighbours in sample, element and row."""
    rows = streams.row_keys(KEY, 2)
    start, first, second = (np.asarray(normals(k, np.arange(1024), (64,)), np.float64) for k in (KEY, *rows))
    size = start.size
    for z in (start, first, second):
        assert stats.kstest(z.ravel(), "norm").pvalue > 1e-4
        assert stats.kstest((z**2).sum(1), stats.chi2(64).cdf).pvalue > 1e-4
        for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1])):
            assert abs(np.mean(a * b)) < 4.5 / np.sqrt(a.size)
    for a, b in ((start, first), (first, second), (start[1:], first[:-1])):
        assert abs(np.mean(a * b)) < 4.5 / np.sqrt(size - 64)


def test_bits_of_neighbouring_rows_agree_as_often_as_coins():
    """Keys that differ by one (or by 2, 4, ...) must share nothing: 64 rows, 256 numbers each, every pair of rows."""
    rows = streams.row_keys(KEY, 64)
    bits = jax.vmap(lambda k: jax.random.bits(sample_keys(k, jnp.arange(1))[0], (256,)))(rows)
    coins = np.unpackbits(np.asarray(bits).view(np.uint8), axis=1).astype(np.float64) * 2 - 1
    for lag in (1, 2, 4, 8, 16, 32):
        agree = (coins[lag:] * coins[:-lag]).sum(1) / np.sqrt(coins.shape[1])
        assert np.abs(agree).max() < 5 and abs(agree.mean()) < 5 / np.sqrt(len(agree))


@pytest.mark.parametrize("key", [0, jax.random.PRNGKey(0), jax.random.key(0, impl="rbg"), jax.random.split(KEY, 2)])
def test_other_keys_are_refused(key):
    with pytest.raises(ValueError, match=r"key: .* given; need one typed threefry key"):
        streams.check_key(key)
