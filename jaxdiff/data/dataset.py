"""What a data set is: a frozen record of where the examples are and what their values mean.

The array to be modelled is always called ``x0``; anything else (``label``, ...) keeps its own name. Examples
come either from arrays in memory or from records decoded when read; both are read by row numbers, so a
pipeline need not know.
"""

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Protocol

import numpy as np

from jaxdiff.data.levels import from_levels
from jaxdiff.near import near

__all__ = ["Arrays", "Dataset", "Records", "arrays", "decode"]


def not_allowed(field: str, given: object, allowed: Iterable[str]) -> ValueError:
    """One-line error for a wrong name, with the nearest allowed one."""
    names = [str(name) for name in allowed]
    return ValueError(f"{field}={given!r} is not known; allowed: {', '.join(names)}{near(given, names)}")


def require(module: str, what: str) -> ModuleType:
    """Import an optional package, or say in one line which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(f"{what} needs {module} ({error}); install jaxdiff[data]") from error


class Records(Protocol):
    """Random access to examples."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at ``rows``, stacked, as stored (integer levels or floats)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Records held in memory, one array a name, the first axis counting examples."""

    arrays: Mapping[str, np.ndarray]
    in_memory = True

    def __len__(self) -> int:
        return len(self.arrays["x0"])

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at ``rows``, copied."""
        return {name: array.take(rows, axis=0) for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A named, finite set of examples.

    Attributes:
        name: as in ``config.data.name``, for example ``tfds:mnist``.
        split: ``train``, ``test``, ...
        records: where the examples are.
        shape: shape of one x0, for images (height, width, channels).
        levels: number of integer values of the stored x0, mapped to bin centres in (-1, 1); None for float
            data, which passes through as float32.
        num_classes: number of labels, or None if there is no ``label``.
        class_names: their names, or ().
    """

    name: str
    split: str
    records: Records = dataclasses.field(repr=False)
    shape: tuple[int, ...]
    levels: int | None
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def in_memory(self) -> bool:
        """Whether the examples are kept in memory once decoded."""
        return getattr(self.records, "in_memory", False)

    def examples(self, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Examples by row number, as the model sees them.

        Args:
            rows: (B,) integers in 0..len-1; None for all, in stored order.

        Returns:
            ``x0`` (B, *shape) float32 (integer levels as bin centres), ``label`` (B,) int32 and others as
            stored.
        """
        batch = self.records.read(np.arange(len(self)) if rows is None else np.asarray(rows))
        x0 = batch["x0"]
        batch["x0"] = x0.astype(np.float32, copy=False) if self.levels is None else from_levels(x0, self.levels)
        return batch


def arrays(
    values: Mapping[str, np.ndarray],
    *,
    name: str = "arrays",
    split: str = "train",
    key: str | None = None,
    levels: int | None = None,
    num_classes: int | None = None,
    class_names: tuple[str, ...] = (),
) -> Dataset:
    """Data set of arrays in memory.

    Args:
        values: named arrays, the first axis counting examples. The one called ``key`` becomes ``x0``;
            ``label`` must be integers 0..num_classes-1.
        name: shown in messages.
        split: shown in messages.
        key: the array to be modelled; by default ``x0``, or ``image``, or the only array.
        levels: number of values of an integer x0; by default 256 for uint8. Other integer arrays must say.
        num_classes: by default the largest label plus one.
        class_names: names of the labels.

    Returns:
        A :class:`Dataset` in memory; the arrays are not copied unless their dtype changes (float64 to
        float32).

    Raises:
        ValueError: no such array, lengths that differ, no examples, NaN or infinite floats, values or labels
            out of range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name}: a {type(values).__name__} given; need arrays by name, {{'x0': array, ...}}")
    values = {k: np.asarray(v) for k, v in values.items()}
    if key is None:
        only = next(iter(values)) if len(values) == 1 else "x0"
        key = next((k for k in ("x0", "image") if k in values), only)
    if key not in values:
        raise not_allowed(f"{name}: array to model, key", key, values or ["(no arrays)"])
    taken = sorted(({"index", "x0"} - {key}) & set(values))
    if taken:
        raise ValueError(f"{name}: array names {taken} given beside key={key!r}; allowed: any but x0 and index")
    out = {"x0" if k == key else k: v for k, v in values.items()}
    counts = {k: v.shape[0] if v.ndim else 0 for k, v in out.items()}
    if len(set(counts.values())) != 1 or not counts["x0"]:
        raise ValueError(f"{name}: arrays need the same number (>= 1) of examples on axis 0, given {counts}")
    x0 = out["x0"]
    if not x0.size:
        raise ValueError(f"{name}: {key!r} has shape {x0.shape}; an example needs at least one value")
    for k, v in values.items():
        if k != key and v.dtype.kind not in "biufc":  # a batch goes to the devices whole
            raise ValueError(f"{name}: array {k!r} has dtype {v.dtype}; give numbers only, and leave names out")
    if x0.dtype.kind == "f":
        if levels is not None:
            raise ValueError(f"{name}: levels={levels} is for integer arrays, given dtype {x0.dtype}; allowed: None")
        out["x0"] = x0 = x0.astype(np.float32, copy=False)
        if not np.isfinite(x0).all():
            raise ValueError(f"{name}: {int((~np.isfinite(x0)).sum())} values of {key!r} are not finite in float32")
    elif x0.dtype.kind in "iu":
        if levels is None and x0.dtype != np.uint8:
            raise ValueError(f"{name}: levels=None is allowed for uint8 and float arrays only, given {x0.dtype}")
        levels = 256 if levels is None else levels
        from_levels(np.array([x0.min(), x0.max()]), levels)  # refuses levels or values out of range
    else:
        raise ValueError(f"{name}: dtype {x0.dtype} of {key!r} is not allowed; give integers or floats")
    if "label" in out:
        out["label"], num_classes = _labels(name, out["label"], num_classes)
    return Dataset(name, split, Arrays(out), x0.shape[1:], levels, num_classes, tuple(class_names))


def _labels(name: str, label: np.ndarray, num_classes: int | None) -> tuple[np.ndarray, int]:
    if label.dtype.kind not in "iu" or label.ndim != 1:
        raise ValueError(f"{name}: label needs shape (N,) and integers, given {label.shape} {label.dtype}")
    num_classes = max(int(label.max()) + 1, 1) if num_classes is None else num_classes
    if label.min() < 0 or label.max() >= num_classes:
        raise ValueError(f"{name}: labels {label.min()}..{label.max()} given, allowed 0..{num_classes - 1}")
    return label.astype(np.int32), num_classes


def decode(dataset: Dataset, chunk: int = 1024) -> Dataset:
    """Read every example into memory once, as stored (an 8-bit image stays 8 bits a value).

    Args:
        dataset: any data set; one already in memory is returned as it is.
        chunk: examples read at a time.

    Returns:
        The same data set with :class:`Arrays` records.
    """
    if dataset.in_memory:
        return dataset
    out: dict[str, np.ndarray] = {}
    for start in range(0, len(dataset), chunk):
        rows = np.arange(start, min(start + chunk, len(dataset)))
        for name, part in dataset.records.read(rows).items():
            if not start:
                out[name] = np.empty((len(dataset), *part.shape[1:]), part.dtype)
            out[name][rows] = part
    return dataclasses.replace(dataset, records=Arrays(out))
