"""Names -> data sets: ``load("digits")``, ``load("toy2d:rings")``, ``load("npz:faces.npz")``, ..."""

import importlib.util
import inspect
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdiff.data.dataset import Dataset, arrays, not_allowed, require
from jaxdiff.data.families import FAMILIES, PIECES
from jaxdiff.data.gradual import gradual
from jaxdiff.data.prepared import tfds

__all__ = ["SOURCES", "digits", "load", "npz", "toy2d"]

MEMORY_LIMIT = 2 * 2**30  # bytes of decoded examples that in_memory="auto" reads into memory


def digits(split: str = "train") -> Dataset:
    """scikit-learn's handwritten digits: 8x8x1, integers 0..16 (17 levels), ten classes.

    The held-out split is every fifth example in order of class (stable), so each class is split alike to
    within one example: 1437 ``train``, 360 ``test``, the same on every machine. Writers are in both splits.

    Args:
        split: ``train``, ``test`` or ``all`` (1797).

    Returns:
        A :class:`~jaxdiff.data.dataset.Dataset` in memory, in scikit-learn's order.

    Raises:
        ValueError: unknown split.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if split not in ("train", "test", "all"):
        raise not_allowed("data.split (data.name='digits')", split, ["train", "test", "all"])
    table = _digits_table()
    image, label = table[:, :64].astype(np.uint8).reshape(-1, 8, 8, 1), table[:, 64].astype(np.int64)
    test = np.zeros(len(label), bool)
    test[np.argsort(label, kind="stable")[::5]] = True
    keep: np.ndarray = {"train": ~test, "test": test, "all": np.ones_like(test)}[split]
    names = tuple(str(n) for n in range(10))
    values = {"x0": image[keep], "label": label[keep]}
    return arrays(values, name="digits", split=split, levels=17, num_classes=10, class_names=names)


def _digits_table() -> np.ndarray:
    """Rows of 64 pixels and a label, from scikit-learn's own file: importing it costs more than a start of training."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        file = pathlib.Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    raw = require("sklearn.datasets", "data.name='digits'").load_digits()  # should the file move
    return np.concatenate([raw.data, raw.target[:, None]], axis=1)


def toy2d(family: str, split: str = "train", *, size: int = 50_000, seed: int = 0) -> Dataset:
    """Points of a two-dimensional family, shape (2,), float32, labelled where the family has pieces.

    Args:
        family: one of ``FAMILIES``.
        split: ``train`` or ``test``: independent draws of the same distribution.
        size: number of points, at least 1.
        seed: integer >= 0; other seeds are other draws.

    Returns:
        A :class:`~jaxdiff.data.dataset.Dataset` in memory.

    Raises:
        ValueError: unknown family or split, size < 1, seed < 0.
    """
    if family not in FAMILIES:
        raise not_allowed("data.name", f"toy2d:{family}", [f"toy2d:{name}" for name in FAMILIES])
    if split not in ("train", "test"):
        raise not_allowed(f"data.split (data.name='toy2d:{family}')", split, ["train", "test"])
    if size < 1 or seed < 0:
        raise ValueError(f"toy2d:{family}: size={size}, seed={seed} given; allowed: size >= 1, seed >= 0")
    generator = np.random.Generator(np.random.Philox(key=[seed, ("train", "test").index(split)]))
    points, label = FAMILIES[family](generator, size)
    values = {"x0": points} if label is None else {"x0": points, "label": label}
    return arrays(values, name=f"toy2d:{family}", split=split, num_classes=PIECES.get(family))


def npz(
    path: str,
    split: str = "train",
    *,
    key: str | None = None,
    levels: int | None = None,
    num_classes: int | None = None,
) -> Dataset:
    """Arrays of a NumPy ``.npz`` file (no pickles), usually ``image`` (N,H,W,C) and ``label`` (N,).

    Args:
        path: the file; ``{split}`` in it is replaced by the split, and without it there is only ``train``.
        split: name of the split.
        key: array to be modelled; by default ``x0``, ``image`` or the only array.
        levels: as in :func:`~jaxdiff.data.dataset.arrays`.
        num_classes: as in :func:`~jaxdiff.data.dataset.arrays`; give it when a split may lack the last class.

    Returns:
        A :class:`~jaxdiff.data.dataset.Dataset` in memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an npz file, or as :func:`~jaxdiff.data.dataset.arrays`.
    """
    name = f"npz:{path}"
    if "{split}" not in path and split != "train":
        raise not_allowed(f"data.split (data.name={name!r}, which has no {{split}} in its path)", split, ["train"])
    file = pathlib.Path(path.replace("{split}", split)).expanduser()
    if not file.is_file():
        beside = sorted(p.name for p in file.parent.glob("*.npz")) if file.parent.is_dir() else []
        allowed = beside or ["(no .npz file there)"]
        raise FileNotFoundError(f"{not_allowed(f'data.name={name!r}: file', str(file.name), allowed)}")
    try:
        with np.load(file, allow_pickle=False) as archive:
            values = {k: archive[k] for k in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(
            f"data.name={name!r}: {file} is not a readable npz file of plain arrays ({error})"
        ) from error
    return arrays(values, name=name, split=split, key=key, levels=levels, num_classes=num_classes)


SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "toy2d": toy2d,
    "npz": npz,
    "arrays": arrays,
    "tfds": tfds,
}


def load(
    name: str,
    split: str = "train",
    *,
    data_dir: str | None = None,
    in_memory: str | bool = "auto",
    **options: Any,
) -> Dataset:
    """Open the data set that ``config.data`` names.

    Args:
        name: ``digits``, ``toy2d:<family>``, ``npz:<path>``, ``tfds:<name>``, or ``arrays`` (with
            ``values=``).
        split: passed to the source.
        data_dir: folder of prepared sets, for ``tfds``; other sources ignore it.
        in_memory: ``auto`` decodes a lazy set into memory, while it is used, if it takes at most 2 GiB; ``true``
            always; ``false`` never (lazy sources only: the others are arrays already).
        **options: passed to the source (``levels``, ``key``, ``size``, ...).

    Returns:
        A :class:`~jaxdiff.data.dataset.Dataset`.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: one line naming the field, the value and what is
        allowed.
    """
    head, colon, argument = str(name).partition(":")
    if head not in SOURCES:
        raise not_allowed("data.name", name, ["digits", "toy2d:<family>", "npz:<path>", "tfds:<name>", "arrays"])
    mode = {"auto": "auto", "true": True, "false": False}.get(str(in_memory).lower())
    if mode is None:
        raise not_allowed("data.in_memory", in_memory, ["auto", "true", "false"])
    source = SOURCES[head]
    known = inspect.signature(source).parameters
    needs = next((p for p in known if known[p].kind is not inspect.Parameter.KEYWORD_ONLY and p != "split"), None)
    takes = needs if head != "arrays" else None
    if bool(argument) != bool(takes) or (colon and not argument):
        form = f"{head}:<{takes}>" if takes else head
        raise ValueError(f"data.name={name!r} has the wrong form; allowed: {form!r}" + _members(head))
    allowed = [p for p in known if p not in (takes, "split")]
    for option in options:
        if option not in allowed:
            raise not_allowed(f"data.{option} (data.name={name!r}): option", option, allowed or ["(none)"])
    if head == "arrays" and "values" not in options:
        raise ValueError("data.name='arrays' needs the option values={name: array, ...}; none given")
    if "data_dir" in known:
        options["data_dir"] = data_dir
    dataset = source(argument, split=split, **options) if takes else source(split=split, **options)
    if mode is False and dataset.in_memory:
        raise ValueError(
            f"data.in_memory=false is not possible for data.name={name!r}, which is arrays; allowed: auto, true"
        )
    size = len(dataset) * int(np.prod(dataset.shape))
    return gradual(dataset) if mode is True or (mode == "auto" and size <= MEMORY_LIMIT) else dataset


def _members(head: str) -> str:
    return f" with one of {', '.join(FAMILIES)}" if head == "toy2d" else ""
