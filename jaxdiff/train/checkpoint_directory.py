"""The directory of a run's checkpoints: which there are, what was left unfinished, names for what is set aside."""

import logging

from etils import epath

from jaxdiff.train.checkpoint_errors import CheckpointError, one_line

__all__ = ["COMMITTED", "free_name", "prepare", "remove", "set_aside", "steps", "sweep"]

_log = logging.getLogger(__name__)
COMMITTED = "commit_success.txt"


def steps(directory: epath.Path) -> list[int]:
    """Steps of the committed checkpoints, ascending; folders with other names than we write are somebody else's."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _is_step(path.name) and path.is_dir() and _is_committed(path)]
    return sorted(int(path.name) for path in found)


def _is_committed(path: epath.Path) -> bool:
    """Whether a save is done: in a bucket, which has no atomic rename, orbax marks it so."""
    return "://" not in str(path) or (path / COMMITTED).exists()


def set_aside(directory: epath.Path) -> list[str]:
    """Names of the damaged checkpoints that were renamed and are still there."""
    parts = ((path.name, *path.name.partition(".corrupt")[:2]) for path in directory.iterdir())
    return sorted(name for name, step, mark in parts if mark and _is_step(step))


def remove(path: epath.Path) -> None:
    """Delete a checkpoint; a deletion that is cut short leaves nothing that looks like one."""
    if "://" in str(path):
        (path / COMMITTED).unlink(missing_ok=True)
    else:
        path = path.rename(path.parent / f"{path.name}.deleting")
    path.rmtree()


def _is_step(name: str) -> bool:
    return name.isdecimal() and name == str(int(name)) and int(name) < 2**31  # steps are counted in 32 bits


def prepare(directory: epath.Path) -> None:
    """Make the directory, see that it can be written, and sweep it; raises CheckpointError if it cannot."""
    probe = directory / ".writable"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"checkpoint directory {directory} cannot be written: {one_line(error)}") from error
    sweep(directory)


def sweep(directory: epath.Path, step: str = "") -> None:
    """Delete what saves (of one step, or all) and deletions that were cut short left behind."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        name, _, rest = path.name.partition(".")
        cut_short = rest.startswith("orbax-checkpoint-tmp") or (_is_step(path.name) and not _is_committed(path))
        unfinished = cut_short and name == (step or name)
        if unfinished or (not step and rest == "deleting"):
            _log.info("removing unfinished %s", path)
            path.rmtree(missing_ok=True)


def free_name(directory: epath.Path, name: str) -> str:
    """``name``, or ``name-2``, ``name-3``, ... where that is taken."""
    free, count = name, 1
    while (directory / free).exists():
        count += 1
        free = f"{name}-{count}"
    return free
