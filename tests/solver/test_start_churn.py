"""Churn of the first step on paths that scale the data: the start is rescaled, then given noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import MIXTURE, PROCESSES, middle

from jaxdiff import exact, solver
from jaxdiff.solver import grid, learn
from jaxdiff.solver.order import posterior

VP, EDM = PROCESSES["vp"], PROCESSES["edm"]
MAKERS = {
    "edm": solver.edm,
    "edm in time": lambda p, g, **k: solver.edm(p, g, clock="time", **k),
    "dpm2": solver.dpm2,
    "exp_rk": solver.exp_rk,
}


@pytest.mark.parametrize("path", PROCESSES)
def test_the_start_is_raised_to_the_marginal(path):
    """From ``N(alpha m, alpha^2 v + sigma^2)`` at the grid's start to that of the raised point, for any Gaussian data."""
    p = PROCESSES[path]
    g = middle(p, 6)
    for name, make in MAKERS.items():
        table = make(p, g, s_churn=3.0)
        b = table.blocks
        gain, added = (1.0 if b.start_gain is None else float(b.start_gain)), float(b.start_noise)
        c = p.coefficients(np.float64(table.tau[0]))
        np.testing.assert_allclose([b.alpha[0], b.sigma[0]], [c.alpha, c.sigma], rtol=1e-12)
        np.testing.assert_allclose(c.sigma / c.alpha, np.sqrt(2) * g[0].rho, rtol=1e-9)
        for mean, v in ((0.7, 0.1), (-2.0, 1.5)):
            before = (g.alpha[0] * mean, g.alpha[0] ** 2 * v + g.sigma[0] ** 2)
            after = (c.alpha * mean, c.alpha**2 * v + c.sigma**2)
            np.testing.assert_allclose((gain * before[0], gain**2 * before[1] + added**2), after, rtol=1e-12)
        np.testing.assert_allclose(b.start, (g.alpha[0], g.sigma[0]), rtol=1e-12)
        assert (b.start_gain is None) == (path in ("ve", "edm"))
        assert name == "edm in time" or solver.check(table).ok(1e-10)


@pytest.mark.parametrize("make", [MAKERS["edm"], MAKERS["edm in time"]])
def test_weak_order_two_with_the_first_step_churned(make):
    assert make(VP, middle(VP, 6), s_churn=4.0).blocks.start_gain is not None
    assert abs(solver.weak_order(lambda p, g: make(p, g, s_churn=4.0), VP, steps=(128, 256)).slope - 2) < 0.1


def test_a_start_at_the_end_of_the_path_is_not_churned():
    for p in (VP, PROCESSES["linear"], PROCESSES["cosine"]):
        assert solver.edm(p, grid.uniform(p, 6), s_churn=3.0).blocks.start_noise is None
    # and one near it is raised to the end of the path at most
    near = solver.edm(VP, grid.from_times(VP, np.linspace(0.99, 0.1, 7)), s_churn=3.0)
    np.testing.assert_allclose(near.tau[0], 1.0, rtol=1e-9)


def general_sampler(g, x, z, s_churn, s_noise, beta_min, beta_max):
    """EDM's algorithm for any schedule and scaling, here vp's, with its own sigma(t), s(t) and their slopes."""
    growth = lambda t: 0.5 * (beta_max - beta_min) * t**2 + beta_min * t
    sigma, s = (lambda t: np.sqrt(np.expm1(growth(t)))), (lambda t: np.exp(-growth(t) / 2))
    inverse = lambda v: (
        (np.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * np.log1p(v * v)) - beta_min) / (beta_max - beta_min)
    )

    def slope(x, t):
        dsigma = 0.5 * (beta_min + (beta_max - beta_min) * t) * (sigma(t) + 1 / sigma(t))
        ds = -sigma(t) * dsigma * s(t) ** 3
        data = posterior(MIXTURE, x / s(t), 1.0, sigma(t))[0]
        return (dsigma / sigma(t) + ds / s(t)) * x - dsigma * s(t) / sigma(t) * data

    steps = len(g.time) - 1
    for i in range(steps):
        t, to = g.time[i], g.time[i + 1]
        hat = inverse(sigma(t) * (1 + min(s_churn / steps, np.sqrt(2) - 1)))
        x = s(hat) / s(t) * x + np.sqrt(sigma(hat) ** 2 - sigma(t) ** 2) * s(hat) * s_noise * z[i]
        d = slope(x, hat)
        x = x + (to - hat) / 2 * (d + slope(x + (to - hat) * d, to))
    return x


@pytest.mark.parametrize("s_noise", [1.0, 1.007])
def test_general_sampler_through_the_executor(s_noise):
    """In float64, with the executor's own draw before the first row: the paper's loop, and the rows walked in numpy."""
    g = grid.from_times(VP, np.linspace(0.8, 0.05, 5))
    table = solver.edm(VP, g, clock="time", s_churn=0.8, s_noise=s_noise)
    later, key, index = (
        np.random.default_rng(2).normal(size=(4, 6)),
        jax.random.key(3),
        jnp.arange(6, dtype=jnp.uint32),
    )
    with jax.enable_x64(True):
        d, x = exact.denoiser(MIXTURE, VP), np.linspace(-1.5, 1.5, 6)
        churn = np.asarray(solver.begin(table, d, np.zeros((6, 1)), key, index).y[0])[:, 0] / table.blocks.start_noise
        assert 0.3 < np.std(churn) < 2
        hooks = solver.hooks(noise=lambda keys, row, y: jnp.asarray(later)[row.k // 2][:, None])
        got = np.asarray(solver.run(table, d, x[:, None], key, hooks=hooks))[:, 0]
        # the same table in a stack beside one without churn
        many = solver.stack([table, solver.edm(VP, g, clock="time")])
        both = jax.vmap(lambda t: solver.run(t, d, x[:, None], key, hooks=hooks))(many)
        np.testing.assert_allclose(both[0][:, 0], got, rtol=0, atol=1e-12)
        plain = solver.run(solver.edm(VP, g, clock="time"), d, x[:, None])
        np.testing.assert_allclose(both[1], plain, rtol=0, atol=1e-12)
    assert many.blocks.start_gain[1] == 1 and many.blocks.start_noise[1] == 0
    b = table.blocks
    y, ds = float(b.start_gain) * x + float(b.start_noise) * churn, [np.zeros(6)] * b.B.shape[1]
    for k in range(table.rows):
        data, noise = posterior(MIXTURE, y, float(b.alpha[k]), float(b.sigma[k]))
        ds = [b.p[k] * data + b.q[k] * noise, *ds[:-1]]
        y = b.A[k, 0] * y + sum(w * v for w, v in zip(b.B[k], ds)) + b.C[k] * later[k // 2]
    np.testing.assert_allclose(got, y, rtol=0, atol=1e-12)
    loop = general_sampler(g, x, [churn, *later], 0.8, s_noise, 0.1, 20.0)
    np.testing.assert_allclose(got, loop, rtol=0, atol=1e-10)


def test_clean_data_start_at_the_level_of_the_grid(tmp_path):
    """``init`` is scaled to the grid's first point, then raised with the rest; a saved table keeps its gain."""
    g = grid.from_times(VP, [0.5, 0.3])
    table = solver.edm(VP, g, heun=False, s_churn=1.0, s_noise=1e-9)
    world = exact.Gaussian(0.0, 1e12)  # so wide that the denoiser returns x/alpha: the row keeps x/alpha as it is
    init = np.full((3, 1), 1e6, np.float32)
    x = solver.sample(table, exact.denoiser(world, VP), jax.random.key(0), (3, 1), init=init)
    np.testing.assert_allclose(x, g.alpha[1] * init, rtol=1e-5)
    learn.save(tmp_path / "t.npz", table)
    read, _ = learn.load(tmp_path / "t.npz")
    assert read.blocks.start_gain == table.blocks.start_gain != 1


def test_teleport_ends_where_churn_begins():
    g = middle(EDM, 5)
    world, z = exact.Gaussian([0.3], [[0.5]]), jnp.linspace(-1.0, 1.0, 4)[:, None]
    plain, churned = (solver.teleport(EDM, world, 80.0 * z, solver.edm(EDM, g, s_churn=c)) for c in (0.0, 3.0))
    np.testing.assert_array_equal(plain, churned)
