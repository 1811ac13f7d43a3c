"""A working directory in a bucket (``gs://...``), with the bucket played by a folder.

What is real: every path that jaxdiff, etils and orbax compute, the order in which things are written, orbax's way of
committing where there is no rename (``commit_success.txt``), the digests, walking back. What is not: the network
and tensorstore's own ``gcs`` driver, in whose place its ``file`` driver is given the folder.
"""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint._src.path.gcs_utils as gcs_utils
import orbax.checkpoint._src.serialization.tensorstore_utils as tensorstore_utils
import pytest
import tiny_run
from etils.epath import backend, gpath

from jaxdiff import cli
from jaxdiff.train.checkpoint import Checkpointer

CONFIG = tiny_run.config(steps=40, save_every=10, extra="config.sample.num = 16")


class Bucket(backend._OsPathBackend):
    """``gs://name/x`` kept as ``root/name/x``; whatever else opens a ``gs:`` path on the local disk is found out."""

    def __init__(self, root):
        self.root, self.used = pathlib.Path(root), set()

    def local(self, path):
        text = os.fspath(path)
        assert text.startswith("gs://"), text
        self.used.add(text)
        return str(self.root / text.removeprefix("gs://"))

    def glob(self, path):
        return [
            "gs://" + str(pathlib.Path(p).relative_to(self.root)) for p in backend.os_backend.glob(self.local(path))
        ]


def _translated(name, count):
    inner = getattr(backend.os_backend, name)

    def method(self, *paths, **options):
        return inner(*(self.local(p) if i < count else p for i, p in enumerate(paths)), **options)

    return method


for _name in ("open", "exists", "isdir", "listdir", "makedirs", "mkdir", "rmtree", "remove", "stat"):
    setattr(Bucket, _name, _translated(_name, 1))
for _name in ("rename", "replace", "copy"):
    setattr(Bucket, _name, _translated(_name, 2))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    folder = Bucket(tmp_path / "buckets")
    (folder.root / "ours").mkdir(parents=True)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", folder)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    monkeypatch.setattr(gcs_utils, "rmtree", lambda path, **_: shutil.rmtree(folder.local(path)))
    kvstore = lambda path: {"driver": "file", "path": folder.local(path)}
    for module in (gcs_utils, tensorstore_utils):
        if hasattr(module, "get_kvstore_for_gcs"):
            monkeypatch.setattr(module, "get_kvstore_for_gcs", kvstore)
    monkeypatch.chdir(tmp_path)  # a path taken for a local one would make a folder called gs: here
    yield folder
    assert not list(tmp_path.glob("gs:*"))


def state(seed):
    rng = np.random.default_rng(seed)
    return {"w": jax.numpy.asarray(rng.normal(size=(32, 8)), "float32"), "ema": jax.numpy.asarray(rng.normal(size=8))}


def test_checkpoints_round_trip_and_walk_back(bucket):
    with Checkpointer("gs://ours/run/checkpoints", keep_last=3) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, state(step), meta={"made": step})
        saver.wait()
        assert saver.steps() == [2, 3, 4]
    folder = bucket.root / "ours" / "run" / "checkpoints"
    assert (folder / "4" / "commit_success.txt").is_file() and "gs://ours/run/checkpoints/4" in bucket.used
    # a save that was cut short has no such file, and is not taken for a checkpoint
    mark = "commit_success.txt"
    shutil.copytree(folder / "4", folder / "5")
    (folder / "5" / mark).unlink()
    for path in (folder / "4" / "state").rglob("d/*"):  # where the arrays are
        data = bytearray(path.read_bytes())
        data[::16] = bytes(byte ^ 1 for byte in data[::16])
        path.write_bytes(data)
    with Checkpointer("gs://ours/run/checkpoints") as reader:
        assert not (folder / "5").exists()  # swept
        found = reader.restore_latest(state(0))
        assert found.step == 3 and found.meta == {"made": 3}
        assert [(bad.step, bad.renamed) for bad in found.bad] == [(4, "4.corrupt")]
        assert all(np.array_equal(found.state[name], state(3)[name]) for name in found.state)
        assert np.array_equal(reader.restore_ema(2).state, state(2)["ema"])
        # nor does it stand in the way of the save that comes to its step
        shutil.copytree(folder / "3", folder / "5")
        (folder / "5" / mark).unlink()
        assert reader.save(5, state(5), meta={"made": 5}) and not reader.save(5, state(6), meta={})
        assert reader.restore(5, state(0)).meta == {"made": 5}


def test_a_run_lives_in_a_bucket(bucket, tmp_path, capsys):
    (tmp_path / "c.py").write_text(CONFIG)
    train = ["train", "--config", str(tmp_path / "c.py")]
    more = ["--config.train.steps=40", "--allow-config-change"]
    assert cli.main([*train, "--workdir", str(tmp_path / "straight")]) == 0
    assert cli.main([*train, "--workdir", "gs://ours/run", "--config.train.profile="]) == 0
    run = bucket.root / "ours" / "run"
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "heartbeat.json", "loss.png", "samples.png"} <= names
    rows = lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = lambda folder: [(row["step"], row["loss"]) for row in rows(folder) if "loss" in row]
    assert losses(run) == losses(tmp_path / "straight")
    # the newest checkpoint goes bad: the run walks back to step 30, does the last ten steps again, and ends equal
    (run / "checkpoints" / "40" / "meta" / "record.json").write_text("{}")
    assert cli.main([*train, "--workdir", "gs://ours/run", *more]) == 0
    assert (run / "checkpoints" / "40.corrupt").is_dir() and losses(run) == losses(tmp_path / "straight")
    digests = [
        (folder / "checkpoints" / "40" / "meta" / "digests-0.json").read_text()
        for folder in (run, tmp_path / "straight")
    ]
    assert digests[0] == digests[1]
    capsys.readouterr()
    assert cli.main(["sample", "--workdir", "gs://ours/run", "--out", "gs://ours/run/drawn.png"]) == 0
    assert capsys.readouterr().out.strip().endswith("gs://ours/run/drawn.png") and (run / "drawn.png").is_file()
