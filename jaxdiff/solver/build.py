"""Rows into a table: the notebook a maker writes its steps in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.grid import Grid, Point
from jaxdiff.solver.table import AffineBlock, Table, freeze

__all__ = ["DATA", "NOISE", "Rows", "require_gaussian", "require_path"]

DATA, NOISE = (1.0, 0.0), (0.0, 1.0)


@dataclasses.dataclass
class _Row:
    at: Point
    A: Sequence[float]
    B: Sequence[float]
    C: float
    E: float
    form: tuple[float, float]
    out: bool
    r: float | None


class Rows:
    """Collects rows ``(at, A, B, C, form)`` from the first grid point on and ends as a Table."""

    def __init__(self, process: Process, start: Point):
        self.process, self.start = process, start
        self.rows: list[_Row] = []
        self.start_noise, self.start_gain = 0.0, 1.0

    def add(
        self,
        at: Point,
        A: Sequence[float],
        B: Sequence[float],
        *,
        C: float = 0.0,
        E: float = 0.0,
        form: tuple[float, float] = DATA,
        out: bool = True,
        r: float | None = None,
    ) -> None:
        """One network call at ``at``; ``A``, ``B`` newest first; ``out`` False for stages inside a step."""
        self.rows.append(_Row(at, A, B, C, E, form, out, r))

    def table(self, end: Point, *, stochastic: bool = False, mode: tuple[int, ...] | None = None) -> Table:
        """The table ending at ``end``. ``stochastic`` keeps the noise column even if every entry is 0."""
        rows = self.rows

        def columns(values: list) -> np.ndarray:
            width = max(len(v) for v in values)
            return np.array([list(v) + [0.0] * (width - len(v)) for v in values], np.float64)

        def optional(values: list[float], keep: bool = False) -> np.ndarray | None:
            column = np.array(values, np.float64)
            return column if keep or np.any(column != 0) else None

        states = [row.at for row in rows] + [end]
        block = AffineBlock(
            p=optional([row.form[0] for row in rows]),
            q=optional([row.form[1] for row in rows]),
            A=columns([row.A for row in rows]),
            B=columns([row.B for row in rows]),
            C=optional([row.C for row in rows], stochastic),
            E=optional([row.E for row in rows]),
            alpha=np.array([s.alpha for s in states]),
            sigma=np.array([s.sigma for s in states]),
            start_scale=np.float64(self.start.sigma) * np.ones(()),
            start_noise=np.float64(self.start_noise) * np.ones(()) if self.start_noise else None,
            law=self.process.noise,
            start_gain=np.float64(self.start_gain) * np.ones(()) if self.start_gain != 1 else None,
        )
        return freeze(
            Table(
                blocks=block,
                tau=np.array([row.at.time for row in rows]),
                time=np.array([s.time for s in states]),
                out=np.array([row.out for row in rows]),
                live=np.ones(len(rows), bool),
                r=None
                if all(row.r is None for row in rows)
                else np.array([row.at.time if row.r is None else row.r for row in rows]),
                mode=mode,
            )
        )


def require_gaussian(process: Process, solver: str) -> None:
    """Refuse a process whose noise law a stochastic row would misrepresent."""
    if not process.noise.gaussian:
        raise ValueError(
            f"process: {solver} draws fresh noise and needs Gaussian noise, but the process has "
            f"{process.noise.name!r} noise; use a deterministic solver (ddim(eta=0), heun, dpm_solver_pp)"
        )


def require_path(grid: Grid, solver: str, need: str) -> None:
    """Refuse a grid of explicit (alpha, sigma) arrays off the path where a solver needs the path itself."""
    if not grid.on_path:
        raise ValueError(
            f"grid: {solver} needs {need}, which explicit (alpha, sigma) arrays do not give unless, at their times, they "
            "lie on the process's path"
        )


def first_order(at: Point, to: Point, std: float = 0.0) -> tuple[list[float], list[float]]:
    """Data-form row ``A = sqrt(sigma_s^2 - c^2)/sigma_t``, ``B = alpha_s - A alpha_t`` (S3): no logs, so exact at
    alpha_t = 0 and at sigma_s = 0."""
    a = float(np.sqrt(max(to.sigma**2 - std**2, 0.0)) / at.sigma)
    return [a], [to.alpha - a * at.alpha]


def noise_step(at: Point, to: Point) -> tuple[list[float], list[float]]:
    """Noise-form first-order row ``A = alpha_s/alpha_t``, ``B = sigma_s - sigma_t alpha_s/alpha_t``; needs alpha_t > 0."""
    a: Any = to.alpha / at.alpha
    return [a], [to.sigma - at.sigma * a]
