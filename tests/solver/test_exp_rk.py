"""Stochastic RES: churn before each exponential Runge-Kutta step, step by step, its weak order and its refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import MIXTURE, PROCESSES, middle

from jaxdiff import exact, process, solver
from jaxdiff.solver import grid
from jaxdiff.solver.order import posterior

P = functools.partial
VP, EDM = PROCESSES["vp"], PROCESSES["edm"]


@pytest.mark.parametrize("p", [VP, EDM])
@pytest.mark.parametrize("s_min, s_max, s_noise", [(0.0, float("inf"), 1.0), (0.2, 40.0, 1.01)])
def test_res_with_churn_step_by_step(p, s_min, s_max, s_noise):
    """The published sampler on the state x: raise the noise level, add the noise, one RES-2S step in half log-SNR."""
    g, churn = middle(p, 9), 3.0
    rng = np.random.default_rng(0)
    x, z = g.sigma[0] * rng.normal(size=(8, 1)), rng.normal(size=(9, 8, 1))
    y, top = x, g.sigma[0] / g.alpha[0]
    levels = []
    for i in range(9):
        rho = g.sigma[i] / g.alpha[i]
        gamma = min(churn / 9, np.sqrt(2) - 1) if s_min <= rho <= s_max else 0.0
        raised = rho * (1 + gamma)
        point = lambda lam: (lambda c: (float(c.alpha), float(c.sigma)))(p.coefficients(p.time(np.float64(lam))))
        (a, s) = point(-np.log(raised))
        y = a * (y / g.alpha[i] + s_noise * np.sqrt(max(raised**2 - rho**2, 0)) * z[i])
        levels.append(raised / rho)
        lam, end = -np.log(raised), np.log(g.alpha[i + 1] / g.sigma[i + 1])
        h = end - lam
        am, sm = point(lam + h / 2)
        first = posterior(MIXTURE, y[:, 0], a, s)[0][:, None]
        stage = sm / s * y + am * -np.expm1(-h / 2) * first
        second = posterior(MIXTURE, stage[:, 0], am, sm)[0][:, None]
        phi1, phi2 = -np.expm1(-h) / h, (np.expm1(-h) + h) / h**2
        y = g.sigma[i + 1] / s * y + g.alpha[i + 1] * h * ((phi1 - 2 * phi2) * first + 2 * phi2 * second)
    assert max(levels) > 1.3 and top > 0
    table = solver.exp_rk(p, g, s_churn=churn, s_min=s_min, s_max=s_max, s_noise=s_noise)
    block = table.blocks
    assert table.nfe == 18 and block.A.shape[1] == 1
    churned = s_max >= g.sigma[0] / g.alpha[0]
    assert (block.start_noise is not None) == churned
    assert (block.start_gain is not None) == (churned and p is VP)
    start = 0 if block.start_noise is None else block.start_noise
    gain = 1 if block.start_gain is None else block.start_gain
    with jax.enable_x64(True):
        bare = dataclasses.replace(table, blocks=dataclasses.replace(block, start_noise=None, start_gain=None))
        noise = jnp.asarray(np.concatenate([z[1:], z[:1]]))
        hooks = solver.hooks(noise=lambda keys, row, y: noise[row.k // 2])
        ours = solver.run(bare, exact.denoiser(MIXTURE, p), jnp.asarray(gain * x + start * z[0]), hooks=hooks)
        np.testing.assert_allclose(ours, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tableau", ["res2", "res3", "etd2", "etd3", "etd4"])
def test_without_churn_nothing_is_added(tableau):
    g = grid.logsnr(VP, 6)
    plain, kept = (solver.exp_rk(VP, g, tableau=tableau, stochastic=s) for s in (None, True))
    assert plain.blocks.C is None and np.array_equal(kept.blocks.C, np.zeros(kept.rows))
    # a window that no level is in
    out = solver.exp_rk(VP, g, tableau=tableau, s_churn=5.0, s_min=1e6)
    for a, b in ((plain, kept), (plain, out)):
        assert np.array_equal(a.blocks.A, b.blocks.A) and np.array_equal(a.blocks.B, b.blocks.B)
        assert a.tau.tolist() == b.tau.tolist()
    assert out.blocks.start_noise is None


@pytest.mark.parametrize("tableau", ["res2", "etd2", "res3"])
def test_weak_order_is_two_at_fixed_churn(tableau):
    measured = solver.weak_order(P(solver.exp_rk, tableau=tableau, s_churn=4.0), VP, steps=(128, 256))
    # the churned step is h + O(1/N) long, so of every scheme order 2 is left at least
    assert 1.9 < measured.slope < (3.2 if tableau == "res3" else 2.1), measured


def test_refusals_name_what_is_wrong():
    g = grid.edm_rho(EDM, 5)
    with pytest.raises(ValueError, match=r"s_churn, s_min, s_max, s_noise: -1.0, 0.0, inf, 1.0 given"):
        solver.exp_rk(EDM, g, s_churn=-1.0)
    with pytest.raises(ValueError, match=r"exp_rk\(s_churn=2\) draws fresh noise and needs Gaussian noise"):
        solver.exp_rk(dataclasses.replace(EDM, noise=process.student_t(5.0)), g, s_churn=2.0)
    off = grid.explicit(g.alpha, 1.1 * g.sigma, g.time)
    with pytest.raises(ValueError, match=r"grid: exp_rk\(s_churn=2\) needs points between the grid's"):
        solver.exp_rk(EDM, off, tableau="etd2", s_churn=2.0)
