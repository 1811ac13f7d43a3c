"""The benchmark: cells, buckets, one program a bucket, exact references, resumption, replay, devices, report."""

import csv
import itertools
import json

import jax
import numpy as np
import pytest

from jaxdiff import exact, process, solver
from jaxdiff.eval import bench, bench_measure, bench_plan, bench_problem, bench_report
from jaxdiff.solver import Table, stack

PATH = process.vp()
SOLVERS = [
    "euler",
    "heun",
    "dpm_solver_pp",
    ("dpm_solver_pp", {"order": 3, "method": "singlestep"}),
    ("ddim", {"eta": 1.0}),
]
WORLD = exact.GaussianMixture([0.4, 0.6], [[-1.0, 0.0], [0.5, 0.8]], [0.05, 0.2], labels=np.array([0, 1]))
SAMPLES = 64


@pytest.fixture(scope="module")
def problem():
    return bench_problem.mixture_problem(PATH, WORLD, steps=400)


def sweep(problem, out=None, **changed):
    settings = {
        "solvers": SOLVERS,
        "grids": ["quadratic", ("edm_rho", {"rho": 5.0})],
        "nfe": [4, 12],
        "seeds": [0, 1],
        "samples": SAMPLES,
        "reference_samples": 4 * SAMPLES,
        "projections": 8,
        "chunk": 8,
    }
    return bench.benchmark(problem, out=out, **{**settings, **changed})


@pytest.fixture(scope="module")
def report(problem, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "report"
    bench._program.clear_cache()
    result = sweep(problem, folder)
    bench_report.write(result, folder, config={"samples": SAMPLES})
    return folder, result


def test_a_cell_is_the_largest_number_of_steps_within_the_budget():
    makers = [
        *bench_plan.choices("solver", ["all"]),
        *bench_plan.choices("solver", [("heun", {"clock": "rho"}), ("unipc", {"order": 3})]),
    ]
    (grid,) = bench_plan.choices("grid", ["uniform"])
    cells = bench_plan.plan(PATH, makers, [grid], [5, 11])
    assert len(cells) == 2 * len(makers)
    ran = [cell for cell in cells if cell.table is not None]
    assert len(ran) > len(makers)
    for cell in ran:
        assert cell.nfe == cell.table.nfe <= cell.budget
        assert len(cell.points) == cell.steps
        try:
            more = cell.solver.make(PATH, grid.make(PATH, cell.steps + 1), **cell.solver.options)
        except ValueError:
            continue  # even numbers of steps only, say
        assert more.nfe > cell.budget, cell.key
    assert all(cell.reason for cell in cells if cell.table is None)


def test_costs_that_are_not_proportional_to_steps_are_searched_both_ways():
    def costing(cost):
        def make(process, grid):
            table = solver.ddim(process, grid)
            return _Priced(table, cost(len(grid)))

        return make

    (grid,) = bench_plan.choices("grid", ["uniform"])
    for cost in (
        lambda n: 2 * n - 1,
        lambda n: 3 * n,
        lambda n: n + 7,
        lambda n: max(1, n - 2),
        lambda n: (n + 1) // 2,
    ):
        cell = bench_plan.plan(PATH, [bench_plan.Choice("priced", {}, costing(cost))], [grid], [20])[0]
        assert cell.steps == max(n for n in range(1, 41) if cost(n) <= 20)


class _Priced:
    def __init__(self, table: Table, nfe: int):
        self.blocks, self.nfe = table.blocks, nfe


def test_refusals_keep_their_reason():
    def even_only(process, grid):
        if len(grid) % 2:
            raise ValueError("grid: an odd number of steps given;\n need an even one")
        return solver.ddim(process, grid)

    def never(process, grid):
        raise ZeroDivisionError("float division by zero")

    (grid,) = bench_plan.choices("grid", ["uniform"])
    made = [bench_plan.Choice(f.__name__, {}, f) for f in (even_only, never)]
    made += bench_plan.choices("solver", [("rk4", {}), ("dpm_solver_pp", {"order": 9})])
    cells = {(c.solver.name, c.budget): c for c in bench_plan.plan(PATH, made, [grid], [1, 2, 7])}
    assert cells["even_only", 7].steps == 6
    assert cells["even_only", 1].reason == "grid: an odd number of steps given; need an even one"
    assert cells["never", 7].reason == "ZeroDivisionError: float division by zero"
    assert cells["dpm_solver_pp", 7].reason.startswith("order: 9 given")
    student = process.linear(noise=process.student_t(3.0))
    refused = bench_plan.plan(student, bench_plan.choices("solver", ["ancestral"]), [grid], [5])[0]
    assert refused.table is None and "Gaussian noise" in refused.reason


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("solver", ["hein"], "did you mean 'heun'"),
        ("grid", ["logsnrr"], "did you mean 'logsnr'"),
        ("solver", [("ddim", {"etta": 1.0})], "did you mean 'eta'"),
        ("solver", ["ddim", ("ddim", {})], "given twice"),
    ],
)
def test_wrong_names_are_one_line(kind, given, words):
    with pytest.raises(ValueError, match=words) as caught:
        bench_plan.choices(kind, given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"nfe": [0]}, "nfe: 0 given"),
        ({"samples": 60, "batch": 16}, "batch: 16 given"),
        ({"reference_samples": 100}, "reference_samples: 100 given"),
        ({"guidance_scales": [2.0]}, "has no labels"),
        ({"seeds": []}, "seeds: none given"),
    ],
)
def test_wrong_settings_are_refused(problem, changed, words):
    with pytest.raises(ValueError, match=words):
        sweep(problem, **changed)


def test_building_tables_compiles_nothing():
    with bench.Compiles() as compiles:
        cells = bench_plan.plan(
            process.cosine(),
            bench_plan.choices("solver", ["all"]),
            bench_plan.choices("grid", ["uniform", "logsnr", "edm_rho"]),
            [3, 9],
        )
        for group in bench_plan.buckets(cells).values():
            stack([cells[i].table for i in group])
    assert compiles.count == 0


def test_the_listener_counts_compiles():
    with bench.Compiles() as compiles:
        jax.jit(lambda x: x * 1.2345 + 0.777)(np.float32(1.0))
    assert compiles.count == 1


def test_buckets_hold_each_runnable_cell_once():
    cells = bench_plan.plan(
        PATH, bench_plan.choices("solver", ["all"]), bench_plan.choices("grid", ["uniform"]), [6, 12]
    )
    groups = bench_plan.buckets(cells)
    assert sorted(i for group in groups.values() for i in group) == [
        i for i, c in enumerate(cells) if c.table is not None
    ]
    for group in groups.values():
        tables = [cells[i].table for i in group]
        assert len({cells[i].budget for i in group}) == 1
        assert stack(tables).rows == max(t.rows for t in tables) <= cells[group[0]].budget


def test_one_program_a_bucket_whatever_seeds_and_chunks(report):
    _, result = report
    assert result.facts["programs_compiled"] == result.facts["buckets"] == 4  # two budgets, with and without noise
    assert len(result.rows) == len(SOLVERS) * 2 * 2 * 2


@pytest.mark.parametrize("make", [process.linear, process.vp, process.cosine, process.edm, process.ve, process.subvp])
def test_the_reference_is_the_exact_flow_on_every_path(make):
    """One Gaussian: the flow is known in closed form."""
    path = make()
    world = exact.Gaussian(np.array([0.4, -0.3]), np.array([[0.5, 0.2], [0.2, 0.3]]))
    z = np.random.default_rng(0).standard_normal((16, 2))
    found = bench_problem.tight_solve(path, exact.denoiser(world, path), z, steps=800, reach=12.0, double=True)
    start = path.coefficients(np.float64(path.t_max))
    with jax.enable_x64(True):
        flow = exact.gaussian_flow(world, path)
        ends = np.asarray(flow.between(z * start.sigma, start.alpha, start.sigma, np.float64(1.0), np.float64(0.0)))
    assert np.abs(found.ends - ends).max() < 1e-6
    assert found.error < 1e-6
    assert np.sqrt(np.mean((found.ends - ends) ** 2)) < max(found.error, 1e-8)


def test_rms_matches_a_run_of_the_table_alone(problem, report):
    _, result = report
    index = np.arange(SAMPLES)
    for i, cell in enumerate(result.cells):
        row = next(r for r in result.rows if r["cell"] == i and r["seed"] == 1)
        x = np.asarray(solver.sample(cell.table, problem.denoiser(None), jax.random.key(1), (SAMPLES, 2)), np.float64)
        if cell.solver.name == "ddim":
            assert row["rms"] is None
            continue
        z = np.asarray(bench_problem.starts(PATH, 1, index, (2,)))
        ends = problem.reference(z, None, None).ends
        assert row["rms"] == pytest.approx(np.sqrt(np.mean((x - ends) ** 2)), rel=1e-3, abs=2e-6)


def test_second_order_solvers_gain_more_from_evaluations(report):
    """Sanity of the numbers themselves: errors fall with cost, and the two-stage one by the larger factor."""
    _, result = report
    rms = {}
    for row in result.rows:
        cell = result.cells[row["cell"]]
        if row["rms"] is not None and cell.grid.name == "quadratic" and row["seed"] == 0:
            rms[cell.solver.label, cell.budget] = row["rms"]
    assert rms["euler", 4] / rms["euler", 12] > 2
    assert rms["heun", 4] / rms["heun", 12] > rms["euler", 4] / rms["euler", 12]


def test_any_row_replays_from_the_folder(problem, report):
    folder, _ = report
    stored = json.loads((folder / "results.json").read_text())
    yard = bench_measure.yardstick(problem, None, SAMPLES, 8, 4 * SAMPLES)
    assert len(stored["rows"]) == 40
    for row in stored["rows"][::3]:
        found = bench_measure.measure(bench.replay(folder, problem, row), yard, None)
        assert found["sliced_w2"] == pytest.approx(row["sliced_w2"], rel=1e-4)
        assert found["covariance_error"] == pytest.approx(row["covariance_error"], rel=1e-3, abs=1e-5)


def test_stored_grids_and_options_rebuild_the_table(report):
    folder, result = report
    stored = json.loads((folder / "results.json").read_text())
    for cell, own in zip(stored["cells"], result.cells):
        points = stored["grids"][cell["points"]]
        grid = solver.Grid(*(np.array(points[name]) for name in ("time", "alpha", "sigma")), points["on_path"])
        again = solver.SOLVERS[cell["solver"]](PATH, grid, **cell["options"])
        assert all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree_util.tree_leaves(again), jax.tree_util.tree_leaves(own.table), strict=True)
        )


def test_finished_buckets_are_kept_and_other_inputs_are_not_mistaken_for_them(problem, report):
    folder, result = report
    again = sweep(problem, folder)
    assert again.facts["buckets_run_now"] == again.facts["programs_compiled"] == 0
    assert again.rows == result.rows
    assert again.facts["reference_rms_error"] == result.facts["reference_rms_error"]
    parts = sorted((folder / "parts").iterdir())
    parts[0].unlink()
    resumed = sweep(problem, folder)
    assert resumed.facts["buckets_run_now"] == 1
    assert resumed.rows == result.rows  # bitwise: one program, one seed
    other = bench_problem.mixture_problem(PATH, exact.GaussianMixture([1.0], [[0.0, 0.0]], 0.3), steps=400)
    changed = sweep(other, folder, solvers=["euler"], seeds=[0], grids=["uniform"])
    assert changed.facts["buckets_run_now"] == changed.facts["buckets"]


def test_chunks_batches_and_devices_change_nothing(problem, report, monkeypatch):
    _, result = report
    assert len(jax.local_devices()) == 8 and result.facts["devices"] == 8
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    alone = sweep(problem, chunk=3, batch=32)
    for a, b in zip(result.rows, alone.rows, strict=True):
        assert (a["cell"], a["seed"]) == (b["cell"], b["seed"])
        for metric in ("sliced_w2", "mean_error", "covariance_error"):
            assert a[metric] == pytest.approx(b[metric], rel=2e-3, abs=1e-5)


def test_the_mesh_lays_tables_and_samples_over_all_devices():
    mesh, rows = bench._layout(32, 64)
    assert dict(mesh.shape) == {"table": 8, "sample": 1} and rows == 8
    mesh, rows = bench._layout(2, 64)
    assert dict(mesh.shape) == {"table": 2, "sample": 4} and rows == 2
    mesh, _ = bench._layout(1, 7)
    assert mesh.size == 1  # 7 samples cannot be split over 8


def test_guidance_scales_share_the_programs(tmp_path):
    guided = bench_problem.mixture_problem(PATH, WORLD, labels=True, steps=200)
    bench._program.clear_cache()
    result = sweep(
        guided,
        solvers=["dpm_solver_pp"],
        grids=["quadratic"],
        nfe=[24],
        seeds=[0],
        guidance_scales=[0.0, 1.0, 3.0],
    )
    assert result.facts["programs_compiled"] == 1
    assert [row["scale"] for row in result.rows] == [0.0, 1.0, 3.0]
    # each scale is held against its own flow: all three are close to theirs, which differ from one another
    assert all(row["rms"] < 0.05 for row in result.rows), [row["rms"] for row in result.rows]
    z = np.asarray(bench_problem.starts(PATH, 0, np.arange(SAMPLES), (2,)))
    labels = guided.labels(np.arange(SAMPLES))
    ends = [guided.reference(z, labels, scale).ends for scale in (0.0, 1.0, 3.0)]
    assert all(np.sqrt(np.mean((a - b) ** 2)) > 0.2 for a, b in itertools.pairwise(ends))
    bench_report.write(result, tmp_path)
    assert (tmp_path / "error_rms_scale3.png").exists()


def test_sliced_distance_to_block_means_is_the_exact_one(problem):
    from jaxdiff.eval.transport import sliced_wasserstein

    yard = bench_measure.yardstick(problem, None, SAMPLES, 8, 4 * SAMPLES)
    truth = problem.draws(4 * SAMPLES + bench_measure.FLOORS * SAMPLES, None)[: 4 * SAMPLES]
    x = np.random.default_rng(0).standard_normal((SAMPLES, 2)).astype(np.float32)
    assert bench_measure.sliced(x, yard) == pytest.approx(
        float(sliced_wasserstein(x, truth, projections=8)), rel=1e-5
    )


def test_samples_that_blow_up_have_no_metrics_and_are_reported(problem, tmp_path):
    yard = bench_measure.yardstick(problem, None, SAMPLES, 8, 4 * SAMPLES)
    x = np.zeros((SAMPLES, 2), np.float32)
    for bad in (np.nan, np.inf, 1e8):
        x[3, 1] = bad
        row = bench_measure.measure(x, yard, np.zeros((SAMPLES, 2)))
        assert row["finite"] == 1 - 1 / SAMPLES
        assert all(row[metric] is None for metric in bench_measure.METRICS)


def test_rms_interval_covers():
    """The 95 % interval of rms, over many sets of normal errors."""
    generator = np.random.default_rng(0)
    yard = bench_measure.Yardstick(
        np.eye(2, dtype=np.float32), np.zeros((200, 2)), np.zeros(2), np.zeros(2), np.eye(2), (0, 0), None, None
    )
    inside = 0
    for _ in range(400):
        row = bench_measure.measure(generator.standard_normal((200, 2)), yard, np.zeros((200, 2)))
        inside += abs(row["rms"] - 1.0) <= row["rms_half_width"]
    assert 0.92 < inside / 400 < 0.98  # four standard errors are 0.044


def test_the_report_has_every_cell_a_ranking_and_pictures(report):
    folder, result = report
    lines = list(csv.DictReader((folder / "results.csv").open()))
    assert len(lines) == len(result.rows)
    assert {line["kind"] for line in lines} == {"deterministic", "stochastic"}
    text = (folder / "report.md").read_text()
    for cell in result.cells:
        assert f"| {cell.solver.label} |" in text
    assert "programs: 4 for 4 buckets" in text
    for metric in ("rms", "sliced_w2", "mean_error", "covariance_error"):
        assert (folder / f"error_{metric}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.partial"))


def test_refused_cells_are_in_the_report(problem, tmp_path):
    result = sweep(problem, solvers=["euler", "rk4"], grids=["uniform"], nfe=[2, 4], seeds=[0])
    refused = [cell for cell in result.cells if cell.table is None]
    bench_report.write(result, tmp_path)
    bad = bench_plan.Cell(result.cells[0].solver, result.cells[0].grid, 1, reason="order: 9 given")
    text = "\n".join(bench_report._failures(bench.Result([*result.cells, bad], result.rows, [], [], {}, {})))
    assert "order: 9 given" in text and "## Refused cells" in text
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert sum(bool(line["reason"]) for line in lines) == len(refused)


def test_ties_share_a_rank_and_a_missing_answer_is_last():
    label = lambda name: bench_plan.Choice(name, {}, None)
    grid = label("uniform")
    cells = [bench_plan.Cell(label(name), grid, budget, 1, budget) for name in "abc" for budget in (5, 10)]
    values = [0.1, 0.1, 0.1, 0.2, 0.3, None]
    found = [bench_report.Summary(i, None, {} if v is None else {"rms": (v, None)}) for i, v in enumerate(values)]
    rows = bench_report.ranking(bench.Result(cells, [], [], [], {}, {}), found, "rms", None)
    assert [(row["solver"], row["rank"]) for row in rows] == [("a", 1.0), ("b", 1.5), ("c", 3.0)]


def test_the_interval_over_seeds_is_students():
    assert bench_report.half_width([1.0]) is None
    assert bench_report.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / np.sqrt(3))
