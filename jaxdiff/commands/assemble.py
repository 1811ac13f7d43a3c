"""From a checked config to the objects it names: process, data, network, game, sampler."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import data, guidance, prediction
from jaxdiff.config import ConfigError, options, resolve
from jaxdiff.data.dataset import Dataset
from jaxdiff.network.options import construct
from jaxdiff.objective import regression
from jaxdiff.objective.coupling import minibatch_ot
from jaxdiff.objective.time import TIMES
from jaxdiff.objective.weighting import WEIGHTINGS
from jaxdiff.process.process import Process
from jaxdiff.solver.grid import Grid
from jaxdiff.solver.table import Table
from jaxdiff.train.ema import averages
from jaxdiff.train.optimiser import optimiser, schedule
from jaxdiff.train.step import Player

T = TypeVar("T")

__all__ = ["Setup", "dataset", "denoiser", "game", "grid", "guided", "process", "setup", "table"]


def built(section: str, given: Mapping[str, Any], make: Callable[..., T], *args: Any, **more: Any) -> T:
    """``make(*args, **more, **given)``; options of a kind that it cannot work with are one line, not a traceback."""
    try:
        return make(*args, **more, **given)
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        if not given:  # not the user's
            raise
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"config.{section}: {shown} given; one of these is of a wrong kind ({type(error).__name__}: {reason})"
        ) from error


def process(config: ConfigDict) -> Process:
    """The corruption process of ``config.process``."""
    given = options(config, "process")
    noise, df = given.pop("noise", "gaussian"), given.pop("df", None)
    if df is not None and noise != "student_t":
        raise ConfigError(f"config.process.df: {df!r} given; only process.noise='student_t' has it, not {noise!r}")
    law = built("process", {} if df is None else {"df": df}, resolve("noise", str(noise)))
    return built("process", given, resolve("process", config.process.name), noise=law, t_max=config.process.t_max)


def dataset(config: ConfigDict, split: str) -> Dataset:
    """A split of ``config.data``; the folder of prepared sets may come from the TFDS_DATA_DIR variable."""
    folder = config.data.data_dir or os.environ.get("TFDS_DATA_DIR") or None
    return data.load(config.data.name, split, data_dir=folder, in_memory=config.data.in_memory)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What training, sampling and evaluation share: process, network, the data's shape and its classes."""

    config: ConfigDict
    process: Process
    network: Any
    shape: tuple[int, ...]
    num_classes: int  # 0: unconditional

    @property
    def null_label(self) -> int:
        """The label that means none."""
        return self.num_classes

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initial parameters, keyed by player."""
        label = jnp.zeros((1,), jnp.int32) if self.num_classes else None
        return {"model": self.network.init(key, jnp.zeros((1, *self.shape)), jnp.zeros(()), label)}


def setup(config: ConfigDict, source: Dataset) -> Setup:
    """Process and network for a data set."""
    classes = (source.num_classes or 0) if config.data.conditional else 0
    net: Any = resolve("network", config.network.name)
    if config.network.name != "dit":
        net = functools.partial(construct, net)
    given = options(config, "network")
    if config.train.precision == "bfloat16":
        given.setdefault("dtype", "bfloat16")  # layers told float32 would promote the parameters the step casts
    made = built("network", given, net, num_classes=classes)
    return Setup(config, process(config), made, source.shape, classes)


def game(made: Setup) -> dict[str, Player]:
    """The one-player game of ordinary training."""
    c = made.config.objective
    loss = regression(
        made.process,
        made.network.apply,
        target=c.target,
        time=built("objective.time_options", c.time_options, TIMES[c.time]),
        weighting=built("objective.weighting_options", c.weighting_options, WEIGHTINGS[c.weighting]),
        cond_key="label" if made.num_classes else None,
        label_drop=c.label_drop,
        null_label=made.null_label,
        coupling=minibatch_ot(c.coupling_group, **c.coupling_options) if c.coupling == "ot" else None,
        sigma_data=c.sigma_data,
        draw=c.draw,
        data_key="x0",
        seed=made.config.seed,
        bins=4,
    )
    o, steps = made.config.optimiser, made.config.train.steps
    rate = {"schedule": o.schedule, "steps": steps, "warmup": o.warmup, "final": o.final}
    own = options(made.config, "optimiser")
    rule = built("optimiser", own, optimiser, o.name, learning_rate=o.learning_rate, clip=o.clip or None, **rate)
    decay = made.config.ema.decay
    shown = schedule(o.schedule, peak=o.learning_rate, steps=steps, warmup=o.warmup, final=o.final)
    return {"model": Player(loss, rule, ema=averages(decay if decay else None), schedule=shown)}


def denoiser(made: Setup, params: Any) -> prediction.Denoiser:
    """The trained network as a denoiser."""
    c = made.config.objective
    cond = jnp.int32(made.null_label) if made.num_classes else None
    return prediction.denoiser(
        made.process, made.network.apply, params, target=c.target, sigma_data=c.sigma_data, cond=cond
    )


def check_guidance(made: Setup, name: str) -> None:
    """Refuse guidance of a network without labels."""
    if name != "none" and not made.num_classes:
        raise ConfigError(f"config.guidance.name: {name!r} needs a network with labels; this one has none")


def guided(made: Setup, d: Any, name: str, scale: float) -> Any:
    """``d`` under the named guidance; labels come later, through ``sample(..., cond=)``."""
    check_guidance(made, name)
    if name == "none":
        return d
    own = options(made.config, "guidance") if name == made.config.guidance.name else {}
    return built("guidance", own, resolve("guidance", name), d, scale, null=jnp.int32(made.null_label))


def shaped(made: Setup, d: Any, name: str, scale: float) -> Any:
    """``d`` as samples are drawn: asked at shifted times inside, under the named guidance, bounded outside."""
    c = made.config.sample
    if c.time_shift > 0:
        d = guidance.time_shift(d, window=c.time_shift)
    d = guided(made, d, name, scale)
    if c.bound == "none":
        return d
    return guidance.clip(d) if c.bound == "clip" else guidance.threshold(d)


def grid(made: Setup) -> Grid:
    """The time grid of ``config.solver``."""
    c = made.config.solver
    return built("solver.grid_options", c.grid_options, resolve("grid", c.grid), made.process, c.steps)


def table(made: Setup) -> Table:
    """The solver table of ``config.solver``."""
    maker = resolve("solver", made.config.solver.name)
    return built("solver", options(made.config, "solver"), maker, made.process, grid(made))


def labels_for(made: Setup, count: int, label: int | None = None) -> np.ndarray | None:
    """Labels of ``count`` samples: the given one, or 0, 1, ... in turn; None without classes."""
    if not made.num_classes:
        if label is not None:
            raise ConfigError(f"label: {label} given, but the network has no labels")
        return None
    if label is None:
        return np.arange(count, dtype=np.int32) % made.num_classes
    if not 0 <= label < made.num_classes:
        raise ConfigError(f"label: {label} given; allowed: 0..{made.num_classes - 1}")
    return np.full(count, label, np.int32)
