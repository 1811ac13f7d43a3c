"""Grids whose noise levels are a function of ``i/N``, or lie evenly on a curve."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxdiff.near import unknown
from jaxdiff.process.process import Process, check_process
from jaxdiff.solver.grid.point import Grid, at_times, check_positive, down_to_data, whole_steps

__all__ = ["AYS", "arctan", "ays", "edm_rho", "exponential", "logsnr", "polyexponential", "vp"]


def _by_level(process: Process, steps: int, low: float | None, high: float | None, spacing: Callable) -> Grid:
    """Half log-SNRs ``spacing(noisy, clean, u)``, u linear from 0 to 1, then data. ``low``, ``high``: where they start and end;
    None is the path's interior, the first point then being moved to t_max."""
    check_process(process)
    steps = whole_steps(steps)
    t_low, t_high = (float(v) for v in process.path.interior())
    noisy = float(process.half_log_snr(min(t_high, process.t_max))) if low is None else low
    clean = float(process.half_log_snr(t_low)) if high is None else high
    if not noisy < clean:
        raise ValueError(f"grid: noise level must fall from start (lam={noisy:g}) to end (lam={clean:g})")
    append = _appends(process)
    count = steps if append else steps + 1
    unit = np.linspace(0.0, 1.0, count) if count > 1 else np.zeros(1)
    times = np.asarray(process.time(spacing(noisy, clean, unit)), np.float64)
    if times[0] > process.t_max * (1 + 1e-9) or times[-1] < -1e-9:
        ends = [float(process.half_log_snr(t)) for t in (process.t_max, 0.0)]
        raise ValueError(
            f"grid: levels from lam={noisy:g} to {clean:g} (sigma/alpha={np.exp(-noisy):g} to {np.exp(-clean):g}) given; "
            f"process {process.name!r} has lam={ends[0]:g} to {ends[1]:g} (sigma/alpha={np.exp(-ends[0]):g} to "
            f"{np.exp(-ends[1]):g})"
        )
    times = np.clip(times, 0.0, process.t_max)
    if low is None:
        times[0] = process.t_max
    if high is None and count > 1:
        times[-1] = t_low  # exactly, not to rounding: t=0 on ve must not be -1e-16
    return down_to_data(process, times) if append else at_times(process, times)


def _on_curve(process: Process, steps: int, level: Callable, inverse: Callable, start: float, end: float) -> Grid:
    """Half log-SNRs ``level(u)``, u linear from ``start`` to ``end``, both kept within the process's range, then data; the
    first point is moved to t_max."""
    check_process(process)
    steps = whole_steps(steps)
    append = _appends(process)
    top, bottom = (float(process.half_log_snr(np.float64(t))) for t in (process.t_max, 0.0))
    start = inverse(max(top, float(level(start))))
    end = end if append else inverse(min(bottom, float(level(end))))
    times = np.asarray(process.time(level(np.linspace(start, end, steps if append else steps + 1))), np.float64)
    times[0] = process.t_max
    if append:
        return down_to_data(process, times)
    times[-1] = 0.0
    return at_times(process, times)


def _appends(process: Process) -> bool:
    """Whether data lies at sigma = 0, which no noise level reaches, so that it is a point of its own."""
    return process.path.clean or process.path.appends_clean


def _levels(sigma_min: float | None, sigma_max: float | None) -> tuple[float | None, float | None]:
    """Half log-SNRs of ends given as sigma/alpha, noisy end first."""
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"{name}: {value} given; need a finite sigma > 0")
    low, high = (None if sigma is None else -float(np.log(sigma)) for sigma in (sigma_max, sigma_min))
    return low, high


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
    check_positive("rho", rho)

    def spacing(noisy: float, clean: float, u: np.ndarray) -> np.ndarray:
        start, end = np.exp(-noisy / rho), np.exp(-clean / rho)
        return -rho * np.log(start + u * (end - start))

    return _by_level(process, steps, *_levels(sigma_min, sigma_max), spacing)


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
    check_positive("rho", rho)
    return _by_level(process, steps, *_levels(sigma_min, sigma_max), lambda a, b, u: b + (1 - u) ** rho * (a - b))


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
    check_positive("data_std", data_std)

    def spacing(noisy: float, clean: float, u: np.ndarray) -> np.ndarray:
        start, end = np.arctan(np.exp(-noisy) / data_std), np.arctan(np.exp(-clean) / data_std)
        return -np.log(data_std * np.tan(start + u * (end - start)))

    return _by_level(process, steps, *_levels(sigma_min, sigma_max), spacing)


def vp(process: Process, steps: int, *, beta_d: float = 19.9, beta_min: float = 0.1, t_min: float = 1e-3) -> Grid:
    """``sigma/alpha = sqrt(exp(beta_d t^2/2 + beta_min t) - 1)``, t linear down to ``t_min``, then data:
    k-diffusion's VP grid.

    t starts at 1, or where the formula meets the process's level at t_max if that is lower; the first point is t_max.
    Raises ValueError for numbers out of range.
    """
    check_positive("beta_d", beta_d)
    check_positive("beta_min", beta_min)
    if not 0 < t_min < 1:
        raise ValueError(f"t_min: {t_min} given; need 0 < t_min < 1")

    def at_level(lam: float) -> float:
        rise = np.logaddexp(0.0, -2 * lam)  # log(1 + (sigma/alpha)^2)
        return float(2 * rise / (beta_min + np.sqrt(beta_min**2 + 2 * beta_d * rise)))

    def level(t: np.ndarray) -> np.ndarray:
        return -0.5 * np.log(np.expm1(beta_d * t * t / 2 + beta_min * t))

    return _on_curve(process, steps, level, at_level, 1.0, t_min)


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
    it are left out. Raises ValueError for another name.
    """
    if name not in AYS:
        raise unknown("name", name, AYS)
    lam, index = -np.log(AYS[name]), np.arange(len(AYS[name]), dtype=np.float64)
    return _on_curve(
        process, steps, lambda u: np.interp(u, index, lam), lambda v: float(np.interp(v, lam, index)), 0.0, index[-1]
    )
