"""Stochastic tables that are other tables: equal a, W and N N^T in the dense normal form."""

import numpy as np
import pytest

from jaxdiff import process, solver
from jaxdiff.solver import grid
from jaxdiff.solver.grid import from_times

PATHS = {name: getattr(process, name)() for name in ("linear", "vp", "cosine", "subvp", "ve", "edm")}


def grids(p):
    """Whole grids, with the ends alpha = 0 and sigma = 0 where the path has them, and one inside."""
    return [
        grid.uniform(p, 1),
        grid.uniform(p, 7),
        grid.logsnr(p, 17),
        grid.edm_rho(p, 12),
        from_times(p, [0.9, 0.7, 0.65, 0.3, 0.1]),
    ]


def assert_same(first, second, tolerance=1e-12):
    one, two = solver.unroll(first), solver.unroll(second)
    scale = max(1.0, float(np.max(np.abs(one.W))))
    np.testing.assert_allclose(one.a, two.a, rtol=0, atol=tolerance * max(1.0, abs(float(one.a))))
    np.testing.assert_allclose(one.W, two.W, rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(one.e, two.e, rtol=0, atol=tolerance)
    size = max(1.0, float(one.N @ one.N))
    np.testing.assert_allclose(one.N @ one.N, two.N @ two.N, rtol=0, atol=tolerance * size)


sde, sa, er, pp = solver.dpm_solver_pp_sde, solver.sa_solver, solver.er_sde, solver.dpm_solver_pp
SAME = {
    "euler_ancestral is ddim": (solver.euler_ancestral, lambda p, g: solver.ddim(p, g, eta=1.0)),
    "euler_ancestral is ddim, half": (
        lambda p, g: solver.euler_ancestral(p, g, eta=0.5),
        lambda p, g: solver.ddim(p, g, eta=0.5),
    ),
    "dpm2_ancestral(0) is dpm2": (lambda p, g: solver.dpm2_ancestral(p, g, eta=0.0), solver.dpm2),
    "2s_ancestral(0) is 2S": (
        lambda p, g: solver.dpmpp_2s_ancestral(p, g, eta=0.0),
        lambda p, g: pp(p, g, method="singlestep"),
    ),
    "sde 2S(0) is 2S": (
        lambda p, g: sde(p, g, method="singlestep", eta=0.0),
        lambda p, g: pp(p, g, method="singlestep"),
    ),
    "sde 2S lagrange(0) is 2S lagrange": (
        lambda p, g: sde(p, g, method="singlestep", variant="lagrange", eta=0.0),
        lambda p, g: pp(p, g, method="singlestep", variant="lagrange"),
    ),
    "sde 2M(0) is 2M": (lambda p, g: sde(p, g, eta=0.0), pp),
    "sde 3M(0) is 3M": (lambda p, g: sde(p, g, order=3, eta=0.0), lambda p, g: pp(p, g, order=3)),
    "heun(0) is lagrange": (
        lambda p, g: sde(p, g, variant="heun", eta=0.0),
        lambda p, g: pp(p, g, variant="lagrange"),
    ),
    "sde 1 is ddim(1)": (lambda p, g: sde(p, g, order=1), lambda p, g: solver.ddim(p, g, eta=1.0)),
    "sa(1, p1) is ddim(1)": (
        lambda p, g: sa(p, g, predictor=1, corrector=0),
        lambda p, g: solver.ddim(p, g, eta=1.0),
    ),
    "sa(1, p2) is 2M SDE": (
        lambda p, g: sa(p, g, predictor=2, corrector=0),
        lambda p, g: sde(p, g, variant="heun"),
    ),
    "sa(0.7, p2) is 2M SDE": (
        lambda p, g: sa(p, g, predictor=2, corrector=0, tau=0.7),
        lambda p, g: sde(p, g, variant="heun", eta=0.49),
    ),
    "er(x) is ddim": (lambda p, g: er(p, g, order=1, phi="x"), solver.ddim),
    "er(x^2) is ddim(1)": (lambda p, g: er(p, g, order=1, phi="x^2"), lambda p, g: solver.ddim(p, g, eta=1.0)),
    "restart without repeats is heun": (
        lambda p, g: solver.restart(p, g, intervals=[(3, 0, 0.06, 0.3)]),
        lambda p, g: solver.heun(p, g, clock="rho"),
    ),
}
for order in (1, 2, 3, 4):
    SAME[f"sa(0, p{order}) is multistep"] = (
        lambda p, g, order=order: sa(p, g, predictor=order, corrector=0, tau=0.0),
        lambda p, g, order=order: pp(p, g, order=order, variant="lagrange"),
    )
for order in (1, 2, 3):
    SAME[f"sa(0, p{order}c{order + 1}) is unipc"] = (
        lambda p, g, order=order: sa(p, g, predictor=order, corrector=order + 1, tau=0.0, lower_order_final="never"),
        lambda p, g, order=order: solver.unipc(p, g, order=order, variant="lagrange", lower_order_final="never"),
    )
    SAME[f"er(x) of order {order} interpolates in rho"] = (
        lambda p, g, order=order: er(p, g, order=order, phi="x"),
        lambda p, g, order=order: solver.usf(p, g, solver_step(order)),
    )


def solver_step(order):
    return {"order": order, "prediction": "data", "variable": "rho"}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("path", PATHS)
def test_same_table(path, name):
    first, second = SAME[name]
    p = PATHS[path]
    for g in grids(p):
        assert_same(first(p, g), second(p, g), 1e-11)


def test_functions_are_their_names():
    p = PATHS["vp"]
    g = from_times(p, np.linspace(0.9, 0.02, 9))
    functions = {
        "x": lambda x: x,
        "x^1.5": lambda x: x**1.5,
        "x^2.5": lambda x: x**2.5,
        "sde_1": lambda x: x * (np.exp(-1 / x) + 10),
        "sde_4": lambda x: x**0.9 * np.log10(1 + 100 * x**1.5),
        "sde_5": lambda x: x * (np.exp(x**0.3) + 10),
    }
    for name, function in functions.items():
        assert_same(er(p, g, phi=name), er(p, g, phi=function))
    # tau: a number, one a step, a function, a band that covers all
    same = [0.6, [0.6] * 8, lambda rho: 0.6]
    for tau in same[1:]:
        assert_same(sa(p, g, tau=0.6), sa(p, g, tau=tau))
    assert_same(sa(p, g, tau=0.6), sa(p, g, tau=0.6, tau_range=(1e-6, 1e6)))
    assert_same(sa(p, g, tau=0.6, tau_range=(1e5, 1e6)), sa(p, g, tau=0.0, stochastic=True))


def test_restart_is_tables_end_to_end():
    """Two repeats of a two-step piece: rows, costs and noise of each part, whatever the solver."""
    p = PATHS["ve"]
    g = grid.edm_rho(p, 12)
    stop = int(np.argmin(np.abs(g.sigma[:-1] - 0.1)))
    plain = solver.heun(p, g, clock="rho")
    table = solver.restart(p, g, intervals=[(3, 2, 0.1, 0.5)], s_noise=1.1)
    assert table.nfe == plain.nfe + 2 * 4
    spread = 1.1 * np.sqrt(0.25 - g.sigma[stop] ** 2)
    rows = np.flatnonzero(np.asarray(table.blocks.C))
    np.testing.assert_allclose(np.asarray(table.blocks.C)[rows], spread)
    assert rows.tolist() == [2 * stop - 1, 2 * stop + 3]
    np.testing.assert_allclose(np.asarray(table.blocks.sigma)[rows + 1], 0.5)
    # a multistep solver starts each piece afresh, and several intervals nest
    twice = solver.restart(p, g, intervals=[(4, 1, 0.1, 0.5), (3, 2, 2.0, 5.0)], solver=pp)
    assert twice.nfe == 12 + 3 + 4 and solver.check(twice).ok()


def test_a_function_tau_counts_by_its_mean_square_over_each_step():
    """tau^2 linear in lam = -log rho: its mean over a step is its value in the middle."""
    p, times = PATHS["vp"], np.array([0.9, 0.7, 0.65, 0.3, 0.1])
    square = lambda lam: 0.1 * (lam + 9)
    lam = p.half_log_snr(times)
    by_function = sa(p, times, tau=lambda rho: np.sqrt(square(-np.log(rho))))
    assert_same(by_function, sa(p, times, tau=np.sqrt(square((lam[:-1] + lam[1:]) / 2))))
