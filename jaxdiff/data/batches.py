"""Batches whose content is a pure function of the step.

Step s of global batch size B holds the positions sB .. sB+B-1 of the endless line of
:mod:`jaxdiff.data.order`. Epochs join without a gap: a batch may end one epoch and begin the next, nothing
is dropped, and each example comes exactly once an epoch even when B does not divide the number of examples.
Process p of n reads the p-th contiguous part of every global batch. So a resumed run needs the step alone,
on any number of processes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdiff.data import order
from jaxdiff.data.dataset import Dataset, require
from jaxdiff.data.stream import Stream

__all__ = ["Pipeline", "pipeline"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Made by :func:`pipeline`, which checks the values; the fields are described there."""

    dataset: Dataset
    batch_size: int
    seed: int = 0
    flip: bool = False
    process_index: int = 0
    process_count: int = 1
    threads: int = 4
    workers: int = 0
    buffer: int = 4

    def positions(self, step: int) -> np.ndarray:
        """(B / n,) int64 global positions that this process reads at ``step`` (>= 0)."""
        if step < 0:
            raise ValueError(f"step={step} given; allowed: >= 0")
        local = self.batch_size // self.process_count
        start = step * self.batch_size + self.process_index * local
        return np.arange(start, start + local, dtype=np.int64)

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """Return this process's part of the batch at ``step``.

        Args:
            step: integer >= 0.

        Returns:
            ``x0`` (B/n, *shape) float32, ``label`` (B/n,) int32 if the set has labels, other arrays by name,
            and ``index`` (B/n,) uint32, the global position modulo 2^32: the number that keys an example's
            randomness.
        """
        position = self.positions(step)
        batch = self.dataset.examples(order.rows(position, len(self.dataset), self.seed))
        if self.flip:
            turned = order.coin(position, self.seed)
            batch["x0"][turned] = batch["x0"][turned][..., ::-1, :]
        batch["index"] = (position & 0xFFFFFFFF).astype(np.uint32)
        return batch

    def epoch(self, step: int) -> float:
        """Epochs completed when ``step`` batches have been read."""
        return step * self.batch_size / len(self.dataset)

    def stream(self, start: int = 0, stop: int | None = None) -> Stream:
        """Batches of steps start, start+1, ..., read ahead in the background.

        Sets in memory are gathered by one thread; lazy ones are decoded by grain (``threads``, or
        ``workers`` processes). Both give exactly ``batch_at(step)``. Close the stream, or use it in a
        ``with`` block.

        Args:
            start: first step.
            stop: step to end before; None for no end.

        Returns:
            A :class:`~jaxdiff.data.stream.Stream`.
        """
        self.positions(start)
        batches = self._plain(start, stop) if self.dataset.in_memory else self._grain(start, stop)
        return Stream(batches, self.buffer)

    def _plain(self, start: int, stop: int | None) -> Iterator[dict[str, np.ndarray]]:
        step = start
        while stop is None or step < stop:
            yield self.batch_at(step)
            step += 1

    def _grain(self, start: int, stop: int | None) -> Iterator[dict[str, np.ndarray]]:
        grain: Any = require("grain", f"data.name={self.dataset.name!r} read lazily")
        # The elements are whole batches: a record store reads many records at once far faster than
        # one by one, and the position in grain's data set is the step, so its state is never needed.
        steps = grain.MapDataset.range(start, 2**62 if stop is None else stop)
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=max(self.buffer, self.threads))
        batches = steps.map(self.batch_at).to_iter_dataset(options)
        if self.workers:
            flags = require("absl.flags", "data.workers").FLAGS
            if not flags.is_parsed():  # grain's worker processes read absl flags, which only absl programs parse
                flags.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return iter(batches)


def pipeline(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    workers: int = 0,
    buffer: int = 4,
) -> Pipeline:
    """Check the values and make a :class:`Pipeline`.

    Args:
        dataset: from :func:`jaxdiff.data.load`.
        batch_size: global batch size, 1..len(dataset), a multiple of process_count.
        seed: integer >= 0, keys the order of examples and the flips.
        flip: mirror each image left to right with probability 1/2, decided by (seed, position).
        process_index: this process, 0..process_count-1.
        process_count: number of processes that share each batch.
        threads: decoding threads of a lazy set (in each worker).
        workers: decoding processes of a lazy set; 0 for threads alone. They are spawned, so the program
            needs an ``if __name__ == "__main__"`` guard.
        buffer: batches read ahead.

    Returns:
        A :class:`Pipeline`.

    Raises:
        ValueError: a value out of range, a set smaller than one global batch, flip of data that are not
            images.
    """
    size = len(dataset)
    where = f"data.name={dataset.name!r}, data.split={dataset.split!r}"
    if not _whole(batch_size) or batch_size < 1:
        raise ValueError(f"data.batch_size={batch_size!r} given; allowed: an integer from 1 to {size} ({where})")
    if batch_size > size:
        raise ValueError(f"data.batch_size={batch_size} is larger than the set ({where}); allowed: 1..{size}")
    if not _whole(process_count) or process_count < 1 or batch_size % process_count:
        allowed = f"a multiple of the {process_count} processes" if process_count else "process_count >= 1"
        raise ValueError(f"data.batch_size={batch_size} given; allowed: {allowed}")
    if not _whole(process_index) or not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index!r} given; allowed: 0..{process_count - 1}")
    if not _whole(seed) or seed < 0:
        raise ValueError(f"data.seed={seed!r} given; allowed: an integer >= 0")
    if flip and len(dataset.shape) != 3:
        raise ValueError(f"data.flip=True needs images (height, width, channels), {where} has shape {dataset.shape}")
    for name, value, least in (("threads", threads, 1), ("workers", workers, 0), ("buffer", buffer, 1)):
        if not _whole(value) or value < least:
            raise ValueError(f"data.{name}={value!r} given; allowed: an integer >= {least}")
    return Pipeline(
        dataset,
        int(batch_size),
        int(seed),
        bool(flip),
        int(process_index),
        int(process_count),
        threads,
        workers,
        buffer,
    )


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
