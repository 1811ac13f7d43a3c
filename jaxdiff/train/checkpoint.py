"""Checkpoints that are verified when they are read: what is kept, what is trusted, what is said when not.

A checkpoint is trusted only if every leaf read back has the digest that was taken from the state being saved
(``digest.py``); the newest that passes is the one a run continues from. What is on disk, and orbax, are in
``checkpoint_files.py``.

Two things are kept apart on purpose. *Damage* (files missing, cut short, flipped) is walked back from and the
directory renamed ``<step>.corrupt``. A *mismatch* (another model, another seed, a newer format) is a
``CheckpointError`` and never touches the disk: the checkpoint is fine, the program asks for something else.
"""

import concurrent.futures
import dataclasses
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import jaxdiff
from jaxdiff.train import checkpoint_directory as folder
from jaxdiff.train.checkpoint_errors import CheckpointError, DamagedStep, collect_quietly, one_line, system_reason
from jaxdiff.train.checkpoint_read import FORMAT, check_fits, from_chief, open_record, read_items, verify
from jaxdiff.train.checkpoint_retention import Retention
from jaxdiff.train.checkpoint_state import join_ema, plain_json, savable, split_ema
from jaxdiff.train.config_diff import Difference, check_same_config
from jaxdiff.train.digest import leaf_of, named_leaves

__all__ = ["BadCheckpoint", "CheckpointError", "Checkpointer", "Difference", "Restored", "check_same_config"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BadCheckpoint:
    """A checkpoint that did not verify, why, and what it is called now (None where nothing was renamed)."""

    step: int
    reason: str
    renamed: str | None

    def __str__(self) -> str:
        """Write it as one line."""
        return f"checkpoint {self.step} is damaged ({self.reason})" + (
            f" and is now {self.renamed}" if self.renamed else ""
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Restored:
    """A verified state with the caller's meta; unpacks as ``state, meta``. ``bad`` were passed over."""

    state: Any
    meta: dict[str, Any]
    step: int
    bad: tuple[BadCheckpoint, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        """Unpack as ``state, meta``."""
        return iter((self.state, self.meta))


# ------------------------------------------------------------------------------------------------ the checkpointer


class Checkpointer:
    """Saves and restores states in ``directory``, one subdirectory a step.

    Saving is asynchronous: ``save`` returns when the state is copied off its devices, and digests, files and
    retention follow in the background. The first save of a Checkpointer is blocking, so that a run which is killed
    again and again still advances. Every process of a job calls every method; process 0 decides.

    Args:
        directory: local or bucket path (anything ``etils.epath`` takes); made if missing.
        keep_last: how many newest checkpoints to keep; None keeps all.
        keep_every: also keep steps divisible by this.
        best_metric: also keep the checkpoint with the best value of this metric.
        best_mode: ``"min"`` or ``"max"``.
        asynchronous: False makes every save blocking.
        first_blocking: False lets the first save be asynchronous too.
        read_only: never write, rename or delete; for samplers beside a running training.
        split: ``state -> (rest, ema)``; default takes the attribute or key ``ema``.
        join: ``(rest, ema) -> state``.

    Nothing is deleted unless one of the checkpoints that stay has been verified by reading it back.

    Raises:
        CheckpointError: if the directory cannot be written (or, read-only, does not exist).
        ValueError: on settings out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        best_metric: str | None = None,
        best_mode: str = "min",
        asynchronous: bool = True,
        first_blocking: bool = True,
        read_only: bool = False,
        split: Callable[[Any], tuple[Any, Any]] = split_ema,
        join: Callable[[Any, Any], Any] = join_ema,
    ):
        self._keep = Retention(keep_last, keep_every, best_metric, best_mode)
        path = epath.Path(directory)
        self.directory = path if "://" in str(path) else path.absolute()  # tensorstore wants absolute paths
        self._asynchronous, self._read_only = asynchronous, read_only
        self._split, self._join = split, join
        self._chief = jax.process_index() == 0
        self._next_blocks = first_blocking
        self._verified: set[int] = set()
        self._writer: Any = None
        self._worker: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self.bad: list[BadCheckpoint] = []
        self.stall_seconds = 0.0  # how long the last asynchronous part of a save held the caller
        if not read_only:
            if self._chief:
                folder.prepare(self.directory)
        elif not self.directory.is_dir():
            raise CheckpointError(f"checkpoint directory {self.directory} does not exist")

    # ---- what there is

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending, verified or not."""
        return folder.steps(self.directory)

    def set_aside(self) -> list[str]:
        """Names of the damaged checkpoints that are out of the way, as far as they are still there."""
        return folder.set_aside(self.directory)

    def meta(self, step: int) -> dict[str, Any]:
        """The caller's meta of a checkpoint (its record is verified, its arrays are not read)."""
        return open_record(self._path(step)).payload["meta"]

    def check_next(self, target: Any = None) -> None:
        """Raise CheckpointError if a run that went on from here would meet a checkpoint of another format, or one that does
        not fit the state ``target`` (abstract, say). Reads records alone."""
        for step in reversed(self.steps()):
            try:
                leaves = open_record(self._path(step)).leaves
            except DamagedStep:
                continue
            for item, tree in zip(("state", "ema"), self._split(target) if target is not None else ()):
                check_fits(self._path(step), item, leaves.get(item, {}), named_leaves(tree))
            return

    def verify(self, step: int) -> str | None:
        """Read a whole checkpoint on the host; None if every digest matches, else what is wrong with it."""
        fault = verify(self._path(step))
        if fault is None:
            self._verified.add(step)
        return fault

    def latest_verified_step(self) -> int | None:
        """The newest step whose files all verify now, or None. Reads from the newest down; renames nothing."""
        self.wait()
        return next((step for step in reversed(self.steps()) if self.verify(step) is None), None)

    def best_step(self) -> int | None:
        """The step with the best value of ``best_metric`` among the checkpoints there are, or None."""
        return self._keep.best(self.directory, self.steps())

    # ---- saving

    def save(
        self,
        step: int,
        state: Any,
        *,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        blocking: bool = False,
    ) -> bool:
        """Save ``state`` as it is now; it may be donated as soon as this returns.

        Args:
            step: the step's number, also the name of the directory.
            state: any pytree of arrays, typed keys and numbers.
            meta: JSON that travels along (config, data position, goodput).
            metrics: numbers for ``best_metric``; default ``meta["metrics"]``.
            blocking: wait until the checkpoint is committed.

        Returns:
            False if there is a checkpoint of this step already; it is left as it is.

        Raises:
            CheckpointError: if this save, or the one before it in the background, failed; what was there before is
                intact.
            ValueError: on a meta that is not JSON or a state that cannot be saved, before anything is written.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened read-only; step {step} cannot be saved")
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
            raise ValueError(f"step={step!r}: allowed are integers >= 0")
        step = int(step)
        from jaxdiff.train import checkpoint_files as files

        self.wait()
        exists = step in self.steps()
        if self._chief and not exists:
            folder.sweep(self.directory, str(step))  # in a bucket a save that was cut short has the same name
        if from_chief(int(exists)):
            _log.info("checkpoint %d exists already in %s", step, self.directory)
            return False
        begun = time.perf_counter()
        named = dict(zip(files.ARRAY_ITEMS, map(named_leaves, self._split(state))))
        shapes = {item: {n: leaf_of(x) for n, x in leaves.items()} for item, leaves in named.items()}
        data = {item: {n: savable(item, n, x) for n, x in leaves.items()} for item, leaves in named.items()}
        payload = plain_json(
            {
                "format": FORMAT,
                "step": step,
                "versions": {"jaxdiff": jaxdiff.__version__, "jax": jax.__version__, "numpy": np.__version__},
                "metrics": meta.get("metrics") if metrics is None else dict(metrics),
                "meta": dict(meta),
            }
        )
        self._keep.check(payload["metrics"], step)
        self._writer = self._writer or files.make_writer()
        self._worker = self._worker or concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        try:
            files.write(self._writer, self._path(step), data, shapes, payload)
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = (step, self._worker.submit(self._finish))
        self.stall_seconds = time.perf_counter() - begun
        if blocking or self._next_blocks or not self._asynchronous:
            self.wait()
        self._next_blocks = False
        return True

    def wait(self) -> None:
        """Wait for the save in the background; raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, future = pending
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error

    def close(self) -> None:
        """Wait, then end the background threads; saving again afterwards starts new ones."""
        try:
            self.wait()
        finally:
            if self._worker is not None:
                self._worker.shutdown()
            if self._writer is not None:
                self._writer.close()
            self._writer = self._worker = None

    def __enter__(self) -> "Checkpointer":
        """Use as a context manager: closed at the end."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close."""
        self.close()

    # ---- restoring

    def restore_latest(self, target: Any) -> Restored | None:
        """Restore the newest checkpoint that verifies; damaged ones on the way are renamed and reported.

        Args:
            target: the state's structure; arrays or ``jax.ShapeDtypeStruct`` with the shardings wanted, on any mesh
                and any number of devices.

        Returns:
            ``Restored``, or None if no checkpoint verifies (``self.bad`` says which were damaged).

        Raises:
            CheckpointError: if the newest intact checkpoint does not fit the target or this version.
        """
        self.wait()
        return self._walk_back(self._split(target), lambda trees: self._join(*trees), ("state", "ema"))

    def restore(self, step: int, target: Any) -> Restored:
        """Restore one step; raises CheckpointError if it is missing, damaged or does not fit ``target``."""
        self.wait()
        trees, meta = self._restore(step, self._split(target), ("state", "ema"))
        return Restored(self._join(*trees), meta, step)

    def restore_ema(self, step: int | None = None, target: Any = None) -> Restored:
        """Restore the averages alone, of one step or of the newest checkpoint whose averages verify.

        Args:
            step: None walks back over damaged checkpoints, which are reported but not renamed (a sampler may
                read beside a running training).
            target: structure and shardings of the averages; None gives nested dictionaries of numpy arrays, with
                list positions as keys ``"0"``, ``"1"``.
        """
        self.wait()
        if step is not None:
            (ema,), meta = self._restore(step, (target,), ("ema",))
            return Restored(ema, meta, step)
        found = self._walk_back((target,), lambda trees: trees[0], ("ema",), rename=False)
        if found is None:
            raise CheckpointError(f"there is no intact checkpoint in {self.directory}")
        return found

    def _walk_back(
        self, targets: Sequence[Any], build: Callable[[Any], Any], items: Sequence[str], rename: bool = True
    ) -> Restored | None:
        passed: list[BadCheckpoint] = []
        skip: set[int] = set()
        while True:
            left = [step for step in self.steps() if step not in skip]
            step = from_chief(left[-1] if left else -1)
            if step < 0:
                if passed:
                    _log.error("no checkpoint in %s is intact", self.directory)
                return None
            try:
                trees, meta = self._restore(step, targets, items)
                return Restored(build(trees), meta, step, tuple(passed))
            except DamagedStep as error:
                skip.add(step)
                moved = self._set_aside(step) if rename and not self._read_only else None
                passed.append(BadCheckpoint(step, error.reason, moved))
                self.bad.append(passed[-1])
                _log.warning("%s in %s", passed[-1], self.directory)

    def _restore(
        self, step: int, targets: Sequence[Any], items: Sequence[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read and verify some items of one step, and its meta; see ``read_items``."""
        path = self._path(step)
        if not path.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"there is no checkpoint {step} in {self.directory}; there are: {known}")
        trees, meta = read_items(path, dict(zip(items, targets)))
        if "state" in items:
            self._verified.add(step)
        return trees, meta

    # ---- the background of a save

    def _finish(self) -> None:
        """Wait for orbax to commit, then delete what the retention policy does not keep."""
        self._writer.wait_until_finished()
        if not self._chief:
            return
        try:
            self._retire()
        except Exception as error:  # the save itself is done; disk space is all that is lost
            _log.warning("old checkpoints in %s were not deleted: %s", self.directory, one_line(error))

    def _retire(self) -> None:
        steps = self.steps()
        surplus = self._keep.surplus(self.directory, steps)
        if not surplus:
            return
        recent = steps[-(self._keep.last or 0) :]
        if not self._verified.intersection(recent) and not any(map(self._verifies, reversed(recent))):
            _log.error("nothing is deleted in %s: none of the newest %d verifies", self.directory, len(recent))
            return
        for step in surplus:
            folder.remove(self._path(step))
            self._verified.discard(step)

    def _verifies(self, step: int) -> bool:
        fault = self.verify(step)
        if fault is not None:
            _log.error("%s in %s", BadCheckpoint(step, fault, None), self.directory)
        return fault is None

    # ---- small things

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _set_aside(self, step: int) -> str:
        """Rename a damaged checkpoint; nothing that is there already is overwritten."""
        name = f"{step}.corrupt"
        if self._chief:
            name = folder.free_name(self.directory, name)
            self._path(step).rename(self.directory / name)
        from_chief(0)
        self._verified.discard(step)
        return name

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """Tidy up after a save that failed, giving its disk space back, and say what happened."""
        reason = system_reason(error) or one_line(error)
        # the other threads of that save may still be writing; a retry of the same step must not meet them
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax"):
                threading.Thread.join(thread, timeout=5)  # orbax's own join raises again
        try:
            if self._chief:
                folder.sweep(self.directory, str(step))
            if "://" not in str(self.directory):
                reason += f" ({shutil.disk_usage(self.directory).free / 1e6:.0f} MB free now)"
            intact: Any = self.steps() or "none"
        except OSError as trouble:
            intact = f"not known ({one_line(trouble)})"
        collect_quietly()
        return CheckpointError(
            f"checkpoint {step} could not be written to {self.directory}: {reason}; intact are {intact}"
        )
