"""`jaxdiff export`: reloaded in a process without jaxdiff or flax, the sampler gives the same bits at any batch size."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxdiff import cli, solver
from jaxdiff.commands import assemble, draw, export

CONFIG = """
from jaxdiff.config import default

def get_config():
    config = default()
    config.data.name = "digits"
    config.data.batch_size = 32
    config.network.name = "dit"
    config.network.width = 16
    config.network.depth = 1
    config.network.heads = 2
    config.network.patch = 4
    config.optimiser.warmup = 1
    config.train.steps = 8
    config.train.log_every = 8
    config.train.tensorboard = False
    config.solver.name = "dpm_solver_pp"
    config.solver.steps = 4
    return config
"""

# the loader as documented, in a process where importing jaxdiff or flax is an error
READER = """
import sys
sys.modules["jaxdiff"] = sys.modules["flax"] = None
import json, pathlib
folder, out = sys.argv[1:3]
card = json.loads((pathlib.Path(folder) / "card.json").read_text())
exec(card["loader"])
sample = load(folder)
found = {}
for start, count in ((0, 3), (5, 7), (0, 16)):
    index = np.arange(start, start + count)
    found[f"{start}_{count}"] = sample(7, index, index % 10 if card["num_classes"] else None)
np.savez(out, **found)
loaded = [name for name, module in sys.modules.items() if module and name.split(".")[0] in ("jaxdiff", "flax")]
assert not loaded, loaded
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    (folder / "tiny.py").write_text(CONFIG)
    run = folder / "run"
    assert cli.main(["train", "--config", str(folder / "tiny.py"), "--workdir", str(run)]) == 0
    return str(run)


def reload(folder, tmp_path):
    out = tmp_path / "samples.npz"
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(folder), str(out)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as file:
        return dict(file)


@pytest.mark.parametrize(
    "overrides",
    [[], ["--config.guidance.name=cfg", "--config.guidance.scale=2.0", "--config.solver.name=ancestral"]],
    ids=["plain", "guided-stochastic"],
)
def test_reloaded_samples_have_the_same_bits(workdir, tmp_path, overrides):
    folder = tmp_path / "model"
    assert cli.main(["export", "--workdir", workdir, "--out", str(folder), *overrides]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "sampler.jax", "weights.safetensors"]
    fields = dict(word.removeprefix("--config.").split("=") for word in overrides)
    made, params, _ = draw.load_run(workdir, fields)
    params = jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x)), params)
    c = made.config.guidance
    d = assemble.guided(made, assemble.denoiser(made, params), c.name, c.scale)
    table = assemble.table(made)
    for name, x in reload(folder, tmp_path).items():
        start, count = map(int, name.split("_"))
        label = np.arange(start, start + count, dtype=np.int32) % 10
        own = solver.sample(
            table, d, jax.random.key(7), (count, *made.shape), index=start, cond=jax.numpy.asarray(label)
        )
        assert x.shape == own.shape and np.std(x) > 0.1
        np.testing.assert_array_equal(x, np.asarray(own))


def test_card_and_weights_say_what_they_are(workdir, tmp_path):
    from safetensors.flax import load_file

    folder = export.run(workdir, str(tmp_path / "model"), {"solver.steps": "3"})
    card = json.loads((folder / "card.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    _, params, _ = draw.load_run(workdir, {})
    assert card["solver"] == {**card["solver"], "name": "dpm_solver_pp", "rows": 3, "nfe": 3}
    assert card["config"]["solver"]["steps"] == 3 and card["output"]["shape"] == ["B", 8, 8, 1]
    assert card["platforms"] == ["cpu", "cuda", "tpu"]
    assert card["parameters"]["digest"] == draw.fingerprint(params)
    kernel = weights["params/params/block_0/mlp_in/kernel"]
    np.testing.assert_array_equal(kernel, np.asarray(params["params"]["block_0"]["mlp_in"]["kernel"]))
    own = [name for name in weights if name.startswith("params/")]
    assert len(own) == len(jax.tree.leaves(params))
    assert sum(weights[n].size for n in own) == card["parameters"]["count"]


def test_loader_is_ten_lines():
    assert len([line for line in export.LOADER.splitlines() if line.strip()]) <= 10


def test_refusals_are_one_line(workdir, tmp_path, capsys, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    assert cli.main(["export", "--workdir", workdir, "--out", str(full)]) == 2
    assert "holds no earlier export" in capsys.readouterr().err
    assert [p.name for p in full.iterdir()] == ["thesis.tex"]
    assert cli.main(["export", "--workdir", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert "config.json" in capsys.readouterr().err
    monkeypatch.setattr(export, "export_sampler", None)  # nothing is compiled before the folder can be written
    assert cli.main(["export", "--workdir", workdir, "--out", "/proc/none"]) == 2
    assert "out: cannot write to /proc/none" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert cli.main(["export", "--workdir", workdir, "--out", str(tmp_path / "y")]) == 2
    assert "jaxdiff[export]" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
