"""The cross product that the solver proofs run over: processes, makers, grids, and one mixture world."""

from __future__ import annotations

import numpy as np

from jaxdiff import exact, process, solver
from jaxdiff.solver.grid import GRIDS, from_times

PROCESSES = {
    "linear": process.linear(),
    "linear_floor": process.linear(sigma_min=0.05),
    "linear_early": process.linear(t_max=0.95),
    "vp": process.vp(),
    "ddpm": process.ddpm(),
    "cosine": process.cosine(),
    "cosine_offset": process.cosine(0.008),
    "cosine_shift": process.cosine(shift=-0.7),
    "subvp": process.subvp(),
    "ve": process.ve(),
    "edm": process.edm(),
}
# one of each kind of path, for tests that compile once a process
PATHS = ("linear", "vp", "ddpm", "cosine", "subvp", "ve", "edm")
STRAIGHT = ("linear", "linear_floor", "linear_early", "edm")  # the velocity of delta data is constant in time

DETERMINISTIC = {
    "euler": solver.euler,
    "euler_rho": lambda p, g: solver.euler(p, g, clock="rho"),
    "ddim": solver.ddim,
    "heun": solver.heun,
    "heun_rho": lambda p, g: solver.heun(p, g, clock="rho"),
    "edm": solver.edm,
    "edm_euler": lambda p, g: solver.edm(p, g, heun=False),
    "dpm_pp_1": lambda p, g: solver.dpm_solver_pp(p, g, order=1),
    "dpm_pp_2": lambda p, g: solver.dpm_solver_pp(p, g),
    "dpm_pp_2_never": lambda p, g: solver.dpm_solver_pp(p, g, lower_order_final="never"),
    "dpm_pp_2_lagrange": lambda p, g: solver.dpm_solver_pp(p, g, variant="lagrange", lower_order_final="zero"),
}
STOCHASTIC = {
    "ddim_half": lambda p, g: solver.ddim(p, g, eta=0.5),
    "ddim_full": lambda p, g: solver.ddim(p, g, eta=1.0),
    "ancestral": solver.ancestral,
    "ancestral_large": lambda p, g: solver.ancestral(p, g, variance="large"),
    "edm_churn": lambda p, g: solver.edm(p, g, s_churn=20.0),
    "edm_churn_euler": lambda p, g: solver.edm(p, g, heun=False, s_churn=3.0),
    "edm_churn_noise": lambda p, g: solver.edm(p, g, s_churn=20.0, s_noise=1.003),
}
SOLVERS = {**DETERMINISTIC, **STOCHASTIC}

MIXTURE = exact.GaussianMixture([0.3, 0.5, 0.2], [-1.5, 0.4, 2.0], [0.35**2, 0.25**2, 0.5**2])


def delta_fails(solver_name: str, process_name: str) -> bool:
    """The documented failures of the delta-data check."""
    raw_time = solver_name in ("euler", "heun") and process_name not in STRAIGHT
    return raw_time or solver_name in ("ancestral_large", "edm_churn_noise")


def middle(p, steps):
    """Equal times from t=.9 to t=.1, where every path is smooth and lam is finite."""
    return from_times(p, np.linspace(0.9, 0.1, steps + 1))


def rms(a, b):
    """Root mean square of ``a - b`` relative to that of ``b``."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


__all__ = [
    "DETERMINISTIC",
    "GRIDS",
    "MIXTURE",
    "PATHS",
    "PROCESSES",
    "SOLVERS",
    "STOCHASTIC",
    "STRAIGHT",
    "delta_fails",
    "middle",
    "rms",
]
