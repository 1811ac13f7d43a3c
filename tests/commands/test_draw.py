"""`jaxdiff sample` and `eval` on a tiny trained run."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxdiff import cli
from jaxdiff import config as config_lib
from jaxdiff.commands import draw


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


def test_chunks_of_another_run_are_refused(run, tmp_path, capsys):
    folder = tmp_path / "a.npz.partial"
    folder.mkdir()
    (folder / "identity.json").write_text("{}")
    assert cli.main(["sample", "--workdir", str(run), "--out", str(tmp_path / "a.npz"), "--num", "5"]) == 2
    assert "chunks of another run" in capsys.readouterr().err
    assert (folder / "identity.json").exists()


BAD = [
    (["--label", "10"], "allowed: 0..9"),
    (["--num", "0"], "need at least 1"),
    (["--out", "x.jpg"], ".png or .npz"),
    (["--config.solver.name=hein"], "did you mean 'heun'"),
    (["--config.guidance.name=cfgg"], "did you mean"),
]


@pytest.mark.parametrize(("flags", "expected"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input(run, capsys, flags, expected):
    assert cli.main(["sample", "--workdir", str(run), *flags]) == 2
    message = capsys.readouterr().err.strip()
    assert expected in message and "\n" not in message


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


def test_eval_writes_metrics_and_picture(run, capsys):
    assert cli.main(["eval", "--workdir", str(run), "--config.eval.num=360", "--config.eval.subsets=1"]) == 0
    text = capsys.readouterr().out
    assert "frechet" in text and "held-out accuracy" in text
    result = json.loads((run / "metrics.json").read_text())
    # three training steps: far worse than real data, which a report that compares the wrong sets would not show
    assert result["metrics"]["frechet"]["ratio"] > 3
    assert 0.98 < result["class_agreement"]["heldout"] <= 1
    assert Image.open(run / "samples.png").size == Image.open(run / "samples.png").size
