"""What a person sees while a run goes: a bar on a terminal, a line now and then in a pipe, nothing in CI."""

import os
import sys
import time
from typing import Any, TextIO


class Progress:
    """Progress of a run, by ``update`` at every step and ``report`` when numbers are at hand.

    On a terminal: a tqdm bar with step, loss, images/s and time left. Elsewhere: one line, at most every
    ``quiet_seconds``; none at all when the environment has ``CI`` set. ``every`` asks for a line at the first
    report after every so many steps instead, wherever the output goes.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        every: int | None = None,
        stream: TextIO | None = None,
        quiet_seconds: float = 30.0,
    ):
        self.total, self.step = total, start
        self._stream = sys.stdout if stream is None else stream
        self._every = every
        self._quiet = quiet_seconds
        self._began, self._first = time.perf_counter(), start
        self._last_time, self._last_step = -float("inf"), start
        self._bar: Any = None
        if every is None and self._stream.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True)
        self._silent = self._bar is None and every is None and bool(os.environ.get("CI"))

    def update(self, step: int) -> None:
        """``step`` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self.step)
        self.step = step

    def report(self, row: dict[str, Any]) -> None:
        """Show the numbers of a log row (loss, images_per_second)."""
        losses = {k: v for k, v in row.items() if k == "loss" or k.endswith("/loss")}
        rate = row.get("images_per_second")
        if self._bar is not None:
            self._bar.set_postfix({**{k: f"{v:.4g}" for k, v in losses.items()}, "img/s": f"{rate or 0:.0f}"})
            return
        if self._silent or not self._due():
            return
        self._last_time, self._last_step = time.perf_counter(), self.step
        parts = [f"step {self.step}/{self.total}"]
        parts += [f"{name} {value:.4g}" for name, value in losses.items()]
        if rate is not None:
            parts.append(f"{rate:.0f} images/s")
        parts.append(f"ETA {_clock(self._remaining())}")
        print("  ".join(parts), file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """One line of plain text, without breaking the bar; not shown when silent."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif not self._silent:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()

    def _due(self) -> bool:
        if self.step >= self.total:
            return True
        if self._every is not None:
            return self.step - self._last_step >= self._every
        return time.perf_counter() - self._last_time >= self._quiet

    def _remaining(self) -> float:
        done = self.step - self._first
        elapsed = time.perf_counter() - self._began
        return elapsed / done * (self.total - self.step) if done else 0.0


def _clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
