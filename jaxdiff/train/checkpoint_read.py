"""Reading a checkpoint: first its record, then whether it fits, then its arrays, then whether they are right.

With several processes each function marked *together* is called by all of them, and damage seen by one is damage
for all; otherwise the one that saw it would leave the others waiting in the next collective.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

import jaxdiff
from jaxdiff.train.checkpoint_errors import (
    CheckpointError,
    DamagedStep,
    collect_quietly,
    one_line,
    says_nothing_about_the_files,
)
from jaxdiff.train.checkpoint_state import empty, like, place, readable
from jaxdiff.train.digest import Leaf, first_mismatch, leaf_of, named_leaves

__all__ = ["FORMAT", "check_fits", "from_chief", "open_record", "read_items", "verify"]

FORMAT = 1
_log = logging.getLogger(__name__)
_OUR_ITEMS = {"state", "ema", "meta"}


def from_chief(value: int) -> int:
    """Process 0's value (together)."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32)))


def _fault(path: epath.Path, read: Callable[[], None]) -> str | None:
    """Run a reader; the reason if the files are damaged. Errors that are not about the files go on up."""
    try:
        read()
    except CheckpointError:
        raise
    except Exception as error:
        if says_nothing_about_the_files(error):
            raise CheckpointError(f"checkpoint {path} could not be read: {one_line(error)}") from error
        fault = one_line(error)
    else:
        return None
    collect_quietly()
    return fault


def _agreed_fault(fault: str | None) -> str | None:
    """A fault if any process has one (together)."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        if np.any(multihost_utils.process_allgather(np.array(fault is not None))) and fault is None:
            return "another process could not read it"
    return fault


def open_record(path: epath.Path, *, together: bool = False) -> Any:
    """Read and check the record of the checkpoint at ``path``.

    Raises:
        DamagedStep: if it is missing or not what was written.
        CheckpointError: if it is of another format, or the directory is a checkpoint but not one of jaxdiff.
    """
    from jaxdiff.train import checkpoint_files as files

    found = []
    fault = _fault(path, lambda: found.append(files.read_record(path)))
    fault = _agreed_fault(fault) if together else fault
    if fault is not None:
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        strange = sorted(n for n in names - _OUR_ITEMS if not n.startswith("_") and n != "commit_success.txt")
        if strange and not names & _OUR_ITEMS:
            raise CheckpointError(
                f"{path} was not written by jaxdiff (it holds {', '.join(strange[:3])}); choose another directory"
            )
        raise DamagedStep(path, fault)
    record = found[0]
    version = record.payload.get("format")
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, jaxdiff {jaxdiff.__version__} reads format {FORMAT}: "
            f"use the jaxdiff that wrote it ({record.payload.get('versions', {}).get('jaxdiff', 'unknown')})"
        )
    return record


def verify(path: epath.Path) -> str | None:
    """Read a whole checkpoint on this process's host; None if every digest matches, else what is wrong."""
    from jaxdiff.train import checkpoint_files as files

    try:
        record = open_record(path)
    except DamagedStep as error:
        return error.reason
    return _fault(path, lambda: files.verify_on_host(path, record))


def _read_whole(path: epath.Path, places: Mapping[str, jax.ShapeDtypeStruct | None]) -> dict[str, Any]:
    """Read every leaf whole on the host, then hand out the parts (together)."""
    from jaxdiff.train import checkpoint_files as files

    arrays = files.read_arrays(path, dict.fromkeys(places))
    for name, where in places.items():
        if where is not None:
            host = arrays[name]
            arrays[name] = jax.make_array_from_callback(where.shape, where.sharding, lambda part, h=host: h[part])  # type: ignore[misc]
    return arrays


def _read_verified(
    path: epath.Path,
    item: str,
    expected: Mapping[str, Leaf],
    places: Mapping[str, jax.ShapeDtypeStruct | None],
) -> dict[str, Any]:
    """Read the leaves of one item to their places and check their digests (together).

    Reading in parts can fail where reading whole succeeds: some of orbax's side files matter to the one alone. So a
    first failure is only a reason to read again, whole; if that fails too it is damage.
    """
    from jaxdiff.train import checkpoint_files as files

    several = jax.process_count() > 1
    arrays: dict[str, Any] = {}
    check = lambda: files.check_digests(item, expected, arrays, collective=several)
    fault = _agreed_fault(_fault(path, lambda: arrays.update(files.read_arrays(path / item, places))))
    fault = fault or _fault(path, check)
    if fault is None:
        return arrays
    reason = None if several else verify(path)  # several have verified already
    if reason is not None:
        raise DamagedStep(path, reason)
    _log.warning("checkpoint %s could only be read whole, not in parts: %s", path, fault)
    fault = _agreed_fault(_fault(path, lambda: arrays.update(_read_whole(path / item, places))))
    fault = fault or _fault(path, check)
    if fault is not None:
        raise CheckpointError(f"checkpoint {path} verifies but could not be restored: {fault}")
    return arrays


def check_fits(path: epath.Path, item: str, stored: Mapping[str, Leaf], wanted: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless an item of the checkpoint at ``path`` has the leaves that are wanted of it."""
    fault = first_mismatch(stored, {name: leaf_of(leaf) for name, leaf in wanted.items()})
    if fault:
        prefix = "ema/" if item == "ema" else ""
        raise CheckpointError(f"checkpoint {path} does not fit this program: {prefix}{fault}")


def read_items(path: epath.Path, targets: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read and verify some items (together).

    Args:
        path: the checkpoint.
        targets: item -> structure with arrays or ``jax.ShapeDtypeStruct``; for ``{"ema": None}`` alone, nested
            dictionaries of numpy arrays are returned.

    Returns:
        The trees in the order asked for, and the caller's meta.

    Raises:
        DamagedStep: if the files are bad.
        CheckpointError: if they are intact but do not fit the target.
    """
    from jaxdiff.train import checkpoint_files as files

    record = open_record(path, together=True)
    loose = dict(targets) == {"ema": None}
    wanted: dict[str, dict[str, Any]] = {}
    for item, target in targets.items():
        stored = record.leaves.get(item, {})
        wanted[item] = dict.fromkeys(stored) if loose else named_leaves(target)
        if not loose:
            check_fits(path, item, stored, wanted[item])

    several = jax.process_count() > 1
    if several:
        share = (jax.process_index(), jax.process_count())
        fault = _agreed_fault(_fault(path, lambda: files.verify_on_host(path, record, share)))
        if fault is not None:
            raise DamagedStep(path, fault)

    trees = []
    for item, target in targets.items():
        stored = record.leaves.get(item, {})
        places = {name: None if loose else place(name, leaf) for name, leaf in wanted[item].items()}
        full = {name: where for name, where in places.items() if 0 not in stored[name].shape}
        arrays = _read_verified(path, item, {name: stored[name] for name in full}, full)
        for name, where in places.items():
            if name not in full:
                arrays[name] = empty(stored[name], where)
        if loose:
            trees.append(readable(arrays))
        else:
            values = [like(leaf, arrays[name]) for name, leaf in wanted[item].items()]
            trees.append(jax.tree.unflatten(jax.tree.structure(target), values))
    return tuple(trees), record.payload["meta"]
