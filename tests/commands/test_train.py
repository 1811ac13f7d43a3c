"""`jaxdiff train`: resumption after kill -9 is bitwise, and every bad input is one line that loses nothing."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tiny_run

from jaxdiff import cli
from jaxdiff import config as config_lib
from jaxdiff.commands import train as commands
from jaxdiff.train.checkpoint import Checkpointer
from jaxdiff.train.checkpoint_files import seal
from jaxdiff.train.checkpoint_read import FORMAT
from jaxdiff.train.lock import WorkdirLock

CONFIG = tiny_run.config()

# a real SIGKILL, at a step of our choosing
DIE = """
import os, signal, sys
from jaxdiff import cli
from jaxdiff.train import loop

class Deadly(loop.MetricLog):
    def add(self, step, metrics):
        super().add(step, metrics)
        if step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

loop.MetricLog = Deadly
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


def environment():
    here = dict(os.environ)
    here["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    here["JAX_PLATFORMS"] = "cpu"
    return here


def train(config_file, workdir, *more):
    command = [
        sys.executable,
        "-m",
        "jaxdiff.cli",
        "train",
        "--config",
        config_file,
        "--workdir",
        str(workdir),
        *more,
    ]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = train(config_file, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def leaves(workdir):
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        return {
            jax.tree_util.keystr(k): v
            for k, v in jax.tree_util.tree_leaves_with_path(checkpointer.restore_ema().state)
        }


def test_writes_what_it_promises(finished):
    names = {p.name for p in finished.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "loss.png", "samples.png"} <= names
    steps = [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 100


def test_kill_nine_and_resume_is_bitwise(config_file, finished, tmp_path):
    workdir = tmp_path / "run"
    command = ["train", "--config", config_file, "--workdir", str(workdir)]
    killed = subprocess.run([sys.executable, "-c", DIE, "63", *command], env=environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    again = train(config_file, workdir)
    assert again.returncode == 0, again.stderr
    straight, resumed = leaves(finished), leaves(workdir)
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)


def test_finished_run_does_nothing_more(config_file, finished):
    before = (finished / "metrics.jsonl").read_text()
    done = train(config_file, finished)
    assert done.returncode == 0, done.stderr
    assert (finished / "metrics.jsonl").read_text() == before


def one_line(capsys, *argv):
    status = cli.main(list(argv))
    message = capsys.readouterr().err.strip()
    assert status == 2
    assert message.startswith("jaxdiff ") and "\n" not in message
    return message


def test_another_config_is_refused_with_the_difference(config_file, finished, capsys):
    stored = (finished / "config.json").read_text()
    argv = ["train", "--config", config_file, "--workdir", str(finished), "--config.optimiser.learning_rate=0.5"]
    message = one_line(capsys, *argv)
    assert "optimiser.learning_rate" in message and "0.001" in message and "0.5" in message
    assert (finished / "config.json").read_text() == stored


@pytest.mark.parametrize(
    ("field", "words"), [("network.width=24", "does not fit this program"), ("seed=4", "have 0")]
)
def test_a_change_that_the_checkpoints_refuse_is_not_stored(config_file, finished, capsys, field, words):
    """It was, and the run could no longer be sampled from."""
    before = contents(finished)
    argv = ["--config", config_file, "--workdir", str(finished), f"--config.{field}", "--allow-config-change"]
    assert words in one_line(capsys, "train", *argv)
    after = contents(finished)
    assert {name: text for name, text in after.items() if name != ".lock"} == {
        name: text for name, text in before.items() if name != ".lock"
    }


def test_losses_that_were_all_refused_are_not_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": null}\n')
    commands.draw_losses(tmp_path)
    assert not (tmp_path / "loss.png").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.5}\n')
    commands.draw_losses(tmp_path)
    assert (tmp_path / "loss.png").exists()


def test_second_run_changes_nothing_of_a_live_one(config_file, finished, capsys):
    stored = (finished / "config.json").read_text()
    with WorkdirLock(finished):
        argv = ["train", "--config", config_file, "--workdir", str(finished), "--allow-config-change"]
        message = one_line(capsys, *argv, "--config.optimiser.learning_rate=0.5")
    assert "in use" in message
    assert (finished / "config.json").read_text() == stored


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_newer_checkpoint_is_refused_and_nothing_is_touched(config_file, finished, tmp_path, capsys):
    """A run that a later jaxdiff went on with, taken up by this one, which would also have changed the config."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    newest = workdir / "checkpoints" / "100" / "meta" / "record.json"
    record = json.loads(newest.read_text())["payload"]
    record["format"], record["versions"]["jaxdiff"] = FORMAT + 1, "9.0"
    newest.write_text(seal(record))
    before = contents(workdir)
    argv = ["--config", config_file, "--workdir", str(workdir)]
    message = one_line(capsys, "train", *argv, "--config.train.log_every=7")
    assert f"has format {FORMAT + 1}" in message and "9.0" in message and str(newest.parent.parent) in message
    assert contents(workdir) == before
    # nor does sampling walk past it to an older one
    assert f"has format {FORMAT + 1}" in one_line(capsys, "sample", "--workdir", str(workdir))
    assert contents(workdir) == before


@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_checkpoint_by_a_logged_metric_is_kept(config_file, tmp_path, mode, capsys):
    workdir = tmp_path / "run"
    settings = {"steps": 60, "save_every": 10, "keep_last": 1, "best_metric": "loss", "best_mode": mode}
    flags = [f"--config.train.{name}={value}" for name, value in settings.items()]
    assert cli.main(["train", "--config", config_file, "--workdir", str(workdir), *flags]) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(losses) == [10, 20, 30, 40, 50, 60]
    best = min(losses, key=losses.get) if mode == "min" else max(losses, key=losses.get)
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        assert checkpointer.steps() == sorted({best, 60})
        assert all(checkpointer.verify(step) is None for step in checkpointer.steps())
    if mode == "max":
        assert best < 60  # the loss falls, so this is not also the newest


# half of the run in one time zone; the rest in another, with the clock set back by a year
ELSEWHERE = """
import sys, time
true, year = time.time, 365 * 86400
time.time = lambda: true() - year
from jaxdiff import cli
sys.exit(cli.main(sys.argv[1:]))
"""


class FakeWandb(types.ModuleType):
    """What of wandb is used: ``init`` gives a run with ``log`` and ``finish``."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **settings):
        run = types.SimpleNamespace(settings=settings, rows=[], finished=False)
        run.log = lambda row, step: run.rows.append((step, row))
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


def test_wandb_gets_every_row_and_a_restart_goes_on_as_the_same_run(config_file, tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    workdir = tmp_path / "run"
    argv = ["train", "--config", config_file, "--workdir", str(workdir), "--config.train.wandb=moons"]
    assert cli.main([*argv, "--config.train.steps=30"]) == 0
    assert cli.main([*argv, "--config.train.steps=50", "--allow-config-change"]) == 0
    first, second = wandb.runs
    assert first.finished and second.finished and first.settings["id"] == second.settings["id"]
    assert first.settings["project"] == "moons" and first.settings["resume"] == "allow"
    assert first.settings["config"]["network"]["width"] == 16
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = {step: row["loss"] for step, row in first.rows + second.rows if "loss" in row}
    assert logged == {row["step"]: row["loss"] for row in rows if "loss" in row} and len(logged) == 5


def test_missing_wandb_is_one_line_before_anything_is_written(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    argv = ["--config", config_file, "--workdir", str(tmp_path / "run"), "--config.train.wandb=moons"]
    message = one_line(capsys, "train", *argv)
    assert "config.train.wandb='moons' needs wandb" in message and "install jaxdiff[wandb]" in message
    assert not (tmp_path / "run").exists()


def test_clock_and_time_zone_do_not_matter(config_file, finished, tmp_path):
    workdir = tmp_path / "run"
    command = ["train", "--config", config_file, "--workdir", str(workdir)]
    here = environment() | {"TZ": "Pacific/Auckland"}
    killed = subprocess.run([sys.executable, "-c", DIE, "63", *command], env=here, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    there = environment() | {"TZ": "America/Los_Angeles"}
    again = subprocess.run([sys.executable, "-c", ELSEWHERE, *command], env=there, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    straight, resumed = leaves(finished), leaves(workdir)
    for name, value in straight.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(10, 101, 10))
    assert all(0 <= row["goodput"] <= 1 for row in rows if "goodput" in row)


def test_full_disk_is_one_line_and_loses_nothing(config_file, tmp_path):
    """Files may not grow beyond 300 kB, as on a full disk: the arrays do not fit, the old checkpoint stays."""
    workdir = tmp_path / "run"
    more = ["--config.network.width=320", "--config.train.steps=40", "--config.train.save_every=20"]
    killed = subprocess.run(
        [sys.executable, "-c", DIE, "25", "train", "--config", config_file, "--workdir", str(workdir), *more],
        env=environment(), capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        assert checkpointer.steps() == [20]
    command = [
        "bash",
        "-c",
        'ulimit -f 300; exec "$@"',
        "bash",
        sys.executable,
        "-m",
        "jaxdiff.cli",
        "train",
        "--config",
        config_file,
        "--workdir",
        str(workdir),
        *more,
    ]
    stopped = subprocess.run(command, env=environment(), capture_output=True, text=True)
    last = stopped.stderr.strip().splitlines()[-1]
    assert stopped.returncode == 2 and "checkpoint 40 could not be written" in last and "intact are [20]" in last
    again = train(config_file, workdir, *more)
    assert again.returncode == 0, again.stderr
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        assert checkpointer.latest_verified_step() == 40


def test_foreign_workdir_is_left_alone(config_file, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("ten years")
    message = one_line(capsys, "train", "--config", config_file, "--workdir", str(tmp_path))
    assert "holds no config.json" in message
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_workdir_whose_first_start_was_killed_is_taken(config_file, tmp_path):
    for name in (".lock", "config.json.partial"):
        (tmp_path / name).write_text("{")
    config = config_lib.load(config_file)
    with contextlib.ExitStack() as hold:
        commands.open_workdir(str(tmp_path), config, hold)
    assert config_lib.restore(tmp_path / "config.json") == config


def test_file_as_workdir(config_file, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "is a file" in one_line(capsys, "train", "--config", config_file, "--workdir", str(tmp_path / "file"))


def test_unwritable_workdir(config_file, capsys):
    message = one_line(capsys, "train", "--config", config_file, "--workdir", "/proc/none/run")
    assert "cannot write" in message


BAD = [
    ("--config.data.name=digitz", "did you mean"),
    ("--config.data.name=tfds:mnist --config.data.data_dir=/nowhere", "data"),
    ("--config.data.batch_size=1000000", "data.batch_size=1000000"),
    ("--config.network.wdith=3", "did you mean 'width'"),
    ("--config.objective.target=noise", "t_max"),
    ("--config.optimiser.name=adamw2", "did you mean"),
    ("--config.mesh.data=64", "64"),
    ("--config.solver.name=edm --config.solver.s_churn=-1", "s_churn"),
    ("--config.process.name=edm --config.process.noise=student_t --config.process.df=4 "
     "--config.solver.name=ancestral", "needs Gaussian noise"),
    ("--config.train.accumulate=7", "accumulate"),
    ("--config.data.conditional=False --config.guidance.name=cfg", "guidance.name: 'cfg' needs a network with labels"),
    ("--config.network.name=unet", "UNet: x has shape (1, 2); it needs (B, H, W, C)"),
    ("--config.mesh.rules=(('kernel','tensr'),)", "tensr"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "expected"), BAD, ids=[b[0][9:45] for b in BAD])
def test_bad_input_before_anything_is_written(config_file, tmp_path, capsys, flags, expected):
    workdir = tmp_path / "run"
    message = one_line(capsys, "train", "--config", config_file, "--workdir", str(workdir), *flags.split())
    assert expected in message
    assert not workdir.exists()


def test_objective_without_its_field_is_one_line():
    from jaxdiff import config as config_lib
    from jaxdiff.commands import assemble

    config = config_lib.default()
    config.network.name = "mlp"
    source = assemble.dataset(config, "train")
    player = assemble.game(assemble.setup(config, source))["model"]
    from jaxdiff.objective.context import Ctx

    batch = {"x0": np.zeros((2, 8, 8, 1), np.float32), "index": np.arange(2, dtype=np.uint32)}
    with pytest.raises(ValueError, match="label"):
        player.loss({}, batch, jax.random.split(jax.random.key(0), 2), Ctx(step=0))
