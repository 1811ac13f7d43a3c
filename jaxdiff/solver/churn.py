"""Churn: noise added before steps that then start from a noisier point (EDM, 2206.00364)."""

from __future__ import annotations

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.build import Rows, require_gaussian, require_path
from jaxdiff.solver.grid import Grid, Point

__all__ = ["Churn"]


class Churn:
    """The settings ``s_churn, s_min, s_max, s_noise`` on a grid; see :func:`jaxdiff.solver.edm` for what they mean.

    ``hats`` (N+1 points): the noisier points from which steps are taken, where nothing is added the grid's own; the last is
    the grid's end. Noise added before a step is drawn by the row before it, whose state is in the scale of the noisier
    point. Raises ValueError, naming ``solver``, for settings out of range, noise that is not Gaussian, and grids without
    a path.
    """

    def __init__(
        self, process: Process, grid: Grid, solver: str, s_churn: float, s_min: float, s_max: float, s_noise: float
    ):
        if not (s_churn >= 0 and 0 < s_noise < np.inf and s_min <= s_max):
            raise ValueError(
                f"s_churn, s_min, s_max, s_noise: {s_churn}, {s_min}, {s_max}, {s_noise} given; need s_churn >= 0, "
                "s_min <= s_max, 0 < s_noise < inf"
            )
        if s_churn > 0:
            require_gaussian(process, f"{solver}(s_churn={s_churn:g})")
            require_path(grid, f"{solver}(s_churn={s_churn:g})", "points between the grid's")
        self.grid, self.s_noise = grid, s_noise
        self.hats = [_hat(process, grid, i, s_churn, s_min, s_max) for i in range(len(grid))] + [grid[len(grid)]]

    def start(self, rows: Rows) -> None:
        """Have the start of ``rows`` raised to the point its first step is taken from."""
        hat = self.hats[0]
        if hat != rows.start:
            rows.start_gain = hat.alpha / rows.start.alpha
            rows.start_noise = self._added(rows.start, hat)

    def end(self, i: int) -> tuple[Point, float]:
        """Where step i ends, in the scale of the noisier point that the next one starts from, and the std of the noise that
        then raises it there."""
        to, after = self.grid[i + 1], self.hats[i + 1]
        return Point(to.time, after.alpha, to.sigma * (after.alpha / to.alpha)), self._added(to, after)

    def _added(self, point: Point, hat: Point) -> float:
        """Std of the noise that raises ``point`` to ``hat``, in path coordinates at ``hat``."""
        if hat == point or point.sigma == 0:
            return 0.0
        return float(hat.alpha * self.s_noise * np.sqrt(max(hat.rho**2 - point.rho**2, 0.0)))


def _hat(process: Process, grid: Grid, i: int, s_churn: float, s_min: float, s_max: float) -> Point:
    """The noisier point from which step i is taken; the grid point itself without churn."""
    point = grid[i]
    gamma = min(s_churn / len(grid), np.sqrt(2.0) - 1) if s_min <= point.rho <= s_max else 0.0
    if gamma == 0 or not np.isfinite(point.rho):
        return point
    rho = point.rho * (1 + gamma)
    if not np.all(grid.alpha == 1):
        top = process.coefficients(np.float64(process.t_max))
        rho = min(rho, float(top.sigma / top.alpha) if top.alpha > 0 else np.inf)
        if rho <= point.rho * (1 + 1e-12):
            return point
    time = float(process.time(-np.log(rho)))
    c = process.coefficients(np.float64(time))
    return Point(time, float(c.alpha), float(c.sigma))
