"""Build a network from keyword options, checking every one before anything compiles."""

import dataclasses
import difflib
import numbers
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp

M = TypeVar("M", bound=nn.Module)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def option_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the options a network class takes (its dataclass fields, without flax's own two)."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.name not in ("parent", "name"))


def check_option_names(where: str, given: Any, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` for the first option that ``where`` does not have, with the nearest name."""
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"network {where}: unknown option {name!r}{hint}; allowed: {', '.join(allowed)}")


def construct(cls: type[M], **options: Any) -> M:
    """Build ``cls(**options)`` from plain values, as a config file holds them.

    Lists become tuples and dtype names ("bfloat16") dtypes; the values are checked by the class.

    Args:
        cls: one of the network classes of this package.
        **options: its fields.

    Returns:
        The (parameterless, hashable) linen module.

    Raises:
        ValueError: an unknown option or a value out of range, named in one line.
    """
    where = cls.__name__
    check_option_names(where, options, option_names(cls))
    clean = {}
    whole = {f.name for f in dataclasses.fields(cls) if f.type in (int, "int")}
    for name, value in options.items():
        if name in whole and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise ValueError(f"network {where}: {name}={value!r} must be a whole number")
        if name in ("dtype", "param_dtype"):
            value = _dtype(where, name, value)
        elif isinstance(value, list | tuple):
            value = tuple(value)
        clean[name] = value
    net = cls(**clean)
    net.check()
    return net


def _dtype(where: str, name: str, value: Any) -> Any:
    try:
        known = jnp.dtype(value).name in DTYPES
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"network {where}: {name}={value!r} must be one of {', '.join(DTYPES)}")
    return jnp.dtype(value)


def at_least(net: nn.Module, low: float, *names: str) -> None:
    """Raise ``ValueError`` unless each named field of ``net`` is >= ``low``."""
    for name in names:
        value = getattr(net, name)
        if not value >= low:
            raise ValueError(f"network {type(net).__name__}: {name}={value!r} must be >= {low}")


def check_conditioning(net: nn.Module) -> None:
    """Check the fields that every network shares: time features, their frequencies, label classes."""
    at_least(net, 2, "time_features")
    at_least(net, 0, "num_classes")
    where = f"network {type(net).__name__}"
    if net.time_features % 2:
        raise ValueError(f"{where}: time_features={net.time_features!r} must be even")
    if len(net.frequencies) != 2 or not 0 < net.frequencies[0] < net.frequencies[1]:
        raise ValueError(f"{where}: frequencies={net.frequencies!r} must be two positive numbers, low < high")
