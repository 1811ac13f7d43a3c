"""Noise laws: densities that integrate to one, quantiles against scipy, and per-example draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff import process


@pytest.mark.parametrize("law,reference", [(process.Gaussian(), stats.norm()), (process.student_t(3), stats.t(3))])
def test_density_in_one_dimension(law, reference):
    z = np.linspace(-8, 8, 33)
    with jax.enable_x64(True):
        np.testing.assert_allclose(law.log_prob(jnp.asarray(z)[:, None]), reference.logpdf(z), rtol=1e-11)
        grid = jnp.linspace(-0.9999, 0.9999, 20001)  # z = u/(1-u^2) covers the line
        jacobian = (1 + grid**2) / (1 - grid**2) ** 2
        density = jnp.exp(law.log_prob((grid / (1 - grid**2))[:, None])) * jacobian
        np.testing.assert_allclose(np.trapezoid(density, grid), 1, atol=1e-6)


@pytest.mark.parametrize("df", [1.0, 4.0, 64.0])
def test_student_t_in_many_dimensions(df):
    """log_prob is scipy's; |n|^2/d follows F(d, df), by Kolmogorov-Smirnov at 1e-4; directions are isotropic."""
    d, n, law = 6, 4000, process.student_t(df)
    z = np.random.default_rng(0).normal(size=(5, 2, 3))
    with jax.enable_x64(True):
        expected = stats.multivariate_t(shape=np.eye(d), df=df).logpdf(z.reshape(5, d))
        np.testing.assert_allclose(law.log_prob(jnp.asarray(z)), expected, rtol=1e-10)
    draws = jax.vmap(lambda k: law.sample(k, (2, 3)))(jax.random.split(jax.random.key(0), n))
    assert draws.shape == (n, 2, 3) and draws.dtype == jnp.float32
    flat = np.asarray(draws, np.float64).reshape(n, d)
    square = (flat**2).sum(1)
    assert stats.kstest(square / d, stats.f(d, df).cdf).pvalue > 1e-4
    assert stats.kstest(square / (square + df), stats.beta(d / 2, df / 2).cdf).pvalue > 1e-4
    # the first coordinate squared over the whole is Beta(1/2, (d-1)/2) for any isotropic law
    assert stats.kstest(flat[:, 0] ** 2 / square, stats.beta(0.5, (d - 1) / 2).cdf).pvalue > 1e-4
    # negative control: the same test refuses the Gaussian as a heavy-tailed law
    if df < 10:
        normal = np.random.default_rng(1).normal(size=(n, d))
        assert stats.kstest((normal**2).sum(1) / d, stats.f(d, df).cdf).pvalue < 1e-4


def test_one_scale_an_example():
    """One chi-square scales a whole example, so its coordinates' magnitudes are dependent."""
    draws = jax.vmap(lambda k: process.student_t(3).sample(k, (2,)))(jax.random.split(jax.random.key(1), 4000))
    a, b = np.log(np.abs(np.asarray(draws))).T
    correlation = stats.spearmanr(a, b)
    assert correlation.pvalue < 1e-6 and correlation.statistic > 0.1


@pytest.mark.parametrize("law", [process.Gaussian(), process.student_t(3)], ids=["gaussian", "student_t"])
def test_keys_draw_one_example_each(law):
    keys = jax.random.split(jax.random.key(2), 5)
    batch = law.sample(keys, (2, 3))
    np.testing.assert_array_equal(batch, jnp.stack([law.sample(key, (2, 3)) for key in keys]))
    assert batch.shape == (5, 2, 3) and law.log_prob(batch).shape == (5,)


def test_laws_on_a_process():
    p = process.edm(noise=process.student_t(8))
    assert not p.noise.gaussian and p.prior.log_prob(jnp.zeros((2, 3))).shape == (2,)
    assert process.vp().noise.gaussian
    assert {k: v.__name__ for k, v in process.LAWS.items()} == {"gaussian": "Gaussian", "student_t": "student_t"}
    dfs = jnp.array([1.0, 5.0])
    mapped = jax.vmap(lambda df: process.student_t(df).log_prob(jnp.ones((1, 2))))(dfs)
    np.testing.assert_allclose(mapped[1], process.student_t(5).log_prob(jnp.ones((1, 2))), rtol=1e-5)
    assert process.Gaussian().sample(jax.random.key(0), (2,), jnp.bfloat16).dtype == jnp.bfloat16
