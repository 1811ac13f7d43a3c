"""What every network returns: a raw array and whatever else was asked for."""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NetOut:
    """The output of a network call.

    Attributes:
        raw: the network's array, of the dtype of its input; what it *means* (data, noise, velocity, ...)
            is the business of `jaxdiff.prediction`.
        aux: extra outputs by name. ``aux["taps"]`` holds the requested block activations and exists only
            when taps were requested, so that a plain call has a plain structure.
    """

    raw: Any
    aux: dict[str, Any] = dataclasses.field(default_factory=dict)


class Taps:
    """Collects the activations a caller asked for, by block name.

    Args:
        wanted: names requested by the caller.
        known: every name the network can offer.

    Raises:
        ValueError: when a requested name is not offered (at trace time, before any compile).
    """

    def __init__(self, wanted: Iterable[str], known: Sequence[str]):
        self.wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        self.kept: dict[str, Any] = {}
        for name in self.wanted:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"taps: no block named {name!r}{hint}; this network has {', '.join(known)}")

    def offer(self, name: str, value: Any) -> None:
        """Keep ``value`` if ``name`` was requested."""
        if name in self.wanted:
            self.kept[name] = value

    def out(self, raw: Any) -> NetOut:
        """Wrap the raw output together with what was kept."""
        return NetOut(raw, {"taps": self.kept} if self.wanted else {})
