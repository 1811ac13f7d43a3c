"""Align Your Steps: the bound against closed forms, its exact minimiser, and the grids that stop early."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learn_cases import WORLD, same, trial
from solver_cases import PROCESSES

from jaxdiff import exact, solver
from jaxdiff.solver import grid, learn
from jaxdiff.solver.learn import levels

EDM, LINEAR, VP = (PROCESSES[name] for name in ("edm", "linear", "vp"))
STD = 0.5
GAUSSIAN = exact.Gaussian(0.0, STD**2)
LINE = grid.logsnr(EDM, 7, lam_min=-np.log(10.0), lam_max=-np.log(0.1))


def gaussian_step(a, b):
    """KLUB in closed form of the step from sigma a to b < a, data N(0, STD^2), edm."""
    c = STD**2
    F = lambda s: -1 / (2 * c * s * s) - np.log(s * s / (s * s + c)) / (2 * c * c)
    return c * c * (F(a) - F(b) - (0.5 / b**2 - 0.5 / a**2) / (a * a + c))


def gaussian_bound(points):
    return sum(gaussian_step(a, b) for a, b in itertools.pairwise(points.sigma[points.sigma > 0]))


def divergence(points):
    """KL(true || sampled) of the last state above sigma = 0 of ddim(eta=1), both Gaussian."""
    finite = grid.Grid(*(v[points.sigma > 0] for v in (points.time, points.alpha, points.sigma)), True)
    _, variance = solver.gaussian_law(solver.ddim(EDM, finite, eta=1.0), 0.0, STD**2)
    ratio = (STD**2 + finite.sigma[-1] ** 2) / variance
    return 0.5 * (ratio - 1 - np.log(ratio))


def test_the_estimate_is_the_closed_gaussian_integral():
    d, x0 = exact.denoiser(GAUSSIAN, EDM), GAUSSIAN.sample(jax.random.key(3), (8192,))
    for points in (LINE, grid.arctan(EDM, 7, data_std=STD, sigma_min=0.1, sigma_max=10.0)):
        # measured within .7 % and .4 %
        assert abs(learn.kl_bound(points, d, x0) / gaussian_bound(points) - 1) < 0.015


def test_on_a_mixture_it_is_what_the_mean_squared_errors_leave():
    # E||D_w - D_v||^2 = mmse(v) - mmse(w) for the exact denoiser: estimated from other draws, without a chain
    d, points = exact.denoiser(WORLD, VP), grid.logsnr(VP, 6)
    x0, z = WORLD.sample(jax.random.key(6), (20000,)), jax.random.normal(jax.random.key(7), (20000, 2))
    error = lambda a, s, t: jnp.mean(jnp.sum((d(a * x0 + s * z, t).data - x0) ** 2, -1))
    lam = np.linspace(points[0].lam, points[5].lam, 5 * 60 + 1)
    c, w = VP.coefficients(VP.time(lam)), np.exp(2 * lam)
    mmse = np.asarray(jax.lax.map(lambda row: error(*row), tuple(map(jnp.float32, (c.alpha, c.sigma, VP.time(lam))))))
    at = range(0, 301, 60)
    left = sum(
        mmse[i] * (w[j] - w[i]) - np.trapezoid(mmse[i : j + 1], w[i : j + 1]) for i, j in itertools.pairwise(at)
    )
    found = learn.kl_bound(points, d, WORLD.sample(jax.random.key(5), (4096,)))
    assert abs(found / (0.5 * left) - 1) < 0.04  # measured .018


@pytest.mark.parametrize("even", [False, True])
def test_rungs_below_the_first_level_reach_down_six_units(even):
    points = levels._finite(LINEAR, grid.logsnr(LINEAR, 4))
    ladder, at = levels._ladder(LINEAR, points, 3, even)
    assert ladder.alpha[0] == 0 and at[0] == 0
    lam = np.log(ladder.alpha[1:] / ladder.sigma[1:])
    np.testing.assert_allclose(lam[0], points[1].lam - 6.0, rtol=1e-9)
    assert np.all(np.diff(lam) > 0)
    np.testing.assert_allclose(ladder.alpha[at], points.alpha, atol=1e-15)


def test_the_minimiser_is_the_known_one_and_bounds_bound():
    d, x0 = exact.denoiser(GAUSSIAN, EDM), GAUSSIAN.sample(jax.random.key(3), (8192,))
    least = learn.klub(solver.ddim, LINE, d, x0, sweeps=None)
    found = grid.Grid(
        least.table.time, *(np.asarray(v) for v in (least.table.blocks.alpha, least.table.blocks.sigma))
    )
    # [62], by dynamic programming on closed-form costs; rungs are 2.3 % apart
    np.testing.assert_allclose(found.sigma[::-1], [0, 0.1, 0.1334, 0.1799, 0.2469, 0.3569, 0.5888, 10], rtol=0.05)
    assert gaussian_bound(found) < gaussian_bound(LINE) / 2.5  # measured .535, 1.369
    best = min(
        sum(map(gaussian_step, (10.0, *inner), (*inner, 0.1)))
        for inner in itertools.combinations(np.geomspace(0.9, 0.115, 20), 5)
    )
    assert gaussian_bound(found) < 1.01 * best  # all choices of five from twenty levels
    arctan = grid.arctan(EDM, 7, data_std=STD, sigma_min=0.1, sigma_max=10.0)
    law = {name: divergence(points) for name, points in (("logsnr", LINE), ("least", found), ("arctan", arctan))}
    assert all(law[n] < gaussian_bound(g) for n, g in (("logsnr", LINE), ("least", found), ("arctan", arctan)))
    # the bound's minimiser improves the law itself, but is not the law's own best grid
    np.testing.assert_allclose([law["logsnr"], law["arctan"]], [0.132, 0.067], atol=5e-4)
    assert law["arctan"] < law["least"] < law["logsnr"]


def test_paths_and_sweeps_against_all_grids_of_a_ladder():
    points = levels._ladder(EDM, grid.Grid(LINE.time[:7], LINE.alpha[:7], LINE.sigma[:7]), 2)[0]
    costs = np.array([[gaussian_step(a, b) if a > b else 0.0 for b in points.sigma] for a in points.sigma])
    total = lambda at: sum(costs[i, j] for i, j in itertools.pairwise(at))
    for steps in (2, 3, 5):
        every = [(0, *inner, 12) for inner in itertools.combinations(range(1, 12), steps - 1)]
        found = levels._shortest(costs, steps)
        assert tuple(found) == min(every, key=total)
        at, start = np.arange(steps + 1) * 12 // steps, total(np.arange(steps + 1) * 12 // steps)
        for _ in range(12):
            at = levels._sweep(costs, at)
        assert total(found) <= total(at) < start
        assert np.array_equal(levels._sweep(costs, at), at)


def test_a_sweep_tries_every_rung_between_the_neighbours():
    costs = np.triu(np.random.default_rng(0).uniform(size=(9, 9)), 1)
    at = [0, 2, 5, 8]
    for best in range(
        1, 5
    ):  # the first point's best rung, from the one after its left neighbour to the one before its right
        steered = costs.copy()
        steered[0, best] -= 5
        second = min(range(best + 1, 8), key=lambda j, c=steered, i=best: c[i, j] + c[j, 8])
        assert levels._sweep(steered, np.array(at)).tolist() == [0, best, second, 8]


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_early_stopped_grids_beat_uniform_log_snr_on_bound_and_endpoint(name):
    # measured, DPM-Solver++ 2M in 10 steps, held out: linear .0919 -> .0632 (one sweep), .0326 (judged);
    # vp .0525 -> .0465, .0187. DDIM: .214 -> .178, .130; .155 -> .134, .108. On the minimiser both are worse than at first
    p = PROCESSES[name]
    t = trial(p, grid.uniform if name == "linear" else grid.logsnr)
    points, x0 = grid.logsnr(p, 10), WORLD.sample(jax.random.key(5), (1024,))
    go = jax.jit(lambda table: jnp.sqrt(jnp.mean((solver.run(table, t.d, t.x) - t.target) ** 2)))
    for maker, gain in ((solver.dpm_solver_pp, 2.4), (solver.ddim, 1.35)):
        start = t.held_out(maker(p, points))
        one = learn.klub(maker, points, t.d, x0)
        judged = learn.klub(maker, points, t.d, x0, sweeps=10, judge=lambda table: go(solver.device(table)))
        least = learn.klub(maker, points, t.d, x0, sweeps=None)
        assert np.all(np.diff(judged.losses) <= 0) and one.losses[1] < one.losses[0] / 1.15
        assert least.losses[1] <= judged.losses[-1]
        assert t.held_out(one.table) < start / 1.1
        assert t.held_out(judged.table) < start / gain
        assert t.held_out(least.table) > start


def test_ends_stay_seeds_repeat_and_files_give_tables_back(tmp_path):
    for name, make in (("linear", grid.uniform), ("ve", grid.edm_rho), ("linear_floor", grid.uniform)):
        p = PROCESSES[name]
        d, points = exact.denoiser(WORLD, p), make(p, 5)
        x0 = WORLD.sample(jax.random.key(5), (64,))
        fit = lambda seed, points=points, d=d, x0=x0: learn.klub(solver.ddim, points, d, x0, rungs=30, seed=seed)
        one = fit(1)
        assert same(one.table, fit(1).table) and not np.array_equal(one.losses, fit(2).losses)
        fixed = [0, -1] if points.sigma[-1] > 0 else [0, -2, -1]
        for found, wanted in ((one.table.time, points.time), (one.table.blocks.sigma, points.sigma)):
            assert np.array_equal(np.asarray(found)[fixed], wanted[fixed])
        assert one.table.nfe == 5
        learn.save(tmp_path / "t.npz", one.table, learner="klub")
        assert same(learn.load(tmp_path / "t.npz")[0], one.table)


def test_refusals_name_what_is_wrong():
    d, x0 = exact.denoiser(WORLD, LINEAR), np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match="no point between"):
        learn.klub(solver.ddim, grid.uniform(LINEAR, 2), d, x0)
    with pytest.raises(ValueError, match="sweeps: 0"):
        learn.klub(solver.ddim, grid.uniform(LINEAR, 4), d, x0, sweeps=0)
    with pytest.raises(ValueError, match="process: missing"):
        learn.kl_bound(grid.uniform(LINEAR, 4), lambda x, t, r=None: d(x, t), x0)
    with pytest.raises(ValueError, match="do not lie on process"):
        learn.kl_bound(grid.uniform(VP, 4), d, x0)
