"""`jaxdiff train --restarts N`: run training in a child process and start it again when it dies or hangs.

Training itself goes on from its newest checkpoint that verifies, so all that is left here is to notice, to wait a
little, and to give up when restarting does not help. Imports no jax: a supervisor must not die of what it guards.

In a job of several processes each has its own supervisor. When one process dies the others cannot go on; they end
after ``JAXDIFF_HEARTBEAT_SECONDS``, and all supervisors start their process again.
"""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

__all__ = ["HEARTBEAT", "supervise"]

HEARTBEAT = "heartbeat.json"
DONE, REFUSED, DIVERGED = 0, 2, 3  # exit statuses, as cli.py gives them, that another start would not change


def _beat(path: pathlib.Path) -> tuple[str, int]:
    """The heartbeat's text and step; ("", -1) while there is none."""
    try:
        text = path.read_text()
        return text, int(json.loads(text)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", -1


def _name(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _tell(line: str) -> None:
    print(f"jaxdiff supervisor: {line}", file=sys.stderr, flush=True)


def supervise(
    command: Sequence[str],
    workdir: str,
    restarts: int,
    stall_timeout: float | None = None,
    *,
    backoff: float = 1.0,
    longest: float = 60.0,
    say: Callable[[str], None] = _tell,
) -> int:
    """Run ``command`` until it ends well; returns its last exit status (128 + signal number if one killed it).

    Exit status 0 (finished, or preempted and saved), 3 (losses not finite) and, before the first heartbeat, 2 (refused:
    the user must mend something) end it. Any other end, a disk or network that failed later on included, is followed
    by a restart after ``backoff`` seconds, twice as long after each failure in a row up to ``longest``. A failure
    counts against ``restarts`` only if the run got no further than before, so a long run survives any number of
    crashes but a step that always fails ends it. SIGTERM and SIGINT are passed on to the child as SIGTERM; it saves,
    and is not started again after that.

    Args:
        command: the training command of one process.
        workdir: where process 0 writes ``heartbeat.json`` at log intervals.
        restarts: how often to start again in a row without progress, >= 0.
        stall_timeout: seconds without a new heartbeat, start-up and compilation included, after which the child
            is killed (-9) and counts as dead; None never kills. Measured on this machine's monotonic clock.
        backoff: seconds before the first restart.
        longest: the longest wait between restarts, seconds.
        say: receives one line for every event.

    Raises:
        ValueError: on settings out of range, before anything is started.
    """
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise ValueError(f"--restarts={restarts!r}: allowed are integers >= 0")
    if stall_timeout is not None and not stall_timeout > 0:
        raise ValueError(f"--stall-timeout={stall_timeout!r}: allowed are seconds > 0")
    if stall_timeout is not None and "://" in workdir:
        raise ValueError(f"--stall-timeout needs a local --workdir for the heartbeat, {workdir} is given")
    beat = pathlib.Path(workdir) / HEARTBEAT
    child: subprocess.Popen | None = None
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGTERM)  # a terminal sends Ctrl-C to both already; a second ends it at once

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    before, furthest = _beat(beat)
    failures, begun = 0, False
    try:
        while True:
            child = subprocess.Popen(list(command))
            if asked:  # the signal came while there was no child to pass it to
                child.send_signal(signal.SIGTERM)
            status = _watch(child, beat, None if asked else stall_timeout, say)
            text, step = _beat(beat)
            begun = begun or text != before  # then nothing is left for a user to mend: a disk or network failed
            if status in (DONE, DIVERGED) or (status == REFUSED and not begun) or asked:
                return status if status >= 0 else 128 - status
            failures = 1 if step > furthest else failures + 1
            furthest = max(furthest, step)
            where = f"after step {step}" if step >= 0 else "before its first step"
            if failures > restarts:
                say(
                    f"training ended with {_name(status)} {where}; giving up, {restarts} restarts in a row did not help"
                )
                return status if status >= 0 else 128 - status
            pause = min(longest, backoff * 2 ** (failures - 1))
            say(f"training ended with {_name(status)} {where}; restart {failures} of {restarts} in {pause:g} s")
            until = time.monotonic() + pause
            while time.monotonic() < until and not asked:
                time.sleep(min(0.1, pause))
            if asked:  # told to stop between two runs: the checkpoints are as good as they get
                return 128 + asked[-1]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(child: subprocess.Popen, beat: pathlib.Path, timeout: float | None, say: Callable[[str], None]) -> int:
    """Wait for the child; kill it when its heartbeat has not changed for ``timeout`` seconds."""
    last, since = _beat(beat)[0], time.monotonic()
    while True:
        try:
            return child.wait(0.2)
        except subprocess.TimeoutExpired:
            pass
        now = _beat(beat)[0]
        if now != last:
            last, since = now, time.monotonic()
        elif timeout is not None and time.monotonic() - since > timeout:
            say(f"no heartbeat for {timeout:g} s; killing process {child.pid}")
            child.kill()
            return child.wait()
