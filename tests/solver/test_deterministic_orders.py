"""Measured convergence orders on the exact 1-D flow, float64, multistep methods from exact starting values."""

import functools
import pathlib
import runpy

import numpy as np
import pytest

from jaxdiff import process, solver
from jaxdiff.solver.order import time_grid

P = functools.partial
RUN = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "experiments" / "solver_orders" / "run.py"))
CASES = RUN["CASES"]
never = {"lower_order_final": "never"}


@pytest.mark.parametrize("name", CASES)
def test_order(name):
    make, warm, expected, steps, grid = (*CASES[name], time_grid)[:5]
    measured = solver.order(make, process.vp(), warm=warm, steps=steps, grid=grid)
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
    from jaxdiff.solver.order import WORLD, posterior, trace

    p = process.vp()
    for make in (solver.ghvb, P(solver.unipc, order=3), P(solver.dpm_solver_v3, l=0.7, b=0.2, corrector=True)):
        table = make(p, time_grid(p, 7))
        x = np.linspace(-2.0, 2.0, 5)
        with jax.enable_x64(True):
            ours = solver.run(table, exact.denoiser(WORLD, p), x[:, None])[:, 0]
        np.testing.assert_allclose(ours, trace(table, x, P(posterior, WORLD)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["dpm_solver_pp 3M", "dpm_solver_pp 3M public", "unipc 2 data", "f_pndm"])
def test_page_says_what_is_measured(name):
    lines = RUN["PAGE"].read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {name} |")]
    written, measured = [cell.strip() for cell in line.strip("|").split("|")], RUN["measure"](name)
    for column, (old, new) in enumerate(zip(written, measured)):
        if column == 2:
            assert abs(float(old) - float(new)) <= 0.011
        elif column != 3:
            assert old == new


def test_page_lists_every_case():
    lines = RUN["PAGE"].read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == list(CASES)
