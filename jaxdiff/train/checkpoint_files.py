"""What one checkpoint is on disk, and the only module that touches orbax (import it late: it costs 0.5 s).

```
<step>/state/...                 orbax arrays: everything but the averages
<step>/ema/...                   orbax arrays: the averages, so that sampling reads them alone
<step>/meta/record.json          sealed: format, step, versions, shapes and dtypes of every leaf, the caller's meta
<step>/meta/digests-<p>.json     sealed: the digest sums of the parts that process p answered for
```
Orbax writes into a temporary directory and renames it when every process and every item is done, so the digests,
computed in a background thread from host copies, commit together with the arrays or not at all. A sealed file
is JSON that carries the sha256 of itself, because a checkpoint is only as trustworthy as its record.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxdiff.train.checkpoint_errors import Damaged
from jaxdiff.train.digest import Leaf, Part, combine, host_parts, nest, part_digest

__all__ = [
    "ARRAY_ITEMS",
    "Record",
    "TEMPORARY",
    "check_digests",
    "make_writer",
    "read_arrays",
    "read_record",
    "verify_on_host",
    "write",
]

ARRAY_ITEMS = ("state", "ema")
TEMPORARY = ".orbax-checkpoint-tmp"
_RECORD, _DIGESTS = "record.json", "digests-{}.json"
_SMALL = 256 * 2**20  # bytes that a verification holds on the host at a time


@dataclasses.dataclass(frozen=True)
class Record:
    """A checkpoint's record: ``payload`` as written, and per item the leaves with their digests."""

    payload: dict[str, Any]
    leaves: dict[str, dict[str, Leaf]]


# ------------------------------------------------------------------------------------------------- sealed files


def seal(payload: Mapping[str, Any]) -> str:
    """JSON text that carries its own sha256, taken of what will be read back (integer keys become strings)."""
    body = json.dumps(json.loads(json.dumps(payload)), sort_keys=True)
    return f'{{"sha256": "{hashlib.sha256(body.encode()).hexdigest()}", "payload": {body}}}\n'


def unseal(path: epath.Path) -> dict[str, Any]:
    """Read a sealed file; raises Damaged if it is missing, not JSON or does not match its own digest."""
    name = f"{path.parent.name}/{path.name}"
    try:
        envelope = json.loads(path.read_text())
        payload, stated = envelope["payload"], envelope["sha256"]
        body = json.dumps(payload, sort_keys=True)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{name} is missing") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"{name} is not readable ({type(error).__name__})") from error
    if hashlib.sha256(body.encode()).hexdigest() != stated:
        raise Damaged(f"{name} does not match its own digest")
    return payload


# ------------------------------------------------------------------------------------------------------ writing


@dataclasses.dataclass
class _SaveRecord(ocp.args.CheckpointArgs):
    """The sealed record text and the host copies whose digests go beside it."""

    text: str
    step: int
    parts: dict[str, dict[str, tuple[tuple[int, ...], list[Part]]]]
    caller_is_free: threading.Event  # hashing waits for this: it would slow down what the caller waits for


@dataclasses.dataclass
class _RestoreRecord(ocp.args.CheckpointArgs):
    """Orbax wants a restore argument per handler; records are read by ``read_record``."""


class _RecordHandler(ocp.AsyncCheckpointHandler):
    """Writes the record and this process's digests in the background of an orbax save."""

    async def _write(self, directory: epath.Path, args: _SaveRecord) -> None:
        args.caller_is_free.wait()
        process = jax.process_index()
        sums = {
            item: sums_of(leaves, workers=max(1, (os.cpu_count() or 1) // 4)) for item, leaves in args.parts.items()
        }
        args.parts = {}  # give the host copies back before the files are closed
        digests = {"step": args.step, "process": process, "sums": sums}
        (directory / _DIGESTS.format(process)).write_text(seal(digests))
        if process == 0:
            (directory / _RECORD).write_text(args.text)

    async def async_save(self, directory: epath.Path, args: _SaveRecord) -> list[Any]:  # type: ignore[override]
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args), name="record")]

    def save(self, directory: epath.Path, args: _SaveRecord) -> None:  # type: ignore[override]
        raise NotImplementedError("records are written by an AsyncCheckpointer")

    def restore(self, directory: epath.Path, args: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError("records are read by read_record")


ocp.args.register_with_handler(_RecordHandler, for_save=True)(_SaveRecord)
ocp.args.register_with_handler(_RecordHandler, for_restore=True)(_RestoreRecord)


class _NoTracebacks(logging.Filter):
    """Orbax logs the traceback of every thread of a failed save; all of them reach the caller as one error."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and "orbax" in record.pathname:
            return False
        return True


_no_tracebacks = _NoTracebacks()


def make_writer() -> ocp.AsyncCheckpointer:
    """The one orbax checkpointer of a run.

    Directories are made before ``save`` returns: made in the background, an interpreter that exits during a
    save hangs for orbax's time limit of 20 minutes.
    """
    logging.getLogger("absl").addFilter(_no_tracebacks)
    arrays = {item: ocp.PyTreeCheckpointHandler() for item in ARRAY_ITEMS}
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(**arrays, meta=_RecordHandler()),
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )


def write(
    writer: ocp.AsyncCheckpointer,
    path: epath.Path,
    items: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, Mapping[str, Leaf]],
    payload: Mapping[str, Any],
) -> None:
    """Start writing ``{item: {leaf name: array}}`` and return once everything is copied off the device.

    ``payload`` must be JSON; it is written as it is now. Typed keys come as their key data, empty arrays are
    not written (they are all in their shape, which is in the record).
    """
    table = {
        item: {name: [list(leaf.shape), leaf.dtype] for name, leaf in leaves.items()}
        for item, leaves in shapes.items()
    }
    text = seal({**payload, "leaves": table, "processes": jax.process_count()})
    parts: dict[str, Any] = {}
    for item, leaves in items.items():
        for leaf in leaves.values():  # start every transfer before waiting for the first
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        parts[item] = {
            name: (tuple(np.shape(x)), host_parts(x, copy=True)) for name, x in leaves.items() if np.size(x)
        }
    arrays = {}
    for item, leaves in items.items():
        tree = nest({name: x for name, x in leaves.items() if np.size(x)})
        if tree:
            arrays[item] = ocp.args.PyTreeSave(tree)
    record = _SaveRecord(text, payload["step"], parts, threading.Event())
    try:
        writer.save(path, args=ocp.args.Composite(**arrays, meta=record))
    finally:
        record.caller_is_free.set()


# ------------------------------------------------------------------------------------------------------ reading


def read_record(path: epath.Path) -> Record:
    """Read and check the record and the digests of the checkpoint at ``path``; raises Damaged."""
    payload = unseal(path / "meta" / _RECORD)
    try:
        tables, processes, step = payload["leaves"], payload["processes"], payload["step"]
    except KeyError as error:
        raise Damaged(f"meta/{_RECORD} has no entry {error}") from None
    files = [unseal(path / "meta" / _DIGESTS.format(process)) for process in range(processes)]
    for process, file in enumerate(files):
        if (file["step"], file["process"]) != (step, process):
            raise Damaged(f"meta/{_DIGESTS.format(process)} belongs to another checkpoint")
    leaves: dict[str, dict[str, Leaf]] = {}
    for item, table in tables.items():
        leaves[item] = {}
        for name, (shape, dtype) in table.items():
            sums = [tuple(f["sums"][item][name]) for f in files if name in f["sums"].get(item, {})]
            leaves[item][name] = Leaf(tuple(shape), dtype, combine(sums))
    return Record(payload, leaves)


def read_arrays(path: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read named leaves of one item.

    Args:
        path: the item's directory.
        wanted: name -> ``jax.ShapeDtypeStruct`` with a sharding (read onto devices) or None (read as numpy).

    Uses the handler rather than a checkpointer: a checkpointer adds barriers, and processes that verify read
    different leaves.
    """
    names = list(wanted)

    def how(leaf: Any) -> ocp.RestoreArgs:
        if leaf is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    if not names:
        return {}
    item = nest(dict.fromkeys(names, 0))
    args = nest({name: how(leaf) for name, leaf in wanted.items()})
    handler = ocp.PyTreeCheckpointHandler()
    try:
        tree = handler.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True))
    finally:
        handler.close()
    found = {}
    for name in names:
        node = tree
        for segment in name.split("/"):
            node = node[segment]
        found[name] = node
    return found


def sums_of(leaves: Mapping[str, tuple[tuple[int, ...], Sequence[Part]]], workers: int) -> dict[str, tuple[int, int]]:
    """Digest sums of ``{name: (global shape, parts)}``; leaves without a part here are left out."""
    held = {name: pair for name, pair in leaves.items() if pair[1]}
    if workers <= 1:
        return {name: part_digest(*pair) for name, pair in held.items()}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return dict(zip(held, pool.map(lambda pair: part_digest(*pair), held.values())))


def verify_on_host(path: epath.Path, record: Record, share: tuple[int, int] = (0, 1)) -> None:
    """Read leaves as numpy, a bounded amount at a time, and compare digests; raises Damaged.

    ``share=(p, n)`` reads every n-th leaf from the p-th on, so that n processes verify a checkpoint together.
    """
    for item, leaves in record.leaves.items():
        mine = [name for name, leaf in leaves.items() if 0 not in leaf.shape][share[0] :: share[1]]
        group: list[str] = []
        size = 0
        for position, name in enumerate(mine):
            group.append(name)
            size += int(np.prod(leaves[name].shape, dtype=np.int64)) * 4
            if size >= _SMALL or position == len(mine) - 1:
                arrays = read_arrays(path / item, dict.fromkeys(group))
                check_digests(item, {n: leaves[n] for n in group}, arrays)
                group, size = [], 0


def check_digests(
    item: str, leaves: Mapping[str, Leaf], arrays: Mapping[str, Any], *, collective: bool = False
) -> None:
    """Compare arrays with the recorded leaves; raises Damaged naming the first that differs.

    Args:
        item: what to call the group in the message.
        leaves: name -> recorded leaf.
        arrays: name -> array, typed keys as key data.
        collective: the arrays are global and every process calls this; sums are added across processes.
    """
    for name, leaf in leaves.items():
        array, is_key = arrays[name], leaf.dtype.startswith("key<")
        shape = tuple(array.shape)[: len(leaf.shape)] if is_key else tuple(array.shape)
        if shape != leaf.shape or (not is_key and str(array.dtype) != leaf.dtype):
            raise Damaged(f"{item}/{name} reads as {array.dtype}{list(array.shape)}, {leaf} was written")
    process = jax.process_index() if collective else 0
    pieces = {
        name: (tuple(arrays[name].shape), host_parts(arrays[name], copy=False, process=process)) for name in leaves
    }
    sums = sums_of(pieces, workers=min(8, os.cpu_count() or 1))
    table = np.array([sums.get(name, (0, 0)) for name in leaves], np.uint32).reshape(1, -1, 2)
    if collective and jax.process_count() > 1:
        table = np.asarray(multihost_utils.process_allgather(table[0]))
    for position, (name, leaf) in enumerate(leaves.items()):
        if combine([(int(a), int(b)) for a, b in table[:, position]]) != leaf.digest:
            raise Damaged(f"{item}/{name} does not match its digest")
