"""Every field of a config: its default, what it means and what it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxdiff.config.names import NAMES, TARGETS, TIMES, WEIGHTINGS

__all__ = ["FIELDS", "LEAST", "MOST", "OPEN", "OPTION_DICTS", "RELEVANT", "Field", "default", "describe", "options"]


class Field(NamedTuple):
    """Default, meaning and allowed names of one config field."""

    default: Any
    meaning: str
    allowed: Sequence[Any] | None = None


FIELDS: dict[str, Field] = {
    "seed": Field(0, "keys parameters, training noise and sampling noise"),
    "data.name": Field("digits", "data set: digits, toy2d:<family>, npz:<path>, tfds:<name>"),
    "data.split": Field("train", "split to train on"),
    "data.heldout": Field("test", "split that evaluation compares with"),
    "data.data_dir": Field("", "folder of prepared tfds sets; empty: the TFDS_DATA_DIR variable"),
    "data.in_memory": Field("auto", "decode once and gather from memory", ("auto", True, False)),
    "data.batch_size": Field(128, "examples a training step, over all devices and processes"),
    "data.seed": Field(0, "keys the order of examples and the flips"),
    "data.conditional": Field(True, "condition the network on labels, where the set has them"),
    "data.flip": Field(False, "mirror images left to right half of the time"),
    "process.name": Field("linear", "how data is corrupted", tuple(NAMES["process"])),
    "process.t_max": Field(
        1.0, "where grids and training times end, in (0, 1]; < 1 where alpha(1) = 0 and the target is noise or score"
    ),
    "network.name": Field("unet", "the network", tuple(NAMES["network"])),
    "objective.target": Field("velocity", "what the network outputs", TARGETS),
    "objective.time": Field("uniform", "density of training times", TIMES),
    "objective.time_options": Field({}, "options of the time density, e.g. mean and std of logit_normal"),
    "objective.draw": Field("stratified", "how times are drawn over a batch", ("stratified", "iid")),
    "objective.weighting": Field("flat", "loss weight as a function of the noise level", WEIGHTINGS),
    "objective.weighting_options": Field({}, "options of the weighting, e.g. gamma of min_snr"),
    "objective.label_drop": Field(0.1, "share of labels replaced by the null label, for guidance; 0..1"),
    "objective.coupling": Field("independent", "how noise is paired with data", ("independent", "ot")),
    "objective.coupling_group": Field(64, "examples (consecutive global indices) paired together by ot"),
    "objective.coupling_options": Field({}, "options of ot, e.g. method (exact, sinkhorn, ott) and epsilon"),
    "objective.sigma_data": Field(0.5, "standard deviation of the data, for the edm target and weighting"),
    "optimiser.name": Field("adamw", "optax optimiser", tuple(NAMES["optimiser"])),
    "optimiser.learning_rate": Field(1e-3, "peak learning rate"),
    "optimiser.schedule": Field("cosine", "decay after warm-up", ("constant", "cosine", "linear", "rsqrt")),
    "optimiser.warmup": Field(100, "steps of linear warm-up"),
    "optimiser.final": Field(0.0, "last learning rate as a fraction of the peak"),
    "optimiser.clip": Field(1.0, "clip gradients to this global norm; 0: do not"),
    "ema.decay": Field(0.999, "moving average of parameters used for sampling; 0: none"),
    "train.steps": Field(1000, "training steps of the whole run, restarts included"),
    "train.accumulate": Field(1, "microbatches accumulated into one step"),
    "train.precision": Field("float32", "compute dtype; parameters stay float32", ("float32", "bfloat16")),
    "train.log_every": Field(50, "steps between log rows; nothing is copied from the device in between"),
    "train.peak_flops": Field(
        0.0, "FLOP/s one device can do at most, for mfu; 0: known chips by name, none for others"
    ),
    "train.stats_every": Field(0, "steps between gradient/parameter norm measurements; 0: none"),
    "train.save_every": Field(1000, "steps between checkpoints"),
    "train.keep_last": Field(3, "newest checkpoints kept"),
    "train.keep_every": Field(0, "also keep checkpoints at multiples of this many steps; 0: none"),
    "train.best_metric": Field("", "also keep the checkpoint with the best value of this logged metric, e.g. loss"),
    "train.best_mode": Field("min", "which value of best_metric is best", ("min", "max")),
    "train.profile": Field("", "steps to trace with jax.profiler into WORKDIR/profile, e.g. 100:105"),
    "train.nonfinite_limit": Field(10, "refused (non-finite) updates in a row after which training stops"),
    "train.tensorboard": Field(True, "write TensorBoard event files beside metrics.jsonl"),
    "train.wandb": Field("", "Weights & Biases project to log to as well; empty: none (needs wandb)"),
    "train.sample_every": Field(0, "steps between sample pictures during training; 0: none"),
    "mesh.data": Field(-1, "devices that split the batch; -1: all that are left"),
    "mesh.fsdp": Field(1, "devices that split parameters (and the batch)"),
    "mesh.tensor": Field(1, "devices that split layers"),
    "mesh.slices": Field(
        1, "slices (or processes) on a slower network that only data crosses; -1: as many as there are"
    ),
    "mesh.fsdp_mode": Field(
        "auto", "who places the collectives of fsdp: XLA (auto) or jaxdiff", ("auto", "explicit")
    ),
    "mesh.rules": Field(
        (), "((regex, spec), ...) by parameter path, spec such as '*, tensor'; before the network's own"
    ),
    "mesh.min_bytes": Field(4 * 2**20, "size from which a parameter is split over fsdp without a rule"),
    "solver.name": Field("dpm_solver_pp", "sampler", tuple(NAMES["solver"])),
    "solver.steps": Field(20, "steps of the time grid, at least 1"),
    "solver.grid": Field("uniform", "time grid", tuple(NAMES["grid"])),
    "solver.grid_options": Field({}, "options of the grid, e.g. rho of edm_rho"),
    "guidance.name": Field("none", "guidance when sampling with labels", tuple(NAMES["guidance"])),
    "guidance.scale": Field(1.0, "guidance scale: 0 unconditional, 1 conditional"),
    "sample.num": Field(100, "samples drawn by `jaxdiff sample`"),
    "sample.batch_size": Field(256, "samples a compiled call"),
    "sample.seed": Field(0, "keys sampling noise, with the global sample index"),
    "sample.bound": Field(
        "none", "keep data estimates in [-1, 1]: by clipping, or dynamic threshold", ("none", "clip", "threshold")
    ),
    "sample.time_shift": Field(0.0, "window, in t, of time-shift sampling; 0: off, published 0.005 to 0.03"),
    "eval.num": Field(1024, "samples drawn for evaluation without guidance"),
    "eval.guidance_scale": Field(2.0, "guidance scale of the class-agreement samples"),
    "eval.subsets": Field(10, "seeded subsets that distances are averaged over"),
}

# sections that also take options of the component they name
OPEN = ("process", "network", "solver", "guidance", "optimiser")

# fields that hold options in a dict: which field names what they are options of, and the registry of those names
OPTION_DICTS = {
    "objective.time_options": ("time", "jaxdiff.objective.time:TIMES"),
    "objective.weighting_options": ("weighting", "jaxdiff.objective.weighting:WEIGHTINGS"),
    "objective.coupling_options": ("coupling", "jaxdiff.objective.coupling:COUPLINGS"),
    "solver.grid_options": ("grid", "jaxdiff.solver.grid:GRIDS"),
}

# the least value of a number
LEAST = {
    "seed": 0,
    "data.batch_size": 1,
    "data.seed": 0,
    "train.steps": 1,
    "train.accumulate": 1,
    "train.log_every": 1,
    "train.save_every": 1,
    "train.keep_last": 1,
    "train.keep_every": 0,
    "train.peak_flops": 0,
    "train.stats_every": 0,
    "train.nonfinite_limit": 1,
    "train.sample_every": 0,
    "mesh.min_bytes": 1,
    "solver.steps": 1,
    "sample.num": 1,
    "sample.batch_size": 1,
    "sample.seed": 0,
    "sample.time_shift": 0,
    "eval.num": 5,
    "eval.subsets": 1,
}

# the greatest: of larger seeds jax keeps the low 32 bits (evaluation adds to one), steps are counted and samples numbered in
# 32 bits too
MOST = {
    "seed": 2**31 - 1,
    "data.seed": 2**31 - 1,
    "sample.seed": 2**31 - 1,
    "train.steps": 2**31 - 1,
    "sample.num": 2**31 - 1,
    "eval.num": 2**31 - 1,
}


def default() -> ConfigDict:
    """Every field at its default; a config file starts from this and changes what it means to."""
    config = ConfigDict(type_safe=False)
    for path, field in FIELDS.items():
        *sections, name = path.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ConfigDict(type_safe=False)
            node = node[section]
        node[name] = dict(field.default) if isinstance(field.default, dict) else field.default
    return config


def options(config: ConfigDict, section: str) -> dict[str, Any]:
    """The options of the component that ``section`` names: what stands there beside the section's own fields."""
    plain = lambda value: value.to_dict() if isinstance(value, ConfigDict) else value
    return {name: plain(value) for name, value in config[section].items() if f"{section}.{name}" not in FIELDS}


# command -> the sections its --help lists
RELEVANT = {
    "train": {p.split(".")[0] for p in FIELDS},
    "sample": {"solver", "guidance", "sample"},
    "eval": {"solver", "guidance", "sample", "eval", "data"},
}


def describe(command: str | None = None) -> str:
    """The fields with their defaults, meanings and allowed names, for --help. Imports nothing."""
    lines = []
    width = max(len(path) for path in FIELDS) + 2
    for path, field in FIELDS.items():
        if command is not None and path.split(".")[0] not in RELEVANT[command]:
            continue
        allowed = f" [{', '.join(map(str, field.allowed))}]" if field.allowed else ""
        shown = repr(field.default) if field.default != "" else "''"
        lines.append(f"  {path:<{width}} {field.meaning}{allowed} (default {shown})")
    return "\n".join(lines)
