"""`jaxdiff train`: from a config to checkpoints, metrics and pictures in a working directory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdiff import config as config_lib
from jaxdiff.commands import assemble, draw, layout
from jaxdiff.commands.program import FILE, Program, identity
from jaxdiff.config import ConfigError
from jaxdiff.data import pipeline
from jaxdiff.eval import loss_curves, toy_panels
from jaxdiff.train import distributed
from jaxdiff.train.checkpoint import Checkpointer
from jaxdiff.train.checkpoint_errors import hush_abandoned
from jaxdiff.train.config_diff import check_same_config
from jaxdiff.train.lock import WorkdirLock
from jaxdiff.train.loop import Callback, Outcome, train
from jaxdiff.train.mesh import batch_shards, check_batch_size, replicated
from jaxdiff.train.metrics import NonFinite, WandbWriter, Writer, load_wandb
from jaxdiff.train.state import abstract_state

__all__ = ["open_workdir", "read_metrics", "run"]

# what may differ from the stored config: it changes no number that training computes
FREE = (
    *("solver", "guidance", "sample", "eval", "mesh", "data.data_dir", "data.in_memory", "data.heldout"),
    *(f"train.{name}_every" for name in ("log", "save", "sample", "stats", "keep")),
    *("train.keep_last", "train.best_metric", "train.best_mode", "train.profile"),
    *("train.tensorboard", "train.wandb", "train.nonfinite_limit", "train.peak_flops"),
)

BEGUN = (".lock", "config.json.partial")  # what a run that was killed while it stored its config leaves


def open_workdir(
    path: str, config: ConfigDict, hold: contextlib.ExitStack, change: bool = False, target: Any = None
) -> epath.Path:
    """The working directory, made if missing, locked in ``hold``, holding ``config`` as config.json.

    Raises ConfigError when it cannot be written, holds something else, or holds another config: the differences are
    shown, and ``change=True`` accepts them; CheckpointError when a newer jaxdiff went on from here, or when the checkpoints
    of a changed run do not fit its state ``target``. Nothing is written before all checks have passed, the config not before
    the lock is held: a second run must not change what a live one reads.
    """
    workdir = epath.Path(path)
    stored, checkpoints = workdir / "config.json", workdir / "checkpoints"
    lines: list[Any] = []
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"workdir: {path} is a file; give a folder")
    if stored.exists():
        lines = check_same_config(config_lib.restore(stored).to_dict(), config.to_dict(), ignore=FREE)
        if lines and not change:
            raise ConfigError(
                f"workdir: {path} holds another config ({'; '.join(map(str, lines))}); give another --workdir, or "
                "--allow-config-change to continue this run with the new values"
            )
    elif workdir.exists() and any(entry.name not in BEGUN for entry in workdir.iterdir()):
        raise ConfigError(
            f"workdir: {path} is not empty and holds no config.json; give a new or an earlier run's folder"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        hold.enter_context(WorkdirLock(workdir))
        if checkpoints.is_dir():
            known = Checkpointer(checkpoints, read_only=True)
            known.check_next(target if lines else None)
            seed = next((line for line in lines if line.path == "seed"), None)
            if seed and known.steps():
                raise ConfigError(f"config.seed: {seed.given} given; the checkpoints of {path} have {seed.saved}")
        config_lib.store(config, stored)
    except OSError as error:
        raise ConfigError(f"workdir: cannot write to {path} ({error.strerror or error})") from None
    return workdir


def use_compile_cache(workdir: epath.Path) -> None:
    """Keep compiled programs in the working directory, unless the user chose a place: a restart then skips XLA."""
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and chosen is None:
        jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / "compile_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def run(config: ConfigDict, path: str, *, change: bool = False) -> Outcome:
    """Train, from the newest checkpoint that verifies if there is one."""
    config_lib.check(config)
    profile = steps_to_trace(config.train.profile)
    if config.train.wandb:
        load_wandb(config.train.wandb)  # a missing package must be known before anything is written
    hush_abandoned()
    distributed.initialise()
    source = assemble.dataset(config, config.data.split)
    made = assemble.setup(config, source)
    mesh = layout.mesh(config)
    check_batch_size(config.data.batch_size, mesh, config.train.accumulate)
    batches = pipeline(
        source,
        config.data.batch_size,
        seed=config.data.seed,
        flip=config.data.flip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    players = assemble.game(made)
    rules = layout.rules(config, mesh.shape["tensor"])
    target = None
    if change or not (epath.Path(path) / "config.json").exists():
        # what does not fit, a network the data or a changed run its checkpoints, must be known before anything is written
        target = abstract_state(players, made.init, mesh, rules, config.mesh.min_bytes)
    assemble.table(made)  # a solver or guidance that does not fit must fail now, not after training
    assemble.check_guidance(made, config.guidance.name)
    with _claim(path, config, change, target) as workdir:
        use_compile_cache(workdir)
        t = config.train
        facts = {
            "config": config.to_dict(),
            "shape": source.shape,
            "levels": source.levels,
            "classes": made.num_classes,
        }
        checkpointer = Checkpointer(
            workdir / "checkpoints",
            keep_last=t.keep_last,
            keep_every=t.keep_every or None,
            best_metric=t.best_metric or None,
            best_mode=t.best_mode,
        )
        try:
            outcome = train(
                players,
                made.init,
                batches,
                steps=t.steps,
                seed=config.seed,
                mesh=mesh,
                rules=rules,
                min_bytes=config.mesh.min_bytes,
                parallel=layout.route(config),
                accumulate=t.accumulate,
                compute_dtype=jnp.bfloat16 if t.precision == "bfloat16" else None,
                checkpointer=checkpointer,
                save_every=t.save_every,
                log_every=t.log_every,
                stats_every=t.stats_every,
                nonfinite_limit=t.nonfinite_limit,
                peak_flops=t.peak_flops or None,
                workdir=workdir,
                profile=profile,
                tensorboard=t.tensorboard,
                writers=_writers(config, workdir),
                callbacks=_callbacks(made, workdir, mesh),
                program=Program(workdir / FILE, identity(mesh, facts)),
                meta={"config": config.to_dict(), "levels": source.levels, "classes": made.num_classes},
            )
        except NonFinite:
            raise  # every process stops at it
        except BaseException:
            distributed.leave_at_exit()
            raise
        finally:
            checkpointer.close()
        toy = not outcome.preempted and made.shape == (2,)
        averaged = everywhere(draw.averaged(outcome.state), mesh) if toy else None
        if jax.process_index() == 0:
            draw_losses(workdir)
            if toy:
                draw_toy(made, source, averaged, workdir)
    return outcome


@contextlib.contextmanager
def _claim(path: str, config: ConfigDict, change: bool, target: Any) -> Iterator[epath.Path]:
    """The working directory, opened and locked by process 0; the others learn whether it could be."""
    with contextlib.ExitStack() as stack:
        trouble: Exception | None = None
        workdir = epath.Path(path)
        if jax.process_index() == 0:
            try:
                workdir = open_workdir(path, config, stack, change, target)
            except Exception as error:
                trouble = error
        refused = distributed.agree(int(trouble is not None))
        if trouble is not None:
            raise trouble
        if refused:
            raise ConfigError(f"workdir: process 0 could not open {path}; its message says why")
        yield workdir


def steps_to_trace(text: str) -> tuple[int, int] | None:
    """``"100:105"`` as (100, 105), ``"100"`` as (100, 100), nothing as None."""
    if not text:
        return None
    first, _, last = text.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal() or not 1 <= int(first) <= int(last or first):
        raise ConfigError(f"config.train.profile: {text!r} given; need FIRST:LAST, steps with 1 <= FIRST <= LAST")
    return int(first), int(last or first)


def everywhere(tree: Any, mesh: Any) -> Any:
    """The tree whole in this process's memory; every process of a job must call it."""
    if jax.process_count() == 1:
        return tree
    return jax.device_get(jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree))


def _writers(config: ConfigDict, workdir: epath.Path) -> list[Writer]:
    """What takes rows besides metrics.jsonl and TensorBoard; process 0 alone writes."""
    if not config.train.wandb or jax.process_index():
        return []
    return [WandbWriter(config.train.wandb, workdir, config.to_dict())]


def _callbacks(made: assemble.Setup, workdir: epath.Path, mesh: Mesh) -> list[Callback]:
    every = made.config.train.sample_every
    if not every:
        return []
    count = -(-100 // batch_shards(mesh)) * batch_shards(mesh)

    def picture(step: int, state: Any) -> None:
        d = assemble.denoiser(made, draw.averaged(state))
        key = jax.random.key(made.config.sample.seed)
        samples = everywhere(draw.batch(made, assemble.table(made), d, key, 0, count, mesh=mesh), mesh)
        if jax.process_index() == 0:
            draw.show(np.asarray(samples)[:100], workdir / "progress" / f"{step:08d}.png")

    return [Callback(every, picture)]


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def draw_losses(workdir: epath.Path) -> None:
    """loss.png from metrics.jsonl."""
    rows = [row for row in read_metrics(workdir) if "model/loss" in row or "loss" in row]
    curves: dict[str, tuple] = {}
    for name in ("loss", "model/loss"):
        # null where every update was refused
        known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if known:
            curves["loss"] = tuple(zip(*known))
    if curves:
        loss_curves(curves, workdir / "loss.png", title="training loss")


def draw_toy(made: assemble.Setup, source: Any, params: Any, workdir: epath.Path) -> None:
    """Data, samples and trajectories of a 2-D run in one picture."""
    from jaxdiff import solver

    table = assemble.table(made)
    d = assemble.denoiser(made, params)
    count = 2000
    x, path = solver.sample(
        table,
        d,
        jax.random.key(made.config.sample.seed),
        (count, 2),
        cond=draw.labels(made, count),
        record=("states",),
    )
    points = source.examples(np.arange(min(len(source), count)))["x0"]
    toy_panels(points, np.asarray(x), np.asarray(path["states"]), workdir / "samples.png")
