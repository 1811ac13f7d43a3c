"""The training loop, readable from top to bottom; everything in it is handed in."""

import collections
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from jaxdiff.train.checkpoint_errors import CheckpointError
from jaxdiff.train.chips import peak_flops as known_peak
from jaxdiff.train.mesh import check_batch_size, make_mesh, put_batch, put_replicated
from jaxdiff.train.metrics import (
    Clock,
    Goodput,
    JsonlWriter,
    MetricLog,
    NonFinite,
    TensorBoardWriter,
    Writer,
    replace_text,
)
from jaxdiff.train.preempt import Preemption
from jaxdiff.train.progress import Progress
from jaxdiff.train.sharding import MIN_BYTES, Rule, sharding_table
from jaxdiff.train.state import TrainState, abstract_state, create_state
from jaxdiff.train.step import Player, check_game, count_flops, make_step

HEARTBEAT = "heartbeat.json"  # written by process 0 into the working directory; `jaxdiff train --restarts` reads it


class Batches(Protocol):
    """What the loop needs of a data pipeline: batches as a function of the step."""

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """This process's numpy batches of steps start, start+1, ...; each has "index"."""


@dataclasses.dataclass(frozen=True)
class Callback:
    """``run(step, state) -> numbers to log, or None``, every so many steps and, if ``last``, at the end.

    The state is only valid during the call: the next step takes its memory.
    """

    every: int
    run: Callable[[int, TrainState], dict[str, float] | None]
    last: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """How a run ended: the state, its step, whether a preemption stopped it, and the last logged row."""

    state: TrainState
    step: int
    preempted: bool
    row: dict[str, float]


def _check(**counts: tuple[int | None, int]) -> None:
    """Refuse settings that are not integers at or above their least value (None passes)."""
    for name, (value, least) in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"train.{name}={value!r}: allowed are integers >= {least}")


def train(
    game: Mapping[str, Player],
    init: Callable[[jax.Array], dict[str, Any]] | Mapping[str, Any],
    pipeline: Batches,
    *,
    steps: int,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] = (),
    min_bytes: int = MIN_BYTES,
    accumulate: int = 1,
    compute_dtype: Any = None,
    parallel: str = "auto",
    teacher: Any = None,
    extra: Any = None,
    checkpointer: Any = None,
    save_every: int = 1000,
    log_every: int = 50,
    stats_every: int = 0,
    nonfinite_limit: int = 10,
    workdir: str | os.PathLike | None = None,
    tensorboard: bool = False,
    writers: Sequence[Writer] = (),
    callbacks: Sequence[Callback] = (),
    progress_every: int | None = None,
    meta: Mapping[str, Any] | None = None,
    in_flight: int = 8,
    profile: tuple[int, int] | None = None,
    flops: float | None = None,
    peak_flops: float | None = None,
    program: Any = None,
) -> Outcome:
    """Train until ``steps`` train steps are done, from the newest checkpoint if there is one.

    The data position, every random key and every schedule are functions of the step and the seed, so a run
    that was killed and started again equals one that was not: bitwise on the same number of devices (on GPUs with
    ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``).

    Args:
        game: name -> Player.
        init: ``init(key) -> {name: params}``, or the parameters.
        pipeline: gives this process's batches from any step on.
        steps: train steps of the whole run, restarts included.
        seed: keys parameters and training noise; a checkpoint made with another seed is refused.
        mesh: the device mesh; all devices data-parallel by default.
        rules: sharding path rules.
        min_bytes: see ``sharding``.
        accumulate: see ``make_step``, as ``compute_dtype``, ``parallel``, ``teacher`` and ``extra``.
        compute_dtype: dtype in which losses see parameters.
        parallel: how the global mean is taken.
        teacher: frozen pytree for ``ctx.teacher``.
        extra: frozen pytree for ``ctx.extra``.
        checkpointer: ``save(step, state, meta=, blocking=)``, ``restore_latest(target)``, ``wait()``,
            ``latest_verified_step()``; None trains without checkpoints.
        save_every: steps between checkpoints; the first after a restart is written before going on, so that
            a run killed again and again still advances.
        log_every: steps between logs. Only then is anything copied from the device.
        stats_every: steps between norm measurements, 0 for none; they reach the log where they coincide.
        nonfinite_limit: refused updates in a row after which training stops.
        workdir: where metrics.jsonl and tensorboard/ are written; None writes neither.
        tensorboard: write TensorBoard event files too.
        writers: further writers.
        callbacks: things to do every so many steps (sample pictures, evaluate).
        progress_every: print a line every so many steps, see ``Progress``.
        meta: anything JSON that should travel with checkpoints (the config).
        in_flight: steps dispatched but not finished at any moment; simulated devices deadlock above ten.
        profile: ``(first, last)``: trace these steps (1 is the run's first) into workdir/profile, on process 0.
        flops: model FLOPs of one step over all devices, for ``flops_per_second``; counted from the losses if None.
        peak_flops: what one device can do in a second, for ``mfu`` in [0, 1]; that of known chips if None.
        program: where the compiled step is kept for the next start: ``target(mesh)`` gives the abstract state of a kept
            step, or None, ``key(mesh)`` its training noise's key; ``ready(step, target, batch, key)`` what is called
            instead of the step. It answers for its being the step of this ``game``, this ``seed`` and these settings
            (``commands/program.py``).

    Returns:
        The ``Outcome``. After SIGTERM it has saved and says ``preempted``; the caller exits with status 0. After
        Ctrl-C it has saved too, and KeyboardInterrupt goes on up.

    Raises:
        ValueError: on settings out of range, before anything compiles.
        NonFinite: after too many refused updates, naming step, metric and the last good checkpoint.
        CheckpointError: if there were checkpoints and none verifies.
        RuntimeError: if the pipeline ends early.
    """
    check_game(game)
    _check(
        steps=(steps, 1), save_every=(save_every, 1), log_every=(log_every, 1), stats_every=(stats_every, 0),
        nonfinite_limit=(nonfinite_limit, 1), in_flight=(in_flight, 1), progress_every=(progress_every, 1),
        **{f"callbacks[{i}].every": (callback.every, 1) for i, callback in enumerate(callbacks)},
    )  # fmt: skip
    if tensorboard and workdir is None:
        raise ValueError("train.tensorboard=True needs train.workdir")
    if profile is not None and (workdir is None or not 1 <= profile[0] <= profile[1]):
        raise ValueError(f"train.profile={profile}: needs train.workdir and first <= last, both >= 1")
    mesh = make_mesh() if mesh is None else mesh
    if hasattr(pipeline, "batch_size"):
        check_batch_size(pipeline.batch_size, mesh, accumulate)

    # the state: newest checkpoint that verifies, or step 0
    kept = program.target(mesh) if program is not None else None
    target = abstract_state(game, init, mesh, rules, min_bytes) if kept is None else kept
    layout = jax.tree.map(lambda leaf: leaf.sharding, target)
    expected = _newest(checkpointer)
    batches = pipeline.stream(expected, steps)  # the first batches are read while the checkpoint is
    try:
        found = checkpointer.restore_latest(target) if checkpointer is not None else None
        if kept is None or found is None:
            init_key, noise_key = jax.random.split(jax.random.key(seed))
        if found is None:
            _refuse_to_begin_anew(checkpointer)
            state, saved_meta = create_state(game, init, init_key, mesh, rules, min_bytes), {}
        else:
            state, saved_meta = found
            if saved_meta.get("seed", seed) != seed:
                raise ValueError(f"train.seed={seed}: the checkpoint was trained with seed {saved_meta['seed']}")
        start = int(jax.device_get(state.step))
    except BaseException:
        _close(batches)
        raise
    if start != expected:  # the newest was damaged, say
        _close(batches)
        batches = pipeline.stream(start, steps)
    step_fn: Any = make_step(
        game, mesh, layout, accumulate=accumulate, compute_dtype=compute_dtype, parallel=parallel,
        stats_every=stats_every, teacher=teacher, extra=extra,
    )  # fmt: skip
    key = put_replicated(noise_key, mesh) if kept is None or found is None else program.key(mesh)

    # what watches: process 0 writes and shows, every process counts
    goodput, clock, log = Goodput(saved_meta.get("goodput")), Clock(), MetricLog(nonfinite_limit)
    chief = jax.process_index() == 0
    writers = list(writers) if chief else []
    if chief and workdir is not None:
        writers.append(JsonlWriter(epath.Path(workdir) / "metrics.jsonl", start))
        if tensorboard:
            writers.append(TensorBoardWriter(epath.Path(workdir) / "tensorboard", start))
    progress = Progress(steps, start, every=progress_every) if chief else None
    if progress and mesh.size > mesh.shape["data"]:
        progress.say(sharding_table(target.params, layout.params, min_bytes))
    if progress:
        for damage in getattr(checkpointer, "bad", ()):
            progress.say(str(damage))
    if progress and found is not None:
        progress.say(f"continuing from step {start} (restart {goodput.restarts})")

    if peak_flops is None:
        peak_flops = known_peak(mesh.devices.flat[0].device_kind, compute_dtype == jnp.bfloat16)
    row: dict[str, float] = {}
    saved = start if found is not None else -1
    must_block = found is not None

    def write(step: int, numbers: Mapping[str, Any]) -> None:
        for writer in writers:
            writer.write(step, dict(numbers))

    def beat(step: int) -> None:
        # a supervisor looks for change, not for the time: clocks of two machines may differ
        if chief and workdir is not None:
            content = {"step": step, "unix": time.time(), "pid": os.getpid()}
            replace_text(epath.Path(workdir) / HEARTBEAT, json.dumps(content))

    def report(step: int, batch: Mapping[str, jax.Array]) -> None:
        """Fetch the interval's metrics, write them, and stop if too many updates were refused."""
        nonlocal row, flops
        if flops is None:  # here, where it delays no step: counting traces the losses
            flops = _counted(game, state, batch, teacher, extra, progress)
        numbers, trouble = log.drain()
        clock.settle()
        row = {**numbers, **clock.summary(batch["index"].shape[0])}
        if hasattr(pipeline, "epoch"):
            row["epoch"] = float(pipeline.epoch(step))
        if flops and "steps_per_second" in row:
            row["flops_per_second"] = flops * row["steps_per_second"]
            if peak_flops:
                row["mfu"] = row["flops_per_second"] / (peak_flops * mesh.size)
        row["goodput"] = goodput.summary(clock.productive_seconds)["goodput"]
        write(step, row)
        beat(step)
        if progress:
            progress.report(row)
        if trouble:
            raise NonFinite(f"training stopped at {trouble}; {_last_good(checkpointer)}")

    def save(step: int, blocking: bool = False) -> None:
        nonlocal saved, must_block
        if checkpointer is None or step == saved:
            return
        record = {
            **(meta or {}),
            "step": step,
            "seed": seed,
            "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
            "goodput": goodput.summary(clock.productive_seconds),
            "metrics": {name: value if math.isfinite(value) else None for name, value in row.items()},
        }
        checkpointer.save(step, state, meta=record, blocking=blocking or must_block)
        saved, must_block = step, False

    def call(callback: Callback, step: int) -> None:
        numbers = callback.run(step, state)
        if numbers:
            write(step, numbers)

    stopped, step = False, start
    tracing = False
    beat(step)
    waiting: collections.deque = collections.deque()
    first_traced, last_traced = profile or (0, 0)  # steps count from 1
    traces = epath.Path(workdir or ".") / "profile"
    try:
        with Preemption() as preemption:
            while step < steps and not stopped:
                before = time.perf_counter()
                try:
                    batch = next(batches)
                except StopIteration:
                    raise RuntimeError(f"the data pipeline ended at step {step}, {steps} were asked") from None
                clock.waited(time.perf_counter() - before)
                if chief and not tracing and first_traced <= step + 1 <= last_traced:
                    jax.block_until_ready(state)
                    jax.profiler.start_trace(os.fspath(traces))
                    tracing = True
                with jax.transfer_guard("disallow"):
                    batch = put_batch(batch, mesh)
                    if step == start and program is not None:
                        step_fn = program.ready(step_fn, target, batch, key)
                    state, metrics = step_fn(state, batch, key)
                step += 1
                log.add(step, metrics)
                waiting.append(next(iter(metrics.values()))["loss"])
                if step == start + 1:  # tracing and compiling are no step time
                    jax.block_until_ready(waiting[-1])
                    first = {"first_step_seconds": time.perf_counter() - before}
                    write(step, first)
                    beat(step)
                    clock.start_interval()
                else:
                    if len(waiting) > in_flight:
                        jax.block_until_ready(waiting.popleft())
                    clock.tick()
                if progress:
                    progress.update(step)

                if tracing and (step == last_traced or step == steps):
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    tracing = False
                    if progress:
                        progress.say(f"traced steps up to {step} into {traces}")

                # a pause of the device's work from here on is no step time either
                stopped = preemption.requested(step)
                if step % log_every == 0 or step == steps or stopped:
                    report(step, batch)
                    clock.start_interval()
                for callback in callbacks:
                    if step % callback.every == 0 or (step == steps and callback.last):
                        call(callback, step)
                        clock.pause()
                if step % save_every == 0 or step == steps or stopped:
                    save(step, blocking=stopped or step == steps)
                    clock.pause()
            if stopped and progress:
                progress.say(f"preempted: saved step {step}" if checkpointer else f"preempted at step {step}")
            jax.block_until_ready(state)
        if preemption.interrupted:
            raise KeyboardInterrupt
    finally:
        # a save in flight is finished and rows are flushed even when training fails
        if tracing:
            jax.profiler.stop_trace()
        _close(batches)
        if checkpointer is not None:
            checkpointer.wait()
        if progress:
            progress.close()
        for writer in writers:
            writer.close()
    return Outcome(state=state, step=step, preempted=stopped, row=row)


def _newest(checkpointer: Any) -> int:
    """The step of the newest checkpoint, from which a run will most likely go on; 0 where none is known."""
    known = checkpointer.steps() if hasattr(checkpointer, "steps") else ()
    return known[-1] if known else 0


def _refuse_to_begin_anew(checkpointer: Any) -> None:
    """A run whose checkpoints are all damaged must not begin at step 0 while nobody looks."""
    lost = checkpointer.set_aside() if hasattr(checkpointer, "set_aside") else []
    if lost:
        raise CheckpointError(
            f"no checkpoint in {checkpointer.directory} verifies; {', '.join(lost)} are kept for you to look at: to begin at "
            "step 0 delete them, or give another workdir"
        )


def _close(batches: Any) -> None:
    """End a stream that can be ended."""
    if hasattr(batches, "close"):
        batches.close()


def _counted(game: Any, state: TrainState, batch: Any, teacher: Any, extra: Any, progress: Progress | None) -> float:
    """Model FLOPs of a step; 0, and a line that says why, for losses that cannot be traced outside a step."""
    try:
        return count_flops(game, state, batch, teacher, extra)
    except Exception as error:  # a number to look at must not end a training
        if progress:
            progress.say(f"FLOPs are not counted, so no mfu: {type(error).__name__} {error}".splitlines()[0])
        return 0.0


def _last_good(checkpointer: Any) -> str:
    """Where to go back to, in words."""
    if checkpointer is None:
        return "there are no checkpoints"
    checkpointer.wait()
    step = checkpointer.latest_verified_step()
    where = getattr(checkpointer, "directory", "")
    return "no checkpoint was saved" if step is None else f"last good checkpoint: step {step} in {where}"
