"""Reading ahead: one background thread, a bounded queue, and how long the consumer waited."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["Stream"]

_END = object()


class Stream:
    """Iterator over ``batches`` that reads up to ``buffer`` of them ahead in a background thread, in order.

    Attributes:
        first_wait_seconds: time the consumer waited for the first batch (start-up, reported apart).
        wait_seconds: total time it waited for later ones.

    An error in the source is raised by ``next`` at the place where the batch would have come. ``close``
    stops the thread; leaving a ``with`` block closes.
    """

    def __init__(self, batches: Iterator[Any], buffer: int = 4):
        self.first_wait_seconds = 0.0
        self.wait_seconds = 0.0
        self._began: float | None = None
        self._queue: queue.Queue = queue.Queue(maxsize=buffer)
        self._stop = threading.Event()
        self._done = False
        arguments = (batches, self._queue, self._stop)  # not self: an abandoned stream can then be collected
        self._thread = threading.Thread(target=_fill, args=arguments, name="jaxdiff-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        if self._done:
            raise StopIteration
        before = time.perf_counter()
        item, error = self._queue.get()
        now = time.perf_counter()
        if self._began is None:
            self._began, self.first_wait_seconds = now, now - before
        else:
            self.wait_seconds += now - before
        if item is _END:
            self.close()
            if error is not None:
                raise error
            raise StopIteration
        return item

    @property
    def wait_fraction(self) -> float:
        """Share (0..1) of the time since the first batch came that the consumer spent waiting for data."""
        if self._began is None:
            return 0.0
        elapsed = time.perf_counter() - self._began
        return min(1.0, self.wait_seconds / elapsed) if elapsed > 0 else 0.0

    def close(self) -> None:
        """Stop reading and end the thread; may be called twice. A later ``next`` raises StopIteration."""
        self._done = True
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop.set()


def _put(items: queue.Queue, stop: threading.Event, item: tuple[Any, BaseException | None]) -> None:
    while not stop.is_set():
        try:
            return items.put(item, timeout=0.1)
        except queue.Full:
            continue


def _fill(batches: Iterator[Any], items: queue.Queue, stop: threading.Event) -> None:
    try:
        for batch in batches:
            _put(items, stop, (batch, None))
            if stop.is_set():
                break
        else:
            _put(items, stop, (_END, None))
    except BaseException as error:
        _put(items, stop, (_END, error))
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
