"""Time grids: N+1 points from noise to data, each with its time, alpha and sigma in float64.

A grid function takes ``(process, steps, ...)`` and costs ``steps`` solver steps. Grids start at
``process.t_max`` and end at data: at t=0, or, on paths whose ``sigma(0) > 0`` only by truncation (ve), at one
appended clean point (t=0, alpha=1, sigma=0). Grids uniform in a function of the noise level (``logsnr``,
``edm_rho``) place ``steps`` points between finite ends, documented per process as ``path.interior()``, move the
first to ``t_max`` exactly, and append the exact end point.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.process.process import Process

__all__ = [
    "GRIDS",
    "Grid",
    "Point",
    "as_grid",
    "cosine",
    "edm_rho",
    "explicit",
    "from_times",
    "logsnr",
    "power",
    "quadratic",
    "shift",
    "uniform",
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


def _steps(steps: Any) -> int:
    whole = isinstance(steps, (int, np.integer)) or (isinstance(steps, (float, np.floating)) and steps % 1 == 0)
    if isinstance(steps, bool) or not whole or steps < 1:
        raise ValueError(f"steps: {steps} given; a grid needs a whole number of steps, at least 1")
    return int(steps)


def _grid(time: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, on_path: bool) -> Grid:
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


def from_times(process: Process, times: Any) -> Grid:
    """The grid at given decreasing times (N+1,) in [0, t_max]; nothing is appended."""
    if isinstance(times, str):
        raise ValueError(f"grid: {times!r} given; need a Grid, as grid.{times}(process, steps), or decreasing times")
    times = np.array(times, np.float64)
    if times.ndim != 1 or times.size < 2:
        raise ValueError(f"times: shape {times.shape} given; need (N+1,) with N >= 1")
    if np.any(times < 0) or np.any(times > process.t_max):
        raise ValueError(
            f"times: range [{times.min():g}, {times.max():g}] given; need 0 <= t <= t_max = {process.t_max:g}"
        )
    if np.any(np.diff(times) >= 0):
        raise ValueError("times: must decrease strictly, from noise to data")
    c = process.coefficients(times)
    return _grid(times, np.array(c.alpha, np.float64), np.array(c.sigma, np.float64), True)


def explicit(alpha: Any, sigma: Any, time: Any = None, process: Process | None = None) -> Grid:
    """A grid from other people's ``alpha``, ``sigma`` (N+1,), float64; ``time`` is what the network is told.

    Without ``time`` it is found by ``process.time(log(alpha/sigma))``, and is 0 where sigma = 0. Solvers that need points
    between grid points or path tangents refuse such a grid.
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
    return _grid(time, alpha, sigma, False)


def as_grid(process: Process, grid: Any) -> Grid:
    """``grid`` itself, or the grid at an array of times. Raises ValueError for a grid of another process."""
    if not isinstance(grid, Grid):
        return from_times(process, grid)
    if grid.on_path:
        c = process.coefficients(grid.time[:-1])  # the last point may be an appended clean one
        if not (
            np.allclose(c.alpha, grid.alpha[:-1], 1e-9, 1e-12) and np.allclose(c.sigma, grid.sigma[:-1], 1e-9, 1e-12)
        ):
            raise ValueError(
                f"grid: its points do not lie on process {process.name!r}; build it with that process, or replay "
                "its arrays with grid.explicit(alpha, sigma, time)"
            )
    return grid


def _warp(process: Process, steps: int, t_min: float, map_unit: Any) -> Grid:
    """Grid at ``t_min + (t_max - t_min) f(u)``, u from 1 to 0; a clean point is appended where the path needs one."""
    steps = _steps(steps)
    if not 0 <= t_min < process.t_max:
        raise ValueError(f"t_min: {t_min} given; need 0 <= t_min < t_max = {process.t_max}")
    append = process.path.appends_clean and t_min == 0
    count = steps if append else steps + 1
    u = np.linspace(1.0, 0.0, count) if count > 1 else np.ones(1)
    times = t_min + (process.t_max - t_min) * map_unit(u)
    return _with_end(process, times, append)


def _with_end(process: Process, times: np.ndarray, append: bool) -> Grid:
    c = process.coefficients(times)
    alpha, sigma = np.array(c.alpha, np.float64), np.array(c.sigma, np.float64)
    if append:
        times, alpha, sigma = np.append(times, 0.0), np.append(alpha, 1.0), np.append(sigma, 0.0)
    return _grid(np.array(times, np.float64), alpha, sigma, True)


def uniform(process: Process, steps: int, *, t_min: float = 0.0) -> Grid:
    """``t_i = t_max + (i/N)(t_min - t_max)``."""
    return _warp(process, steps, t_min, lambda u: u)


def power(process: Process, steps: int, *, exponent: float = 2.0, t_min: float = 0.0) -> Grid:
    """``t_i = t_min + (t_max - t_min)(1 - i/N)^exponent``; exponent 2 is DDIM's and DEIS's quadratic grid."""
    if not exponent > 0:
        raise ValueError(f"exponent: {exponent} given; need > 0")
    return _warp(process, steps, t_min, lambda u: u**exponent)


def quadratic(process: Process, steps: int, *, t_min: float = 0.0) -> Grid:
    """:func:`power` with exponent 2."""
    return power(process, steps, exponent=2.0, t_min=t_min)


def cosine(process: Process, steps: int, *, t_min: float = 0.0) -> Grid:
    """``t_i = t_min + (t_max - t_min)(1 + cos(pi i/N))/2``: dense at both ends."""
    return _warp(process, steps, t_min, lambda u: (1 - np.cos(np.pi * u)) / 2)


def shift(process: Process, steps: int, *, factor: float = 3.0, t_min: float = 0.0) -> Grid:
    """``t' = s t/(1 + (s-1) t)`` of the uniform grid (SD3); on the linear path ``lam' = lam - log s``."""
    if not factor > 0:
        raise ValueError(f"factor: {factor} given; need > 0")
    return _warp(process, steps, t_min, lambda u: factor * u / (1 + (factor - 1) * u))


def _levels(process: Process, steps: int, low: float | None, high: float | None) -> tuple[float, float, bool]:
    """(lam at the noisy end, lam at the clean end of the interior, whether the start is moved to t_max)."""
    t_low, t_high = (float(v) for v in process.path.interior())
    t_high = min(t_high, process.t_max)
    noisy = float(process.half_log_snr(t_high)) if low is None else low
    clean = float(process.half_log_snr(t_low)) if high is None else high
    if not noisy < clean:
        raise ValueError(f"grid: noise level must fall from start (lam={noisy:g}) to end (lam={clean:g})")
    return noisy, clean, low is None


def _by_level(process: Process, steps: int, low: float | None, high: float | None, spacing: Any) -> Grid:
    steps = _steps(steps)
    noisy, clean, exact_start = _levels(process, steps, low, high)
    ends = process.path.clean or process.path.appends_clean
    count = steps if ends else steps + 1
    unit = np.linspace(0.0, 1.0, count) if count > 1 else np.zeros(1)
    times = np.asarray(process.time(spacing(noisy, clean, unit)), np.float64)
    if exact_start:
        times[0] = process.t_max
    if count > 1 and high is None:
        times[-1] = float(process.path.interior()[0])  # exactly, not to rounding: t=0 on ve must not be -1e-16
    if ends and not process.path.appends_clean:
        times = np.append(times, 0.0)
    return _with_end(process, times, process.path.appends_clean)


def logsnr(process: Process, steps: int, *, lam_min: float | None = None, lam_max: float | None = None) -> Grid:
    """Uniform in ``half_log_snr`` from ``lam_min`` (at t_max) to ``lam_max``, then the exact end point.

    Defaults: the path's ``interior()`` times (1e-3 and, where alpha(1)=0, 1 - 1e-3; sigma_min, sigma_max for
    ve and edm). On ve and edm this is the exponential grid.
    """
    return _by_level(process, steps, lam_min, lam_max, lambda a, b, u: a + u * (b - a))


def edm_rho(
    process: Process,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Grid:
    """EDM's grid ``(smax^(1/rho) + i/(N-1) (smin^(1/rho) - smax^(1/rho)))^rho``, i < N, then 0 (2206.00364).

    In ``sigma/alpha`` on paths with alpha != 1. Defaults of ``sigma_min``, ``sigma_max``: the path's ends.
    """
    if not rho > 0:
        raise ValueError(f"rho: {rho} given; need > 0")
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"{name}: {value} given; edm_rho() needs a finite sigma > 0")

    def spacing(noisy: float, clean: float, u: np.ndarray) -> np.ndarray:
        start, end = np.exp(-noisy / rho), np.exp(-clean / rho)
        return -rho * np.log(start + u * (end - start))

    low = None if sigma_max is None else -float(np.log(sigma_max))
    high = None if sigma_min is None else -float(np.log(sigma_min))
    return _by_level(process, steps, low, high, spacing)


GRIDS = {
    "uniform": uniform,
    "power": power,
    "quadratic": quadratic,
    "cosine": cosine,
    "shift": shift,
    "logsnr": logsnr,
    "edm_rho": edm_rho,
}
