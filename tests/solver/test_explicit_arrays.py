"""Every maker on explicit (alpha, sigma) arrays with somebody else's times: flows, VE and VP, clean ends and others."""

import deterministic_cases
import jax
import numpy as np
import pytest
import solver_cases
import stochastic_cases

from jaxdiff import process, solver
from jaxdiff.solver.grid import explicit

S = np.array([1.0, 0.9, 0.7, 0.5, 0.3, 0.12, 0.05, 0.0])
RHO = np.array([80.0, 40.0, 15.0, 6.0, 2.0, 0.9, 0.3, 0.1, 0.03, 0.0])
A = 1 / np.sqrt(1 + RHO**2)
ARRAYS = {
    "flow": (1 - S, S),
    "flow from alpha > 0 to sigma > 0": (1 - S[1:-1], S[1:-1]),
    "flow to sigma > 0": (1 - S[:-1], S[:-1]),
    "ve": (np.ones(10), RHO),
    "ve to sigma > 0": (np.ones(9), RHO[:-1]),
    "vp": (A, RHO * A),
    "vp to sigma > 0": (A[:-1], (RHO * A)[:-1]),
    "another scale": (2 * A, 2 * RHO * A),
    "one step": (np.array([0.0, 1.0]), np.array([1.0, 0.0])),
    "one step to sigma > 0": (np.array([0.5, 1.0]), np.array([1.0, 0.1])),
    "two steps": (np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.5, 0.0])),
}
MAKERS = {**solver_cases.SOLVERS, **deterministic_cases.ALL, **stochastic_cases.ALL}
# stages between grid points, path tangents or churn: the path is needed
OFF_GRID = {
    *deterministic_cases.OFF_GRID,
    *("euler", "heun", "edm_churn", "edm_churn_euler", "edm_churn_noise", "restart"),
    *(f"dpm2_ancestral_{eta}" for eta in ("0", "0.5")),
    *(f"dpmpp_2s_ancestral_{eta}" for eta in ("0", "0.5")),
    *(name for name in stochastic_cases.SDE if name.startswith("sde_2s")),
    *stochastic_cases.RES,
}
INEXACT = {"ancestral_large", *deterministic_cases.DELTA_FAILS}


@pytest.mark.parametrize("name", sorted(set(MAKERS) - OFF_GRID))
def test_delta_data_on_every_kind_of_array(name):
    for kind, (alpha, sigma) in ARRAYS.items():
        grid = explicit(alpha, sigma, np.linspace(999, 0, alpha.size))
        table = MAKERS[name](process.vp(), grid)
        block = table.blocks
        for column in (block.p, block.q, block.A, block.B, block.C, block.E):
            assert column is None or np.all(np.isfinite(column)), kind
        np.testing.assert_array_equal([block.alpha[-1], block.sigma[-1]], [alpha[-1], sigma[-1]])
        assert set(np.stack([block.alpha, block.sigma], 1).ravel()) <= {*alpha, *sigma}, kind
        assert name in INEXACT or solver.check(table).ok(1e-10), (kind, solver.check(table))


@pytest.mark.parametrize("name", sorted(OFF_GRID))
def test_the_others_say_what_they_need(name):
    """And take the same arrays with the times of the path they lie on."""
    p = process.edm(sigma_min=0.03)
    alpha, sigma = ARRAYS["ve"]
    with pytest.raises(ValueError, match=r"^grid: .* needs .* explicit \(alpha, sigma\) arrays do not give"):
        MAKERS[name](p, explicit(alpha, sigma, np.linspace(999, 0, alpha.size)))
    table = MAKERS[name](p, explicit(alpha, sigma, process=p))
    assert name in {"edm_churn_noise", *INEXACT} or solver.check(table).ok(1e-9)


def test_every_registered_solver_is_among_them():
    """By the function each case calls, at whatever options."""
    grid = explicit(*ARRAYS["flow"], np.linspace(999, 0, S.size))
    for name, maker in solver.SOLVERS.items():
        if name in ("euler", "heun", "dpm2", "rk4", "rho_rk", "exp_rk", "f_pndm", "pndm", "restart", "deis"):
            with pytest.raises(ValueError, match=r"^grid: "):
                maker(process.linear(), grid)
        else:
            assert maker(process.linear(), grid).nfe >= len(grid)
    for maker in (
        lambda p, g: solver.euler(p, g, clock="rho"),
        lambda p, g: solver.heun(p, g, clock="rho"),
        lambda p, g: solver.rho_rk(p, g, tableau="2heun"),
        lambda p, g: solver.exp_rk(p, g, tableau="etd2"),
        lambda p, g: solver.pndm(p, g, warmup="heun"),
        lambda p, g: solver.deis(p, g, variable="rho"),
        lambda p, g: solver.restart(p, g, intervals=()),
    ):
        assert maker(process.linear(), grid).nfe >= len(grid)


def test_explicit_arrays_serve_a_traced_process():
    """Its path is not looked at: the arrays alone make the table."""
    grid = explicit([0.1, 0.5, 1.0], [1.0, 0.5, 0.0], [1.0, 0.5, 0.0])
    end = lambda beta: solver.ddim(process.vp(beta, 20.0), grid).blocks.alpha[-1] * beta
    assert float(jax.jit(end)(0.25)) == 0.25
