"""Measured convergence orders on the exact 1-D flow, float64, multistep methods from exact starting values."""

import functools

import numpy as np
import pytest

from jaxdiff import process, solver
from jaxdiff.solver import Step

P = functools.partial
never = {"lower_order_final": "never"}

# name: (maker, exact starting values, order, grids)
FINE, PAIR = (128, 256, 512), (128, 512)
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
    CASES[f"{name} 3M public"] = (P(make, order=3, method="multistep", variant="public", **never), 4, 2, FINE)
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
        CASES[f"v3 {n} {corrector}"] = (P(solver.dpm_solver_v3, **options), n + 2, n + corrector, FINE)


@pytest.mark.parametrize("name", CASES)
def test_order(name):
    make, warm, expected, steps = CASES[name]
    measured = solver.order(make, process.vp(), warm=warm, steps=steps)
    low, high = (0.3, 0.4) if expected >= 3 or warm else (0.12, 0.12)
    assert expected - low < measured.slope < expected + high, measured
    assert measured.errors[-1] < 0.01


@pytest.mark.parametrize("name", ["linear", "cosine", "edm"])
@pytest.mark.parametrize("make, warm, expected", [(solver.dpm_solver_pp, 3, 2), (P(solver.unipc, **never), 4, 3)])
def test_order_on_other_paths(name, make, warm, expected):
    measured = solver.order(make, getattr(process, name)(), warm=warm, steps=(128, 512))
    assert abs(measured.slope - expected) < 0.35, measured


def test_tables_converge_to_the_exact_flow_of_the_library():
    """order() has its own numpy executor and posterior; the library's executor and world must agree with it."""
    import jax

    from jaxdiff import exact
    from jaxdiff.solver.order import WORLD, posterior, time_grid, trace

    p = process.vp()
    for make in (solver.ghvb, P(solver.unipc, order=3), P(solver.dpm_solver_v3, l=0.7, b=0.2, corrector=True)):
        table = make(p, time_grid(p, 7))
        x = np.linspace(-2.0, 2.0, 5)
        with jax.enable_x64(True):
            ours = solver.run(table, exact.denoiser(WORLD, p), x[:, None])[:, 0]
        np.testing.assert_allclose(ours, trace(table, x, P(posterior, WORLD)), rtol=1e-10, atol=1e-12)
