"""Configs: which names exist, what every field means, how a file and dotted overrides become checked values.

A config is an ``ml_collections.ConfigDict`` made by a file's ``get_config()``, which starts from :func:`default`. Each
component (process, network, ...) is a section with a ``name`` and, beside it, that component's own options. Names
are plain dictionaries of strings, resolved when something is built: nothing here imports jax.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import json
import numbers
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

__all__ = [
    "FIELDS",
    "NAMES",
    "ConfigError",
    "Field",
    "apply_overrides",
    "check",
    "default",
    "describe",
    "load",
    "options",
    "resolve",
    "restore",
    "store",
]


class ConfigError(ValueError):
    """A config field with a wrong name, value or type; the message is one line."""


# component -> name -> "module:attribute", resolved late
NAMES: dict[str, dict[str, str]] = {
    "process": {
        name: f"jaxdiff.process:{name}" for name in ("linear", "vp", "ddpm", "cosine", "trig", "subvp", "ve", "edm")
    },
    "network": {
        "mlp": "jaxdiff.network:MLP",
        "unet": "jaxdiff.network:UNet",
        "dit": "jaxdiff.network:make_dit",
    },
    "solver": {
        name: f"jaxdiff.solver:{name}"
        for name in (
            "euler ddim ancestral ddpm heun edm dpm_solver dpm_solver_pp conjugate dc_solver deis dpm2 dpm_solver_v3 exp_rk "
            "f_pndm ghvb heavy_ball ipndm lms pndm rho_rk rk4 unipc usf velocity_ab "
            "euler_ancestral dpm2_ancestral dpmpp_2s_ancestral dpm_solver_pp_sde er_sde sa_solver restart euler_maruyama "
            "predictor_corrector"
        ).split()
    },
    "grid": {
        name: f"jaxdiff.solver.grid:{name}"
        for name in (
            "uniform power quadratic cosine shift logsnr edm_rho arctan ays beta cosmap discrete dynamic_shift exponential "
            "polyexponential vp"
        ).split()
    },
    "guidance": {name: f"jaxdiff.guidance:{name}" for name in ("cfg", "cfg_rescale", "cfg_pp")} | {"none": ""},
    "optimiser": {name: f"jaxdiff.train.optimiser:{name}" for name in ("adam", "adamw", "lion", "muon", "sgd")},
    "noise": {"gaussian": "jaxdiff.process:Gaussian", "student_t": "jaxdiff.process:student_t"},
}
TARGETS = ("data", "noise", "vpred", "velocity", "score", "edm")
TIMES = ("uniform", "logit_normal", "log_normal", "mode", "cosmap", "discrete")
WEIGHTINGS = ("flat", "snr", "min_snr", "p2", "edm", "sigmoid", "likelihood")


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
OPEN = {
    "process": "process",
    "network": "network",
    "solver": "solver",
    "guidance": "guidance",
    "optimiser": "optimiser",
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


def near(given: Any, allowed: Iterable[Any]) -> str:
    """``; did you mean ...?`` for the closest of ``allowed``, or nothing."""
    found = difflib.get_close_matches(str(given), [str(a) for a in allowed], 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def load(path: str) -> ConfigDict:
    """The config a file's ``get_config()`` returns; ``file.py:text`` passes text to it."""
    file, _, argument = path.partition(":")
    location = pathlib.Path(file)
    if not location.is_file():
        raise ConfigError(f"config: no file {file!r}; give a Python file with get_config()")
    module = types.ModuleType(location.stem)
    module.__file__ = str(location)
    exec(compile(location.read_text(), str(location), "exec"), module.__dict__)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config: {file!r} defines no get_config()")
    return module.get_config(argument) if argument else module.get_config()


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Set ``{"solver.steps": "8", ...}``, in order; text becomes the field's type.

    Naming another component drops the options that belonged to the one before. Raises ConfigError for fields that
    do not exist and values of another type.
    """
    for path, text in overrides.items():
        section, _, name = path.rpartition(".")
        if path not in FIELDS and section not in OPEN:
            raise ConfigError(f"config.{path}: no such field{near(path, FIELDS)}; --help lists them")
        value = _parse(path, text)
        node = config[section] if section else config
        if name == "name" and section in OPEN and value != node.name:
            for option in options(config, section):
                del node[option]
        node[name] = value
    return config


def _parse(path: str, text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if path in FIELDS:
        wanted = FIELDS[path].default
        if isinstance(wanted, str) and not isinstance(value, str) and path != "data.in_memory":
            value = text
        check_type(path, value)
    return value


KINDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "text", "dict": "a dict"}


def check_type(path: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` has the type of the field's default."""
    wanted = FIELDS[path].default
    if path == "data.in_memory":
        return
    if isinstance(wanted, float) and isinstance(value, int) and not isinstance(value, bool):
        return
    if isinstance(wanted, dict) and isinstance(value, (dict, ConfigDict)):
        return
    if isinstance(wanted, tuple) and isinstance(value, (list, tuple)):
        return
    if type(value) is not type(wanted):
        kind = {
            "int": "a whole number",
            "float": "a number",
            "bool": "True or False",
            "str": "text",
            "dict": "a dict",
            "tuple": "a list",
        }
        raise ConfigError(f"config.{path}: {value!r} given; need {kind[type(wanted).__name__]}")


def options(config: ConfigDict, section: str) -> dict[str, Any]:
    """The options of the component that ``section`` names: what stands there beside the section's own fields."""
    return {name: _plain(value) for name, value in config[section].items() if f"{section}.{name}" not in FIELDS}


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value


@functools.cache
def resolve(kind: str, name: str) -> Callable:
    """The constructor of component ``name``."""
    if name not in NAMES[kind]:
        raise ConfigError(f"{kind}: {name!r} is unknown; allowed: {', '.join(NAMES[kind])}{near(name, NAMES[kind])}")
    module, _, attribute = NAMES[kind][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def check(config: ConfigDict) -> ConfigDict:
    """Refuse unknown sections, fields, names, types and options, each in one line, before anything is built."""
    sections = {path.split(".")[0] for path in FIELDS if "." in path}
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key in sections:
            for name in value:
                if f"{key}.{name}" not in FIELDS and key not in OPEN:
                    allowed = [p for p in FIELDS if p.startswith(f"{key}.")]
                    raise ConfigError(
                        f"config.{key}.{name}: no such field{near(f'{key}.{name}', allowed)}; allowed: "
                        + ", ".join(p.partition(".")[2] for p in allowed)
                    )
        elif key not in FIELDS:
            raise ConfigError(f"config.{key}: no such field{near(key, [*sections, *FIELDS])}")
    for path, field in FIELDS.items():
        section, _, name = path.rpartition(".")
        node = config.get(section) if section else config
        if node is None or name not in node:
            raise ConfigError(f"config.{path}: missing; start a config from jaxdiff.config.default()")
        check_type(path, node[name])
        if field.allowed is not None and node[name] not in field.allowed:
            raise ConfigError(
                f"config.{path}: {node[name]!r} is unknown; allowed: {', '.join(map(str, field.allowed))}"
                + near(node[name], field.allowed)
            )
    for path, least in LEAST.items():
        section, _, name = path.rpartition(".")
        if config[section][name] < least:
            raise ConfigError(f"config.{path}: {config[section][name]} given; need at least {least}")
    for section, kind in OPEN.items():
        given = options(config, section)
        if given:
            known = option_parameters(kind, config[section].name)
            for name, value in given.items():
                if name not in known:
                    raise ConfigError(
                        f"config.{section}.{name}: {config[section].name!r} has no such option{near(name, known)}; "
                        f"allowed: {', '.join(known) or 'none'}"
                    )
                check_option(f"{section}.{name}", value, known[name])
    for path, (chooser, place) in OPTION_DICTS.items():
        section, _, name = path.partition(".")
        if config[section][name]:
            choice = config[section][chooser]
            known = _parameters_of(_entry(place, choice), path)
            for option, value in config[section][name].items():
                if option not in known:
                    raise ConfigError(
                        f"config.{path}: {choice!r} has no option {option!r}{near(option, known)}; "
                        f"allowed: {', '.join(known) or 'none'}"
                    )
                check_option(f"{path}[{option!r}]", value, known[option])
    group, rows = config.objective.coupling_group, config.data.batch_size // config.train.accumulate
    if config.objective.coupling == "ot" and (group < 1 or rows % group):
        raise ConfigError(
            f"config.objective.coupling_group: {group} given; it must divide the {rows} examples of a microbatch "
            "(config.data.batch_size / config.train.accumulate)"
        )
    if not 0 <= config.objective.label_drop <= 1:
        raise ConfigError(f"config.objective.label_drop: {config.objective.label_drop} given; need 0..1")
    return config


LEAST = {
    "data.batch_size": 1,
    "train.steps": 1,
    "train.accumulate": 1,
    "train.log_every": 1,
    "train.save_every": 1,
    "train.keep_last": 1,
    "train.peak_flops": 0,
    "train.stats_every": 0,
    "mesh.min_bytes": 1,
    "solver.steps": 1,
    "sample.num": 1,
    "sample.batch_size": 1,
    "sample.time_shift": 0,
    "eval.num": 5,
    "eval.subsets": 1,
}

# fields that hold options in a dict: which field names what they are options of, and the registry of those names
OPTION_DICTS = {
    "objective.time_options": ("time", "jaxdiff.objective.time:TIMES"),
    "objective.weighting_options": ("weighting", "jaxdiff.objective.weighting:WEIGHTINGS"),
    "objective.coupling_options": ("coupling", "jaxdiff.objective.coupling:COUPLINGS"),
    "solver.grid_options": ("grid", "jaxdiff.solver.grid:GRIDS"),
}

# parameters that builders fill in themselves
_FILLED = {
    "process": {"noise", "t_max"},
    "network": {"num_classes", "parent", "name", "two_time"},
    "solver": {"process", "grid", "stochastic"},
    "guidance": {"d", "cond", "null", "scale"},
    "optimiser": {"rate"},
    "objective.coupling_options": {"group"},
    "solver.grid_options": {"process", "steps"},
}


def _entry(place: str, name: str) -> Callable:
    module, _, registry = place.partition(":")
    return getattr(importlib.import_module(module), registry)[name]


def option_parameters(kind: str, name: str) -> dict[str, inspect.Parameter | None]:
    """Options of a component, read from its constructor's signature; None where that says nothing of the value."""
    if name == "none":
        return {}
    if kind == "optimiser":
        function: Any = importlib.import_module("jaxdiff.train.optimiser").OPTIMISERS[name]
    elif kind == "network" and name == "dit":
        return {"size": None, **_parameters_of(importlib.import_module("jaxdiff.network").DiT, kind)}
    else:
        function = resolve(kind, name)
    return {**_parameters_of(function, kind), **({"noise": None, "df": None} if kind == "process" else {})}


def _parameters_of(function: Any, kind: str) -> dict[str, inspect.Parameter | None]:
    """Keyword parameters of ``function``, without those that the builders fill in."""
    return {
        p.name: p
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in _FILLED.get(kind, ())
    }


def check_option(path: str, value: Any, parameter: inspect.Parameter | None) -> None:
    """Refuse a value of another type than the parameter is annotated with, where that is a plain one."""
    if parameter is None:
        return
    annotation = parameter.annotation
    kinds = [
        k.strip()
        for k in (
            annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        ).split("|")
    ]
    if kinds == ["Any"] and isinstance(parameter.default, numbers.Real) and isinstance(value, str):
        kinds = ["float"]  # numbers that may also be traced arrays
    plain = isinstance(value, bool)
    fits = {
        "int": isinstance(value, numbers.Integral) and not plain,
        "float": isinstance(value, numbers.Real) and not plain,
        "bool": plain,
        "str": isinstance(value, str),
        "None": value is None,
    }
    if set(kinds) <= set(fits) and not any(fits[k] for k in kinds):
        allowed = " or ".join(KINDS.get(k, "None") for k in kinds)
        raise ConfigError(f"config.{path}: {value!r} given; need {allowed}")


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


RELEVANT = {
    "train": {p.split(".")[0] for p in FIELDS},
    "sample": {"solver", "guidance", "sample"},
    "eval": {"solver", "guidance", "sample", "eval", "data"},
}


def store(config: ConfigDict, path: Any) -> None:
    """Write a config as JSON, complete or not at all."""
    temporary = path.parent / (path.name + ".partial")
    temporary.write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def restore(path: Any) -> ConfigDict:
    """Read what :func:`store` wrote; fields added since get their defaults."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"config: cannot read {path} ({error})") from None
    config = default()
    for key, value in saved.items():
        if isinstance(value, dict) and key in config:
            for name, item in value.items():
                config[key][name] = item
        else:
            config[key] = value
    return config
