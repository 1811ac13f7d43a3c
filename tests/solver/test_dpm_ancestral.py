"""Single-step DPM-Solver with fresh noise after each step: the published dpm_fast, its law, its order, its identities."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import MIXTURE, PROCESSES

from jaxdiff import exact, process, solver
from jaxdiff.solver import grid
from jaxdiff.solver.grid import explicit, from_times
from jaxdiff.solver.order import posterior

MAKERS = {"noise": solver.dpm_solver, "data": solver.dpm_solver_pp}
X = np.linspace(-1.5, 2.0, 7)
DRAWS = np.random.default_rng(4).normal(size=(4, 7))


def published(calls, eta, s_noise, low=0.02, high=20.0):
    """k-diffusion's dpm_fast written out in sigma = e^-t, with its analytic denoiser; also the grid and the rows of noise."""
    blocks = calls // 3 + 1
    orders = [3] * (blocks - 2) + [2, 1] if calls % 3 == 0 else [3] * (blocks - 1) + [calls % 3]
    ends = np.linspace(-math.log(high), -math.log(low), blocks + 1)
    eps = lambda x, t: posterior(MIXTURE, x, 1.0, math.exp(-t))[1]
    x, points = high * X, []
    for i, order in enumerate(orders):
        t, to = ends[i], ends[i + 1]
        points += [t + (to - t) * j / order for j in range(order)]
        s, level = math.exp(-t), math.exp(-to)
        up = min(level, eta * math.sqrt(level**2 * (s**2 - level**2) / s**2))
        down = math.sqrt(level**2 - up**2)
        goal = min(ends[-1], -math.log(down)) if down > 0 else ends[-1]
        h, e = goal - t, eps(x, t)
        grow = lambda r, t=t, h=h: math.exp(-(t + r * h)) * math.expm1(r * h)
        if order == 1:
            step = grow(1) * e
        elif order == 2:
            middle = eps(x - grow(1 / 2) * e, t + h / 2)
            step = grow(1) * middle
        else:
            u1 = x - grow(1 / 3) * e
            d1 = eps(u1, t + h / 3) - e
            u2 = x - grow(2 / 3) * e - 2 * math.exp(-(t + 2 / 3 * h)) * (math.expm1(2 / 3 * h) / (2 / 3 * h) - 1) * d1
            d2 = eps(u2, t + 2 / 3 * h) - e
            step = grow(1) * e + 1.5 * math.exp(-goal) * (math.expm1(h) / h - 1) * d2
        noise = math.sqrt(max(level**2 - math.exp(-2 * goal), 0.0)) if i + 1 < len(orders) else 0.0
        x = x - step + s_noise * noise * DRAWS[i]
    return x, explicit(np.ones(calls + 1), np.exp(-np.append(points, ends[-1])), process=process.edm()), orders


@jax.jit
def run(table, x, noise):
    hook = solver.hooks(noise=lambda keys, row, y: noise[row.k][:, None])
    return solver.run(table, exact.denoiser(MIXTURE, process.edm()), x[:, None], hooks=hook)[:, 0]


@pytest.mark.parametrize("calls", [7, 8, 9])
def test_published_fast_sampler(calls):
    """In float64 through the executor; eta 1.6 lets its noise be cut at the last level."""
    for eta, s_noise in ((0.4, 1.0), (1.0, 1.007), (1.6, 1.0)):
        told, g, orders = published(calls, eta, s_noise)
        table = solver.dpm_solver(process.edm(), g, eta=eta, s_noise=s_noise)
        assert table.nfe == calls and table.blocks.C[-1] == 0 and np.count_nonzero(table.blocks.C) == len(orders) - 1
        noise = np.zeros((calls, 7))
        noise[np.cumsum(orders) - 1] = DRAWS[: len(orders)]
        with jax.enable_x64(True):
            got = run(table, 20.0 * X, jnp.asarray(noise))
        np.testing.assert_allclose(got, told, rtol=0, atol=1e-10)


def same(one, two):
    leaves = [jax.tree_util.tree_flatten(table) for table in (one, two)]
    assert leaves[0][1] == leaves[1][1]
    for a, b in zip(leaves[0][0], leaves[1][0]):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", MAKERS)
def test_eta_zero_is_the_table_without_noise(form):
    for path, method, order in itertools.product(("linear", "vp", "edm"), ("fast", "singlestep"), (1, 2, 3)):
        p = PROCESSES[path]
        for g in (grid.uniform(p, 7), from_times(p, [0.9, 0.7, 0.65, 0.3, 0.1])):
            plain, none = (
                MAKERS[form](p, g, method=method, order=order, **k) for k in ({}, {"eta": 0.0, "s_noise": 2.0})
            )
            same(plain, none)
            assert plain.blocks.C is None
            # and what eta -> 0 tends to
            near = MAKERS[form](p, g, method=method, order=order, eta=1e-7)
            np.testing.assert_allclose(solver.unroll(near).W, solver.unroll(plain).W, rtol=0, atol=1e-9 * plain.rows)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_ancestral_family_is_its_low_orders(eta):
    """On grids that end at sigma = 0, of paths that do: there no level stops a step."""
    for path in ("linear", "vp", "cosine", "subvp", "edm"):
        p = PROCESSES[path]
        for g in (grid.uniform(p, 7), grid.edm_rho(p, 12)):
            for ours, theirs in (
                (solver.dpm_solver(p, g, order=1, eta=eta), solver.euler_ancestral),
                (solver.dpm_solver(p, g, order=2, method="singlestep", eta=eta), solver.dpm2_ancestral),
                (solver.dpm_solver_pp(p, g, order=2, method="singlestep", eta=eta), solver.dpmpp_2s_ancestral),
            ):
                one, two = solver.unroll(ours), solver.unroll(theirs(p, g, eta=eta))
                scale = max(1.0, float(np.max(np.abs(one.W))))
                np.testing.assert_allclose(one.W, two.W, rtol=0, atol=1e-11 * scale)
                np.testing.assert_allclose(one.N**2, two.N**2, rtol=0, atol=1e-11 * max(1.0, float(np.max(two.N**2))))


@pytest.mark.parametrize("path", PROCESSES)
def test_law_on_delta_data_and_stages_on_the_path(path):
    p = PROCESSES[path]
    for g in (grid.uniform(p, 1), grid.uniform(p, 2), grid.logsnr(p, 11), grid.edm_rho(p, 16)):
        cases = itertools.product(
            MAKERS.values(), ("fast", "singlestep"), (2, 3), (0.4, 1.0, 1.5), ("midpoint", "lagrange")
        )
        for make, method, order, eta, variant in cases:
            table = make(p, g, method=method, order=order, eta=eta, variant=variant)
            assert solver.check(table).ok(1e-10), (len(g), method, order, eta, variant)
            assert 0 <= table.tau.min() and table.tau.max() <= p.t_max * (1 + 1e-12)
            assert method == "singlestep" or eta > 1 or table.nfe == len(g)


@pytest.mark.parametrize("form", MAKERS)
def test_weak_order_is_that_of_the_step_without_noise(form):
    """3 as well, which prediction history never has with noise; fast tables of 3 m + 2 points have no first-order step."""
    p = PROCESSES["cosine"]
    for order, eta in itertools.product((1, 2, 3), (0.5, 1.0)):
        make = lambda p, g, order=order, eta=eta: MAKERS[form](p, g, order=order, method="singlestep", eta=eta)
        assert abs(solver.weak_order(make, p).slope - order) < 0.06
    fast = lambda p, g: MAKERS[form](p, g, order=3, method="fast", eta=0.5)
    result = solver.weak_order(fast, p, steps=(95, 185))
    assert abs(result.slope - 3) < 0.25, result


def test_s_noise_leaves_the_law():
    p = PROCESSES["vp"]
    result = solver.check(solver.dpm_solver(p, grid.logsnr(p, 11), eta=1.0, s_noise=1.01))
    assert result.mean_error < 1e-10 < 1e-4 < result.variance_error


@pytest.mark.parametrize("path", ["linear", "vp", "ve", "edm"])
def test_finite_in_float32(path):
    p = PROCESSES[path]
    tables = [
        make(p, grid.logsnr(p, n), method=method, order=3, eta=eta)
        for make in MAKERS.values()
        for method, n in (("fast", 20), ("singlestep", 6))
        for eta in (0.5, 1.0)
    ]
    x = float(tables[0].blocks.start_scale) * jnp.linspace(-3, 3, 9, dtype=jnp.float32)[:, None]
    d = exact.denoiser(MIXTURE, p)
    ends = jax.jit(jax.vmap(lambda table: solver.run(table, d, x, jax.random.key(0))))(solver.stack(tables))
    assert ends.dtype == jnp.float32 and np.all(np.isfinite(ends)) and np.max(np.abs(ends[4:])) < 50


def test_refusals_name_what_is_wrong():
    p, g = PROCESSES["vp"], grid.uniform(PROCESSES["vp"], 8)
    student = process.vp(noise=process.student_t(20))
    off = explicit(g.alpha, 0.9 * g.sigma, g.time)
    for build, message in (
        (lambda: solver.dpm_solver(p, g, eta=-0.5), "eta: -0.5 given; dpm_solver() needs 0 <= eta < inf"),
        (lambda: solver.dpm_solver(p, g, eta=1.0, s_noise=-1.0), "s_noise: -1.0 given; dpm_solver()"),
        (
            lambda: solver.dpm_solver_pp(p, g, eta=1.0),
            "eta: 1.0 given; dpm_solver_pp() with method 'multistep' draws no",
        ),
        (lambda: solver.dpm_solver(student, g.time, eta=1.0), "process: dpm_solver() with eta > 0 draws fresh noise"),
        (
            lambda: solver.dpm_solver(p, off, eta=1.0),
            "grid: dpm_solver() with eta > 0 needs points between the grid's",
        ),
    ):
        with pytest.raises(ValueError) as error:
            build()
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert solver.dpm_solver(p, off, order=1, eta=1.0).nfe == 8  # no stages, no path needed
