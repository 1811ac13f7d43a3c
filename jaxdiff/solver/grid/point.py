"""What a grid is: points of a path, from noise to data; and grids at given points."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdiff.process.process import Process, check_process

__all__ = [
    "Grid",
    "Point",
    "as_grid",
    "at_times",
    "check_positive",
    "explicit",
    "from_times",
    "down_to_data",
    "whole_steps",
]


class Point(NamedTuple):
    """One point of a path: time, alpha, sigma (float64 scalars)."""

    time: float
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        """Half log-SNR; -inf where alpha is 0, +inf where sigma is 0."""
        with np.errstate(divide="ignore"):
            return float(np.log(self.alpha) - np.log(self.sigma))

    @property
    def rho(self) -> float:
        """``sigma / alpha``; inf where alpha is 0."""
        return self.sigma / self.alpha if self.alpha > 0 else np.inf


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """``time``, ``alpha``, ``sigma`` of shape (N+1,), noise first. ``on_path``: the points lie on the process."""

    time: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    on_path: bool = True

    def __len__(self) -> int:
        """N, the number of steps."""
        return self.time.shape[0] - 1

    def __getitem__(self, i: int) -> Point:
        """Point i, 0..N."""
        return Point(float(self.time[i]), float(self.alpha[i]), float(self.sigma[i]))


def whole_steps(steps: Any) -> int:
    """``steps`` as an int; raises ValueError unless it is a whole number of at least 1."""
    whole = isinstance(steps, (int, np.integer)) or (isinstance(steps, (float, np.floating)) and steps % 1 == 0)
    if isinstance(steps, bool) or not whole or steps < 1:
        raise ValueError(f"steps: {steps} given; a grid needs a whole number of steps, at least 1")
    return int(steps)


def check_positive(name: str, value: float) -> None:
    """Refuse a grid's option that is not a finite number above 0."""
    if not 0 < value < np.inf:
        raise ValueError(f"{name}: {value} given; need a finite number > 0")


def _checked(time: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, on_path: bool) -> Grid:
    """Validate that the points go from noise to data, strictly, and build."""
    if not (np.all(np.isfinite(time)) and np.all(np.isfinite(alpha)) and np.all(np.isfinite(sigma))):
        raise ValueError("grid: time, alpha and sigma must be finite")
    if np.any(alpha < 0) or np.any(sigma < 0) or np.any(alpha + sigma <= 0):
        raise ValueError("grid: alpha and sigma must be >= 0 and not both 0")
    if sigma[0] == 0:
        raise ValueError("grid: starts at sigma = 0, where there is nothing to denoise; start at more noise")
    # signal to noise must rise strictly; compared crosswise, so that zeros at either end are allowed
    if not np.all(alpha[1:] * sigma[:-1] > alpha[:-1] * sigma[1:]):
        i = int(np.argmin(alpha[1:] * sigma[:-1] > alpha[:-1] * sigma[1:]))
        raise ValueError(
            f"grid: noise level must fall at every step, but point {i + 1} (t={time[i + 1]:g}, alpha={alpha[i + 1]:g}, "
            f"sigma={sigma[i + 1]:g}) is no cleaner than point {i} (t={time[i]:g}, alpha={alpha[i]:g}, sigma={sigma[i]:g})"
        )
    grid = Grid(time, alpha, sigma, on_path)
    for column in (grid.time, grid.alpha, grid.sigma):
        column.setflags(write=False)
    return grid


def at_times(process: Process, times: np.ndarray) -> Grid:
    """The grid at ``times`` (N+1,), decreasing; nothing is appended."""
    c = process.coefficients(times)
    return _checked(np.array(times, np.float64), np.array(c.alpha, np.float64), np.array(c.sigma, np.float64), True)


def down_to_data(process: Process, times: np.ndarray) -> Grid:
    """The grid at ``times`` (N,), decreasing, and then data: the path at t=0, or, where that is cut off above sigma = 0,
    the clean point."""
    if not process.path.appends_clean:
        return at_times(process, np.append(times, 0.0))
    c = process.coefficients(times)
    alpha, sigma = np.append(c.alpha, 1.0), np.append(c.sigma, 0.0)
    return _checked(np.append(times, 0.0), alpha, sigma, True)


def from_times(process: Process, times: Any) -> Grid:
    """The grid at given decreasing times (N+1,) in [0, t_max]; nothing is appended. Raises ValueError for other times."""
    if isinstance(times, str):
        raise ValueError(f"grid: {times!r} given; need a Grid, as grid.uniform(process, steps), or decreasing times")
    times = np.array(times, np.float64)
    if times.ndim != 1 or times.size < 2:
        raise ValueError(f"times: shape {times.shape} given; need (N+1,) with N >= 1")
    if np.any(times < 0) or np.any(times > process.t_max):
        raise ValueError(
            f"times: range [{times.min():g}, {times.max():g}] given; need 0 <= t <= t_max = {process.t_max:g}"
        )
    if np.any(np.diff(times) >= 0):
        i = int(np.argmax(np.diff(times) >= 0))
        raise ValueError(
            f"times: {times[i]:g}, then {times[i + 1]:g} given; must decrease strictly, from noise to data"
        )
    return at_times(process, times)


def explicit(alpha: Any, sigma: Any, time: Any = None, process: Process | None = None) -> Grid:
    """A grid from other people's ``alpha``, ``sigma`` (N+1,), float64; ``time`` is what the network is told.

    Without ``time`` it is found by ``process.time(log(alpha/sigma))``, and is 0 where sigma = 0. Solvers that need points
    between grid points or path tangents refuse such a grid, unless its points lie on their process's path at those times.
    """
    alpha, sigma = np.array(alpha, np.float64), np.array(sigma, np.float64)
    if alpha.shape != sigma.shape or alpha.ndim != 1 or alpha.size < 2:
        raise ValueError(f"alpha, sigma: shapes {alpha.shape}, {sigma.shape} given; need equal (N+1,) with N >= 1")
    if time is None:
        if process is None:
            raise ValueError("time: missing; give the network's times, or the process to compute them from")
        clean = sigma == 0  # no path tells a noise level from 0 by its logarithm
        with np.errstate(divide="ignore", invalid="ignore"):
            time = np.where(clean, 0.0, process.time(np.log(alpha) - np.log(np.where(clean, 1.0, sigma))))
    time = np.array(time, np.float64)
    if time.shape != alpha.shape:
        raise ValueError(f"time: shape {time.shape} given; need that of alpha, {alpha.shape}")
    return _checked(time, alpha, sigma, False)


def as_grid(process: Process, grid: Any) -> Grid:
    """``grid`` itself, or the grid at an array of times; explicit arrays whose points lie on the path at their times count
    as the process's own grid. Raises ValueError for a grid of another process."""
    check_process(process)
    if not isinstance(grid, Grid):
        return from_times(process, grid)
    lies = _lies_on(process, grid)
    if grid.on_path and not lies:
        raise ValueError(
            f"grid: its points do not lie on process {process.name!r}; build it with that process, or replay "
            "its arrays with grid.explicit(alpha, sigma, time)"
        )
    return grid if grid.on_path == lies else dataclasses.replace(grid, on_path=True)


def _lies_on(process: Process, grid: Grid) -> bool:
    """Whether the process has the grid's alpha and sigma at its times; its last point may be an appended clean one."""
    own = slice(None, -1 if grid.on_path or grid.sigma[-1] == 0 else None)
    time, alpha, sigma = grid.time[own], grid.alpha[own], grid.sigma[own]
    if not grid.on_path and (np.any(np.diff(time) >= 0) or np.any(time < 0) or np.any(time > process.t_max)):
        return False  # the network's own numbering
    if not grid.on_path and any(isinstance(v, jax.core.Tracer) for v in jax.tree_util.tree_leaves(process)):
        return False  # not known while tracing, and explicit arrays need no path
    c = process.coefficients(time)
    return np.allclose(c.alpha, alpha, 1e-9, 1e-12) and np.allclose(c.sigma, sigma, 1e-9, 1e-12)
