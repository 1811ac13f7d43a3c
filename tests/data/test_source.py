"""Sources, levels, and one-line errors."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxdiff import data

TFDS = os.environ.get("TFDS_DATA_DIR")
PREPARED = bool(TFDS) and os.path.isdir(os.path.join(TFDS, "mnist"))
needs_tfds = pytest.mark.skipif(not PREPARED, reason="TFDS_DATA_DIR does not name a folder with mnist, prepared")


@pytest.mark.parametrize("levels", [2, 17, 256, 1000])
def test_levels_round_trip_and_are_bin_centres(levels):
    k = np.arange(levels)
    x = data.from_levels(k, levels)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, 2 * (k + 0.5) / levels - 1, atol=6e-8)
    assert np.array_equal(data.to_levels(x, levels), k)
    # Anything inside the bin belongs to it, up to float32 rounding at its edges.
    edge = (1 - 1e-3) / levels
    assert np.array_equal(data.to_levels(x - edge, levels), k) and np.array_equal(data.to_levels(x + edge, levels), k)
    assert data.to_levels(np.array([-1.7, -1.0, 1.0, 3.0]), levels).tolist() == [0, 0, levels - 1, levels - 1]


def test_levels_refuse_what_has_no_level():
    with pytest.raises(ValueError, match=r"allows values 0..16, given 0..17"):
        data.from_levels(np.array([0, 17]), 17)
    with pytest.raises(ValueError, match="integer array, given dtype float64"):
        data.from_levels(np.array([0.5]), 17)
    with pytest.raises(ValueError, match="1 NaN"):
        data.to_levels(np.array([0.0, np.nan]), 17)
    with pytest.raises(ValueError, match="levels=1 is not allowed"):
        data.from_levels(np.array([0]), 1)


def test_digits_split_is_stratified_disjoint_and_whole():
    train, test, both = (data.load("digits", split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (1437, 360, 1797)
    assert (both.shape, both.levels, both.num_classes) == ((8, 8, 1), 17, 10)
    count = [np.bincount(d.examples()["label"], minlength=10) for d in (train, test, both)]
    assert np.array_equal(count[0] + count[1], count[2])
    assert np.abs(count[1] - count[2] / 5).max() <= 1
    together = np.concatenate([d.examples()["x0"] for d in (train, test)]).reshape(1797, -1)
    whole = both.examples()["x0"].reshape(1797, -1)
    assert np.array_equal(together[np.lexsort(together.T)], whole[np.lexsort(whole.T)])
    assert np.array_equal(train.examples()["x0"], data.load("digits").examples()["x0"])
    raw = both.records.read(np.arange(1797))["x0"]
    assert raw.dtype == np.uint8 and raw.max() == 16
    assert np.array_equal(data.to_levels(both.examples()["x0"], 17), raw)


def test_digits_are_those_of_scikit_learn_without_importing_it():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    ours = data.load("digits", "all").records.read(np.arange(1797))
    assert np.array_equal(ours["x0"][..., 0], theirs.images) and np.array_equal(ours["label"], theirs.target)
    assert (
        "sklearn" not in run("import sys; from jaxdiff import data; data.load('digits'); print(*sys.modules)").split()
    )


SECOND_MOMENT = {
    "two_moons": 1.3125 - 1 / np.pi + 2 * 0.05**2,
    "eight_gaussians": 1.5**2 + 2 * 0.1**2,
    "checkerboard": 8 / 3,
    "swissroll": 52 / 27 + 2 * 0.05**2,
    "pinwheel": 1 + 0.3**2 + 0.1**2,
    "rings": np.mean(np.array([0.5, 1, 1.5, 2]) ** 2) + 2 * 0.04**2,
}
CENTRED = {"two_moons", "eight_gaussians", "checkerboard", "pinwheel", "rings"}


@pytest.mark.parametrize("family", data.FAMILIES)
def test_toy2d_moments_match_their_closed_forms(family):
    """Means and E|x|^2 within 4.5 standard errors of 50000 draws."""
    toy = data.load(f"toy2d:{family}")
    batch = toy.examples()
    x = batch["x0"].astype(np.float64)
    assert x.shape == (50_000, 2) and batch["x0"].dtype == np.float32 and toy.shape == (2,) and toy.levels is None
    square = (x**2).sum(1)
    assert abs(square.mean() - SECOND_MOMENT[family]) < 4.5 * square.std() / np.sqrt(len(x))
    if family in CENTRED:
        assert (np.abs(x.mean(0)) < 4.5 * x.std(0) / np.sqrt(len(x))).all()
    if toy.num_classes:
        share = np.bincount(batch["label"], minlength=toy.num_classes) / len(x)
        p = 1 / toy.num_classes
        assert np.abs(share - p).max() < 4.5 * np.sqrt(p * (1 - p) / len(x))
    assert np.array_equal(x, data.load(f"toy2d:{family}").examples()["x0"])
    assert not np.array_equal(x, data.load(f"toy2d:{family}", "test").examples()["x0"])
    assert not np.array_equal(x, data.load(f"toy2d:{family}", seed=1).examples()["x0"])


def test_checkerboard_lies_on_the_dark_squares():
    cell = np.floor(data.load("toy2d:checkerboard").examples()["x0"]).astype(int)
    assert (cell.sum(1) % 2 == 0).all() and len(np.unique(cell, axis=0)) == 8


def test_npz_and_its_split(tmp_path):
    image = np.random.default_rng(0).integers(0, 17, (6, 4, 4, 1)).astype(np.uint8)
    np.savez(tmp_path / "set_test.npz", image=image, label=np.arange(6), weight=np.ones((6, 2)))
    loaded = data.load(f"npz:{tmp_path}/set_{{split}}.npz", "test", levels=17)
    batch = loaded.examples()
    assert sorted(batch) == ["label", "weight", "x0"] and loaded.num_classes == 6 and loaded.shape == (4, 4, 1)
    assert np.array_equal(data.to_levels(batch["x0"], 17), image)
    np.savez(tmp_path / "plain.npz", points=np.ones((5, 3)))
    assert data.load(f"npz:{tmp_path}/plain.npz").examples()["x0"].dtype == np.float32
    (tmp_path / "torn.npz").write_bytes((tmp_path / "set_test.npz").read_bytes()[:200])
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "objects.npz", x0=np.array([{}, {}], dtype=object))
    for bad in ("torn", "text", "objects"):
        with pytest.raises(ValueError, match=r"is not a readable npz file"):
            data.load(f"npz:{tmp_path}/{bad}.npz")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'plain.npz'"):
        data.load(f"npz:{tmp_path}/plane.npz")
    with pytest.raises(ValueError, match=r"data.split.*'test'.*allowed: train"):
        data.load(f"npz:{tmp_path}/plain.npz", "test")


U8 = np.zeros((4, 2, 2, 1), np.uint8)
ERRORS = {
    "unknown source": (lambda: data.load("digit"), ValueError, r"data.name='digit'.*did you mean 'digits'"),
    "unknown family": (lambda: data.load("toy2d:two_moon"), ValueError, r"did you mean 'toy2d:two_moons'"),
    "no family": (lambda: data.load("toy2d"), ValueError, r"allowed: 'toy2d:<family>' with one of two_moons"),
    "needless argument": (lambda: data.load("digits:8"), ValueError, r"data.name='digits:8'.*allowed: 'digits'"),
    "unknown split": (lambda: data.load("digits", "tst"), ValueError, r"data.split.*'tst'.*did you mean 'test'"),
    "unknown option": (lambda: data.load("toy2d:rings", sise=3), ValueError, r"'sise'.*did you mean 'size'"),
    "in_memory word": (lambda: data.load("digits", in_memory="yes"), ValueError, r"data.in_memory='yes'.*auto, true"),
    "lazy arrays": (lambda: data.load("digits", in_memory=False), ValueError, r"data.in_memory=false.*auto, true"),
    "toy size": (lambda: data.load("toy2d:rings", size=0), ValueError, r"size=0.*allowed: size >= 1"),
    "no data folder": (
        lambda: data.load("tfds:mnist", data_dir="/no/such/folder"),
        FileNotFoundError,
        r"data.data_dir='/no/such/folder' is not a folder",
    ),
    "set not there": (lambda: data.load("tfds:mnist", data_dir="/"), FileNotFoundError, r"data.name='tfds:mnist'"),
    "arrays without": (lambda: data.load("arrays"), ValueError, r"needs the option values="),
    "no main array": (lambda: data.arrays({"a": U8, "b": U8}), ValueError, r"key='x0' is not known; allowed: a, b"),
    "lengths": (lambda: data.arrays({"x0": U8, "label": np.arange(3)}), ValueError, r"given {'x0': 4, 'label': 3}"),
    "empty": (lambda: data.arrays({"x0": U8[:0]}), ValueError, r"\(>= 1\) of examples"),
    "levels unsaid": (lambda: data.arrays({"x0": U8.astype(int)}), ValueError, r"levels=None.*given int64"),
    "levels of floats": (
        lambda: data.arrays({"x0": np.ones((3, 2))}, levels=5),
        ValueError,
        r"levels=5 is for integer",
    ),
    "level range": (lambda: data.arrays({"x0": U8 + 9}, levels=9), ValueError, r"allows values 0..8, given 9..9"),
    "not finite": (
        lambda: data.arrays({"x0": np.array([[np.nan], [1]])}),
        ValueError,
        r"1 values of 'x0' are not fin",
    ),
    "dtype": (lambda: data.arrays({"x0": np.array(["a", "b"])}), ValueError, r"dtype <U1 of 'x0' is not allowed"),
    "label range": (
        lambda: data.arrays({"x0": U8, "label": np.arange(4)}, num_classes=3),
        ValueError,
        r"labels 0..3 given, allowed 0..2",
    ),
    "label sign": (
        lambda: data.arrays({"x0": U8, "label": np.full(4, -1)}),
        ValueError,
        r"labels -1..-1 given, allowed 0..0",
    ),
    "no names": (lambda: data.arrays(U8), ValueError, r"arrays: a ndarray given; need arrays by name, {'x0'"),
    "label dtype": (lambda: data.arrays({"x0": U8, "label": np.ones(4)}), ValueError, r"label needs shape \(N,\)"),
    "no values": (
        lambda: data.arrays({"x0": np.ones((4, 0))}),
        ValueError,
        r"'x0' has shape \(4, 0\); an example needs",
    ),
    "names": (
        lambda: data.arrays({"x0": U8, "file": np.array(list("abcd"))}),
        ValueError,
        r"array 'file' has dtype <U1; give numbers only",
    ),
    "dates": (
        lambda: data.arrays({"x0": U8, "day": np.arange(4).astype("M8[D]")}),
        ValueError,
        r"'day' has dtype date",
    ),
    "reserved name": (lambda: data.arrays({"x0": U8, "index": U8}), ValueError, r"\['index'\] given beside key='x0'"),
    "small set": (
        lambda: data.pipeline(data.load("digits"), 1438),
        ValueError,
        r"data.batch_size=1438 is larger than the set \(data.name='digits'.*allowed: 1..1437",
    ),
    "batch": (lambda: data.pipeline(data.load("digits"), 0), ValueError, r"data.batch_size=0 .*from 1 to 1437"),
    "shards": (
        lambda: data.pipeline(data.load("digits"), 30, process_count=4),
        ValueError,
        r"data.batch_size=30 given; allowed: a multiple of the 4 processes",
    ),
    "process": (
        lambda: data.pipeline(data.load("digits"), 8, process_index=2, process_count=2),
        ValueError,
        r"process_index=2 given; allowed: 0..1",
    ),
    "seed": (lambda: data.pipeline(data.load("digits"), 8, seed=-1), ValueError, r"data.seed=-1 given"),
    "flip points": (
        lambda: data.pipeline(data.load("toy2d:rings"), 8, flip=True),
        ValueError,
        r"data.flip=True needs",
    ),
    "step": (lambda: data.pipeline(data.load("digits"), 8).batch_at(-1), ValueError, r"step=-1 given; allowed: >= 0"),
    "buffer": (lambda: data.pipeline(data.load("digits"), 8, buffer=0), ValueError, r"data.buffer=0 given"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_line_that_names_it(case):
    call, kind, words = ERRORS[case]
    with pytest.raises(kind, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def run(code: str, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_room_loads_no_optional_package_nor_jax():
    loaded = run("import sys, jaxdiff.data; print(*sys.modules)").split()
    assert "numpy" in loaded and not {"jax", "grain", "sklearn", "tensorflow_datasets"} & set(loaded)


@pytest.mark.parametrize(
    ("package", "name"),
    [("sklearn", "digits"), ("tensorflow_datasets", "tfds:mnist"), ("array_record", "tfds:mnist")],
)
def test_a_missing_package_names_the_extra(package, name, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"data.name='{name}' needs .*install jaxdiff\[data\]") as caught:
        data.load(name)
    assert "\n" not in str(caught.value)


@needs_tfds
def test_tfds_mnist_without_tensorflow():
    code = """
import sys
import numpy as np
from jaxdiff import data
lazy = data.load("tfds:mnist", "train[:600]", in_memory=False)
ram = data.decode(lazy)
assert not lazy.in_memory and ram.in_memory and len(lazy) == 600
assert (lazy.shape, lazy.levels, lazy.num_classes) == ((28, 28, 1), 256, 10)
a, b = (data.pipeline(d, 64, seed=3, flip=True) for d in (lazy, ram))
with a.stream(5, 20) as left, b.stream(5, 20) as right:
    pairs = list(zip(left, right, strict=True))
assert len(pairs) == 15
for left, right in pairs:
    assert sorted(left) == ["index", "label", "x0"]
    assert all(left[k].tobytes() == right[k].tobytes() and left[k].dtype == right[k].dtype for k in left)
assert "tensorflow" not in sys.modules and "grain" in sys.modules
print(len(data.load("tfds:mnist", "test")), np.bincount(ram.examples()["label"]).sum())
"""
    assert run(code).split() == ["10000", "600"]


@needs_tfds
def test_tfds_names_and_splits_are_suggested():
    with pytest.raises(ValueError, match=r"data.split.*'tran'.*did you mean 'train'"):
        data.load("tfds:mnist", "tran")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'tfds:mnist'"):
        data.load("tfds:mnits")
