"""Whether a config can be built: fields, types, names and options, refused in one line each before anything is."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import numbers
import typing
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxdiff.config.fields import FIELDS, LEAST, MOST, OPEN, OPTION_DICTS, options
from jaxdiff.config.names import ConfigError, near, resolve

__all__ = ["check", "check_option", "check_type", "option_parameters"]


def check(config: ConfigDict) -> ConfigDict:
    """Refuse unknown sections, fields, names, types and options, each in one line, before anything is built.

    Returns ``config`` itself; raises ConfigError.
    """
    _check_known(config)
    _check_plain(config)
    _check_values(config)
    _check_components(config)
    _check_option_dicts(config)
    group, rows = config.objective.coupling_group, config.data.batch_size // config.train.accumulate
    if config.objective.coupling == "ot" and (group < 1 or rows % group):
        raise ConfigError(
            f"config.objective.coupling_group: {group} given; it must divide the {rows} examples of a microbatch "
            "(config.data.batch_size / config.train.accumulate)"
        )
    if not 0 <= config.objective.label_drop <= 1:
        raise ConfigError(f"config.objective.label_drop: {config.objective.label_drop} given; need 0..1")
    return config


def _check_known(config: ConfigDict) -> None:
    """Nothing stands in the config that is no field, and no option of an open section."""
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
        elif key in sections:
            example = next(path for path in FIELDS if path.startswith(f"{key}."))
            raise ConfigError(f"config.{key}: {value!r} given; need a section, with fields such as config.{example}")
        elif key not in FIELDS:
            raise ConfigError(f"config.{key}: no such field{near(key, [*sections, *FIELDS])}")


def _plain(value: Any) -> Any:
    """A dict for a ConfigDict, whose own text has several lines."""
    return value.to_dict() if isinstance(value, ConfigDict) else value


def _check_plain(config: ConfigDict) -> None:
    """Every value can be stored: numbers, text, lists and dicts of such, as JSON has them."""
    for section, value in config.items():
        for name, item in value.items() if isinstance(value, ConfigDict) else [("", value)]:
            plain = _plain(item)
            try:
                json.dumps(plain)
            except (TypeError, ValueError):
                path = f"{section}.{name}".rstrip(".")
                shown = " ".join(repr(plain).split())
                raise ConfigError(
                    f"config.{path}: {shown} ({type(plain).__name__}) given; need what JSON can hold, "
                    "such as a number, text or a list of such"
                ) from None


def _check_values(config: ConfigDict) -> None:
    """Every field is there, of its type, one of its allowed names, and no less than its least value."""
    for path, field in FIELDS.items():
        section, _, name = path.rpartition(".")
        node = config.get(section) if section else config
        if node is None or name not in node:
            raise ConfigError(f"config.{path}: missing; start a config from jaxdiff.config.default()")
        value = _plain(node[name])
        check_type(path, value)
        if field.allowed is not None and value not in field.allowed:
            raise ConfigError(
                f"config.{path}: {value!r} is unknown; allowed: {', '.join(map(str, field.allowed))}"
                + near(value, field.allowed)
            )
        if path in LEAST and value < LEAST[path]:
            raise ConfigError(f"config.{path}: {value} given; need at least {LEAST[path]}")
        if path in MOST and value > MOST[path]:
            raise ConfigError(f"config.{path}: {value} given; need at most {MOST[path]}")


def _check_components(config: ConfigDict) -> None:
    """The options in open sections are those of the components that the sections name."""
    for section in OPEN:
        given = options(config, section)
        known = option_parameters(section, config[section].name) if given else {}
        for name, value in given.items():
            if name not in known:
                own = [path.partition(".")[2] for path in FIELDS if path.startswith(f"{section}.")]
                raise ConfigError(
                    f"config.{section}.{name}: {config[section].name!r} has no such option; "
                    f"allowed: {', '.join(known) or 'none'}{near(name, [*known, *own])}"
                )
            check_option(f"{section}.{name}", value, known[name])


def _check_option_dicts(config: ConfigDict) -> None:
    """The options in dicts are those of what the field beside them names."""
    for path, (chooser, place) in OPTION_DICTS.items():
        section, _, name = path.partition(".")
        choice, given = config[section][chooser], config[section][name]
        known = _parameters_of(_entry(place, choice), path) if given else {}
        for option, value in given.items():
            if option not in known:
                raise ConfigError(
                    f"config.{path}: {choice!r} has no option {option!r}{near(option, known)}; "
                    f"allowed: {', '.join(known) or 'none'}"
                )
            check_option(f"{path}[{option!r}]", value, known[option])


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "text",
    "dict": "a dict",
    "tuple": "a list",
    "numbers": "a list of numbers",
}


def check_type(path: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` has the type of the field's default."""
    wanted = FIELDS[path].default
    if path == "data.in_memory":
        return
    if isinstance(wanted, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if not -math.inf < value < math.inf:
            raise ConfigError(f"config.{path}: {value} given; need a finite number")
        return
    if isinstance(wanted, dict) and isinstance(value, (dict, ConfigDict)):
        return
    if isinstance(wanted, tuple) and isinstance(value, (list, tuple)):
        return
    if type(value) is not type(wanted):
        raise ConfigError(f"config.{path}: {value!r} given; need {KINDS[type(wanted).__name__]}")


def check_option(path: str, value: Any, parameter: inspect.Parameter | None) -> None:
    """Refuse a value of another type than the parameter is annotated with, where that is a plain one."""
    if parameter is None:
        return
    value, annotation, default = _plain(value), parameter.annotation, parameter.default
    named = isinstance(annotation, type) and typing.get_origin(annotation) is None
    text = annotation.__name__ if named else str(annotation)
    kinds = [kind.strip() for kind in text.split("|")]
    if kinds == ["Any"] and isinstance(default, numbers.Real) and not isinstance(default, bool):
        # numbers that may also be traced arrays; those of a solver may be one a step
        kinds = ["float", "numbers"] if path.startswith("solver.") else ["float"]
    if not any(_fits(value, kind) for kind in kinds):
        raise ConfigError(f"config.{path}: {value!r} given; need {' or '.join(map(_said, kinds))}")


def _items(kind: str) -> list[str] | None:
    """``["int", "..."]`` of ``tuple[int, ...]``; None for what is no tuple."""
    return [item.strip() for item in kind[6:-1].split(",")] if kind.startswith("tuple[") else None


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of a plain kind; of other kinds nothing is known, and anything passes."""
    items = ["float", "..."] if kind == "numbers" else _items(kind)
    if items is not None:
        if not isinstance(value, list | tuple):
            return False
        items = items[:1] * len(value) if items[-1] == "..." else items
        return len(items) == len(value) and all(map(_fits, value, items))
    plain = isinstance(value, bool)
    known = {
        "int": isinstance(value, numbers.Integral) and not plain,
        "float": isinstance(value, numbers.Real) and not plain,
        "bool": plain,
        "str": isinstance(value, str),
        "None": value is None,
    }
    return known.get(kind, True)


def _said(kind: str) -> str:
    """A kind in words."""
    items = _items(kind)
    if items is None:
        return KINDS.get(kind, kind)
    return f"a list{'' if items[-1] == '...' else f' of {len(items)}'}, each {_said(items[0])}"


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


def _entry(place: str, name: str) -> Callable:
    """What the registry at ``place``, "module:registry", has under ``name``."""
    module, _, registry = place.partition(":")
    return getattr(importlib.import_module(module), registry)[name]
