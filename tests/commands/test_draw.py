"""`jaxdiff sample` and `eval` on a tiny trained run."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxdiff import cli, data
from jaxdiff import config as config_lib
from jaxdiff.commands import assemble, draw, evaluate
from jaxdiff.train import make_mesh, replicated


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from jaxdiff.commands import train

    config = config_lib.default()
    given = {
        "network.name": "mlp", "network.width": "16", "network.depth": "1", "data.batch_size": "32", "train.steps": "3",
        "train.tensorboard": "False", "solver.name": "ddim", "solver.steps": "3", "sample.batch_size": "16",
        "mesh.data": "1", "optimiser.warmup": "1",
    }  # fmt: skip
    workdir = tmp_path_factory.mktemp("digits") / "run"
    train.run(config_lib.check(config_lib.apply_overrides(config, given)), str(workdir))
    return workdir


def test_npz_is_streamed_and_resumable(run, tmp_path, monkeypatch):
    out = tmp_path / "many.npz"
    calls, real = [], draw.batch

    def dies_later(*args, **kwargs):
        calls.append(args[4])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(draw, "batch", dies_later)
    argv = ["sample", "--workdir", str(run), "--out", str(out), "--num", "70"]
    assert cli.main(argv) == 130
    assert not out.exists()
    assert cli.main(argv) == 0
    assert calls == [0, 16, 32, 32, 48, 64]  # the two finished chunks are not drawn again
    with np.load(out) as file:
        assert file["x0"].shape == (70, 8, 8, 1) and file["x0"].dtype == np.float32
        np.testing.assert_array_equal(file["label"], np.arange(70) % 10)
        many = file["x0"]
    assert Image.open(tmp_path / "many.png").size[0] > 80
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many.npz", "many.png"]
    # the same noise whatever the chunk size: samples agree to float tolerance
    monkeypatch.undo()
    assert cli.main([*argv[:4], str(tmp_path / "other.npz"), "--num", "70", "--config.sample.batch_size=32"]) == 0
    with np.load(tmp_path / "other.npz") as file:
        np.testing.assert_allclose(file["x0"], many, atol=1e-5)


def test_bounds_and_time_shift_are_chosen_in_the_config(run, tmp_path):
    def samples(name, *more):
        out = tmp_path / f"{name}.npz"
        assert cli.main(["sample", "--workdir", str(run), "--out", str(out), "--num", "8", *more]) == 0
        with np.load(out) as file:
            return file["x0"]

    plain = samples("plain")
    assert np.max(np.abs(plain)) > 1.05  # three training steps: nothing holds the samples in range by itself
    for bound in ("clip", "threshold"):
        held = samples(
            bound, f"--config.sample.bound={bound}", "--config.guidance.name=cfg", "--config.guidance.scale=3"
        )
        assert np.max(np.abs(held)) <= 1 + 1e-5
    shifted = samples("shifted", "--config.sample.time_shift=0.03")
    assert np.isfinite(shifted).all() and 1e-5 < np.max(np.abs(shifted - plain)) < 1
    assert (
        cli.main(["sample", "--workdir", str(run), "--out", str(tmp_path / "x.npz"), "--config.sample.bound=clamp"])
        == 2
    )
    assert (
        cli.main(["sample", "--workdir", str(run), "--out", str(tmp_path / "x.npz"), "--config.sample.time_shift=-1"])
        == 2
    )


# `jaxdiff sample` that says how much memory it needed (its own: ru_maxrss counts that of the process it was forked
# from), and that draws no sample beyond a number given: there it waits to be killed, however late that comes
CHILD = """
import pathlib, sys, time
from jaxdiff import cli
from jaxdiff.commands import draw
drawn = draw.batch

def batch(*args, **kwargs):
    while args[4] >= int(sys.argv[1]):
        time.sleep(0.01)
    return drawn(*args, **kwargs)

draw.batch = batch
status = cli.main(sys.argv[2:])
print("VmHWM", next(l.split()[1] for l in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l))
sys.exit(status)
"""


def child(run, out, num, most=10**9):
    argv = ["sample", "--workdir", str(run), "--out", str(out), "--num", str(num), "--config.sample.batch_size=2000"]
    return subprocess.Popen([sys.executable, "-c", CHILD, str(most), *argv], stdout=subprocess.PIPE, text=True)


def kibibytes(process):
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    return int(text.split("VmHWM")[1])


def kill_after(process, chunks, count):
    """SIGKILL once so many chunks are there; the names of those that there are then, and when they were written."""
    deadline = time.monotonic() + 900
    while len(list(chunks.glob("*.npy"))) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return {file.name: file.stat().st_mtime_ns for file in chunks.glob("*.npy")}


@pytest.mark.slow
def test_two_hundred_thousand_survive_kill_nine_in_little_memory(run, tmp_path):
    """51 MB of samples: SIGKILL in the middle, and the file is bitwise that of a run left alone; memory is one chunk's."""
    few = kibibytes(child(run, tmp_path / "few.npz", 2000))
    many = kibibytes(child(run, tmp_path / "straight.npz", 200_000))
    assert (tmp_path / "straight.npz").stat().st_size > 200_000 * 64 * 4
    assert many - few < 25 * 1024, (few, many)
    chunks = tmp_path / "killed.npz.partial"
    done = kill_after(child(run, tmp_path / "killed.npz", 200_000, most=100_000), chunks, 20)
    assert 20 <= len(done) <= 50 and not (tmp_path / "killed.npz").exists()
    # what is finished is kept: a second victim writes further chunks only
    more = kill_after(child(run, tmp_path / "killed.npz", 200_000, most=180_000), chunks, len(done) + 5)
    assert len(done) + 5 <= len(more) <= 90 and more.items() >= done.items()
    kibibytes(child(run, tmp_path / "killed.npz", 200_000))
    assert not chunks.exists()
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "straight.npz").read_bytes()


def test_chunks_left_by_a_kill_while_they_were_deleted_are_nobody_else_s(run, tmp_path, monkeypatch, capsys):
    argv = ["sample", "--workdir", str(run), "--out", str(tmp_path / "a.npz"), "--num", "40"]
    kind, left = type(epath.Path(tmp_path)), []

    def dies_after_one(path, **options):
        if path.suffix == ".npy":
            left.append(path)
            if len(left) == 2:
                raise KeyboardInterrupt
        pathlib.Path(path).unlink(**options)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "unlink", dies_after_one)
        assert cli.main(argv) == 130
    assert (tmp_path / "a.npz").exists() and left[1].exists() and not left[0].exists()
    written = (tmp_path / "a.npz").read_bytes()
    assert cli.main([*argv, "--config.sample.seed=7"]) == 2
    assert "chunks of another run" in capsys.readouterr().err
    assert cli.main(argv) == 0  # its own go on
    assert (tmp_path / "a.npz").read_bytes() == written and not left[1].parent.exists()


def test_chunks_of_another_run_are_refused(run, tmp_path, capsys):
    folder = tmp_path / "a.npz.partial"
    folder.mkdir()
    (folder / "identity.json").write_text("{}")
    assert cli.main(["sample", "--workdir", str(run), "--out", str(tmp_path / "a.npz"), "--num", "5"]) == 2
    assert "chunks of another run" in capsys.readouterr().err
    assert (folder / "identity.json").exists()


BAD = [
    (["--label", "10"], "allowed: 0..9"),
    (["--num", "0"], "num: 0 given; need 1 to"),
    (["--out", "x.jpg"], ".png or .npz"),
    (["--config.solver.name=hein"], "did you mean 'heun'"),
    (["--config.guidance.name=cfgg"], "did you mean"),
    (["--config.guidance.scale=high"], "config.guidance.scale: 'high' given; need a number"),
    (["--label", "-1"], "label: -1 given; allowed: 0..9"),
    (["--out", "/proc/none/x.npz"], "out: cannot write to /proc/none"),
    (["--config.solver.grid=edm"], "did you mean 'edm_rho'"),
    (["--config.solver.grid_options={'t_min': -1}"], "t_min: -1 given"),
    (["--config.solver.name=dpm_solver_pp", "--config.solver.order=9"], "order: 9"),
    (["--config.process.name=vp"], "config.process.name: fixed by the training of"),
    (["--config.objective.target=data"], "allowed here: fields of data, eval, guidance, sample, solver"),
    (["--config.data.name=toy2d:rings"], "checkpoint"),
    (["--config.data.conditional=False"], "config.data.conditional: fixed by the training of"),
    (["--num", "101"], "num: 101 given; a picture shows at most 100, --out FILE.npz keeps all"),
    (["--out", "x.npz", "--num", str(2**32)], "num: 4294967296 given; need 1 to 2147483647"),
]


BAD_EVAL = [
    (["--config.data.heldout=tset"], "did you mean 'test'"),
    (["--config.data.heldout=train"], "config.data.heldout: 'train' given; it is the split trained on"),
    (["--config.eval.num=2"], "config.eval.num: 2 given; need at least 5"),
    (["--config.eval.subsets=0"], "config.eval.subsets: 0 given"),
    (["--config.data.name=npz:/nowhere.npz"], "/nowhere.npz"),
]


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [("sample", *b) for b in BAD] + [("eval", *b) for b in BAD_EVAL],
    ids=lambda v: " ".join(v)[:50] if isinstance(v, list) else "",
)
def test_bad_input(run, capsys, monkeypatch, command, flags, expected):
    def compiled(*args, **kwargs):
        raise AssertionError("sampling began")

    monkeypatch.setattr(draw.solver, "sample", compiled)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert cli.main([command, "--workdir", str(run), *flags]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"jaxdiff {command}: ") and expected in message
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_no_run_there(tmp_path, capsys):
    assert cli.main(["sample", "--workdir", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_truncated_checkpoint_is_one_line(run, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for file in (copy / "checkpoints").rglob("*"):
        if file.is_file() and "ema" in str(file):
            file.write_bytes(file.read_bytes()[:3])
    assert cli.main(["sample", "--workdir", str(copy)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint" in message


def test_any_number_of_samples_is_pictured(run, tmp_path):
    assert cli.main(["sample", "--workdir", str(run), "--num", "15", "--out", str(tmp_path / "a.png")]) == 0
    width, height = Image.open(tmp_path / "a.png").size
    assert height < width / 4  # two rows of ten
    assert cli.main(["eval", "--workdir", str(run), "--config.eval.num=23", "--config.eval.subsets=1"]) == 0
    width, height = Image.open(run / "samples.png").size
    assert width < height / 4 and (run / "metrics.json").is_file()  # ten rows of two


@pytest.mark.parametrize("shape", [(32, 32, 4), (2,), (8, 8), (5, 5, 3)])
def test_samples_of_any_shape_are_pictured(shape, tmp_path):
    """Latents are no images: a run on them used to end at its first picture."""
    draw.show(np.random.default_rng(0).normal(size=(7, *shape)).astype(np.float32), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 48


def test_latents_are_trained_sampled_and_evaluated_on_part_of_the_devices(tmp_path):
    from jaxdiff.commands import train

    rng = np.random.default_rng(0)
    for split, size in (("train", 64), ("test", 16)):
        values = {"x0": rng.normal(size=(size, 4, 4, 4)).astype(np.float32), "label": np.arange(size) % 3}
        np.savez(tmp_path / f"{split}.npz", **values)
    given = {
        "data.name": f"npz:{tmp_path}/{{split}}.npz", "data.batch_size": "16", "mesh.data": "2", "network.name": "mlp",
        "network.width": "16", "network.depth": "1", "train.steps": "2", "train.sample_every": "1",
        "train.tensorboard": "False", "solver.name": "ddim", "solver.steps": "2", "optimiser.warmup": "1",
    }  # fmt: skip
    run = tmp_path / "run"
    train.run(config_lib.check(config_lib.apply_overrides(config_lib.default(), given)), str(run))
    assert sorted(path.name for path in (run / "progress").iterdir()) == ["00000001.png", "00000002.png"]
    assert cli.main(["sample", "--workdir", str(run), "--num", "9", "--out", str(tmp_path / "a.npz")]) == 0
    assert (tmp_path / "a.png").is_file()
    assert cli.main(["eval", "--workdir", str(run), "--config.eval.num=9", "--config.eval.subsets=1"]) == 0


def test_a_batch_lies_where_the_parameters_do(run):
    made, params, _ = draw.load_run(str(run), {})
    few = make_mesh(2, devices=jax.devices()[:2])
    d = assemble.denoiser(made, jax.device_put(params, replicated(few)))
    drawn = draw.batch(made, assemble.table(made), d, jax.random.key(0), 0, 8, mesh=few)
    assert drawn.devices() == set(few.devices.flat) and np.isfinite(drawn).all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"x0": np.zeros((9, 7, 8, 1))}, "its examples have shape (7, 8, 1), those trained on (8, 8, 1)"),
        ({"x0": np.zeros((4, 8, 8, 1))}, "it has 4 examples; need at least 5"),
        ({"x0": np.zeros((9, 8, 8, 1))}, "it has no labels, the network knows 10"),
        (
            {"x0": np.zeros((9, 8, 8, 1)), "label": np.arange(9) + 2},
            "it has labels of 11 classes, the network knows 10",
        ),
        (None, "config.data.heldout: 'test' given; data.split"),
    ],
)
def test_a_held_out_set_that_does_not_fit_is_known_before_drawing(values, words, run, monkeypatch):
    made, _, source = draw.load_run(str(run), {})
    other = source if values is None else data.arrays(values)
    monkeypatch.setattr(assemble, "dataset", lambda *_: other if values else data.load("digits", "tst"))
    with pytest.raises(config_lib.ConfigError) as caught:
        evaluate._heldout(made, source)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_eval_writes_metrics_and_picture(run, capsys):
    assert cli.main(["eval", "--workdir", str(run), "--config.eval.num=360", "--config.eval.subsets=1"]) == 0
    text = capsys.readouterr().out
    assert "frechet" in text and "held-out accuracy" in text
    result = json.loads((run / "metrics.json").read_text())
    # three training steps: far worse than real data, which a report that compares the wrong sets would not show
    assert result["metrics"]["frechet"]["ratio"] > 3
    assert 0.98 < result["class_agreement"]["heldout"] <= 1
    assert Image.open(run / "samples.png").size == Image.open(run / "samples.png").size
