"""Weightings: one number in every target, published closed forms, finite ends, the likelihood integral."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import prediction, process
from jaxdiff.objective import weighting as w
from jaxdiff.objective.time import density_at, log_normal, logit_normal, mode, uniform
from jaxdiff.process import PROCESSES

TARGETS = prediction.TARGETS
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", [n for n in w.WEIGHTINGS if n != "flat"])
@pytest.mark.parametrize("path", ["linear", "vp", "cosine", "edm", "ddpm"])
def test_every_target_gives_one_number(path, name):
    """Random wrong predictions at the same x: w_F |F - F_hat|^2 is the same for all six kinds of F."""
    with jax.enable_x64(True):
        t = jnp.array([0.05, 0.3, 0.6, 0.9])
        p = PROCESSES[path]()
        c = p.coefficients(t)
        x0, eps, wrong = (jnp.asarray(RNG.normal(size=(4, 3))) for _ in range(3))
        column = lambda v: v[:, None]
        x = column(c.alpha) * x0 + column(c.sigma) * eps
        wrong_data = (x - column(c.sigma) * wrong) / column(c.alpha)
        values = []
        for target in TARGETS:
            residual = prediction.target_of(target, c, x0, eps) - prediction.target_of(target, c, wrong_data, wrong)
            weight = w.target_weight(w.WEIGHTINGS[name](), target, c, density=jnp.float64(1.0))
            values.append(column(weight) * residual**2)
            factor = w.residual_factor(target, c)
            np.testing.assert_allclose(column(factor) * residual**2, (eps - wrong) ** 2, rtol=1e-8)
        for value in values[1:]:
            np.testing.assert_allclose(value, values[0], rtol=1e-8)


def test_published_closed_forms():
    with jax.enable_x64(True):
        t = jnp.linspace(0.02, 0.98, 49)
        vp, straight = process.vp().coefficients(t), process.linear().coefficients(t)
        snr = (vp.alpha / vp.sigma) ** 2
        five = w.min_snr(5)
        check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9)
        check(w.target_weight(five, "data", vp), jnp.minimum(snr, 5))
        check(w.target_weight(five, "noise", vp), jnp.minimum(1, 5 / snr))
        check(w.target_weight(five, "vpred", vp), jnp.minimum(snr, 5) / (snr + 1))
        check(w.target_weight(five, "velocity", straight), t**2 * jnp.minimum((1 / t - 1) ** 2, 5))
        check(w.target_weight(w.snr(), "data", vp), snr)
        check(w.target_weight(w.min_snr(np.inf), "data", vp), snr)
        check(w.target_weight(w.p2(1, 0), "noise", vp), jnp.ones(49))
        check(w.target_weight(w.p2(2, 0.5), "noise", vp), (2 + snr) ** -0.5)
        rho = 1 / jnp.sqrt(snr)
        check(w.target_weight(w.edm(0.5), "data", vp), (rho**2 + 0.25) / (rho * 0.5) ** 2)
        check(w.target_weight(w.edm(0.5), "edm", vp, 0.5), jnp.ones(49))
        check(w.target_weight(w.sigmoid(-1.0), "noise", vp), 1 / (1 + jnp.e * snr))
        check(w.target_weight(w.flat(), "vpred", vp), jnp.ones(49))
        check(w.target_weight(w.likelihood(), "noise", straight, density=1.0), 1 / (t * (1 - t)))  # -dlam/dt


def test_finite_at_both_ends_with_the_right_limits():
    for path, make in PROCESSES.items():
        c = make().coefficients(jnp.array([0.0, 1e-5, 0.5, 1.0]))
        for name, weighting in w.WEIGHTINGS.items():
            for target in TARGETS:
                weight = w.target_weight(weighting(), target, c, density=1.0)
                assert bool(jnp.all(jnp.isfinite(weight) & (weight >= 0))), (path, name, target)
    ends = process.linear().coefficients(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(w.target_weight(w.min_snr(5), "data", ends), [5, 0], atol=1e-12)
    np.testing.assert_allclose(w.target_weight(w.min_snr(5), "velocity", ends), [0, 0], atol=1e-12)
    np.testing.assert_allclose(w.target_weight(w.edm(0.5), "edm", ends), [1, 1], rtol=1e-6)
    np.testing.assert_allclose(w.target_weight(w.edm(0.5), "data", ends)[1], 4, rtol=1e-6)


@pytest.mark.parametrize("path", ["linear", "vp", "cosine"])
def test_over_lam_is_one_integral_for_every_time_density(path):
    """E_t[w |r|^2] with |r|^2 = exp(-lam^2), w integrated over lam, is sqrt(pi) whatever t is drawn from."""
    with jax.enable_x64(True):
        p = PROCESSES[path]()
        u = (jnp.arange(40_000) + 0.5) / 40_000
        for density in (uniform(), logit_normal(0.0, 1.5), log_normal(0.0, 1.7), mode(0.8)):
            t = density(u, p)
            c = p.coefficients(t)
            weight = w.target_weight(w.likelihood(), "noise", c, density=density_at(density, u, p, 0.0, 1.0))
            total = jnp.mean(weight * jnp.exp(-(c.half_log_snr**2)))
            np.testing.assert_allclose(total, np.sqrt(np.pi), rtol=2e-4)
        c = p.coefficients(log_normal(0.0, 0.5)(u, p))
        wrong = jnp.mean(w.target_weight(w.likelihood(), "noise", c, density=1.0) * jnp.exp(-(c.half_log_snr**2)))
        assert abs(float(wrong) - np.sqrt(np.pi)) > 0.3  # negative control: forgetting p(t) is seen


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: w.min_snr(0), "gamma: 0 given"),
        (lambda: w.p2(0, 1), "k, power: 0, 1 given"),
        (lambda: w.edm(-1), "sigma_data: -1 given"),
        (lambda: w.residual_factor("dta", process.linear().coefficients(0.5)), "target: 'dta' .*'data'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
