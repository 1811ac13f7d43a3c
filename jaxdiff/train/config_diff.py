"""Which fields of two configs differ: asked before a run goes on with a config it was not started with."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["MISSING", "Difference", "check_same_config"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One field in which two configs differ; ``MISSING`` marks a field that one of them lacks."""

    path: str
    saved: Any
    given: Any

    def __str__(self) -> str:
        """Write it as ``optimiser.lr: saved 0.001, given 0.01``."""
        show = lambda value: "absent" if value is MISSING else repr(value)
        return f"{self.path}: saved {show(self.saved)}, given {show(self.given)}"


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()


def check_same_config(
    saved: Mapping[str, Any], given: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> list[Difference]:
    """Compare a saved config with the one given now, as they look in JSON (a tuple equals a list).

    Args:
        saved: nested dictionary, as read from ``config.json``.
        given: nested dictionary, as the program has it now.
        ignore: dotted paths that may differ, with everything below them (``"train.steps"``).

    Returns:
        The differences in the order of ``saved``, then what only ``given`` has; ``print(*differences, sep="\\n")``
        is a readable diff.
    """
    differences: list[Difference] = []

    def compare(path: str, a: Any, b: Any) -> None:
        if any(path == entry or path.startswith(entry + ".") for entry in ignore):
            return
        if isinstance(a, Mapping) and isinstance(b, Mapping) and (a or b):
            for key in [*a, *(k for k in b if k not in a)]:
                compare(f"{path}.{key}" if path else str(key), a.get(key, MISSING), b.get(key, MISSING))
        elif a is MISSING or b is MISSING or a != b or isinstance(a, bool) != isinstance(b, bool):
            differences.append(Difference(path, a, b))

    plain = lambda config: json.loads(json.dumps(config, default=str))
    compare("", plain(dict(saved)), plain(dict(given)))
    return differences
