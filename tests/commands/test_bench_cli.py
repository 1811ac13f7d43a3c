"""`jaxdiff bench` from the command line: a folder, overrides, a trained run, one-line errors, quick help."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from jaxdiff import cli
from jaxdiff.commands import bench_config
from jaxdiff.config import load

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
    from jaxdiff.commands.bench_config import default

    def get_config():
        config = default()
        config.process = ("linear", {})
        config.weights = (1, 1)
        config.means = ((-1.0, 0.0), (1.0, 0.5))
        config.covs = 0.1
        config.solvers = ("euler", ("dpm_solver_pp", {"order": 3}))
        config.grids = ("uniform",)
        config.nfe = (3, 6)
        config.samples = 32
        config.reference_samples = 64
        config.reference_steps = 64
        config.projections = 4
        return config
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "bench.py"
    path.write_text(textwrap.dedent(CONFIG))
    return path


def test_bench_writes_the_folder(config, tmp_path, capsys):
    out = tmp_path / "report"
    assert (
        cli.main(["bench", "--config", str(config), "--out", str(out), "--config.nfe=(3,)", "--config.timing=True"])
        == 0
    )
    assert "2 cells of 2 solvers (0 refused), " in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert {"results.csv", "results.json", "tables.npz", "report.md", "error_rms.png", "parts"} <= names
    stored = json.loads((out / "results.json").read_text())
    assert stored["config"]["nfe"] == [3] and len(stored["rows"]) == 2
    seconds = stored["seconds"]["dpm_solver_pp(order=3)"]
    assert seconds["nfe"] == 3 and seconds["seconds"] > 0
    assert "## Wall time" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sample=3", "did you mean 'samples'"),
        ("samples=1", "config.samples: 1 given; need at least 2"),
        ("samples=x", "config.samples: 'x' given"),
        ("nfe=5", "config.nfe: 5 given; need a tuple"),
        ("seeds=(-1,)", "config.seeds: -1 given"),
        ("world=mixtur", "did you mean 'mixture'"),
        ("world=run", "config.workdir: missing"),
        ("process=('liner', {})", "config.process"),
        ("process=('vp', {'beta': 1})", "did you mean 'beta_"),
        ("means=()", "config.means: missing"),
        ("guidance_scales=(2.0,)", "config.labels: missing"),
        ("solvers=('eular',)", "did you mean 'euler'"),
        ("grids=(('logsnr', {'lam': 1}),)", "grids: 'logsnr' has no option 'lam'"),
        ("nfe=(0,)", "nfe: 0 given"),
        ("reference_samples=50", "reference_samples: 50 given"),
        ("weights={1: 2}", "config.weights: {1: 2} given; need a tuple"),
        ("weights=((0.5,), (0.5,))", "config.weights: ((0.5,), (0.5,)) given; need one number a component"),
        ("means=('a', 'b')", "config.means: ('a', 'b') given; need numbers"),
        ("solvers=(3,)", "solvers: 3 given; an entry is a name, or (name, options)"),
        ("grids=(('logsnr', 2),)", "grids: ('logsnr', 2) given; an entry is a name, or (name, options)"),
        ("solvers=((1, {}),)", "solvers: (1, {}) given"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(config, tmp_path, capsys, override, words):
    out = tmp_path / "report"
    assert cli.main(["bench", "--config", str(config), "--out", str(out), f"--config.{override}"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("jaxdiff bench: ")
    assert not out.exists()


def test_out_must_be_a_folder(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--config", str(config), "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_config_file_of_training_is_refused(tmp_path, capsys):
    assert cli.main(["bench", "--config", str(ROOT / "configs/digits.py"), "--out", str(tmp_path / "r")]) == 2
    assert "no such field" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gmm", "digits"])
def test_shipped_configs_are_valid(name):
    from jaxdiff.eval import bench_plan

    config = bench_config.check(load(str(ROOT / f"configs/bench/{name}.py")))
    solvers = bench_plan.choices("solver", config.solvers)
    assert len(bench_plan.choices("grid", config.grids)) == (4 if name == "gmm" else 2)
    if name == "gmm":
        assert len(solvers) >= 60 and tuple(config.nfe) == (5, 10, 20, 50) and config.samples == 1024


def test_help_lists_names():
    text = bench_config.describe()
    for name in ("mixture, run", "cosine, trig", "dpm_solver_pp,", "edm_rho,", "cfg_rescale"):
        assert name in text


def test_help_imports_no_jax():
    code = "import sys, jaxdiff.cli\ntry: jaxdiff.cli.main(['bench', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "reference_steps" in done.stdout and "--out" in done.stdout


@pytest.mark.slow
def test_a_trained_run_is_held_against_its_own_tight_solve(tmp_path):
    """Train four steps, bench unguided and guided: high-order solvers are near the tight solve of the same network."""
    run, out = tmp_path / "run", tmp_path / "report"
    small = {"network.channels": 8, "train.steps": 4, "data.batch_size": 16, "optimiser.warmup": 1}
    words = [f"--config.{name}={value}" for name, value in small.items()]
    assert cli.main(["train", "--config", str(ROOT / "configs/digits.py"), "--workdir", str(run), *words]) == 0
    changed = {
        "workdir": run,
        "solvers": "('euler','dpm_solver_pp')",
        "grids": "('uniform',)",
        "nfe": "(16,)",
        "samples": 16,
        "batch": 8,
        "reference_samples": 16,
        "reference_steps": 48,
        "guidance_scales": "(1.0,2.0)",
    }
    words = [f"--config.{name}={value}" for name, value in changed.items()]
    assert cli.main(["bench", "--config", f"{ROOT}/configs/bench/digits.py", "--out", str(out), *words]) == 0
    stored = json.loads((out / "results.json").read_text())
    assert stored["facts"]["programs_compiled"] == 1 and len(stored["rows"]) == 4
    assert all(row["rms"] < 0.05 and row["frechet"] > 0 for row in stored["rows"]), stored["rows"]
    assert all(error < 5e-3 for error in stored["facts"]["reference_rms_error"].values())
    assert os.path.getsize(out / "error_frechet_scale2.png") > 0
