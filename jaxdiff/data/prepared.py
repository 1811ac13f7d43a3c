"""``tfds:<name>``: sets prepared by tensorflow-datasets in array_record format, read without TensorFlow."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdiff.data.dataset import Dataset, not_allowed, require

__all__ = ["PreparedRecords", "tfds"]


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRecords:
    """Images (and labels) decoded from a tfds data source when read."""

    source: Any
    image: str
    label: str | None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Decode the examples at ``rows`` and stack them."""
        # One read of many records is several times faster than one record at a time.
        examples = self.source.__getitems__(np.asarray(rows).tolist())
        out = {"x0": np.stack([example[self.image] for example in examples])}
        if self.label is not None:
            out["label"] = np.array([example[self.label] for example in examples], np.int32)
        return out


def tfds(name: str, split: str = "train", data_dir: str | None = None) -> Dataset:
    """A prepared image set, read lazily through ``tfds.data_source`` (nothing is ever downloaded).

    Prepare it once, where TensorFlow is not needed either for most sets, with
    ``tfds.builder(name, data_dir=..., file_format="array_record").download_and_prepare()``.

    Args:
        name: tfds name, for example ``mnist``.
        split: tfds split, slices included (``train[:90%]``).
        data_dir: folder of prepared sets (local or bucket path); by default the environment's TFDS_DATA_DIR,
            then tfds's own default.

    Returns:
        A lazy :class:`Dataset`, ``x0`` from the image feature (uint8, 256 levels) and ``label`` if there is
        one.

    Raises:
        FileNotFoundError: no such folder, or the set is not prepared in it.
        ValueError: unknown split, no image feature, or images of varying size.
        ModuleNotFoundError: tensorflow-datasets or array-record is not installed.
    """
    field = f"data.name='tfds:{name}'"
    library = require("tensorflow_datasets", field)
    require("array_record.python.array_record_data_source", field)
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    folder = require("etils.epath", field).Path(data_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data.data_dir={str(data_dir)!r} is not a folder ({field}); set it or TFDS_DATA_DIR")
    base = name.split("/")[0].split(":")[0]
    if not (folder / base).is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "downloads")
        message = not_allowed("data.name", f"tfds:{name}", [f"tfds:{n}" for n in there] or ["(none)"])
        raise FileNotFoundError(f"data.data_dir={str(data_dir)!r}: {message}")
    try:
        with _quiet():
            source = library.data_source(name, split=split, data_dir=str(folder), download=False)
            source.__getitems__([0][: len(source)])  # what it has to say, it says when it first decodes
    except NotImplementedError as error:  # tfds's word for: files of another format, or none
        raise FileNotFoundError(
            f"{field} is not prepared as array_record in data.data_dir={str(data_dir)!r}; "
            f"allowed: what download_and_prepare wrote with file_format='array_record'"
        ) from error
    except ValueError as error:
        reason = str(error).splitlines()[0]
        if "split" in reason.lower():
            raise not_allowed(f"data.split ({field})", split, _splits(library, name, folder)) from error
        raise ValueError(f"{field} in data.data_dir={str(data_dir)!r} is refused by tfds: {reason}") from error
    return _describe(name, split, source, library.features)


def _splits(library: Any, name: str, folder: Any) -> list[str]:
    with _quiet():
        return list(library.builder(name, data_dir=str(folder)).info.splits)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide tfds's advice (OpenCV, variant folders), which is not about the user's request."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _describe(name: str, split: str, source: Any, kinds: Any) -> Dataset:
    features = source.dataset_info.features
    images = [key for key, feature in features.items() if type(feature) is kinds.Image]
    labels = [key for key, feature in features.items() if type(feature) is kinds.ClassLabel]
    if len(images) != 1:
        raise ValueError(f"data.name='tfds:{name}' has image features {images}; allowed: exactly one")
    shape, dtype = features[images[0]].shape, np.dtype(features[images[0]].np_dtype)
    if None in shape or dtype != np.uint8:
        raise ValueError(f"data.name='tfds:{name}' has images of shape {shape} and {dtype}; allowed: one size, uint8")
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    classes = features[label] if label else None
    return Dataset(
        name=f"tfds:{name}",
        split=split,
        records=PreparedRecords(source, images[0], label),
        shape=tuple(shape),
        levels=256,
        num_classes=classes.num_classes if classes else None,
        class_names=tuple(classes.names) if classes else (),
    )
