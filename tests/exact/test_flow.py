"""The closed-form flow maps against a tight ODE solve, against each other, and in their tails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from scipy.special import log_ndtr

from jaxdiff import exact, process


def line():
    return exact.GaussianMixture([2.0, 5.0, 3.0], [-2.0, 0.3, 1.5], [0.05, 0.3, 0.01])


def carried(world, path, x, t, s):
    """The PF-ODE from t to s by an eighth-order Runge-Kutta method at 1e-12."""
    velocity = jax.jit(lambda x, t: world.velocity(x, path.coefficients(t)))
    shape = x.shape
    rhs = lambda t, y: np.asarray(velocity(jnp.asarray(y.reshape(shape)), jnp.asarray(t))).ravel()
    return solve_ivp(rhs, (t, s), x.ravel(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1].reshape(shape)


@pytest.mark.parametrize(
    "name,t,s", [("linear", 0.95, 0.0), ("vp", 0.8, 0.02), ("edm", 0.05, 0.0), ("cosine", 0.1, 0.9)]
)
def test_quantile_flow_solves_the_ode(name, t, s):
    path, world = process.PROCESSES[name](), line()
    with jax.enable_x64(True):
        c = path.coefficients(t)
        x = np.linspace(-2.5, 2.5, 9) * np.hypot(c.alpha, c.sigma)
        flow = exact.quantile_flow(world, path)
        np.testing.assert_allclose(flow(jnp.asarray(x), t, s), carried(world, path, x, t, s), rtol=2e-9, atol=2e-9)


def test_quantile_flow_is_the_quantile_map_to_1e_12():
    """Against bracketed root finding on scipy's own log cdf, in both tails out to |z| = 8."""
    world, (a, b), (c, d) = line(), (0.3, 0.9), (0.95, 0.1)

    def tail(x, alpha, sigma, sign):
        m, h = alpha * world.means[:, 0], np.sqrt(alpha**2 * world.spectra[:, 0] + sigma**2)
        return np.logaddexp.reduce(np.log(world.weights) + log_ndtr(sign * (x - m) / h))

    mean, cov = world.moments()
    x = a * mean[0] + np.linspace(-8, 8, 33) * np.sqrt(a * a * cov[0, 0] + b * b)
    expected = []
    for each in x:
        sign = 1 if tail(each, a, b, 1) < tail(each, a, b, -1) else -1
        goal = tail(each, a, b, sign)
        expected.append(
            brentq(lambda y, sign=sign, goal=goal: tail(y, c, d, sign) - goal, -30, 30, xtol=1e-15, rtol=1e-15)
        )
    with jax.enable_x64(True):
        flow = exact.quantile_flow(world, process.vp())
        between = jax.jit(flow.between)
        np.testing.assert_allclose(between(jnp.asarray(x), a, b, c, d), expected, rtol=1e-12, atol=1e-12)
        # there and back, and through a third level
        there = between(jnp.asarray(x), a, b, c, d)
        np.testing.assert_allclose(between(there, c, d, a, b), x, rtol=1e-12, atol=1e-12)
        half = between(jnp.asarray(x), a, b, 0.6, 0.7)
        np.testing.assert_allclose(between(half, 0.6, 0.7, c, d), there, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["vp", "linear", "edm"])
def test_float32_tails(name):
    """Out to eight deviations the error stays within a few units of the map's own conditioning."""
    path, world = process.PROCESSES[name](), line()
    c = path.coefficients(0.9)
    scale = float(np.sqrt(c.alpha**2 * world.moments()[1][0, 0] + c.sigma**2))
    x = (np.linspace(-8, 8, 321) * scale).astype(np.float32)
    flow = exact.quantile_flow(world, path)
    y = np.asarray(jax.jit(flow)(jnp.asarray(x), 0.9, 0.0))
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64)
        truth, slope = np.asarray(flow(wide, 0.9, 0.0)), np.asarray(flow.jacobian(wide, 0.9, 0.0))
    assert y.dtype == np.float32 and np.all(np.isfinite(y)) and np.all(np.diff(y) >= 0)
    np.testing.assert_array_less(np.abs(y - truth), 1.5e-6 * (1 + np.abs(truth) + slope * scale))
    assert np.median(np.abs(y - truth)) < 3e-7


def test_derivatives_are_density_ratios():
    path, world = process.linear(), line()
    with jax.enable_x64(True):
        flow = exact.quantile_flow(world, path)
        run = jax.jit(flow)
        x, t, s = jnp.linspace(-2.0, 2.0, 9), 0.7, 0.2
        slope = jax.jit(jax.vmap(jax.grad(lambda x: flow(x, t, s))))(x)
        np.testing.assert_allclose(slope, jax.jit(flow.jacobian)(x, t, s), rtol=1e-9)
        # dx_s/ds is the velocity at the end, and a parameter's derivative matches central differences
        at = run(x, t, s)
        ds = jax.jit(jax.jacfwd(lambda s: flow(x, t, s)))(s)
        np.testing.assert_allclose(ds, world.velocity(at, path.coefficients(s)), rtol=1e-8, atol=1e-9)

        @jax.jit
        def moved(shift):
            again = exact.GaussianMixture(
                world.weights, world.means + shift, bases=world.bases, spectra=world.spectra, labels=None
            )
            return exact.quantile_flow(again, path)(x, t, s)

        slope = jax.jacfwd(moved)(jnp.asarray(0.0))
        np.testing.assert_allclose(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-7, atol=1e-8)
        assert np.all(np.isfinite(jax.jit(jax.jacrev(lambda x: flow(x, t, s).sum()))(x)))


def test_quantile_flow_shapes_points_and_vmap():
    path, world = process.vp(), line()
    flow = jax.jit(exact.quantile_flow(world, path))
    x = jnp.linspace(-2, 2, 6)
    column = flow(x[:, None], 0.8, 0.1)
    np.testing.assert_array_equal(column[:, 0], flow(x, 0.8, 0.1))
    times = jnp.linspace(0.1, 0.9, 6)
    mapped = jax.vmap(flow, (0, 0, None))(x, times, 0.05)
    np.testing.assert_allclose(flow(x, times, 0.05), mapped, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(flow(x, 0.4, 0.4), x, rtol=1e-5, atol=1e-6)
    points = exact.GaussianMixture([0.25, 0.75], [-1.0, 2.0], 0.0)
    points = jax.jit(exact.quantile_flow(points, process.linear()))
    z = jnp.linspace(-3, 3, 12)  # the quarter quantile of the normal is -0.6745
    np.testing.assert_allclose(points(z, 1.0, 0.0), np.where(np.asarray(z) < -0.6745, -1.0, 2.0), atol=1e-6)
    still = jax.jit(exact.quantile_flow(exact.Delta(0.5), process.linear()))
    np.testing.assert_allclose(still(z, 0.5, 0.25), 0.75 * 0.5 + 0.5 * (z - 0.25), rtol=1e-5, atol=1e-6)


def test_gaussian_flow_solves_the_ode_and_meets_the_quantile_flow():
    cov = np.array([[0.5, 0.2], [0.2, 0.15]])
    world, path = exact.Gaussian([0.5, -0.2], cov), process.vp()
    with jax.enable_x64(True):
        flow = exact.gaussian_flow(world, path)
        x = np.random.default_rng(0).normal(size=(4, 2))
        y = flow(jnp.asarray(x), 1.0, 0.02)
        np.testing.assert_allclose(y, carried(world, path, x, 1.0, 0.02), rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(flow(y, 0.02, 1.0), x, rtol=1e-12, atol=1e-12)
        narrow = exact.Gaussian(0.4, 0.3)
        z = jnp.linspace(-8, 8, 17)
        both = [make(narrow, path)(z, 0.9, 0.01) for make in (exact.gaussian_flow, exact.quantile_flow)]
        np.testing.assert_allclose(*both, rtol=1e-12, atol=1e-12)


def test_gaussian_flow_off_the_support():
    """A direction without variance scales as sigma_s/sigma_t, down to the point itself."""
    flow = exact.gaussian_flow(exact.Gaussian([1.0, 2.0], np.diag([1.0, 0.0])), process.linear())
    x = jnp.array([[0.3, 1.7]])
    np.testing.assert_allclose(flow(x, 0.8, 0.4)[:, 1], 0.6 * 2.0 + (1.7 - 0.2 * 2.0) * 0.5, rtol=1e-5)
    np.testing.assert_allclose(flow(x, 0.8, 0.0)[:, 1], 2.0, rtol=1e-6)
    assert np.all(np.isfinite(flow(jnp.array([[0.3, 2.0]]), 0.0, 0.5)))
