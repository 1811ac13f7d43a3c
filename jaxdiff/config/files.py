"""From a file and overrides to a config, and from a run's folder back."""

from __future__ import annotations

import ast
import inspect
import json
import pathlib
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxdiff.config.fields import FIELDS, OPEN, default, options
from jaxdiff.config.names import ConfigError, near
from jaxdiff.config.validate import check_type

__all__ = ["apply_overrides", "load", "restore", "store"]


def load(path: str) -> ConfigDict:
    """The config a file's ``get_config()`` returns; ``file.py:text`` passes text to it.

    Raises ConfigError for a file that is not there, has none, or fails.
    """
    file, _, argument = path.partition(":")
    location = pathlib.Path(file)
    if not location.is_file():
        raise ConfigError(f"config: no file {file!r}; give a Python file with get_config()")
    module = types.ModuleType(location.stem)
    module.__file__ = str(location)
    try:
        exec(compile(location.read_text(), str(location), "exec"), module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"config: {file!r} defines no get_config()")
        _check_call(module.get_config, file, argument)
        config = module.get_config(argument) if argument else module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's own code raises
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(location)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f" at line {line}" if line else ""  # a file that is no text fails at none
        reason = (error.msg if isinstance(error, SyntaxError) else str(error)).partition("\n")[0]
        raise ConfigError(f"config: {file!r} fails{where}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config: get_config() of {file!r} returns {type(config).__name__}; need a ConfigDict")
    return config


def _check_call(get_config: Callable, file: str, argument: str) -> None:
    """Refuse text for a ``get_config`` that takes none, and the lack of it for one that needs it."""
    try:
        inspect.signature(get_config).bind(*[argument] * bool(argument))
    except TypeError:
        wrong = f"takes no text, {argument!r} given" if argument else "needs text, none given"
        raise ConfigError(f"config: get_config() of {file!r} {wrong}; FILE.py:TEXT passes TEXT") from None


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Set ``{"solver.steps": "8", ...}``; text becomes the field's type.

    Naming another component drops the options that belonged to the one before, not those given with it. Raises
    ConfigError for fields that do not exist and values of another type.
    """
    names = [path for path in overrides if path in FIELDS and path.endswith(".name")]
    for path in [*names, *(path for path in overrides if path not in names)]:
        text = overrides[path]
        section, _, name = path.rpartition(".")
        if path not in FIELDS and section not in OPEN:
            raise ConfigError(f"config.{path}: no such field{near(path, FIELDS)}; --help lists them")
        value = _parse(path, text)
        node = config.get(section) if section else config
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"config.{section}: {node!r} given; need a section, with fields such as config.{path}")
        if name == "name" and section in OPEN and value != node.name:
            for option in options(config, section):
                del node[option]
        node[name] = value
    return config


def _parse(path: str, text: str) -> Any:
    """The value that an override's text means, of the field's type where ``path`` is a field."""
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


def store(config: ConfigDict, path: Any) -> None:
    """Write a config as JSON, complete or not at all."""
    temporary = path.parent / (path.name + ".partial")
    temporary.write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def restore(path: Any) -> ConfigDict:
    """Read what :func:`store` wrote; fields added since get their defaults. Raises ConfigError if unreadable."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"config: cannot read {path} ({error})") from None
    if not isinstance(saved, dict):
        raise ConfigError(f"config: {path} holds {type(saved).__name__}, not the fields of a config")
    config = default()
    for key, value in saved.items():
        if isinstance(value, dict) and isinstance(config.get(key), ConfigDict):
            for name, item in value.items():
                config[key][name] = item
        else:
            config[key] = value
    return config
