"""The fields of a benchmark's config: defaults, meanings, checks. Imports no jax, so that help is quick."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from ml_collections import ConfigDict

from jaxdiff.config import NAMES, ConfigError, Field, near, option_parameters

__all__ = ["FIELDS", "apply_overrides", "check", "default", "describe"]

FIELDS: dict[str, Field] = {
    "title": Field("Solver benchmark", "heading of the report"),
    "world": Field("mixture", "an exact world, or a trained run", ("mixture", "run")),
    "workdir": Field("", "folder of the trained run, for world 'run'"),
    "process": Field(("linear", {}), "(name, options) of the process of an exact world"),
    "weights": Field((), "weights of the mixture's components (K,)"),
    "means": Field((), "means of the mixture's components (K, d)"),
    "covs": Field((), "covariances (K, d, d) or variances (K,) or one variance"),
    "labels": Field((), "class of each component (K,); samples then take the classes in turn"),
    "solvers": Field(("all",), "names, or (name, options); 'all' is every solver with its defaults"),
    "grids": Field(("uniform", "logsnr", "edm_rho", "cosine"), "names, or (name, options)"),
    "nfe": Field((5, 10, 20, 50), "budgets of network evaluations"),
    "seeds": Field((0,), "seeds of starts and noise; intervals are over seeds"),
    "guidance": Field("cfg", "guidance, where guidance_scales are given", ("cfg", "cfg_rescale", "cfg_pp")),
    "guidance_scales": Field((), "guidance scales; empty: none"),
    "samples": Field(1024, "samples a cell"),
    "batch": Field(0, "samples a call; 0: all"),
    "chunk": Field(32, "tables a call"),
    "projections": Field(64, "directions of sliced W2"),
    "reference_samples": Field(16384, "points of the true distribution, a multiple of samples"),
    "reference_steps": Field(1000, "steps of the tight solve that gives the true end points"),
    "timing": Field(False, "also time every solver on its own"),
}
AT_LEAST = {"samples": 2, "batch": 0, "chunk": 1, "projections": 1, "reference_samples": 2, "reference_steps": 8}


def default() -> ConfigDict:
    """Every field at its default."""
    return ConfigDict({name: field.default for name, field in FIELDS.items()}, type_safe=False, convert_dict=False)


def describe() -> str:
    """Fields with defaults, meanings and allowed names, for --help."""
    names = {"process": NAMES["process"], "solvers": NAMES["solver"], "grids": NAMES["grid"]}
    width = max(map(len, FIELDS)) + 2
    lines = []
    for name, field in FIELDS.items():
        allowed = field.allowed or names.get(name)
        listed = f" [{', '.join(allowed)}]" if allowed else ""
        lines.append(f"  {name:<{width}} {field.meaning}{listed} (default {field.default!r})")
    return "\n".join(lines)


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Set ``{"samples": "256", "nfe": "(5, 10)"}``; text becomes the field's type."""
    for name, text in overrides.items():
        if name not in FIELDS:
            raise ConfigError(f"config.{name}: no such field{near(name, FIELDS)}; allowed: {', '.join(FIELDS)}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False}.get(text.lower(), text)
        config[name] = value
    return config


def check(config: ConfigDict) -> ConfigDict:
    """Refuse unknown fields, wrong types and names in one line. Solver and grid entries are checked when planned."""
    for name in config:
        if name not in FIELDS:
            raise ConfigError(f"config.{name}: no such field{near(name, FIELDS)}; allowed: {', '.join(FIELDS)}")
    for name, field in FIELDS.items():
        if name not in config:
            raise ConfigError(f"config.{name}: missing; start a config from jaxdiff.commands.bench_config.default()")
        value = config[name]
        if isinstance(field.default, tuple):
            numbers = name == "covs" and isinstance(value, (int, float))
            if isinstance(value, str | Mapping) or not (hasattr(value, "__len__") or numbers):
                raise ConfigError(f"config.{name}: {value!r} given; need a tuple")
        elif type(value) is not type(field.default):
            raise ConfigError(f"config.{name}: {value!r} given; need a value of type {type(field.default).__name__}")
        if field.allowed is not None and value not in field.allowed:
            allowed = ", ".join(field.allowed)
            raise ConfigError(f"config.{name}: {value!r} is unknown; allowed: {allowed}{near(value, field.allowed)}")
    for name, least in AT_LEAST.items():
        if config[name] < least:
            raise ConfigError(f"config.{name}: {config[name]} given; need at least {least}")
    for seed in config.seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"config.seeds: {seed!r} given; seeds are whole numbers >= 0")
    _check_numbers(config)
    if config.world == "run":
        if not config.workdir:
            raise ConfigError("config.workdir: missing; world 'run' needs the folder of a trained run")
        return config
    entry = config.process
    if len(entry) != 2 or entry[0] not in NAMES["process"]:
        allowed = ", ".join(NAMES["process"])
        raise ConfigError(f"config.process: {entry!r} given; need (name, options) with name of: {allowed}")
    known = [*option_parameters("process", entry[0]), "t_max"]
    for option in entry[1]:
        if option not in known or option in ("noise", "df"):
            raise ConfigError(f"config.process: {entry[0]!r} has no option {option!r}{near(option, known)}")
    if not len(config.means):
        raise ConfigError("config.means: missing; world 'mixture' needs weights, means and covs")
    if len(config.guidance_scales) and not len(config.labels):
        raise ConfigError("config.labels: missing; guidance_scales need a class for each component")
    return config


def _check_numbers(config: ConfigDict) -> None:
    """What describes a mixture is numbers; weights and labels are plain lists of them."""
    import numpy as np

    for name in ("weights", "means", "covs", "labels"):
        try:
            axes = np.asarray(config[name], float).ndim
        except (TypeError, ValueError):
            raise ConfigError(f"config.{name}: {config[name]!r} given; need numbers") from None
        if name in ("weights", "labels") and axes != 1:
            raise ConfigError(f"config.{name}: {config[name]!r} given; need one number a component, (K,)")
