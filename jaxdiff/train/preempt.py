"""Notice that the machine will be taken away, or that somebody pressed Ctrl-C, in time to save.

One process: a signal handler sets a flag that the loop reads between steps; no network port is opened.
Several processes: all must stop at the same step, so the question goes to jax's preemption sync point,
which needs ``jax.distributed.initialize`` and installs its own SIGTERM handler there.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax


class Preemption:
    """Context manager; ``requested(step)`` says whether to save and stop after ``step``.

    Handlers are installed on entry (main thread of a single process) and put back on exit. A second SIGTERM
    while the save runs is only counted: the save is allowed to finish. A second SIGINT is a KeyboardInterrupt. A
    process that was told to ignore a signal goes on ignoring it.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)):
        self._signals = signals
        self._previous: dict[int, Any] = {}
        self.received: list[int] = []

    def __enter__(self) -> "Preemption":
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            os.write(2, b"saving after this step; Ctrl-C again ends at once\n")  # a print could meet another halfway
        self.received.append(number)

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return signal.SIGINT in self.received

    def requested(self, step: int) -> bool:
        """Whether a signal came; with several processes, whether this is the step all of them stop at."""
        if jax.process_count() == 1:
            return bool(self.received)
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
