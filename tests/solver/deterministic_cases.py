"""Deterministic makers with their options, for tests that run over all of them."""

import functools

from jaxdiff import solver
from jaxdiff.solver import Step

P = functools.partial
# stages between grid points, or the path's time: refused on explicit (alpha, sigma) grids
OFF_GRID = {
    "dpm2": solver.dpm2,
    "rk4": solver.rk4,
    "rk4_rho": P(solver.rk4, clock="rho"),
    "rho_rk": solver.rho_rk,
    "res2": solver.exp_rk,
    "res3": P(solver.exp_rk, tableau="res3"),
    "etd3": P(solver.exp_rk, tableau="etd3"),
    "etd4": P(solver.exp_rk, tableau="etd4"),
    "dpm_solver_2s": P(solver.dpm_solver, method="singlestep", order=2),
    "dpm_solver_3s": P(solver.dpm_solver, method="singlestep"),
    "dpm_solver_pp_3s": P(solver.dpm_solver_pp, method="singlestep", order=3),
    "deis_t": solver.deis,
    "f_pndm": solver.f_pndm,
    "f_pndm_public": P(solver.f_pndm, variant="public"),
    "conjugate": P(solver.conjugate, rate=0.3),
    "usf_t": P(solver.usf, steps=Step(3, "data", "t", True)),
}
ON_GRID = {
    "dpm_solver": solver.dpm_solver,
    "dpm_solver_fast2": P(solver.dpm_solver, order=2),
    "dpm_solver_3m": P(solver.dpm_solver, method="multistep"),
    "dpm_solver_3m_public": P(solver.dpm_solver, method="multistep", variant="public"),
    "dpm_solver_pp_3m": P(solver.dpm_solver_pp, order=3),
    "dpm_solver_pp_3m_never": P(solver.dpm_solver_pp, order=3, lower_order_final="never"),
    "dpm_solver_pp_fast": P(solver.dpm_solver_pp, order=3, method="fast"),
    "unipc_1": P(solver.unipc, order=1),
    "unipc": solver.unipc,
    "unipc_3_bh1": P(solver.unipc, order=3, variant="bh1"),
    "unipc_3_noise": P(solver.unipc, order=3, prediction="noise"),
    "unip_3": P(solver.unipc, order=3, corrector=False),
    "dc": P(solver.dc_solver, compensation=0.95),
    "deis_rho": P(solver.deis, variable="rho"),
    "deis_lam": P(solver.deis, variable="lam"),
    "lms": solver.lms,
    "lms_zero": P(solver.lms, lower_order_final="zero"),
    "lms_auto": P(solver.lms, lower_order_final="auto"),
    "ipndm": solver.ipndm,
    "ipndm_public": P(solver.ipndm, variant="public"),
    "s_pndm": P(solver.pndm, order=2),
    "rho_rk_heun": P(solver.rho_rk, tableau="2heun"),
    "etd2": P(solver.exp_rk, tableau="etd2"),
    "ghvb": solver.ghvb,
    "ghvb_3.8_zero": P(solver.ghvb, order=3.8, lower_order_final="zero"),
    "heavy_ball": solver.heavy_ball,
    "v3": solver.dpm_solver_v3,
    "v3_corrector": P(solver.dpm_solver_v3, order=3, corrector=True),
    "usf": P(solver.usf, steps=Step(2, "noise", "rho", True)),
    "conjugate_0": solver.conjugate,
    "dpm_solver_3m_heun": P(solver.dpm_solver, method="multistep", variant="heun"),
    "dpm_solver_pp_fast_taylor": P(solver.dpm_solver_pp, order=3, method="fast", variant="taylor"),
    "velocity_ab": solver.velocity_ab,
    "velocity_ab_4": P(solver.velocity_ab, order=4),
    "velocity_ab_zero": P(solver.velocity_ab, order=3, lower_order_final="zero"),
    "velocity_ab_angle": P(solver.velocity_ab, order=3, clock="angle"),
    "velocity_ab_rosenbrock": P(solver.velocity_ab, order=3, clock="rosenbrock"),
}
# velocities, defined at alpha = 0 too
FROM_NOISE = {"rk4", "velocity_ab", "velocity_ab_4", "velocity_ab_zero", "velocity_ab_angle"}
# v3 away from its two exact settings is not exact on one point of data, nor are conjugate and raw-time stages
V3 = {"v3_free": P(solver.dpm_solver_v3, l=0.7, s=-0.1, b=0.2, order=2, corrector=True)}
ALL = {**OFF_GRID, **ON_GRID, **V3}
DELTA_FAILS = {"conjugate", "v3_free", "velocity_ab_angle", "velocity_ab_rosenbrock"}
RAW_TIME = {"rk4"}
