"""From ``config.mesh`` to a mesh, the rules that split parameters over it, and the route of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdiff.train.mesh import make_mesh
from jaxdiff.train.sharding import TENSOR_RULES, Rule, parse_rules

__all__ = ["mesh", "route", "rules"]


def mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh of ``config.mesh``."""
    m = config.mesh
    return make_mesh(m.data, m.fsdp, m.tensor, devices, slices=m.slices)


def rules(config: ConfigDict, tensor: int) -> tuple[Rule, ...]:
    """The user's rules, then the network's own for splitting over ``tensor`` devices."""
    own = TENSOR_RULES.get(config.network.name, ()) if tensor > 1 else ()
    return (*parse_rules(config.mesh.rules, "config.mesh.rules"), *own)


def route(config: ConfigDict) -> str:
    """``make_step``'s ``parallel``."""
    return "fsdp" if config.mesh.fsdp_mode == "explicit" else "auto"
