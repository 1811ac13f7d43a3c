"""Decoding a set into memory without making the first batch wait for all of it.

A run that starts, or starts again, needs one batch; the other examples are decoded meanwhile. Rows that are asked
for are decoded at once, the rest in stored order by a background thread, each kept as decoded.
"""

import atexit
import dataclasses
import threading
import weakref

import numpy as np

from jaxdiff.data.dataset import Dataset, Records

__all__ = ["Gradual", "gradual"]

_QUIET = 8  # reads before the background thread starts: the first step should have the processor to itself
_CHUNK = 256  # examples decoded at a time; what is in hand is finished before the interpreter exits


class Gradual:
    """Records in memory that fill up: ``read`` gives what the lazy ``records`` would, each decoded about once."""

    in_memory = True

    def __init__(self, records: Records):
        first = records.read(np.zeros(1, np.int64))
        self._records = records
        self._arrays = {name: np.empty((len(records), *part.shape[1:]), part.dtype) for name, part in first.items()}
        self._done = np.zeros(len(records), bool)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting, self._reads = threading.Lock(), 0

    def __len__(self) -> int:
        return len(self._done)

    @property
    def decoded(self) -> int:
        """How many examples are in memory by now."""
        return int(self._done.sum())

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at ``rows``, copied; after some calls the background thread starts."""
        rows = np.asarray(rows)
        missing = np.unique(rows[~self._done[rows]])
        for start in range(0, len(missing), _CHUNK):
            _keep(self._records, self._arrays, self._done, missing[start : start + _CHUNK])
        self._start()
        return {name: array.take(rows, axis=0) for name, array in self._arrays.items()}

    def _start(self) -> None:
        with self._starting:
            self._reads += 1
            if self._thread is not None or self._reads < _QUIET:
                return
            arguments = (self._records, self._arrays, self._done, self._stop)  # not self: it may be collected
            self._thread = threading.Thread(target=_rest, args=arguments, name="jaxdiff-decode", daemon=True)
            self._thread.start()
        weakref.finalize(self, self._stop.set)
        atexit.register(_end, self._stop, self._thread)


def _keep(records: Records, arrays: dict[str, np.ndarray], done: np.ndarray, rows: np.ndarray) -> None:
    for name, part in records.read(rows).items():
        arrays[name][rows] = part
    done[rows] = True  # only now: two threads may decode a row twice, none reads it unfinished


def _rest(records: Records, arrays: dict[str, np.ndarray], done: np.ndarray, stop: threading.Event) -> None:
    for start in range(0, len(done), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(done)))
        rows = rows[~done[rows]]
        if stop.is_set():
            return
        if len(rows):
            _keep(records, arrays, done, rows)


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    """A decoder must not be in the middle of its work when its libraries are torn down."""
    stop.set()
    thread.join(timeout=10.0)


def gradual(dataset: Dataset) -> Dataset:
    """The same data set, decoded into memory as it is used (``decode`` does it all at once)."""
    return dataset if dataset.in_memory else dataclasses.replace(dataset, records=Gradual(dataset.records))
