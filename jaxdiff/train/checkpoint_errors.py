"""What can be wrong with a checkpoint, and how it is said in one line."""

import errno
import functools
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = [
    "CheckpointError",
    "Damaged",
    "DamagedStep",
    "collect_quietly",
    "hush_abandoned",
    "one_line",
    "says_nothing_about_the_files",
    "system_reason",
]

_MACHINE = "EACCES EPERM EMFILE ENFILE ENOMEM EAGAIN EBUSY ESTALE"
_LINK = "ETIMEDOUT ENOTCONN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH"
_ERRNOS = {getattr(errno, name) for name in f"{_MACHINE} {_LINK}".split()}
# modules whose errors are of the way to a bucket
_NETWORK = ("aiohttp.", "botocore.", "gcsfs.", "google.api_core.", "google.auth.", "requests.", "urllib3.")
_WORDS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or used; one line that names the directory and the reason."""


class Damaged(Exception):
    """The files of a checkpoint are missing, unreadable or not what was written."""


class DamagedStep(CheckpointError):
    """``Damaged`` with the checkpoint's name; walking back catches it."""

    def __init__(self, path: object, reason: str):
        super().__init__(f"checkpoint {path} is damaged: {reason}")
        self.reason = reason


def says_nothing_about_the_files(error: BaseException) -> bool:
    """Reading failed for want of memory, rights or a connection: nothing may be renamed because of it."""
    return any(
        isinstance(cause, (MemoryError, TimeoutError, ConnectionError))
        or (isinstance(cause, OSError) and cause.errno in _ERRNOS)
        or type(cause).__module__.startswith(_NETWORK)
        or any(word in str(cause) for word in _WORDS)
        for cause in _causes(error)
    )


def system_reason(error: BaseException) -> str | None:
    """The operating system's words if an error, or one of its causes, comes from there."""
    reason = None
    for cause in _causes(error):
        said = re.search(r"os_error_code='(\d+)'", str(cause))  # how tensorstore words it
        if isinstance(cause, OSError) and cause.errno:
            reason = os.strerror(cause.errno)
        elif said:
            reason = os.strerror(int(said[1]))
    return reason


def collect_quietly() -> None:
    """When one of orbax's transfers fails it abandons the others, which complain at length once they are collected.

    The fault is reported in one line by whoever asked; collect the rest now, quietly.
    """
    log, level = logging.getLogger("asyncio"), logging.getLogger("asyncio").level
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
    finally:
        log.setLevel(level)
        sys.unraisablehook = hook


@functools.cache
def hush_abandoned() -> None:
    """For a process of our own (a command): never show what orbax's abandoned transfers say of themselves.

    :func:`collect_quietly` meets only those that are over when it is called; the others speak from threads of
    tensorstore, before or after the one line that says what happened, until the process ends.
    """
    closed = "Event loop is closed"

    def worth_telling(record: logging.LogRecord) -> bool:
        said = f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}"
        return not ("was never retrieved" in said and ("orbax" in said or "OCDBT" in said))

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == closed):
            told(unraisable)

    told, sys.unraisablehook = sys.unraisablehook, hook
    logging.getLogger("asyncio").addFilter(worth_telling)
    warnings.filterwarnings("ignore", r"coroutine '.*\bwrite_fragment' was never awaited", RuntimeWarning)  # orbax's


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def one_line(error: BaseException) -> str:
    """First line of an error's message, of readable length."""
    if isinstance(error, DamagedStep):
        return error.reason
    text = (str(error).strip().splitlines() or [""])[0]
    text = text if len(text) <= 200 else text[:197] + "..."
    return text if isinstance(error, Damaged) else f"{type(error).__name__}: {text}"
