"""Write docs/solver-weak-orders.md: every stochastic solver's weak order, measured on exact Gaussian data without sampling."""

import functools
import pathlib

import numpy as np

from jaxdiff import process, solver
from jaxdiff.solver.weak import level_grid

P = functools.partial
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "solver-weak-orders.md"
STEPS = (256, 512)
never = {"lower_order_final": "never"}

# name -> (maker, order by name, weak order expected); None: a mixture of error terms, no clean slope at these steps
CASES = {}
for eta in (0.5, 1.0):
    CASES[f"ddim eta={eta:g}"] = (P(solver.ddim, eta=eta), 1, 1)
    CASES[f"euler_ancestral eta={eta:g}"] = (P(solver.euler_ancestral, eta=eta), 1, 1)
    CASES[f"dpm2_ancestral eta={eta:g}"] = (P(solver.dpm2_ancestral, eta=eta), 2, 2)
    CASES[f"dpmpp_2s_ancestral eta={eta:g}"] = (P(solver.dpmpp_2s_ancestral, eta=eta), 2, 2)
    for order in (2, 3):
        CASES[f"dpm_solver {order}, singlestep, eta={eta:g}"] = (
            P(solver.dpm_solver, order=order, method="singlestep", eta=eta),
            order,
            order,
        )
    CASES[f"dpm_solver_pp 3, singlestep, eta={eta:g}"] = (
        P(solver.dpm_solver_pp, order=3, method="singlestep", eta=eta),
        3,
        3,
    )
    CASES[f"sde-dpm++ 1 eta={eta:g}"] = (P(solver.dpm_solver_pp_sde, order=1, eta=eta), 1, 1)
    for variant in ("midpoint", "heun"):
        CASES[f"sde-dpm++ 2M {variant} eta={eta:g}"] = (
            P(solver.dpm_solver_pp_sde, variant=variant, eta=eta, **never),
            2,
            2,
        )
    for variant in ("lagrange", "public"):
        CASES[f"sde-dpm++ 3M {variant} eta={eta:g}"] = (
            P(solver.dpm_solver_pp_sde, order=3, variant=variant, eta=eta, **never),
            3,
            2,
        )
    for coupling in ("exact", "rho", "independent"):
        CASES[f"sde-dpm++ 2S {coupling} eta={eta:g}"] = (
            P(solver.dpm_solver_pp_sde, method="singlestep", coupling=coupling, eta=eta),
            2,
            1 if coupling == "independent" else 2,
        )
for phi in solver.PHIS:
    for order in (1, 2, 3):
        CASES[f"er_sde {order} phi={phi}"] = (P(solver.er_sde, order=order, phi=phi), order, min(order, 2))
CASES["er_sde 3 public, exact sums"] = (P(solver.er_sde, variant="public", quadrature="exact"), 3, 2)
CASES["er_sde 3 public"] = (P(solver.er_sde, variant="public"), 3, 1)
for tau in (0.5, 1.0):
    for predictor, corrector in ((1, 0), (1, 2), (2, 0), (2, 2), (3, 0), (3, 4), (4, 4)):
        CASES[f"sa_solver p{predictor}c{corrector} tau={tau:g}"] = (
            P(solver.sa_solver, predictor=predictor, corrector=corrector, tau=tau, **never),
            max(predictor, corrector),
            1 if (predictor, corrector) == (1, 0) else None if (predictor, corrector) == (2, 2) else 2,
        )
CASES["sa_solver p3c4 tau=1 PECE"] = (P(solver.sa_solver, predictor=3, corrector=4, pece=True, **never), 4, 2)
CASES["sa_solver p2c2 tau=1 public"] = (P(solver.sa_solver, variant="public", **never), 2, 2)
for eta in (0.5, 1.0):
    for order in (1, 2, 3):
        CASES[f"euler_maruyama {order} eta={eta:g}"] = (
            P(solver.euler_maruyama, order=order, eta=eta, **never),
            order,
            min(order, 2),
        )
CASES["predictor_corrector"] = (solver.predictor_corrector, 1, 1)
CASES["ancestral"] = (solver.ancestral, 1, 1)
CASES["edm s_churn=4"] = (P(solver.edm, s_churn=4.0), 2, 2)
CASES["edm s_churn=4, no Heun"] = (P(solver.edm, s_churn=4.0, heun=False), 1, 1)
CASES["exp_rk res2 s_churn=4"] = (P(solver.exp_rk, s_churn=4.0), 2, 2)
# as many points in the repeated piece as steps around it
CASES["restart"] = (lambda p, g: solver.restart(p, g, intervals=[(len(g), 2, 0.3, 1.0)]), 2, 2)


def measure(name):
    """One line of the page: its cells."""
    make, nominal, expected = CASES[name]
    path = process.vp()
    result = solver.weak_order(make, path, steps=STEPS)
    table = make(path, level_grid(path, 12))
    shape = f"({np.shape(table.blocks.A)[1]}, {np.shape(table.blocks.B)[1]})"
    cost = (result.nfe[-1] - result.nfe[-2]) / (STEPS[-1] - STEPS[-2])
    expected = "-" if expected is None else str(expected)
    return [name, str(nominal), expected, f"{result.slope:.2f}", f"{result.errors[-1]:.1e}", f"{cost:g}", shape]


HEAD = ["solver", "order by name", "weak order expected", "measured", f"error at {STEPS[-1]}", "NFE a step", "(S, R)"]
TEXT = """# Weak orders of the stochastic solvers

Written by `experiments/solver_orders/weak.py`; do not edit. On Gaussian data the denoiser is affine, so the law of a run is
propagated exactly: no sampling. VP path, float64, equal steps in half log-SNR from -1.8 to 1.8, cold start; the error is the
RMS of those of mean and variance over data variances 0.1, 0.3, 1.5; the slope is between 256 and 512 steps. With noise of a
fixed level, prediction history of any length gives weak order 2 (and so does a cold start): the order by name holds without
noise, from exact starting values. Single steps below the next level, with the noise that leads back drawn after them, keep
their order. "-": error terms of orders 2 and 3 of like size, no clean slope at these steps. The published ER-SDE-3 keeps
about 1 % of the first-order error in its sums. *(S, R)*: states and predictions carried.

"""


if __name__ == "__main__":
    from page import main

    main(__doc__, PAGE, TEXT, HEAD, CASES, measure)
