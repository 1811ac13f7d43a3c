"""Tables learned row by row: trajectories, least squares against closed forms, DC-Solver's ratios."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learn_cases import same, trial
from solver_cases import PROCESSES

from jaxdiff import exact, solver
from jaxdiff.solver import grid, learn

LINEAR, EDM, VP = (PROCESSES[name] for name in ("linear", "edm", "vp"))


@pytest.mark.parametrize("name, make", [("linear", grid.uniform), ("vp", grid.logsnr), ("edm", grid.edm_rho)])
def test_trajectories_are_exact_at_their_points_and_second_order_between(name, make):
    p, world, errors = PROCESSES[name], exact.Gaussian(0.4, 0.3), []
    flow = exact.gaussian_flow(world, p)
    with jax.enable_x64(True):
        for count in (50, 100):
            points = make(p, count)
            a, s = points.alpha, points.sigma
            x = a[0] * 0.4 + np.sqrt(a[0] ** 2 * 0.3 + s[0] ** 2) * np.linspace(-1.0, 1.0, 5)
            go = jax.jit(
                jax.vmap(lambda end_a, end_s, flow=flow, x=x, a=a, s=s: flow.between(x, a[0], s[0], end_a, end_s))
            )
            truth = learn.Trajectory(jnp.asarray(a), jnp.asarray(s), go(a, s))
            np.testing.assert_allclose(truth.at(a, s), truth.states, atol=1e-12)
            between = points.time[:-1] + 0.3 * np.diff(points.time)
            c = p.coefficients(between)
            errors.append(np.abs(np.asarray(truth.at(c.alpha, c.sigma)) - go(c.alpha, c.sigma)).max())
    assert 3.9 < errors[0] / errors[1] < 4.1  # measured 4.000, 4.014, 4.020
    assert errors[1] < 3e-4


@pytest.mark.parametrize("process", [LINEAR, VP], ids=["linear", "vp"])
def test_one_free_coefficient_a_row_is_the_one_that_gaussian_data_asks_for(process):
    # two records under the sum rules leave one number, and one number makes a row exact on data N(m, v):
    # u_s = A u_t + (b - beta) g_t u_t + beta g_r u_r with u = y - alpha m, g = alpha v/(alpha^2 v + sigma^2)
    m, v = 0.4, 0.3
    world = exact.Gaussian(m, v)
    d, line = exact.denoiser(world, process), np.linspace(0.9, 0.1, 9)
    base = solver.ddim(process, line)
    c = process.coefficients(line)
    spread = np.sqrt(c.alpha**2 * v + c.sigma**2)
    with jax.enable_x64(True):
        x = c.alpha[0] * m + spread[0] * jnp.linspace(-1.0, 1.0, 7)
        accurate = solver.rk4(process, np.linspace(0.9, 0.1, 161))
        found = learn.least_squares(base, d, x, accurate, records=2)
        end = np.asarray(solver.run(found.table, d, x))
    exact_end = c.alpha[-1] * m + spread[-1] * np.linspace(-1.0, 1.0, 7)
    np.testing.assert_allclose(end, exact_end, atol=1e-7)
    u, g = spread / spread[0], c.alpha * v / spread**2
    A = c.sigma[1:] / c.sigma[:-1]
    b = c.alpha[1:] - A * c.alpha[:-1]
    u[1] = A[0] + b[0] * g[0]  # the first row has nothing free
    beta = (u[2:] - A[1:] * u[1:-1] - b[1:] * g[1:-1] * u[1:-1]) / (g[:-2] * u[:-2] - g[1:-1] * u[1:-1])
    np.testing.assert_allclose(found.table.blocks.B[1:, 1], beta, rtol=1e-5)
    np.testing.assert_allclose(found.table.blocks.B[1:, 0], b[1:] - beta, rtol=1e-5)
    assert solver.check(found.table).ok(1e-10)


@pytest.mark.parametrize("local", [False, True])
def test_free_coefficients_make_every_step_exact_on_gaussian_data(local):
    # with A and B both free, the flow u_s = r u_t is in the span of y and d = m + g u: the first row is exact too
    m, v = 0.4, 0.3
    d, line = exact.denoiser(exact.Gaussian(m, v), VP), np.linspace(0.9, 0.1, 6)
    c = VP.coefficients(line)
    spread, z = np.sqrt(c.alpha**2 * v + c.sigma**2), np.linspace(-1.0, 1.0, 7)
    with jax.enable_x64(True):
        x = c.alpha[0] * m + spread[0] * jnp.asarray(z)
        accurate = solver.rk4(VP, np.linspace(0.9, 0.1, 161))
        options = {"train": ("A", "B"), "consistent": False, "local": local, "cutoff": 1e-12}
        found = learn.least_squares(solver.ddim(VP, line), d, x, accurate, **options)
        _, kept = solver.run(found.table, d, x, record=("states",))
    assert found.losses.max() < 1e-8
    np.testing.assert_allclose(kept["states"], (c.alpha * m + spread * z[:, None]).T[1:], atol=1e-7)


def test_a_reference_that_is_the_table_changes_nothing():
    t = trial(LINEAR, grid.uniform)
    for base in (solver.dpm_solver_pp(LINEAR, grid.uniform(LINEAR, 6)), solver.heun(LINEAR, grid.uniform(LINEAR, 6))):
        found = learn.least_squares(base, t.d, t.x, base, records=3, consistent=bool(base.out.all()))
        assert np.abs(found.table.blocks.B[:, : base.blocks.B.shape[1]] - base.blocks.B).max() < 1e-5
        assert found.losses.max() < 1e-6  # measured 2.6e-6, 7e-8
    one = solver.ddim(LINEAR, grid.uniform(LINEAR, 6))
    found = learn.least_squares(one, t.d, t.x, one, records=2, local=True)
    assert np.abs(found.table.blocks.B[:, 1]).max() < 1e-5


def test_least_squares_cuts_the_error_on_held_out_starts():
    # measured, edm, 8 evaluations, from DDIM's .217: two records .079, four .044, two states and three records .0175
    t = trial(EDM, grid.edm_rho)
    base = solver.ddim(EDM, grid.edm_rho(EDM, 8))
    at = t.held_out(base)
    ends = {}
    for name, options in {
        "two": {"records": 2},
        "four": {"records": 4},
        "states": {"records": 3, "states": 2, "train": ("A", "B")},
    }.items():
        found = learn.least_squares(base, t.d, t.x, t.reference, **options)
        assert found.table.nfe == 8 and solver.check(found.table).ok(1e-9) and found.losses.shape == (8,)
        ends[name] = t.held_out(found.table)
    assert ends["two"] < at / 2.4 and ends["four"] < at / 4 and ends["states"] < at / 10
    # towards where ten steps of Heun lead from the state a step starts from, as published: .088
    g = grid.edm_rho(EDM, 8).time
    steps = np.append((g[:-1, None] + np.diff(g)[:, None] * np.arange(10) / 10).ravel(), 0.0)
    found = learn.least_squares(base, t.d, t.x, solver.heun(EDM, steps), records=2, local=True)
    assert t.held_out(found.table) < at / 2.2
    # from Heun in rho, whose two slopes a step are weighed apart: .517 -> .052, 11 evaluations
    heun = solver.heun(EDM, grid.edm_rho(EDM, 6), clock="rho")
    assert t.held_out(learn.least_squares(heun, t.d, t.x, t.reference, records=3).table) < t.held_out(heun) / 8


@pytest.mark.parametrize(
    "options", [{}, {"order": 3}, {"variant": "bh1"}, {"prediction": "noise"}, {"corrector": False}]
)
def test_ratios_of_one_are_unipc_and_traced_tables_are_the_makers(options):
    for p, points in ((LINEAR, grid.uniform(LINEAR, 6)), (VP, np.linspace(0.9, 0.1, 7)), (EDM, grid.edm_rho(EDM, 6))):
        if options.get("prediction") and points is not None and p is LINEAR:
            points = np.linspace(0.9, 0.1, 7)
        tables = learn.compensated(p, points, **options)
        assert same(tables.build(tables.start), solver.unipc(p, points, **options))
        ratios = 1 + 0.3 * np.random.default_rng(0).standard_normal(tables.start["compensation"].shape)
        every = np.concatenate(
            [np.ones(len(points if isinstance(points, grid.Grid) else points[1:]) - ratios.size), ratios]
        )
        wanted = solver.dc_solver(p, points, compensation=every, **options)
        assert same(tables.build({"compensation": ratios}), wanted)
        with jax.enable_x64(True):
            made = solver.unroll(tables.build({"compensation": jnp.asarray(ratios)}))
        wanted = solver.unroll(wanted)
        np.testing.assert_allclose(made.W, wanted.W, atol=1e-12 * np.abs(wanted.W).max())
        np.testing.assert_allclose(made.a, wanted.a, atol=1e-14)


def test_learned_ratios_lower_the_error_on_held_out_starts():
    # measured, linear, 5 evaluations: UniPC .0703 -> .0417 step by step; 8: .0370 -> .0173, and .0071 on the endpoint
    t = trial(LINEAR, grid.uniform)
    for steps, gain in ((5, 1.6), (8, 2.0)):
        tables = learn.compensated(LINEAR, grid.uniform(LINEAR, steps))
        found = learn.dc(tables, t.d, t.x[:64], t.reference)
        assert found.table.nfe == steps
        assert np.abs(found.parameters["compensation"] - 1).max() <= 1
        assert t.held_out(found.table) < t.held_out(tables.build(tables.start)) / gain
    again = learn.dc(tables, t.d, t.x[:64], t.reference)
    assert same(again.table, found.table)
    ends = learn.endpoint(tables, t.d, t.x, t.target, steps=200, rate=2e-2)
    assert t.held_out(ends.table) < t.held_out(found.table) / 2


def test_a_greedy_ratio_is_the_best_for_its_own_state():
    t = trial(LINEAR, grid.uniform)
    tables = learn.compensated(LINEAR, grid.uniform(LINEAR, 4))
    found = learn.dc(tables, t.d, t.x[:64], t.reference, reach=2.0)
    truth = learn.trajectory(t.reference, t.d, t.x[:64]).at(found.table.blocks.alpha, found.table.blocks.sigma)
    go = jax.jit(lambda table: solver.run(table, t.d, t.x[:64], record=("states",))[1]["states"])
    row = 4 - found.losses.size  # the first step with three predictions

    def error(ratio):
        table = tables.build({"compensation": np.append(ratio, found.parameters["compensation"][1:])})
        return float(jnp.sqrt(jnp.mean((go(solver.device(table))[row] - truth[row + 1]) ** 2)))

    best = found.parameters["compensation"][0]
    np.testing.assert_allclose(error(best), found.losses[0], rtol=1e-3)
    assert all(error(best) <= error(r) for r in np.linspace(-0.9, 2.9, 20))


def test_files_give_row_by_row_tables_back(tmp_path):
    t = trial(LINEAR, grid.uniform)
    base = solver.ddim(LINEAR, grid.uniform(LINEAR, 5))
    for name, found in {
        "dc": learn.dc(learn.compensated(LINEAR, grid.uniform(LINEAR, 5)), t.d, t.x[:16], t.reference),
        "iia": learn.least_squares(base, t.d, t.x[:16], t.reference, records=3),
    }.items():
        learn.save(tmp_path / "t.npz", found.table, learner=name)
        again, about = learn.load(tmp_path / "t.npz")
        assert about == {"learner": name} and same(again, found.table)


def test_refusals_name_what_is_wrong():
    t = trial(LINEAR, grid.uniform)
    base = solver.ddim(LINEAR, grid.uniform(LINEAR, 4))
    with pytest.raises(ValueError, match="train: 'times' given"):
        learn.least_squares(base, t.d, t.x, t.reference, train=("times",))
    with pytest.raises(ValueError, match="nothing free"):
        learn.least_squares(base, t.d, t.x, t.reference)
    with pytest.raises(ValueError, match="reference: starts at"):
        learn.least_squares(base, t.d, t.x, solver.ddim(LINEAR, np.linspace(0.9, 0, 5)), records=2)
    with pytest.raises(ValueError, match="a grid point of the table"):
        learn.least_squares(base, t.d, t.x, solver.heun(LINEAR, grid.uniform(LINEAR, 7)), records=2, local=True)
    with pytest.raises(ValueError, match="multistep"):
        learn.least_squares(
            base, t.d, t.x, solver.dpm_solver_pp(LINEAR, grid.uniform(LINEAR, 8)), records=2, local=True
        )
    with pytest.raises(ValueError, match="compensated"):
        learn.dc(learn.family(base, train=("B",), records=2), t.d, t.x, t.reference)
    with pytest.raises(ValueError, match="three predictions"):
        learn.compensated(LINEAR, grid.uniform(LINEAR, 3))
    with pytest.raises(ValueError, match="reach"):
        learn.dc(learn.compensated(LINEAR, grid.uniform(LINEAR, 4)), t.d, t.x, t.reference, reach=0)
    with pytest.raises(ValueError, match="deterministic"):
        learn.trajectory(solver.ancestral(LINEAR, grid.uniform(LINEAR, 4)), t.d, t.x)


RUN = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "experiments" / "learned_solvers" / "run.py"))


def test_page_says_what_is_measured():
    lines = [line for line in RUN["PAGE"].read_text().splitlines() if line.startswith("| ")][2:]
    written = {
        tuple(cells[:3]): cells for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)
    }
    assert set(written) == {(path, *name) for path in RUN["PATHS"] for name in RUN["CASES"]}
    for name in (("DDIM", "least squares: two records"), ("UniPC-2", "DC: step by step")):
        old, new = written["linear", *name], RUN["measure"]("linear", name)
        assert old[:4] == new[:4]
        np.testing.assert_allclose([float(v) for v in old[4:6]], [float(v) for v in new[4:6]], rtol=0.03)
