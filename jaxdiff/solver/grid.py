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

import jax
import numpy as np

from jaxdiff.process.process import Process

__all__ = [
    "GRIDS",
    "Grid",
    "Point",
    "arctan",
    "as_grid",
    "ays",
    "beta",
    "cosine",
    "cosmap",
    "discrete",
    "dynamic_shift",
    "edm_rho",
    "explicit",
    "exponential",
    "from_times",
    "logsnr",
    "polyexponential",
    "power",
    "quadratic",
    "shift",
    "uniform",
    "vp",
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
    return _grid(time, alpha, sigma, False)


def as_grid(process: Process, grid: Any) -> Grid:
    """``grid`` itself, or the grid at an array of times; explicit arrays whose points lie on the path at their times count
    as the process's own grid. Raises ValueError for a grid of another process."""
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


def exponential(
    process: Process, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Grid:
    """:func:`logsnr` with its ends given as ``sigma/alpha``, k-diffusion's exponential grid."""
    return polyexponential(process, steps, rho=1.0, sigma_min=sigma_min, sigma_max=sigma_max)


def polyexponential(
    process: Process,
    steps: int,
    *,
    rho: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Grid:
    """``log(sigma/alpha) = log smin + (1 - i/(N-1))^rho (log smax - log smin)``, i < N, then the exact end (k-diffusion)."""
    _positive("rho", rho)
    return _by_level(process, steps, *_sigmas(sigma_min, sigma_max), lambda a, b, u: b + (1 - u) ** rho * (a - b))


def arctan(
    process: Process,
    steps: int,
    *,
    data_std: float = 0.5,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Grid:
    """``sigma/alpha = c tan(...)``, the angle linear from ``atan(smax/c)`` to ``atan(smin/c)``, then the exact end.

    KL-optimal for Euler on Gaussian data of standard deviation c = ``data_std`` (2404.14507 [62]).
    """
    _positive("data_std", data_std)

    def spacing(noisy: float, clean: float, u: np.ndarray) -> np.ndarray:
        start, end = np.arctan(np.exp(-noisy) / data_std), np.arctan(np.exp(-clean) / data_std)
        return -np.log(data_std * np.tan(start + u * (end - start)))

    return _by_level(process, steps, *_sigmas(sigma_min, sigma_max), spacing)


def vp(process: Process, steps: int, *, beta_d: float = 19.9, beta_min: float = 0.1, t_min: float = 1e-3) -> Grid:
    """``sigma/alpha = sqrt(exp(beta_d t^2/2 + beta_min t) - 1)``, t linear down to ``t_min``, then data:
    k-diffusion's VP grid.

    t starts at 1, or where the formula meets the process's level at t_max if that is lower; the first point is t_max.
    """
    if not (beta_d > 0 and beta_min > 0 and 0 < t_min < 1):
        raise ValueError(f"beta_d, beta_min, t_min: {beta_d}, {beta_min}, {t_min} given; need > 0, and t_min < 1")

    def at_level(lam: float) -> float:
        rise = np.logaddexp(0.0, -2 * lam)  # log(1 + (sigma/alpha)^2)
        return float(2 * rise / (beta_min + np.sqrt(beta_min**2 + 2 * beta_d * rise)))

    def level(t: np.ndarray) -> np.ndarray:
        return -0.5 * np.log(np.expm1(beta_d * t * t / 2 + beta_min * t))

    return _on_curve(process, steps, level, at_level, 1.0, t_min)


def beta(process: Process, steps: int, *, a: float = 0.6, b: float = 0.6, t_min: float = 0.0) -> Grid:
    """``t_i = t_min + (t_max - t_min) F^-1(1 - i/N)``, F the Beta(a, b) distribution function (2407.12173 [109]).

    a = b = 1 is :func:`uniform`, a = b = 1/2 is :func:`cosine`.
    """
    from scipy.special import betaincinv

    _positive("a", a)
    _positive("b", b)
    return _warp(process, steps, t_min, lambda u: betaincinv(a, b, u))


def cosmap(process: Process, steps: int, *, t_min: float = 0.0) -> Grid:
    """``t = 1 - 1/(tan(pi u/2) + 1)``, u linear from 1 to 0 (2403.03206); on the linear path the cosine path's levels."""
    return _warp(
        process, steps, t_min, lambda u: np.sin(np.pi * u / 2) / (np.sin(np.pi * u / 2) + np.sin(np.pi * (1 - u) / 2))
    )


def dynamic_shift(
    process: Process,
    steps: int,
    *,
    tokens: float = 1024,
    low: tuple[float, float] = (256, 0.5),
    high: tuple[float, float] = (4096, 1.15),
    t_min: float = 0.0,
) -> Grid:
    """:func:`shift` by ``e^mu``, mu linear in the number of image ``tokens`` between ``low`` and ``high`` (tokens, mu)."""
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return shift(process, steps, factor=float(np.exp(low[1] + slope * (tokens - low[0]))), t_min=t_min)


def discrete(
    process: Process,
    steps: int,
    *,
    spacing: str = "trailing",
    offset: int = 0,
    train_steps: int | None = None,
) -> Grid:
    """Times of a chain of T training steps, index k being time ``(k + 1)/T``, then t = 0.

    ``spacing``: "leading" ``k T//N + offset`` (never starts at pure noise), "linspace" (rounded, both ends included),
    "trailing" ``round(T - i T/N) - 1``. ``train_steps``: T; the process's own for ddpm, else 1000. Raises ValueError
    when N > T or the offset leaves the chain. With t_max < 1 the chain is the part of it up to t_max.
    """
    steps = _steps(steps)
    if spacing not in ("leading", "linspace", "trailing"):
        raise ValueError(f"spacing: {spacing!r} given; allowed: leading, linspace, trailing")
    total = int(getattr(process.path, "steps", 1000) if train_steps is None else train_steps)
    count = int(np.floor(total * process.t_max + 1e-9))
    if steps > count:
        raise ValueError(f"steps: {steps} given; a chain of {count} training steps has no more than {count}")
    if spacing == "leading":
        index = np.arange(steps, dtype=np.float64)[::-1] * (count // steps) + offset
    elif spacing == "linspace":
        index = np.round(np.linspace(0, count - 1, steps))[::-1] if steps > 1 else np.array([count - 1])
    else:
        index = np.round(count - np.arange(steps) * count / steps) - 1
    if offset and spacing != "leading":
        raise ValueError(f"offset: {offset} given; only spacing='leading' has one")
    if index[0] >= count or index[-1] < 0:
        raise ValueError(f"offset: {offset} given; indices would leave 0..{count - 1}")
    times = (index + 1.0) / total
    append = process.path.appends_clean
    return _with_end(process, times if append else np.append(times, 0.0), append)


# Align Your Steps' optimised levels sigma/alpha (2404.14507 [62]), noise first
AYS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def ays(process: Process, steps: int, *, name: str = "sd15") -> Grid:
    """Align Your Steps: published optimised noise levels, log-linearly interpolated to N, then data (2404.14507 [62]).

    ``name``: "sd15", "sdxl", "deepfloyd", "svd" (11 levels each). With N = 11 these are the published levels, except that
    the first point is the process's own start at t_max (the same on the process they were made for); levels beyond
    it are left out.
    """
    if name not in AYS:
        raise ValueError(f"name: {name!r} given; allowed: {', '.join(AYS)}")
    lam, index = -np.log(AYS[name]), np.arange(len(AYS[name]), dtype=np.float64)
    return _on_curve(
        process, steps, lambda u: np.interp(u, index, lam), lambda v: float(np.interp(v, lam, index)), 0.0, index[-1]
    )


def _on_curve(process: Process, steps: int, level: Any, inverse: Any, start: float, end: float) -> Grid:
    """Half log-SNRs ``level(u)`` at u linear from ``start`` to ``end``, both kept within the process's range; ends as
    :func:`_by_level`'s."""
    steps = _steps(steps)
    ends = process.path.clean or process.path.appends_clean
    top, bottom = float(process.half_log_snr(np.float64(process.t_max))), float(process.half_log_snr(np.float64(0.0)))
    start = inverse(max(top, float(level(start))))
    end = end if ends else inverse(min(bottom, float(level(end))))
    times = np.asarray(process.time(level(np.linspace(start, end, steps if ends else steps + 1))), np.float64)
    times[0] = process.t_max
    if not ends:
        times[-1] = 0.0
    if ends and not process.path.appends_clean:
        times = np.append(times, 0.0)
    return _with_end(process, times, process.path.appends_clean)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: {value} given; need > 0")


def _sigmas(sigma_min: float | None, sigma_max: float | None) -> tuple[float | None, float | None]:
    """(lam at the noisy end, lam at the clean end) of ends given as sigma/alpha."""
    low = None if sigma_max is None else -float(np.log(sigma_max))
    return low, None if sigma_min is None else -float(np.log(sigma_min))


GRIDS = {
    "uniform": uniform,
    "power": power,
    "quadratic": quadratic,
    "cosine": cosine,
    "shift": shift,
    "logsnr": logsnr,
    "edm_rho": edm_rho,
    "arctan": arctan,
    "ays": ays,
    "beta": beta,
    "cosmap": cosmap,
    "discrete": discrete,
    "dynamic_shift": dynamic_shift,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "vp": vp,
}
