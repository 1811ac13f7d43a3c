"""One run to a work directory: an advisory lock that dies with its process."""

import datetime
import json
import logging
import os
import pathlib
import socket
from types import TracebackType

__all__ = ["WorkdirLock", "WorkdirLocked"]

_log = logging.getLogger(__name__)
_NAME = ".lock"
_open_locks: set[int] = set()


class WorkdirLocked(RuntimeError):
    """Another run uses the work directory; the message says which."""


def _drop_in_child() -> None:
    """Close the lock files a fork inherited: a worker that outlives its parent must not keep the lock."""
    for descriptor in list(_open_locks):
        try:
            os.close(descriptor)
        except OSError:
            pass
    _open_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)


class WorkdirLock:
    """Hold ``workdir`` for this run: ``with WorkdirLock(workdir): train(...)``.

    The lock is ``flock`` on ``<workdir>/.lock``, so it is free as soon as its process is gone, however it died;
    the file's content (pid, host, start) is only for the message. It is taken on construction and given back by
    ``release``, at the end of the ``with``, or by the system. Bucket paths (``gs://...``) are not locked. In a
    job of several processes only process 0 should take it.

    Args:
        workdir: made if missing.

    Raises:
        WorkdirLocked: if another run holds it, this process included.
        OSError: if the directory cannot be written, or its file system has no locks.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._descriptor: int | None = None
        self.path: pathlib.Path | None = None
        if "://" in os.fspath(workdir):
            _log.info("%s is not a local path, it is not locked against a second run", workdir)
            return
        import fcntl  # not on every platform; only needed here

        directory = pathlib.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / _NAME
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise WorkdirLocked(
                f"workdir {directory} is in use by {holder}: wait for it, stop it, or give another workdir"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise OSError(error.errno, f"cannot lock workdir {directory}: {error.strerror}") from error
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(who) + "\n").encode(), 0)
        self._descriptor = descriptor
        _open_locks.add(descriptor)

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would let two later runs lock different files."""
        if self._descriptor is not None and self._descriptor in _open_locks:
            _open_locks.discard(self._descriptor)
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> "WorkdirLock":
        """Use as a context manager; the lock is held since construction."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        self.release()


def _holder(content: bytes) -> str:
    """Name the run that a lock file's content describes."""
    try:
        who = json.loads(content)
        return f"process {who['pid']} on {who['host']} (since {who['started']})"
    except (ValueError, KeyError, TypeError):
        return "another run"
