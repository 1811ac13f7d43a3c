"""The stochastic makers at the options that the proofs run over."""

from jaxdiff import solver
from jaxdiff.solver.er_sde import PHIS


def _with(maker, **options):
    return lambda p, g: maker(p, g, **options)


sde, sa, er = solver.dpm_solver_pp_sde, solver.sa_solver, solver.er_sde

ANCESTRAL = {
    f"{maker.__name__}_{eta:g}": _with(maker, eta=eta)
    for maker in (solver.euler_ancestral, solver.dpm2_ancestral, solver.dpmpp_2s_ancestral)
    for eta in (0.0, 0.5, 1.0)
}
SDE = {
    "sde_1": _with(sde, order=1),
    "sde_2m": sde,
    "sde_2m_heun": _with(sde, variant="heun", lower_order_final="never"),
    "sde_2m_half": _with(sde, eta=0.5),
    "sde_3m": _with(sde, order=3, lower_order_final="never"),
    "sde_3m_public": _with(sde, order=3, variant="public", lower_order_final="zero"),
    "sde_2s": _with(sde, method="singlestep"),
    "sde_2s_half": _with(sde, method="singlestep", eta=0.5),
    "sde_2s_lagrange": _with(sde, method="singlestep", variant="lagrange"),
    "sde_2s_rho": _with(sde, method="singlestep", coupling="rho"),
    "sde_2s_independent": _with(sde, method="singlestep", coupling="independent"),
}
ER = {f"er_{phi}_{order}": _with(er, phi=phi, order=order) for phi in PHIS for order in (1, 2, 3)}
ER["er_function"] = _with(er, phi=lambda x: x**1.2)
ER["er_public_exact"] = _with(er, variant="public", quadrature="exact")
SA = {
    f"sa_p{p}c{c}_tau{tau:g}": _with(sa, predictor=p, corrector=c, tau=tau, lower_order_final="never")
    for p, c in ((1, 0), (1, 1), (2, 0), (2, 2), (2, 3), (3, 4), (4, 4))
    for tau in (0.0, 0.6, 1.0)
}
SA["sa"] = sa
SA["sa_always"] = _with(sa, predictor=3, corrector=4, lower_order_final="always")
SA["sa_public"] = _with(sa, variant="public")
SA["sa_pece"] = _with(sa, predictor=3, corrector=3, pece=True)
SA["sa_band"] = _with(sa, tau_range=(0.05, 1.0))
SA["sa_function"] = _with(sa, tau=lambda rho: 1 / (1 + rho))
RESTART = {"restart": solver.restart}
RES = {f"{name}_churn": _with(solver.exp_rk, tableau=name, s_churn=4.0) for name in ("res2", "res3", "etd2")}
RES["dpm2_churn"] = _with(solver.dpm2, s_churn=4.0)
REDRAW = {"pc": solver.predictor_corrector, "pc_3": _with(solver.predictor_corrector, corrections=3, delta=0.4)}
ALL = {**ANCESTRAL, **SDE, **ER, **SA, **RESTART, **RES, **REDRAW}

# scaled noise leaves the marginals, and so does a plain step of Euler-Maruyama; the published ER-SDE drops small noises
DELTA_FAILS = {
    "maruyama": solver.euler_maruyama,
    "maruyama_half": _with(solver.euler_maruyama, eta=0.5),
    "maruyama_2": _with(solver.euler_maruyama, order=2),
    "euler_noise": _with(solver.euler_ancestral, s_noise=1.003),
    "dpm2_noise": _with(solver.dpm2_ancestral, s_noise=1.003),
    "2s_noise": _with(solver.dpmpp_2s_ancestral, s_noise=1.003),
    "sde_noise": _with(sde, s_noise=1.003),
    "sde_2s_noise": _with(sde, method="singlestep", s_noise=1.003),
    "restart_noise": _with(solver.restart, s_noise=1.003),
    "er_public": _with(er, variant="public"),
}
