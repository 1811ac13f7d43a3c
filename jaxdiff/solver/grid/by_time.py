"""Grids whose times are a function of ``i/N``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxdiff.process.process import Process, check_process
from jaxdiff.solver.grid.point import Grid, at_times, check_positive, down_to_data, whole_steps

__all__ = ["beta", "cosine", "cosmap", "discrete", "dynamic_shift", "power", "quadratic", "shift", "uniform"]


def _warp(process: Process, steps: int, t_min: float, map_unit: Callable) -> Grid:
    """Grid at ``t_min + (t_max - t_min) f(u)``, u from 1 to 0; a clean point is appended where the path needs one."""
    check_process(process)
    steps = whole_steps(steps)
    if not 0 <= t_min < process.t_max:
        raise ValueError(f"t_min: {t_min} given; need 0 <= t_min < t_max = {process.t_max}")
    append = process.path.appends_clean and t_min == 0
    count = steps if append else steps + 1
    u = np.linspace(1.0, 0.0, count) if count > 1 else np.ones(1)
    times = t_min + (process.t_max - t_min) * map_unit(u)
    return down_to_data(process, times) if append else at_times(process, times)


def uniform(process: Process, steps: int, *, t_min: float = 0.0) -> Grid:
    """``t_i = t_max + (i/N)(t_min - t_max)``."""
    return _warp(process, steps, t_min, lambda u: u)


def power(process: Process, steps: int, *, exponent: float = 2.0, t_min: float = 0.0) -> Grid:
    """``t_i = (t_max^(1/k) + (i/N)(t_min^(1/k) - t_max^(1/k)))^k``, k = ``exponent``; 2 is DDIM's and DEIS's quadratic grid."""
    check_positive("exponent", exponent)

    def unit(u: np.ndarray) -> np.ndarray:
        low = (t_min / process.t_max) ** (1 / exponent)
        return ((u + (1 - u) * low) ** exponent - low**exponent) / (1 - low**exponent)

    return _warp(process, steps, t_min, unit)


def quadratic(process: Process, steps: int, *, t_min: float = 0.0) -> Grid:
    """:func:`power` with exponent 2."""
    return power(process, steps, exponent=2.0, t_min=t_min)


def cosine(process: Process, steps: int, *, t_min: float = 0.0) -> Grid:
    """``t_i = t_min + (t_max - t_min)(1 + cos(pi i/N))/2``: dense at both ends."""
    return _warp(process, steps, t_min, lambda u: (1 - np.cos(np.pi * u)) / 2)


def cosmap(process: Process, steps: int, *, t_min: float = 0.0) -> Grid:
    """``t = 1 - 1/(tan(pi u/2) + 1)``, u linear from 1 to 0 (2403.03206); on the linear path the cosine path's levels."""
    return _warp(
        process, steps, t_min, lambda u: np.sin(np.pi * u / 2) / (np.sin(np.pi * u / 2) + np.sin(np.pi * (1 - u) / 2))
    )


def shift(
    process: Process, steps: int, *, factor: float = 3.0, terminal: float | None = None, t_min: float = 0.0
) -> Grid:
    """``t' = s t/(1 + (s-1) t)`` of the uniform grid (SD3); on the linear path ``lam' = lam - log s``.

    ``terminal``: where the last step starts, as a fraction of t_max in (0, 1): all points but the end are then stretched
    from t_max, ``1 - t'' = (1 - t')(1 - terminal)/(1 - t'_{N-1})`` (LTX-Video, HF diffusers' ``shift_terminal``).
    Raises ValueError for factors not above 0, terminals outside (0, 1), and one with a single step or t_min > 0.
    """
    check_positive("factor", factor)
    if terminal is not None and not (0 < terminal < 1 and steps > 1 and t_min == 0):
        raise ValueError(
            f"terminal: {terminal} given (steps={steps}, t_min={t_min}); need 0 < terminal < 1, two steps or more, t_min 0"
        )

    def unit(u: np.ndarray) -> np.ndarray:
        times = factor * u / (1 + (factor - 1) * u)
        if terminal is None:
            return times
        last = times[:steps]
        return np.append(1 - (1 - last) * (1 - terminal) / (1 - last[-1]), times[steps:])

    return _warp(process, steps, t_min, unit)


def dynamic_shift(
    process: Process,
    steps: int,
    *,
    tokens: float = 1024,
    low: tuple[float, float] = (256, 0.5),
    high: tuple[float, float] = (4096, 1.15),
    terminal: float | None = None,
    t_min: float = 0.0,
) -> Grid:
    """:func:`shift` by ``e^mu``, mu linear in the number of image ``tokens`` between ``low`` and ``high`` (tokens, mu).

    ``terminal`` as in :func:`shift`. Raises ValueError unless ``low`` has fewer tokens than ``high``.
    """
    if not low[0] < high[0]:
        raise ValueError(f"low, high: {low}, {high} given; dynamic_shift() needs low[0] < high[0] tokens")
    slope = (high[1] - low[1]) / (high[0] - low[0])
    factor = float(np.exp(low[1] + slope * (tokens - low[0])))
    return shift(process, steps, factor=factor, terminal=terminal, t_min=t_min)


def beta(process: Process, steps: int, *, a: float = 0.6, b: float = 0.6, t_min: float = 0.0) -> Grid:
    """``t_i = t_min + (t_max - t_min) F^-1(1 - i/N)``, F the Beta(a, b) distribution function (2407.12173 [109]).

    a = b = 1 is :func:`uniform`, a = b = 1/2 is :func:`cosine`.
    """
    from scipy.special import betaincinv

    check_positive("a", a)
    check_positive("b", b)
    return _warp(process, steps, t_min, lambda u: betaincinv(a, b, u))


def discrete(
    process: Process,
    steps: int,
    *,
    spacing: str = "trailing",
    offset: int = 0,
    extra: bool = False,
    end: str = "data",
    train_steps: int | None = None,
) -> Grid:
    """Indices of a chain of T training steps, index k being time ``(k + 1)/T``, then ``end``: HF diffusers' spacings.

    ``spacing``: "leading" ``(T//N) i + offset`` (never starts at pure noise) and "linspace" ``round((T-1) i/(N-1))``, both ends
    included, for i from N-1 to 0; "trailing" ``round(T - i T/N) - 1``. ``extra``: N + 1 such points without the last, which is
    how diffusers' DPM-Solver, UniPC, DEIS and SA-Solver space "leading" and "linspace" (its DDIM, DDPM and PNDM do not, nor do
    Euler, Heun and LMS, whose "linspace" is not rounded). ``end``: "data" is t = 0 (``set_alpha_to_one=True`` or
    ``final_sigmas_type="zero"`` there), "first" the chain's first index (False, "sigma_min").

    ``train_steps``: T; the process's own for ddpm, else 1000. With t_max < 1 the chain is the part of it up to t_max. Raises
    ValueError for other names, more steps than the chain has and an offset that leaves it.
    """
    check_process(process)
    steps = whole_steps(steps)
    if spacing not in ("leading", "linspace", "trailing"):
        raise ValueError(f"spacing: {spacing!r} given; allowed: leading, linspace, trailing")
    if end not in ("data", "first"):
        raise ValueError(f"end: {end!r} given; allowed: data, first")
    total = getattr(process.path, "steps", 1000) if train_steps is None else train_steps
    if isinstance(total, bool) or not total >= 1 or total % 1:
        raise ValueError(f"train_steps: {train_steps} given; need a whole number of at least 1")
    if spacing == "trailing" and (extra or offset):
        raise ValueError(f"offset, extra: {offset}, {extra} given; spacing='trailing' has neither")
    if spacing == "linspace" and offset:
        raise ValueError(f"offset: {offset} given; only spacing='leading' has one")
    count = int(np.floor(total * process.t_max + 1e-9))
    points = steps + bool(extra)
    if points > count:
        raise ValueError(
            f"steps: {steps} given; a chain of {count} training steps has no more than {count - bool(extra)}"
        )
    if spacing == "leading":
        index = np.arange(points, dtype=np.float64)[::-1] * (count // points) + offset
    elif spacing == "linspace":
        index = np.round(np.linspace(0, count - 1, points))[::-1] if points > 1 else np.array([count - 1.0])
    else:
        index = np.round(count - np.arange(steps) * count / steps) - 1
    index = index[:steps]
    if index[0] >= count or index[-1] < 0:
        raise ValueError(f"offset: {offset} given; indices would leave 0..{count - 1}")
    if end == "data":
        return down_to_data(process, (index + 1.0) / total)
    if index[-1] == 0:
        cure = "fewer steps" if spacing == "trailing" else "extra=True"
        raise ValueError(
            f"end: 'first' given, but {steps} steps of spacing={spacing!r} reach that index; give {cure}"
        )
    return at_times(process, np.append(index + 1.0, 1.0) / total)
