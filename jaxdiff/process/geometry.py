"""Where and in which coordinates a process acts: basis, known endpoint, domain; identity members.

A process is ``x_t = T^-1[a T x0 + b T y + c T n]`` kept in a domain. These are the members for which T is
the identity, b is zero and nothing is constrained; spectral bases, bridges and bounded domains are
siblings with the same two methods.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxdiff.process.coefficients import resolve

__all__ = ["Absent", "Euclidean", "Identity"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Identity:
    """The basis in which data already is."""

    def forward(self, x: Any) -> Any:
        """``T x``."""
        return x

    def inverse(self, x: Any) -> Any:
        """``T^-1 x``."""
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Absent:
    """No endpoint: ``b(t) = 0``."""

    def coefficient(self, t: Any) -> Any:
        """``b(t)``, of the shape of ``t``."""
        xp, t = resolve(t)
        return xp.zeros_like(t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Euclidean:
    """All of R^n."""

    def project(self, x: Any) -> Any:
        """The nearest point of the domain."""
        return x
