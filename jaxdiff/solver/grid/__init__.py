"""Time grids: N+1 points from noise to data, each with its time, alpha and sigma in float64.

A grid function takes ``(process, steps, ...)`` and costs ``steps`` solver steps. Grids start at
``process.t_max`` and end at data: at t=0, or, on paths whose ``sigma(0) > 0`` only by truncation (ve), at one
appended clean point (t=0, alpha=1, sigma=0). Grids uniform in a function of the noise level (``logsnr``,
``edm_rho``) place ``steps`` points between finite ends, documented per process as ``path.interior()``, move the
first to ``t_max`` exactly, and append the exact end point.
"""

from jaxdiff.solver.grid.by_level import AYS, arctan, ays, edm_rho, exponential, logsnr, polyexponential, vp
from jaxdiff.solver.grid.by_time import (
    beta,
    cosine,
    cosmap,
    discrete,
    dynamic_shift,
    power,
    quadratic,
    shift,
    uniform,
)
from jaxdiff.solver.grid.point import Grid, Point, as_grid, explicit, from_times

__all__ = [
    "AYS",
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
