"""Measure the convergence order of every deterministic solver and write docs/solver-orders.md.

    python experiments/solver_orders/run.py            # about a minute on two CPU cores
    python experiments/solver_orders/run.py --check    # measure, compare with the page, write nothing

The problem is the probability flow of a 1-D mixture on the VP path, whose exact solution is the quantile map. Grids are
equal in time between half log-SNR -2.2 and 2.2, with N = 128, 256, 512 steps unless the page says so; the order is the
slope of the RMS error over the last two. Multistep methods start from exact states, since a first-order first step
caps any of them at 2.
"""

import functools
import pathlib

import numpy as np

from jaxdiff import process, solver
from jaxdiff.solver import Step
from jaxdiff.solver.order import time_grid

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "solver-orders.md"
P = functools.partial
never = {"lower_order_final": "never"}

# name: (maker, exact starting values, order that theory gives, grids)
FINE, PAIR = (128, 256, 512), (128, 512)


def uneven(path, count):
    """Steps in the proportions 1, 3, 1, 1, 3, 1, ...: the stages of fast third-order steps are not at 1/3 and 2/3."""
    ends = [float(path.time(np.float64(lam))) for lam in (-2.2, 2.2)]
    sizes = np.where(np.arange(count) % 3 == 1, 3.0, 1.0)
    position = np.concatenate([[0.0], np.cumsum(sizes) / np.sum(sizes)])
    return solver.grid.from_times(path, ends[0] + position * (ends[1] - ends[0]))


CASES = {
    "ddim": (solver.ddim, 0, 1, FINE),
    "heun": (solver.heun, 0, 2, FINE),
    "dpm2": (solver.dpm2, 0, 2, FINE),
    "rk4 time": (solver.rk4, 0, 4, FINE),
    "rk4 rho": (P(solver.rk4, clock="rho"), 0, 4, FINE),
    "rho_rk midpoint": (P(solver.rho_rk, tableau="midpoint"), 0, 2, FINE),
    "rho_rk 2heun": (P(solver.rho_rk, tableau="2heun"), 0, 2, FINE),
    "rho_rk 3kutta": (solver.rho_rk, 0, 3, FINE),
    "res2": (solver.exp_rk, 0, 2, FINE),
    "res3": (P(solver.exp_rk, tableau="res3"), 0, 3, FINE),
    "etd2": (P(solver.exp_rk, tableau="etd2"), 0, 2, FINE),
    "etd3": (P(solver.exp_rk, tableau="etd3"), 0, 3, FINE),
    "etd4": (P(solver.exp_rk, tableau="etd4"), 0, 4, FINE),
    "deis 4 cold": (P(solver.deis, order=4), 0, 2, FINE),
    "ipndm": (solver.ipndm, 5, 4, FINE),
    "ipndm public": (P(solver.ipndm, variant="public"), 5, 2, FINE),
    "f_pndm": (solver.f_pndm, 0, 4, FINE),
    "f_pndm public": (P(solver.f_pndm, variant="public"), 0, 2, FINE),
    "s_pndm": (P(solver.pndm, order=2), 0, 2, FINE),
    "ghvb 0.8": (P(solver.ghvb, order=0.8), 5, 1, FINE),
    "ghvb 1.8": (solver.ghvb, 5, 2, FINE),
    "ghvb 3.8": (P(solver.ghvb, order=3.8), 5, 2, FINE),
    "heavy_ball": (solver.heavy_ball, 5, 1, FINE),
    "conjugate -1": (P(solver.conjugate, rate=-1.0), 0, 1, FINE),
    "conjugate 0.5": (P(solver.conjugate, rate=0.5), 0, 1, FINE),
    "unipc 3 tail": (P(solver.unipc, order=3), 5, 2, FINE),
    "dc 0.9": (P(solver.dc_solver, compensation=0.9, **never), 4, 1, (48, 96)),
    "usf mixed": (
        lambda p, g: solver.usf(
            p, g, [Step(3, "data", "lam", True) if i % 2 else Step(3, "noise", "rho") for i in range(len(g))]
        ),
        5,
        3,
        FINE,
    ),
}
for n in (2, 3):
    for name, make in (("dpm_solver", solver.dpm_solver), ("dpm_solver_pp", solver.dpm_solver_pp)):
        for variant in ("midpoint", "lagrange"):
            CASES[f"{name} {n}S {variant}"] = (P(make, order=n, method="singlestep", variant=variant), 0, n, FINE)
            # the tail's last step must not be first-order: N = 2 mod 3
            CASES[f"{name} {n} fast {variant}"] = (P(make, order=n, method="fast", variant=variant), 0, n, PAIR)
        CASES[f"{name} {n}M"] = (P(make, order=n, method="multistep", **never), n + 1, n, FINE)
for name, make in (("dpm_solver", solver.dpm_solver), ("dpm_solver_pp", solver.dpm_solver_pp)):
    for variant, n in (("midpoint", 2), ("lagrange", 3)):
        CASES[f"{name} 3 fast {variant}, uneven grid"] = (
            P(make, order=3, method="fast", variant=variant),
            0,
            n,
            (2048, 8192),
            uneven,
        )
    for variant in ("public", "heun"):
        CASES[f"{name} 3M {variant}"] = (P(make, order=3, method="multistep", variant=variant, **never), 4, 2, FINE)
for n in (1, 2, 3, 4):
    for prediction in ("data", "noise"):
        options = {"order": n, "prediction": prediction, **never}
        CASES[f"unipc {n} {prediction}"] = (P(solver.unipc, **options), n + 2, n + 1, FINE)
        CASES[f"unip {n} {prediction}"] = (P(solver.unipc, corrector=False, **options), n + 2, n, FINE)
for n in (2, 3, 4):
    for variable in ("t", "rho", "lam"):
        CASES[f"deis {n} {variable}"] = (P(solver.deis, order=n, variable=variable), n + 1, n, FINE)
for n in (1, 2, 3):
    for corrector in (False, True):
        options = {"l": 0.7, "s": -0.2, "b": 0.1, "order": n, "corrector": corrector, **never}
        CASES[f"dpm_solver_v3 {n}{' corrected' if corrector else ''}"] = (
            P(solver.dpm_solver_v3, **options),
            n + 2,
            n + corrector,
            FINE,
        )
for n in (2, 3, 4):
    for clock in ("flow", "angle", "rosenbrock"):
        CASES[f"velocity_ab {n} {clock}"] = (P(solver.velocity_ab, order=n, clock=clock), n + 1, n, FINE)
CASES["edm time"] = (P(solver.edm, clock="time"), 0, 2, FINE)
CASES["edm"] = (solver.edm, 0, 2, FINE)
CASES["euler time"] = (solver.euler, 0, 1, FINE)
for n in (1, 2, 3, 4):
    CASES[f"lms {n}"] = (P(solver.lms, order=n), n + 1, n, FINE)
CASES["dpm_solver_pp 4M lagrange"] = (P(solver.dpm_solver_pp, order=4, variant="lagrange", **never), 5, 4, FINE)
for name, order, rule in (
    ("3 p_pseudo", 3, {"p_pseudo": True}),
    ("2 corrected c_pseudo", 2, {"corrector": True, "c_pseudo": True}),
    ("2 corrected public", 2, {"corrector": True, "variant": "public"}),
):
    options = {"l": 0.7, "s": -0.2, "b": 0.1, "order": order, **rule, **never}
    CASES[f"dpm_solver_v3 {name}"] = (P(solver.dpm_solver_v3, **options), order + 2, 2, FINE)


def measure(name):
    """One line of the page: its cells."""
    make, warm, nominal, steps, grid = (*CASES[name], time_grid)[:5]
    path = process.vp()
    result = solver.order(make, path, warm=warm, steps=steps, grid=grid)
    table = make(path, time_grid(path, 12))
    shape = f"({np.shape(table.blocks.A)[1]}, {np.shape(table.blocks.B)[1]})"
    cost = (result.nfe[-1] - result.nfe[-2]) / (steps[-1] - steps[-2])
    start = f"{warm} exact states" if warm else "cold"
    error = f"{result.errors[-1]:.1e} ({steps[-1]})"
    return [name, str(nominal), f"{result.slope:.2f}", error, f"{cost:g}", shape, start]


HEAD = ["solver", "order", "measured", "RMS error (at N)", "NFE a step", "(S, R)", "start"]
TEXT = """# Orders of the deterministic solvers

Written by `experiments/solver_orders/run.py`; do not edit. Problem: the probability flow of a three-component 1-D mixture on
the VP path, float64, equal times between half log-SNR -2.2 and 2.2; the exact solution is the quantile map, so no
reference solver is involved. *order* is what theory gives for the variant and start named, *measured* the slope of the
error between the two finest grids. *(S, R)*: states and predictions a table carries (12 steps). "public" variants are the
published formulas whose order is lower than their name; the defaults are the corrected ones.

"""


if __name__ == "__main__":
    from page import main

    main(__doc__, PAGE, TEXT, HEAD, CASES, measure)
