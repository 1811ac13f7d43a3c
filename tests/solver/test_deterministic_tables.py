"""Every deterministic table: exact on delta data, correct at both ends, refusals, finite in float32."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deterministic_cases import ALL, DELTA_FAILS, FROM_NOISE, OFF_GRID, ON_GRID, RAW_TIME

from jaxdiff import exact, process, solver
from jaxdiff.solver import grid

PATHS = {name: getattr(process, name)() for name in ("linear", "vp", "ddpm", "cosine", "subvp", "ve", "edm")}
STRAIGHT = ("linear", "edm")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ALL)
def test_delta_data(name, path):
    p = PATHS[path]
    fails = name in DELTA_FAILS or (name in RAW_TIME and path not in STRAIGHT)
    worst = 0.0
    for steps in (1, 2, 3, 4, 11):
        result = solver.check(ALL[name](p, grid.logsnr(p, steps)))
        worst = max(worst, *result)
        # one or two steps over the whole range multiply rounding by sigma_max/sigma_min, up to 1e6 here
        assert fails or result.ok(1e-9 if steps < 5 else 1e-12), (steps, result)
    assert not fails or worst > 1e-4 or name == "v3_free"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ALL)
def test_both_ends(name, path):
    """Every coefficient is finite, and a start at alpha = 0 is recorded as data."""
    p = PATHS[path]
    for g in (grid.uniform(p, 1), grid.uniform(p, 6)):
        table = ALL[name](p, g)
        block = table.blocks
        for column in (block.A, block.B, block.p, block.q):
            assert column is None or np.all(np.isfinite(column)), name
        assert block.alpha[0] == g.alpha[0] and block.sigma[-1] == 0
        if g.alpha[0] == 0 and name not in FROM_NOISE:
            assert block.p[0] == 1 and (block.q is None or block.q[0] == 0)


@pytest.mark.parametrize("name", OFF_GRID)
def test_explicit_grids_are_refused_where_stages_are_off_them(name):
    g = grid.uniform(PATHS["vp"], 5)
    with pytest.raises(ValueError, match=r"grid: .* needs"):
        OFF_GRID[name](PATHS["vp"], grid.explicit(g.alpha, g.sigma, 1000 * g.time))
    with pytest.raises(ValueError, match=r"grid: .* needs"):
        OFF_GRID[name](PATHS["linear"], grid.explicit(g.alpha, g.sigma, g.time))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ALL)
def test_explicit_grids_on_the_path_give_the_same_table(name, path):
    g = grid.logsnr(PATHS[path], 9)
    a = ALL[name](PATHS[path], g)
    b = ALL[name](PATHS[path], grid.explicit(g.alpha, g.sigma, g.time))
    for x, y in zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ON_GRID)
def test_other_paths_explicit_grids_give_their_table(name):
    """The arrays alone decide, whatever process carries them; DC-Solver also reads the times."""
    g = grid.uniform(PATHS["vp"], 9)
    a = ON_GRID[name](PATHS["vp"], g)
    b = ON_GRID[name](PATHS["linear"], grid.explicit(g.alpha, g.sigma, 500 * g.time))
    blocks = [jax.tree_util.tree_leaves(t.blocks) for t in (a, b)]
    for x, y in zip(*blocks, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


def test_costs():
    p = PATHS["vp"]
    for n in range(1, 24):
        g = grid.logsnr(p, n)
        for order in (1, 2, 3):
            assert solver.dpm_solver(p, g, order=order).nfe == n
            assert solver.dpm_solver_pp(p, g, order=order, method="fast").nfe == n
        assert solver.unipc(p, g, order=3).nfe == n and solver.lms(p, g).nfe == n
    g = grid.from_times(p, np.linspace(0.9, 0.1, 11))
    assert solver.dpm_solver(p, g, method="singlestep").nfe == 30
    assert solver.f_pndm(p, g).nfe == 19 and solver.pndm(p, g, order=2).nfe == 11
    assert (
        solver.dpm_solver(p, grid.uniform(p, 10), method="singlestep").nfe == 28
    )  # the step to sigma = 0 is one call
    assert np.shape(solver.unipc(p, g, order=3).blocks.B)[1] == 4 and np.shape(solver.unipc(p, g).blocks.A)[1] == 1


@pytest.mark.parametrize(
    "make, words",
    [
        (functools.partial(solver.dpm_solver, method="singlestep", nfe=20), "nfe: 20.*fast"),
        (functools.partial(solver.dpm_solver, order=4), "order: 4.*1, 2, 3"),
        (functools.partial(solver.dpm_solver_pp, order=4), "order: 4.*1, 2, 3"),
        (functools.partial(solver.dpm_solver_pp, order=2.0), "order: 2.0 given"),
        (
            functools.partial(solver.dpm_solver, method="fast", lower_order_final="maybe"),
            "lower_order_final: 'maybe'",
        ),
        (functools.partial(solver.edm, s_noise=float("inf")), "s_noise: 0.0, 0.0, inf, inf given"),
        (functools.partial(solver.dpm_solver, method="quick"), "method: 'quick'.*fast"),
        (functools.partial(solver.dpm_solver_pp, variant="heum"), "variant: 'heum'.*lagrange"),
        (functools.partial(solver.unipc, variant="bh3"), "variant: 'bh3'.*bh1"),
        (functools.partial(solver.unipc, corrector=[True, False]), "corrector: 2 values"),
        (functools.partial(solver.unipc, lower_order_final="maybe"), "lower_order_final: 'maybe'.*auto"),
        (functools.partial(solver.dc_solver, compensation=[1.0]), "compensation: 1 values"),
        (functools.partial(solver.dc_solver, compensation=float("nan")), "compensation: nan given"),
        (functools.partial(solver.conjugate, rate=float("inf")), "rate: inf given"),
        (functools.partial(solver.deis, variable="s"), "variable: 's'.*rho"),
        (functools.partial(solver.lms, order=5), "order: 5"),
        (functools.partial(solver.pndm, order=3), "order: 3.*2, 4"),
        (functools.partial(solver.ghvb, order=0), "order: 0"),
        (functools.partial(solver.heavy_ball, beta=0), "beta: 0"),
        (functools.partial(solver.exp_rk, tableau="rk"), "tableau: 'rk'.*res2"),
        (functools.partial(solver.dpm_solver_v3, l=[1.0, 2.0]), "l: shape"),
        (functools.partial(solver.dpm_solver_v3, l=[1.0, 2.0], lam=[1.0, 0.0]), "lam: "),
        (functools.partial(solver.usf, steps=[{"order": 1}]), "steps: 1 given"),
        (functools.partial(solver.velocity_ab, clock="time"), "clock: 'time'.*flow, angle, rosenbrock"),
        (functools.partial(solver.velocity_ab, order=5), "order: 5"),
        (functools.partial(solver.edm, clock="rosenbrock"), "clock: 'rosenbrock'.*time, rho"),
        (functools.partial(solver.edm, variant="euler"), "variant: 'euler'.*jump, public"),
        (functools.partial(solver.euler_maruyama, temperature=0), "temperature: 0"),
        (functools.partial(solver.euler_maruyama, eta=-1), "eta: -1"),
        (functools.partial(solver.predictor_corrector, delta=1.5), "delta: 1.5"),
        (functools.partial(solver.predictor_corrector, corrections=0.5), "corrections: 0.5"),
        (functools.partial(solver.usf, steps={"order": 1, "prediction": "x0"}), "prediction: 'x0'"),
    ],
)
def test_errors_name_the_argument(make, words):
    with pytest.raises(ValueError, match=words):
        make(PATHS["vp"], grid.uniform(PATHS["vp"], 5))


def test_options_are_in_the_signatures():
    """help() and a config's check read them there; a maker that passes on keywords it does not name has none."""
    for make in (*solver.SOLVERS.values(), *grid.GRIDS.values()):
        assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(make).parameters.values()), make


def finite(paths, counts, names):
    """Largest absolute value over all runs in float32: one compile for each path."""
    for path in paths:
        p = PATHS[path]
        world = exact.GaussianMixture([0.3, 0.5, 0.2], [-1.5, 0.4, 2.0], [0.35**2, 0.25**2, 0.5**2])
        d = exact.denoiser(world, p)
        tables = [ALL[name](p, make(p, n)) for name in names for n in counts for make in (grid.uniform, grid.logsnr)]
        stacked = solver.stack(tables)
        z = jnp.linspace(-3, 3, 9, dtype=jnp.float32)[:, None]
        start = jnp.asarray(np.array([t.blocks.start_scale for t in tables]), jnp.float32)
        run = jax.jit(jax.vmap(lambda table, x: solver.run(table, d, x)))  # noqa: B023
        ends = run(stacked, start[:, None, None] * z)
        assert ends.dtype == jnp.float32
        bad = [i for i in range(len(tables)) if not bool(jnp.all(jnp.isfinite(ends[i])))]
        assert not bad, (path, [names[i // (2 * len(counts))] for i in bad])


@pytest.mark.parametrize("path", ["linear", "vp", "edm"])
def test_finite_in_float32(path):
    finite([path], (1, 2, 3, 7), list(ALL))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_finite_in_float32_up_to_200(path):
    names = [name for name in ALL if name != "dc"]  # for few steps: carries all its history
    finite([path], (1, 2, 4, 9, 24, 50), names)
    finite([path], (200,), names)


@pytest.mark.parametrize("name", ["dpm_solver_pp_3m", "unipc_3_bh1", "lms", "dpm_solver_3s", "ghvb", "usf"])
def test_float32_follows_float64(name):
    p = PATHS["vp"]
    world = exact.GaussianMixture([0.3, 0.5, 0.2], [-1.5, 0.4, 2.0], [0.35**2, 0.25**2, 0.5**2])
    table = ALL[name](p, grid.logsnr(p, 12))
    x = np.random.default_rng(0).normal(size=(256, 1))
    ends = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            y = solver.run(table, exact.denoiser(world, p), jnp.asarray(x, jnp.float64 if x64 else jnp.float32))
            ends.append(np.asarray(y, np.float64))
    assert np.sqrt(np.mean((ends[0] - ends[1]) ** 2) / np.mean(ends[1] ** 2)) < 2e-5
