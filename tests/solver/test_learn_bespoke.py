"""Bespoke tables: the identity is the base, a path can be turned into another, order stays, training gains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learn_cases import same, trial
from solver_cases import PROCESSES, middle

from jaxdiff import exact, solver
from jaxdiff.solver import grid, learn

LINEAR, VP = PROCESSES["linear"], PROCESSES["vp"]
BASES = {"euler": solver.euler, "midpoint": learn.midpoint, "heun": solver.heun, "rk4": solver.rk4}


@pytest.mark.parametrize("name, make", [("linear", grid.uniform), ("vp", grid.logsnr), ("ve", grid.edm_rho)])
@pytest.mark.parametrize("base", BASES)
def test_the_identity_is_the_base_to_the_last_bit(name, make, base):
    p = PROCESSES[name]
    table = BASES[base](p, make(p, 5))
    tables = learn.scale_time(table, p)
    assert same(tables.build(tables.start), table)
    n, evaluated, scaled = (len(np.unique(v)) for v in (table.time, table.tau[:-1], table.time[:-1]))
    sizes = {"time": n - 1, "pace": evaluated, "scale": scaled - 1, "slope": evaluated}
    assert {k: v.size for k, v in tables.start.items()} == sizes
    rng = np.random.default_rng(0)
    moved = tables.build({k: v + 0.05 * rng.standard_normal(v.shape) for k, v in tables.start.items()})
    assert not same(moved, table)
    assert np.array_equal(moved.time[[0, -1]], table.time[[0, -1]])
    assert np.all(np.diff(np.unique(-moved.time)) > 0)


def test_parameters_are_as_many_as_published():
    # 8n - 1 for RK2 and 4n - 1 for RK1, of which the softmax of the gaps takes one more
    for base, count in (("midpoint", 8), ("euler", 4)):
        tables = learn.scale_time(BASES[base](LINEAR, middle(LINEAR, 6)), LINEAR)
        assert sum(v.size for v in tables.start.values()) - 1 == count * 6 - 1


def smooth(table, p, time, scale, h=1e-6):
    """The member of ``scale_time(table, p)`` for functions time(r), scale(r) of the base's time, by central differences."""
    tables = learn.scale_time(table, p)
    nodes = -np.unique(-table.time)
    rate = lambda f, r: (f(r + h) - f(r - h)) / (2 * h)
    at = nodes[: tables.start["pace"].size]
    gaps = -np.diff(nodes)
    width = np.append(gaps, gaps[-1])[: at.size]
    return tables.build(
        {
            "time": np.log(-np.diff(time(nodes)) / gaps),
            "pace": np.log(rate(time, at)),
            "scale": np.log(scale(nodes[1 : tables.start["scale"].size + 1]) / scale(nodes[0])),
            "slope": rate(scale, at) / scale(nodes[0]) * width,
        }
    )


@pytest.mark.parametrize("base", BASES)
def test_a_linear_path_scaled_and_retimed_is_the_vp_path(base):
    # x_vp(r) = (alpha + sigma)(r) x_linear(sigma/(alpha + sigma)): the base on VP, state by state
    line = middle(VP, 5)
    own = lambda r: VP.coefficients(np.clip(np.asarray(r, np.float64), 0, 1))
    when = lambda r: own(r).sigma / (own(r).alpha + own(r).sigma)
    first, last = when(line.time[0]), when(line.time[-1])
    back = lambda r: line.time[0] + (r - first) * (line.time[-1] - line.time[0]) / (last - first)
    time, scale = lambda r: when(back(r)), lambda r: own(back(r)).alpha + own(back(r)).sigma
    start = BASES[base](LINEAR, np.linspace(first, last, 6))
    made, wanted = (solver.unroll(t, rows=True) for t in (smooth(start, LINEAR, time, scale), BASES[base](VP, line)))
    nodes = BASES[base](VP, line).time[1:]
    s, s0 = (v.alpha + v.sigma for v in (own(nodes), own(line.time[0])))
    np.testing.assert_allclose(made.a * s / s0, wanted.a, rtol=1e-7)
    np.testing.assert_allclose(made.W * s[:, None], wanted.W, atol=1e-7)


@pytest.mark.parametrize("base, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_smooth_scales_and_clocks_keep_the_order(base, order):
    def make(p, points):
        table = BASES[base](p, points)
        first, last = points.time[0], points.time[-1]
        # one at both ends, slope between
        time = lambda r: r + 0.15 * (first - last) * np.sin(np.pi * (r - last) / (first - last)) ** 2
        return smooth(table, p, time, lambda r: np.exp(0.4 * np.sin(3 * r)))

    found = solver.order(make, VP, steps=(64, 128))
    assert abs(found.slope - order) < 0.05  # measured 1.001, 1.969, 1.985, 3.962


def test_the_bound_bounds_and_has_the_published_factors():
    # Gaussian data: the velocity is linear in x, so that its Lipschitz constant is known
    world, n = exact.Gaussian(0.4, 0.3), 6
    d, line = exact.denoiser(world, LINEAR), np.linspace(0.9, 0.1, 7)
    t = np.linspace(0.1, 0.9, 500)
    c = LINEAR.coefficients(t)
    slope = np.abs((c.da * c.alpha * 0.3 + c.ds * c.sigma) / (c.alpha**2 * 0.3 + c.sigma**2)).max()
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        x = 0.1 * 0.4 + np.sqrt(0.01 * 0.3 + 0.81) * jax.random.normal(jax.random.key(0), (512,), jnp.float64)
        truth = learn.trajectory(solver.heun(LINEAR, np.linspace(0.9, 0.1, 2001)), d, x)
        go = jax.jit(lambda table: solver.run(table, d, x))
        for base in ("euler", "midpoint"):
            table = BASES[base](LINEAR, line)
            tables = learn.scale_time(table, LINEAR)
            moved = tables.build({k: v + 0.1 * rng.standard_normal(v.shape) for k, v in tables.start.items()})
            bound = jax.jit(learn.step_bound(table, d, float(slope)))
            for made, slack in ((table, 2), (moved, 20)):  # measured 1.4, 1.8 and 4, 16
                error = float(jnp.sqrt(jnp.mean((go(solver.device(made)) - truth.states[-1]) ** 2)))
                assert error < float(bound(solver.device(made), truth)) < slack * error
        # errors of one step each, and the published factors at s' = 0
        table = learn.midpoint(LINEAR, line)
        c, z = LINEAR.coefficients(line), 0.8 / n * 2.0
        states = truth.at(c.alpha, c.sigma)
        step = jax.jit(lambda table, x: solver.run(table, d, x))
        errors = []
        for i in range(n):
            end = step(solver.device(learn.midpoint(LINEAR, line[i : i + 2])), states[i])
            errors.append(float(jnp.sqrt(jnp.mean((end - states[i + 1]) ** 2))))
        L = 1 + z * (1 + z / 2)
        wanted = sum(e * L ** (n - 1 - i) for i, e in enumerate(errors))
        found = jax.jit(learn.step_bound(table, d, 2.0))(solver.device(table), truth)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_trained_on_its_bound_it_beats_its_base_on_held_out_starts():
    # measured, 9 evaluations: .0581 -> .0079 on the bound (7.3x), -> .0039 on the endpoint (15x)
    t = trial(LINEAR, grid.uniform)
    base = learn.midpoint(LINEAR, grid.uniform(LINEAR, 5))
    found = learn.bespoke(base, t.d, t.x, t.reference, steps=300, rate=2e-2)
    assert found.table.nfe == base.nfe == 9
    assert found.losses.min() < found.losses[0] / 2.8
    assert t.held_out(found.table) < t.held_out(base) / 6
    ends = learn.endpoint(learn.scale_time(base, LINEAR), t.d, t.x, t.target, steps=300, rate=2e-2)
    assert t.held_out(ends.table) < t.held_out(found.table) / 1.7


def test_one_seed_gives_one_table_and_files_give_it_back(tmp_path):
    t = trial(LINEAR, grid.uniform)
    base = solver.euler(LINEAR, grid.uniform(LINEAR, 3))
    fit = lambda seed: learn.bespoke(base, t.d, t.x, t.reference, batch=16, steps=20, seed=seed)
    one, again = fit(1), fit(1)
    assert same(one.table, again.table) and np.array_equal(one.losses, again.losses)
    assert not np.array_equal(one.losses, fit(2).losses)
    one = one.table
    learn.save(tmp_path / "t.npz", one, learner="bespoke")
    again, about = learn.load(tmp_path / "t.npz")
    assert about == {"learner": "bespoke"} and same(again, one)
    assert t.held_out(again) == t.held_out(one)


def test_refusals_name_what_is_wrong():
    t = trial(LINEAR, grid.uniform)
    points = grid.uniform(LINEAR, 4)
    with pytest.raises(ValueError, match="record the velocity"):
        learn.scale_time(solver.ddim(LINEAR, points), LINEAR)
    with pytest.raises(ValueError, match="did you mean 'scale'"):
        learn.scale_time(solver.euler(LINEAR, points), LINEAR, train=("scales",))
    with pytest.raises(ValueError, match="none given"):
        learn.scale_time(solver.euler(LINEAR, points), LINEAR, train=())
    with pytest.raises(ValueError, match="reference: ends at"):
        learn.bespoke(solver.euler(LINEAR, points), t.d, t.x, solver.heun(LINEAR, np.linspace(1, 0.1, 9)))
    with pytest.raises(ValueError, match="process: missing"):
        learn.bespoke(solver.euler(LINEAR, points), lambda x, s, r=None: t.d(x, s), t.x, t.reference)
    base = solver.euler(LINEAR, points)
    B = np.pad(base.blocks.B, ((0, 0), (0, 1)), constant_values=0.1)
    multistep = dataclasses.replace(base, blocks=dataclasses.replace(base.blocks, B=B))
    with pytest.raises(ValueError, match="one-step"):
        learn.step_bound(multistep, t.d)
