"""Numbers about a run that never make the device wait: kept on device, fetched at log intervals, written out.

``MetricLog`` holds the device scalars of every step since the last log and turns them into one row of plain
floats with a single fetch. ``Clock`` measures steps on the host. Writers take rows: ``JsonlWriter`` always,
``TensorBoardWriter`` (tensorboardX, no TensorFlow) and ``WandbWriter`` when asked.
"""

import importlib
import json
import math
import os
import statistics
import time
import uuid
from types import ModuleType
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

_FLAGS = ("active", "skipped", "skipped_in_a_row")


def fetch(tree: Any) -> Any:
    """Copy device arrays to the host. The only place in the training loop that does."""
    return jax.device_get(tree)


class NonFinite(RuntimeError):
    """Training stopped because updates were refused too many times in a row."""

    exit_status = 3  # of the command line: the same steps would end the same way


class MetricLog:
    """Device metrics of the steps since the last ``drain``."""

    def __init__(self, limit: int = 10):
        if limit < 1:
            raise ValueError(f"nonfinite_limit={limit}: allowed are integers >= 1")
        self.limit = limit
        self._pending: list[tuple[int, dict[str, dict[str, jax.Array]]]] = []

    def add(self, step: int, metrics: dict[str, dict[str, jax.Array]]) -> None:
        """Keep what the step that made the state's ``step`` equal to ``step`` returned; no transfer."""
        self._pending.append((step, metrics))

    def drain(self) -> tuple[dict[str, float], str | None]:
        """Fetch and average everything kept: ``({"loss": ...}, None or why training must stop)``.

        Averages are over steps at which the player moved and its update was good; ``stats/`` over steps where
        they were measured. Names are ``player/metric``, without the prefix for a lone player.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return {}, None
        steps = [step for step, _ in pending]
        rows = fetch([metrics for _, metrics in pending])
        out: dict[str, float] = {}
        trouble = None
        for name in rows[0]:
            prefix = "" if len(rows[0]) == 1 else f"{name}/"
            table = {key: np.stack([row[name][key] for row in rows]) for key in rows[0][name]}
            out |= {prefix + key: value for key, value in _averages(table).items()}
            trouble = trouble or self._trouble(name, steps, table)
        return out, trouble

    def _trouble(self, name: str, steps: list[int], table: dict[str, np.ndarray]) -> str | None:
        """Why to stop, or None: which metric was not finite, for how many updates, since which step."""
        over = np.flatnonzero((table["skipped_in_a_row"] >= self.limit) & (table["active"] > 0))
        if not over.size:
            return None
        row = over[0]
        bad = [
            key
            for key, values in table.items()
            if key not in _FLAGS and not key.startswith("stats/") and not np.isfinite(values[row]).all()
        ]
        bad.sort(key=lambda key: (key != "loss", key == "grad_norm", key))
        return (
            f"step {steps[row]}: {', '.join(bad) or 'the gradient'} of player {name!r} not finite, "
            f"{int(table['skipped_in_a_row'][row])} updates refused in a row (limit {self.limit})"
        )


def _averages(table: dict[str, np.ndarray]) -> dict[str, float]:
    """Means of one player's metrics over its good moves; the number of refused updates; vectors by entry."""
    moved = table["active"] > 0
    good = moved & (table["skipped"] == 0)
    out: dict[str, float] = {"skipped": float(table["skipped"][moved].sum())}
    for key, values in table.items():
        if key in _FLAGS or key == "stats/active":
            continue
        use = good & (table["stats/active"] > 0) if key.startswith("stats/") else good
        if key == "learning_rate":
            use = np.arange(len(values)) == np.flatnonzero(moved)[-1] if moved.any() else moved
        if not use.any():
            if moved.any() and not key.startswith("stats/"):
                out[key] = math.nan  # the player moved and every update was refused
            continue
        mean = values[use].astype(np.float64).mean(axis=0)
        if mean.ndim == 0:
            out[key] = float(mean)
        else:
            out |= {f"{key}/{i}": float(value) for i, value in enumerate(mean.reshape(-1))}
    return out


class Clock:
    """Host-side timing of the loop: rates, percentiles of step time, share of time spent waiting for data.

    Steps are dispatched without waiting, so single times are those of the dispatch loop; because the number
    of steps in flight is bounded they settle at the device's rate after the first few.
    """

    def __init__(self) -> None:
        self.productive_seconds = 0.0
        self.start_interval()

    def start_interval(self) -> None:
        """Begin a new log interval now."""
        self._steps: list[float] = []
        self._waited = self._settled = 0.0
        self._last = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for input."""
        self._waited += seconds

    def tick(self) -> None:
        """A step was dispatched."""
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self.productive_seconds += now - self._last
        self._last = now

    def settle(self) -> None:
        """The device has finished every step dispatched: this wait was theirs, though no single one's."""
        now = time.perf_counter()
        self._settled += now - self._last
        self.productive_seconds += now - self._last
        self._last = now

    def pause(self) -> None:
        """Time since the last tick (saving, sampling pictures, logging) belongs to no step."""
        self._last = time.perf_counter()

    def summary(self, examples_per_step: int) -> dict[str, float]:
        """Rates of the interval; empty if no step was taken."""
        if not self._steps:
            return {}
        total = max(sum(self._steps) + self._settled, 1e-9)
        cuts = statistics.quantiles(self._steps, n=100, method="inclusive") if len(self._steps) > 1 else None
        pick = lambda percent: cuts[percent - 1] if cuts else self._steps[0]
        return {
            "images_per_second": examples_per_step * len(self._steps) / total,
            "steps_per_second": len(self._steps) / total,
            "step_seconds_p50": pick(50),
            "step_seconds_p90": pick(90),
            "step_seconds_p99": pick(99),
            "input_wait_fraction": min(1.0, self._waited / total),
        }


class Goodput:
    """Share of wall time since the first start that went into steps which were kept, across restarts.

    Kept in checkpoint metadata: steps lost between the last save and a crash count as wall time only.
    """

    def __init__(self, saved: dict[str, Any] | None = None):
        saved = saved or {}
        self._began = float(saved.get("first_start_unix", time.time()))
        self._before = float(saved.get("productive_seconds", 0.0))
        self.restarts = int(saved.get("restarts", -1)) + 1

    def summary(self, productive_seconds: float) -> dict[str, float]:
        """Fields for metadata: first_start_unix, productive_seconds, wall_seconds, restarts, goodput in [0,1]."""
        productive = self._before + productive_seconds
        wall = max(time.time() - self._began, productive, 1e-9)  # a clock set back cannot make it exceed 1
        return {
            "first_start_unix": self._began,
            "productive_seconds": productive,
            "wall_seconds": wall,
            "restarts": self.restarts,
            "goodput": productive / wall,
        }


class Writer(Protocol):
    """Anything that takes rows of numbers: JSONL, TensorBoard, or the user's own (W&B and the like)."""

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Record one row."""

    def close(self) -> None:
        """Flush and release."""


class JsonlWriter:
    """One JSON object a line: ``{"step": 50, "loss": 0.31, ...}``; values that are not finite become null.

    Opened at ``resume_step``, it drops rows of later steps (they will be written again) and a torn last line,
    so that every step stands in the file once however often the run was killed.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int = 0):
        self.path = epath.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a line that is no text is as good as torn
        text = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        lines = text.splitlines()
        kept = [line for line in lines if (row := _row_step(line)) is not None and row <= resume_step]
        # an object in a bucket cannot be appended to: it is written anew with every row
        self._lines = kept if "://" in os.fspath(self.path) else None
        if kept != lines or (text and not text.endswith("\n")):  # a whole row may be torn from the end of its line
            replace_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a") if self._lines is None else None

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Append a row and flush it."""
        clean = {key: _plain(value) for key, value in row.items()}
        line = json.dumps({"step": int(step), **clean})
        if self._lines is not None:
            self._lines.append(line)
            self.path.write_text("\n".join(self._lines) + "\n")
        elif self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def replace_text(path: epath.Path, text: str) -> None:
    """Write a small file whole or not at all; an object in a bucket always is."""
    if "://" in os.fspath(path):
        path.write_text(text)
        return
    part = path.parent / (path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _row_step(line: str) -> int | None:
    """Step of a line of the file, or None if the line is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _plain(value: Any) -> Any:
    """A JSON value: numbers as Python numbers, null for nan and infinities, text as it is."""
    if isinstance(value, str | bool) or value is None:
        return value
    number = float(value)
    return None if not math.isfinite(number) else int(value) if isinstance(value, int) else number


class TensorBoardWriter:
    """TensorBoard event files through tensorboardX; loads it on construction. Text values are left out."""

    def __init__(self, directory: str | os.PathLike, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        # of a run that was killed before its first checkpoint too: TensorBoard forgets what is written again
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """One scalar a name."""
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def load_wandb(project: str) -> ModuleType:
    """Import wandb, or say in one line (ModuleNotFoundError) which field wanted it and what brings it."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"config.train.wandb={project!r} needs wandb ({error}); install jaxdiff[wandb], or leave the field empty"
        ) from error


class WandbWriter:
    """Weights & Biases, loaded on construction. A run that is started again goes on as the same W&B run.

    Args:
        project: the W&B project.
        directory: the working directory; holds ``wandb.json`` with the run's id, and W&B's own files if it is local.
        config: shown beside the run.

    Raises:
        ModuleNotFoundError: one line, if wandb is not installed.
    """

    def __init__(self, project: str, directory: str | os.PathLike, config: dict[str, Any] | None = None):
        wandb = load_wandb(project)
        folder = epath.Path(directory)
        card = folder / "wandb.json"
        if not card.exists():
            replace_text(card, json.dumps({"id": uuid.uuid4().hex}) + "\n")
        number = json.loads(card.read_text())["id"]
        local = None if "://" in os.fspath(folder) else os.fspath(folder)
        self._run = wandb.init(project=project, id=number, resume="allow", dir=local, config=config or {})

    def write(self, step: int, row: dict[str, Any]) -> None:
        """One row; what is not finite is left out."""
        clean = {key: _plain(value) for key, value in row.items()}
        self._run.log({key: value for key, value in clean.items() if value is not None}, step=int(step))

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
