"""Nested diffusion: one inner step is the denoiser; laws follow a closed-form recursion; every row's data is a sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, process, solver
from jaxdiff.guidance import nested
from jaxdiff.solver import grid

LINEAR = process.linear()
MEAN, V = 0.6, 0.5
GAUSSIAN = exact.denoiser(exact.Gaussian([MEAN], V), LINEAR)
KEY, OWN = jax.random.key(0), jax.random.key(1)


def inner(steps, eta):
    return lambda p: solver.ddim(p, grid.uniform(p, steps), eta=eta)


@pytest.mark.parametrize("make", [solver.ddim, solver.dpm_solver_pp, solver.heun])
def test_one_inner_step_is_the_denoiser(make):
    outer, x = make(LINEAR, grid.uniform(LINEAR, 6)), jnp.linspace(-2, 2, 5)[:, None]
    world = exact.denoiser(exact.GaussianMixture([0.3, 0.7], [[-1.5], [1.0]], [[[0.05]], [[0.1]]]), LINEAR)
    go = jax.jit(lambda d: solver.run(outer, d, x))
    np.testing.assert_allclose(go(nested(world, outer, inner(1, 0.0))), go(world), rtol=1e-5, atol=1e-5)


def recursion(outer, make):
    """Mean and variance of every row's data and of the end, from the tables alone."""
    b = outer.blocks
    mean, var, found = 0.0, float(b.sigma[0]) ** 2, []
    for k in range(outer.rows):
        table = make(process.linear(t_max=float(outer.tau[k])))
        centre, noise = solver.gaussian_law(table, MEAN, V, start=0.0)
        gain2 = solver.gaussian_law(table, MEAN, V, start=1.0)[1] - noise
        alpha, sigma = float(b.alpha[k]), float(b.sigma[k])
        gain = np.sqrt(gain2)
        data_mean = centre + gain * (mean - alpha * MEAN)
        found.append((data_mean, gain2 * var + noise))
        p, q = (0.0 if v is None else float(v[k]) for v in (b.p, b.q))
        A, B, C = float(b.A[k, 0]), float(b.B[k, 0]), 0.0 if b.C is None else float(b.C[k])
        on_y, on_data = A + B * q / sigma, B * (p - q * alpha / sigma)
        mean = on_y * mean + on_data * data_mean
        var = (on_y + on_data * gain) ** 2 * var + on_data**2 * noise + C**2
    return np.array([*found, (mean, var)])


@pytest.mark.parametrize(("outer_eta", "inner_eta", "steps"), [(1.0, 1.0, 24), (0.0, 1.0, 6), (1.0, 0.0, 4)])
def test_laws_of_every_rows_data_and_of_the_end(outer_eta, inner_eta, steps):
    """Within 4 standard errors of the recursion (30 numbers)."""
    outer, make, B = solver.ddim(LINEAR, grid.uniform(LINEAR, 4), eta=outer_eta), inner(steps, inner_eta), 8192
    d = nested(GAUSSIAN, outer, make, key=OWN, index=jnp.arange(B))
    x = jax.random.normal(jax.random.key(2), (B, 1))
    out, seen = jax.jit(lambda d: solver.run(outer, d, x, KEY, record=("predictions",)))(d)
    samples = np.concatenate([np.asarray(seen["predictions"].data), out[None]])[..., 0].astype(np.float64)
    law = recursion(outer, make)
    assert np.all(np.abs(samples.mean(1) - law[:, 0]) < 4 * np.sqrt(law[:, 1] / B))
    assert np.all(np.abs(samples.var(1) / law[:, 1] - 1) < 4 * np.sqrt(2 / B))


def test_an_exact_inner_sampler_makes_every_law_exact():
    """The recursion's errors fall with the inner steps at first order, for every row and any number of outer steps; the
    plain estimate at t = 1 is no sample at all."""
    for rows in (1, 2, 5):
        outer = solver.ddim(LINEAR, grid.uniform(LINEAR, rows), eta=1.0)
        miss = np.array(
            [np.abs(recursion(outer, inner(n, 1.0)) - np.array([MEAN, V])).max(0) for n in (24, 48, 96, 192)]
        )
        assert np.all(miss[:, 0] < 1e-12) and np.all(miss[:-1, 1] / miss[1:, 1] > 1.6) and miss[-1, 1] < 0.03 * V
    np.testing.assert_allclose(recursion(outer, inner(200, 0.0))[-1, 1], 0.733, atol=1e-3)  # biased, as documented
    x = jax.random.normal(jax.random.key(2), (64, 1))
    plain = solver.run(outer, GAUSSIAN, x, KEY, record=("predictions",))[1]["predictions"].data
    assert float(jnp.var(plain[0])) < 1e-6


def test_every_rows_data_is_in_a_mode_with_its_weight():
    world = exact.denoiser(exact.GaussianMixture([0.3, 0.7], [[-1.0], [1.0]], [[[1e-3]], [[1e-3]]]), LINEAR)
    outer, B = solver.ancestral(LINEAR, grid.uniform(LINEAR, 3)), 2048
    d = nested(world, outer, inner(30, 1.0), key=OWN, index=jnp.arange(B))
    x = jax.random.normal(jax.random.key(3), (B, 1))
    seen = jax.jit(lambda d: solver.run(outer, d, x, KEY, record=("predictions",))[1]["predictions"].data)(d)
    assert np.mean(np.abs(np.abs(seen) - 1) < 0.15) > 0.98
    share = np.mean(np.asarray(seen[..., 0]) > 0, 1)
    assert np.all(
        np.abs(share - 0.7) < 4 * np.sqrt(0.21 / B) + 0.02
    )  # 0.02: thirty inner steps are not infinitely many
    assert float(np.mean(np.asarray(seen[0]) * np.asarray(seen[1]) < 0)) > 0.05  # rows draw noise of their own


def test_it_is_called_like_any_denoiser():
    outer = solver.ddim(LINEAR, grid.uniform(LINEAR, 4))
    x = jnp.linspace(-1, 1, 4)[:, None]
    told, plain = nested(GAUSSIAN, outer, inner(1, 0.0))(x, 0.5), GAUSSIAN(x, 0.5)
    np.testing.assert_allclose(told.data, plain.data, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(told.noise, plain.noise, rtol=1e-5, atol=1e-6)


def test_noise_belongs_to_the_sample():
    outer = solver.ddim(LINEAR, grid.uniform(LINEAR, 3))
    x = jnp.linspace(-1, 1, 4)[:, None]
    go = jax.jit(lambda x, index: solver.run(outer, nested(GAUSSIAN, outer, inner(3, 1.0), key=OWN, index=index), x))
    whole = go(x, jnp.arange(4) + 10)
    np.testing.assert_allclose(go(x[2:], jnp.arange(2) + 12), whole[2:], rtol=1e-5, atol=1e-6)
    assert float(jnp.max(jnp.abs(go(x[2:], jnp.arange(2)) - whole[2:]))) > 0.05


def test_refusals():
    outer = solver.ddim(LINEAR, grid.uniform(LINEAR, 4))
    other = solver.ddim(LINEAR, grid.uniform(LINEAR, 7))
    assert np.all(np.isnan(solver.run(other, nested(GAUSSIAN, outer, inner(1, 0.0)), jnp.ones((2, 1)))))
    late = lambda p: solver.ddim(LINEAR, grid.uniform(LINEAR, 2))
    above = lambda p: solver.ddim(p, [p.t_max, 0.5 * p.t_max])
    for text, call in {
        "key: missing": lambda: nested(GAUSSIAN, outer, inner(2, 1.0)),
        "index: missing": lambda: nested(GAUSSIAN, outer, inner(2, 1.0), key=OWN),
        "process: missing": lambda: nested(lambda x, t, r: x, outer, inner(2, 0.0)),
        "inner: its table at t=0.75 begins": lambda: nested(GAUSSIAN, outer, late),
        "ends above sigma = 0": lambda: nested(GAUSSIAN, outer, above),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()
