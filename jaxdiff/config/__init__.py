"""Configs: which names exist, what every field means, how a file and dotted overrides become checked values.

A config is an ``ml_collections.ConfigDict`` made by a file's ``get_config()``, which starts from :func:`default`. Each
component (process, network, ...) is a section with a ``name`` and, beside it, that component's own options. Names
are plain dictionaries of strings, resolved when something is built: nothing here imports jax.
"""

from jaxdiff.config.fields import FIELDS, MOST, RELEVANT, Field, default, describe, options
from jaxdiff.config.files import apply_overrides, load, restore, store
from jaxdiff.config.names import NAMES, TARGETS, TIMES, WEIGHTINGS, ConfigError, near, resolve
from jaxdiff.config.validate import check, check_type, option_parameters

__all__ = [
    "FIELDS",
    "MOST",
    "NAMES",
    "RELEVANT",
    "TARGETS",
    "TIMES",
    "WEIGHTINGS",
    "ConfigError",
    "Field",
    "apply_overrides",
    "check",
    "check_type",
    "default",
    "describe",
    "load",
    "near",
    "option_parameters",
    "options",
    "resolve",
    "restore",
    "store",
]
