"""Time densities against their distribution functions; stratified draws against integer arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from jaxdiff import objective, process
from jaxdiff.objective.time import TIMES, cosmap, discrete, iid, log_normal, logit_normal, mode, stratified, uniform

U = (np.arange(200) + 0.5) / 200


def at(density, path=None):
    return np.asarray(density(jnp.asarray(U, jnp.float32), path), np.float64)


def test_densities_invert_their_distribution_functions():
    np.testing.assert_allclose(at(uniform()), U, atol=1e-7)
    t = at(logit_normal(0.4, 1.3))
    np.testing.assert_allclose(scipy.stats.norm.cdf(np.log(t / (1 - t)), 0.4, 1.3), U, atol=2e-6)
    for path in (process.edm(), process.linear(), process.vp(), process.cosine(0.008), process.ddpm()):
        t = at(log_normal(-0.3, 0.9), path)
        np.testing.assert_allclose(scipy.stats.norm.cdf(-path.half_log_snr(t), -0.3, 0.9), U, atol=2e-4)
    t = at(cosmap())
    np.testing.assert_allclose(process.linear().half_log_snr(t), process.trig().half_log_snr(U), atol=2e-5)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_follows_the_published_map(scale):
    published = lambda v: 1 - v - scale * (np.cos(np.pi / 2 * v) ** 2 - 1 + v)
    t = at(mode(scale))
    assert np.all(np.diff(t) >= 0)
    back = [scipy.optimize.brentq(lambda v, s=s: published(v) - s, 0, 1) for s in t[20:180:20]]
    np.testing.assert_allclose(1 - np.array(back), U[20:180:20], atol=2e-3 if scale in (-1.0, 1.75) else 2e-6)


def test_discrete_visits_every_index_equally():
    u = (jnp.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(np.asarray(discrete(10)(u, None)), np.repeat(np.arange(1, 11), 100) / 10, rtol=1e-6)


def test_golden_sequence_is_exact_at_any_index():
    """The same as integer arithmetic, also where float32 or int32 would have lost every digit."""
    index = np.array([0, 1, 2, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    u = stratified(7, index, seed=3)
    shift = int(jax.random.bits(jax.random.fold_in(jax.random.key(3), 7), dtype=jnp.uint32))
    exact = [((((shift + int(i) * 2654435769) % 2**32) >> 9) + 0.5) / 2**23 for i in index]
    np.testing.assert_array_equal(np.asarray(u, np.float64), exact)
    assert 0 < float(jnp.min(u)) and float(jnp.max(u)) < 1


def discrepancy(u):
    return scipy.stats.kstest(np.asarray(u, np.float64), "uniform").statistic


def test_every_window_is_equidistributed_and_every_draw_uniform():
    for step, first in ((0, 0), (11, 2**20 + 5), (900_000, 2**32 - 30)):
        index = (first + np.arange(64)) % 2**32
        assert discrepancy(stratified(step, index.astype(np.uint32))) < 2.5 / 64
    # negative control: independent numbers are as far from uniform as 64 draws usually are
    assert discrepancy(iid(jax.random.split(jax.random.key(0), 64))) > 2.5 / 64
    across = jax.vmap(lambda step: stratified(step, jnp.array([5, 6], jnp.uint32)))(jnp.arange(3000))
    assert scipy.stats.kstest(np.asarray(across[:, 0], np.float64), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(np.asarray(iid(jax.random.split(jax.random.key(1), 3000))), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: logit_normal(std=0), "std: 0 given"),
        (lambda: log_normal(std=-1), "std: -1 given"),
        (lambda: mode(3), "scale: 3 given"),
        (lambda: discrete(0), "steps: 0 given"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tables_list_what_exists():
    assert set(TIMES) == {"uniform", "logit_normal", "log_normal", "mode", "cosmap", "discrete"}
    assert objective.TIMES is TIMES
