"""Which solvers are the same: equality of dense normal forms, no network involved."""

import functools

import numpy as np
import pytest

from jaxdiff import process, solver
from jaxdiff.solver import Step, grid

P = functools.partial
never = {"lower_order_final": "never"}
pp = P(solver.dpm_solver_pp, **never)
ps = P(solver.dpm_solver, method="multistep", **never)
pc = P(solver.unipc, **never)

SAME = {
    "UniP-2 bh2 = 2M": (P(pc, corrector=False), pp),
    "UniP-3 = 3M": (P(pc, order=3, corrector=False), P(pp, order=3)),
    "UniP-3 noise = DPM-Solver 3M": (P(pc, order=3, corrector=False, prediction="noise"), P(ps, order=3)),
    "DC(1) = UniPC": (P(solver.dc_solver, compensation=1.0, order=3, **never), P(pc, order=3)),
    "UniPC flags = UniPC": (P(pc, corrector=[True] * 9), pc),
    "v3(1, 0, 0) = DPM++": (P(solver.dpm_solver_v3, order=3, **never), P(pp, order=3, variant="lagrange")),
    "v3(0, -1, 0) = DPM-Solver": (
        P(solver.dpm_solver_v3, l=0, s=-1, order=3, **never),
        P(ps, order=3, variant="lagrange"),
    ),
    "v3 corrector = UniPC": (
        P(solver.dpm_solver_v3, order=2, corrector=True, **never),
        P(pc, order=2, variant="lagrange"),
    ),
    "v3 arrays = v3 numbers": (
        P(solver.dpm_solver_v3, l=[0.4] * 5, s=[0.2] * 5, b=[0.3] * 5, lam=[-9, -2, 0, 1, 2], order=3),
        P(solver.dpm_solver_v3, l=0.4, s=0.2, b=0.3, order=3),
    ),
    "GHVB(1) = iPNDM": (P(solver.ghvb, order=4), P(solver.ipndm, variant="public")),
    "HB(1) = iPNDM": (P(solver.heavy_ball, order=3, beta=1.0), P(solver.ipndm, order=3, variant="public")),
    "LMS = DEIS rhoAB": (solver.lms, P(solver.deis, order=4, variable="rho")),
    "iPNDM = LMS": (solver.ipndm, solver.lms),
    "PNDM ramp = iPNDM": (P(solver.pndm, warmup="ramp", variant="public"), P(solver.ipndm, variant="public")),
    "DEIS lam = DPM-Solver": (
        P(solver.deis, order=3, variable="lam"),
        P(ps, order=3, variant="lagrange"),
    ),
    "DEIS order 1 = DDIM": (P(solver.deis, order=1), solver.ddim),
    "DPM-Solver-1 = DDIM": (P(solver.dpm_solver, order=1), solver.ddim),
    "DPM++1 = DDIM": (P(pp, order=1), solver.ddim),
    "DPM++1S = DDIM": (P(pp, order=1, method="singlestep"), solver.ddim),
    "GHVB p=1 beta=1 = DDIM": (P(solver.ghvb, order=1), solver.ddim),
    "conjugate(0) = DDIM": (solver.conjugate, solver.ddim),
    "conjugate -> DDIM": (P(solver.conjugate, rate=1e-13), solver.ddim),
    "RES-2S = 2S exact": (solver.exp_rk, P(pp, method="singlestep", variant="lagrange")),
    "rhoRK 2heun = Heun": (P(solver.rho_rk, tableau="2heun"), P(solver.heun, clock="rho")),
    "USF data = DPM++": (P(solver.usf, steps=Step(3)), P(pp, order=3, variant="lagrange")),
    "USF noise = DPM-Solver": (P(solver.usf, steps=Step(3, "noise")), P(ps, order=3, variant="lagrange")),
    "USF t = DEIS": (P(solver.usf, steps=Step(3, "noise", "t")), solver.deis),
    "USF rho = LMS": (
        P(solver.usf, steps={"order": 4, "prediction": "noise", "variable": "rho"}),
        P(solver.lms, lower_order_final="zero"),
    ),
    "USF corrector = UniPC": (P(solver.usf, steps=Step(3, corrector=True)), P(pc, order=3, variant="lagrange")),
    "USF noise corrector = UniPC": (
        P(solver.usf, steps=Step(3, "noise", corrector=True)),
        P(pc, order=3, prediction="noise", variant="lagrange"),
    ),
}


def same(a, b, tolerance=1e-12):
    one, two = solver.unroll(a), solver.unroll(b)
    for x, y in zip(one, two):
        np.testing.assert_allclose(x, y, atol=tolerance * (1 + np.max(np.abs(y))))


def different(a, b):
    return np.max(np.abs(solver.unroll(a).W - solver.unroll(b).W)) > 1e-6


GRIDS = {
    "vp": lambda: (process.vp(), grid.uniform(process.vp(), 9, t_min=0.02)),
    "vp to data": lambda: (process.vp(), grid.logsnr(process.vp(), 9)),
    "flow": lambda: (process.linear(), grid.from_times(process.linear(), np.linspace(0.99, 0.01, 10))),
    "edm": lambda: (process.edm(), grid.edm_rho(process.edm(), 9, sigma_min=0.1)),
}


@pytest.mark.parametrize("where", GRIDS)
@pytest.mark.parametrize("name", SAME)
def test_same(name, where):
    one, two = SAME[name]
    p, g = GRIDS[where]()
    if g.sigma[-1] == 0 and name in ("GHVB(1) = iPNDM", "HB(1) = iPNDM"):
        one, two = P(one, lower_order_final="zero"), P(two, lower_order_final="zero")
    same(one(p, g), two(p, g), 1e-9 if name == "conjugate -> DDIM" else 1e-12)


def test_b_matters_only_where_a_coefficient_is_fixed():
    p, g = GRIDS["vp"]()
    # order 3 meets a fixed 1/2 only in its second step's predictor and first corrector
    start = {"order": 3, "corrector": [False, *[True] * 8]}
    one, two = (solver.unroll(pc(p, g, variant=v, **start), rows=True) for v in ("bh1", "bh2"))
    assert np.max(np.abs(one.W[0] - two.W[0])) == 0 and np.max(np.abs(one.W[1] - two.W[1])) > 1e-6
    assert different(pc(p, g, variant="bh1"), pc(p, g, variant="bh2"))
    assert different(pc(p, g, variant="bh2"), pc(p, g, variant="lagrange"))


def test_fast_on_equal_log_snr_steps_is_singlestep():
    p = process.vp()
    lam = np.linspace(-3, 3, 10)
    fine, coarse = (grid.from_times(p, p.time(v)) for v in (lam, lam[::3]))
    for make in (solver.dpm_solver, solver.dpm_solver_pp):
        # N = 9 = 3 + 3 + 2 + 1: its first two steps are the third-order singlestep's
        ours = solver.unroll(make(p, fine, order=3, method="fast", variant="midpoint"), rows=True)
        theirs = solver.unroll(make(p, coarse, order=3, method="singlestep", variant="midpoint"), rows=True)
        np.testing.assert_allclose(ours.W[2, :3], theirs.W[2, :3], rtol=1e-10)
        np.testing.assert_allclose(ours.W[5, :6], theirs.W[5, :6], rtol=1e-10)
    assert solver.dpm_solver(p, fine, order=3, method="fast").nfe == 9


def test_euler_on_the_flow_velocity_is_ddim_with_both_ends():
    p = process.linear()
    g = grid.uniform(p, 9)
    same(solver.euler(p, g), solver.ddim(p, g))
    assert g.alpha[0] == 0 and g.sigma[-1] == 0


def test_variants_differ():
    """The identities above would be empty if options were ignored."""
    p, g = GRIDS["vp"]()
    assert different(pp(p, g, order=3), pp(p, g, order=3, variant="public"))
    assert different(pp(p, g), pp(p, g, variant="lagrange"))
    assert different(solver.ipndm(p, g), solver.ipndm(p, g, variant="public"))
    assert different(solver.f_pndm(p, g), solver.f_pndm(p, g, variant="public"))
    assert different(solver.deis(p, g), solver.deis(p, g, variable="rho"))
    assert different(solver.dc_solver(p, g, compensation=0.9), solver.unipc(p, g))
    assert different(solver.unipc(p, g), solver.unipc(p, g, corrector=False))
    for rule in ("auto", "always"):
        assert different(pp(p, g, order=3), pp(p, g, order=3, lower_order_final=rule))
