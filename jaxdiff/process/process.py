"""A process: five independent choices, ``x_t = T^-1[alpha T x0 + b T y + sigma T n]`` kept in a domain."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxdiff.process.coefficients import Coefficients, expand
from jaxdiff.process.geometry import Absent, Euclidean, Identity
from jaxdiff.process.noise import Gaussian

__all__ = ["Process", "check_process"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """How data is corrupted. Time runs from data (0) to noise (1); ``t_max`` is where grids start.

    ``path`` gives the coefficients and may hold arrays (vmapped over, learned); ``noise`` is the law of n
    and of the sampler's start; ``basis``, ``endpoint``, ``domain`` default to their identity members.
    """

    path: Any
    noise: Any = dataclasses.field(default_factory=Gaussian)
    basis: Any = dataclasses.field(default_factory=Identity)
    endpoint: Any = dataclasses.field(default_factory=Absent)
    domain: Any = dataclasses.field(default_factory=Euclidean)
    t_max: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def name(self) -> str:
        """The path's registered name."""
        return self.path.name

    @property
    def prior(self) -> Any:
        """The unit-scale law a sampler starts from: ``sample(key, shape)`` is one example, ``log_prob(x)`` is of a batch."""
        return self.noise

    def coefficients(self, t: Any) -> Coefficients:
        """``alpha, sigma`` and the scaled tangent at ``t``, in the shape of ``t``."""
        return self.path.coefficients(t)

    def half_log_snr(self, t: Any) -> Any:
        """``lam(t) = log(alpha/sigma)``, decreasing in t."""
        return self.path.half_log_snr(t)

    def time(self, lam: Any) -> Any:
        """The time at which ``half_log_snr`` equals ``lam``."""
        return self.path.time(lam)

    def network_time(self, t: Any) -> Any:
        """The number told to the network for time ``t`` (``t`` itself; the zero-based index for ddpm)."""
        return self.path.network_time(t)

    def corrupt(self, x0: Any, n: Any, t: Any, y: Any = None) -> Any:
        """``x_t`` from data ``x0`` (B, ...), noise ``n`` of its shape, times ``t`` aligned from the left."""
        c = self.coefficients(t)
        forward = self.basis.forward
        mixed = expand(c.alpha, x0) * forward(x0) + expand(c.sigma, x0) * forward(n)
        if y is not None:
            mixed = mixed + expand(self.endpoint.coefficient(t), x0) * forward(y)
        return self.domain.project(self.basis.inverse(mixed))

    def velocity(self, x0: Any, n: Any, t: Any) -> Any:
        """``dx_t/dt = alpha' x0 + sigma' n``; infinite at t=0 where sigma' is."""
        c = self.coefficients(t)
        return (expand(c.da, x0) * x0 + expand(c.ds, x0) * n) / expand(c.pace, x0)


def check_process(process: Any) -> None:
    """Refuse a process's name, and the function that makes it, in its place: ValueError."""
    if not hasattr(process, "coefficients"):
        raise ValueError(f"process: {process!r} given; need a Process, such as process.linear()")
