"""Gaussian data makes every sampler affine, so the law it draws from is known exactly: no sampling noise in a proof.

The executor is run once on a batch that spans its inputs (the start and each fresh draw, through the noise hook), which gives
its affine map; mean and variance follow, and are compared with recursions written from the papers' formulas.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import PROCESSES, middle

from jaxdiff import exact, solver
from jaxdiff.solver import grid

MEAN, VAR = 0.6, 0.3
OFFSET = 0.4  # at the exact mean every solver is at a fixed point, which would prove little
WORLD = exact.Gaussian(MEAN, VAR)


def posterior(alpha, sigma):
    """``x0_hat = d0 + d1 x`` and ``eps_hat = e0 + e1 x``."""
    v = alpha**2 * VAR + sigma**2
    d1 = alpha * VAR / v
    return (MEAN - d1 * alpha * MEAN, d1), (-sigma * alpha * MEAN / v, sigma / v)


def law(alpha, sigma, offset=0.0):
    """Mean and variance of the data's marginal; ``offset`` moves the mean, in units of sigma, off that law."""
    return alpha * MEAN + offset * sigma, alpha**2 * VAR + sigma**2


def push(moments, constant, slope, std=0.0):
    mean, var = moments
    return constant + slope * mean, slope**2 * var + std**2


@jax.jit
def _basis(table, d, x):
    hook = solver.hooks(noise=lambda keys, row, y: (jnp.arange(y.shape[0]) == row.k + 2)[:, None].astype(y.dtype))
    return jax.vmap(lambda tb: solver.run(tb, d, x, hooks=hook))(table)


def executed(p, tables, offset=0.0):
    """Mean and variance (T,) of the executor's output started from the law of the first grid point."""
    starts, churns = [], []
    for table in tables:
        block = table.blocks
        added = 0.0 if block.start_noise is None else float(block.start_noise)
        gain = 1.0 if block.start_gain is None else float(block.start_gain)
        starts.append(push(law(float(block.alpha[0]) / gain, float(block.start_scale), offset), 0.0, gain))
        churns.append(added**2)
    tables = [
        dataclasses.replace(t, blocks=dataclasses.replace(t.blocks, start_noise=None, start_gain=None))
        for t in tables
    ]
    many = solver.stack(tables)
    with jax.enable_x64(True):
        x = jnp.zeros((many.tau.shape[1] + 2, 1)).at[1].set(1.0)
        out = np.asarray(_basis(many, exact.denoiser(WORLD, p), x))[..., 0]
    constant, gains = out[:, 0], out[:, 1:] - out[:, :1]
    mean = constant + gains[:, 0] * np.array([m for m, _ in starts])
    start = np.array([v for _, v in starts]) + np.array(churns)
    return mean, gains[:, 0] ** 2 * start + np.sum(gains[:, 1:] ** 2, 1)


def ddim_moments(g, eta):
    moments = law(g[0].alpha, g[0].sigma, OFFSET)
    for i in range(len(g)):
        at, to = g[i], g[i + 1]
        forward = 1 - (at.alpha / to.alpha * to.sigma / at.sigma) ** 2  # share of at's noise not already in to's
        c = eta * to.sigma * np.sqrt(forward)
        (d0, d1), (e0, e1) = posterior(at.alpha, at.sigma)
        keep = np.sqrt(to.sigma**2 - c**2)
        moments = push(moments, to.alpha * d0 + keep * e0, to.alpha * d1 + keep * e1, c)
    return moments


def edm_moments(g, s_churn, s_noise=1.0, heun=True):
    """EDM's algorithm 2 on alpha = 1."""
    moments = law(1.0, g[0].sigma, OFFSET)
    for i in range(len(g)):
        sigma, after = g[i].sigma, g[i + 1].sigma
        hat = sigma * (1 + min(s_churn / len(g), np.sqrt(2) - 1))
        moments = push(moments, 0.0, 1.0, s_noise * np.sqrt(hat**2 - sigma**2))
        slope = lambda s: tuple(np.array(posterior(1.0, s)[1]))  # (x - D)/sigma
        f0, f1 = slope(hat)
        h = after - hat
        if after == 0 or not heun:
            moments = push(moments, h * f0, 1 + h * f1)
            continue
        n0, n1 = slope(after)  # at the Euler state c + k x
        k = 1 + h * f1
        moments = push(moments, h / 2 * (f0 + n0 + n1 * h * f0), 1 + h / 2 * (f1 + n1 * k))
    return moments


@pytest.mark.parametrize("path", ["linear", "vp", "ddpm", "cosine", "ve"])
def test_ddim_moments(path):
    p = PROCESSES[path]
    grids = [middle(p, 12), grid.uniform(p, 9), grid.edm_rho(p, 14)]
    etas = (0.0, 0.3, 1.0)
    mean, var = executed(p, [solver.ddim(p, g, eta=e) for g in grids for e in etas], OFFSET)
    expected = np.array([ddim_moments(g, e) for g in grids for e in etas])
    np.testing.assert_allclose(mean, expected[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(var, expected[:, 1], rtol=1e-12)


def test_edm_churn_moments():
    p = PROCESSES["edm"]
    grids = [grid.edm_rho(p, 6), grid.edm_rho(p, 17), middle(p, 10)]
    cases = [(0.0, 1.0, True), (3.0, 1.0, True), (40.0, 1.003, True), (2.0, 1.0, False)]
    tables = [solver.edm(p, g, s_churn=c, s_noise=n, heun=h) for g in grids for c, n, h in cases]
    mean, var = executed(p, tables, OFFSET)
    expected = np.array([edm_moments(g, c, n, h) for g in grids for c, n, h in cases])
    np.testing.assert_allclose(mean, expected[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(var, expected[:, 1], rtol=1e-11)


WEAK = {
    # solver, order; fixed S_churn, so that the churn of one step vanishes with the step
    "ddim_full": (lambda p, g: solver.ddim(p, g, eta=1.0), 1),
    "ddim_half": (lambda p, g: solver.ddim(p, g, eta=0.5), 1),
    "ancestral": (solver.ancestral, 1),
    "edm_churn": (lambda p, g: solver.edm(p, g, s_churn=4.0), 2),
    "edm_churn_euler": (lambda p, g: solver.edm(p, g, s_churn=4.0, heun=False), 1),
}


@pytest.mark.parametrize("path", ["linear", "vp", "edm"])
def test_weak_orders(path):
    p, steps = PROCESSES[path], (64, 128)
    end = middle(p, 4)[4]
    truth = law(end.alpha, end.sigma)
    mean, var = executed(p, [make(p, middle(p, n)) for make, _ in WEAK.values() for n in steps])
    np.testing.assert_allclose(mean, truth[0], rtol=0, atol=1e-12)  # the exact mean is a fixed point of all of them
    error = np.abs(var - truth[1]).reshape(len(WEAK), 2)
    for (name, (_, order)), e in zip(WEAK.items(), error):
        assert abs(np.log2(e[0] / e[1]) - order) < 0.15, (name, e)


def test_s_noise_leaves_a_variance_floor():
    p = PROCESSES["edm"]
    end = middle(p, 4)[4]
    _, var = executed(p, [solver.edm(p, middle(p, n), s_churn=4.0, s_noise=1.01) for n in (64, 128)])
    excess = var - law(end.alpha, end.sigma)[1]
    assert excess[1] > 0.5 * excess[0] > 0  # it does not go away with the step, by design


def test_drawn_noise_has_the_law_of_the_algebra():
    # 20 000 draws through sample(): mean within 4.5 standard errors, variance within 4.5 sqrt(2/n) (two-sided 7e-6 each)
    p, n = PROCESSES["vp"], 20_000
    for table in (solver.ddim(p, grid.uniform(p, 8), eta=1.0), solver.edm(p, grid.uniform(p, 8), s_churn=4.0)):
        x = np.asarray(solver.sample(table, exact.denoiser(WORLD, p), jax.random.key(11), (n, 1)), np.float64)
        first = table.blocks
        mean, var = executed(p, [table])
        # the prior replaces the exact marginal at t=1: alpha(1) = 0.0066 shifts the mean's start by alpha MEAN
        start = law(float(first.alpha[0]), float(first.start_scale))
        gain = _gain(p, table)
        mean, var = mean - gain * start[0], var - gain**2 * (start[1] - float(first.start_scale) ** 2)
        assert abs(x.mean() - mean[0]) < 4.5 * np.sqrt(var[0] / n)
        assert abs(x.var() / var[0] - 1) < 4.5 * np.sqrt(2 / n)


def _gain(p, table):
    """d(output)/d(start) of an affine run."""
    with jax.enable_x64(True):
        x = jnp.zeros((table.rows + 2, 1)).at[1].set(1.0)
        out = np.asarray(_basis(solver.stack([table]), exact.denoiser(WORLD, p), x))[0, :, 0]
    return out[1] - out[0]
