"""What errors say of a name that is not among those allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["near", "unknown"]


def near(value: Any, allowed: Iterable[Any]) -> str:
    """``; did you mean 'x'?`` for the name of ``allowed`` closest to ``value``, nothing if none is close."""
    found = difflib.get_close_matches(str(value), [name for name in allowed if isinstance(name, str)], 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def unknown(field: str, value: Any, allowed: Iterable[Any]) -> ValueError:
    """The error for a ``field`` whose ``value`` is not among the names ``allowed``."""
    names = [str(name) for name in allowed]
    return ValueError(f"{field}: {value!r} is unknown; allowed: {', '.join(names)}{near(value, names)}")
