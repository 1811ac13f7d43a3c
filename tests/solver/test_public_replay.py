"""Final states that the public code of EDM and azula reached, against tables on explicit (alpha, sigma) arrays.

Kept from runs of ``experiments/solver_orders/replay.py``'s kind: their code in float64 from ``sigma_0 X`` with these draws on
this mixture. EDM 008a4e5, azula bec12b8.
"""

import dataclasses
import functools

import numpy as np
import pytest

from jaxdiff import exact, process, solver
from jaxdiff.solver.grid import explicit
from jaxdiff.solver.order import posterior

P = functools.partial
WORLD = exact.GaussianMixture([0.35, 0.65], [-1.2, 0.7], [0.3**2, 0.2**2])
X = np.linspace(-1.5, 2.0, 7)
DRAWS = np.random.default_rng(5).normal(size=(20, 7))


def end(table, rows):
    """The table in numpy float64 from ``start_scale X``; ``rows``: which draw each row adds (-1: churn before the first)."""
    b = table.blocks
    zero = np.zeros(table.rows)
    p, q, C = (zero if v is None else np.asarray(v) for v in (b.p, b.q, b.C))
    y = float(b.start_scale) * X
    if b.start_noise is not None:
        y = (1.0 if b.start_gain is None else float(b.start_gain)) * y + float(b.start_noise) * DRAWS[rows[-1]]
    ys, ds = [y] * b.A.shape[1], [np.zeros(7)] * b.B.shape[1]
    for k in range(table.rows):
        data, noise = posterior(WORLD, ys[0], float(b.alpha[k]), float(b.sigma[k]))
        ds = [p[k] * data + q[k] * noise, *ds[:-1]]
        y = sum(c * v for c, v in zip(b.A[k], ys)) + sum(c * v for c, v in zip(b.B[k], ds))
        ys = [y + (C[k] * DRAWS[rows[k]] if C[k] else 0), *ys[:-1]]
    return ys[0]


def close(table, rows, told):
    told = np.array(told)
    np.testing.assert_allclose(end(table, rows), told, rtol=0, atol=1e-8 * max(1, np.max(np.abs(told))))


HEUN = {
    2 * i - 1 if i else -1: i for i in range(6)
}  # draw i is added before step i, by the last row of the step before


def test_edm_sampler_with_churn():
    i = np.arange(6)
    sigma = (80 ** (1 / 7) + i / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    p = process.edm()
    grid = explicit(np.ones(7), np.append(sigma, 0.0), process=p)
    table = solver.edm(p, grid, s_churn=30, s_min=0.01, s_max=1, s_noise=1.007)
    told = "-2.2310542974581478 -1.7757658028624101 -1.2392108599825518 1.1176357077922876 1.5876898902199896 \
        0.9832248964663665 1.581899848370588"
    close(table, HEUN, [float(v) for v in told.split()])


def test_edm_general_sampler_on_the_vp_schedule():
    """Heun in the path's own time with churn, and the published Euler step to sigma = 0 (ablation_sampler, vp scaling)."""
    low, high = (np.sqrt(np.expm1(0.5 * 19.9 * t * t + 0.1 * t)) for t in (1e-3, 1.0))
    beta_d = 2 * (np.log(low**2 + 1) / 1e-3 - np.log(high**2 + 1)) / (1e-3 - 1)
    beta_min = np.log(high**2 + 1) - 0.5 * beta_d
    # their churn goes past t = 1
    p = dataclasses.replace(process.vp(beta_min, beta_min + beta_d), t_max=2.0)
    time = np.append(1 + np.arange(6) / 5 * (1e-3 - 1), 0.0)
    growth = 0.5 * beta_d * time**2 + beta_min * time
    grid = explicit(np.exp(-growth / 2), np.sqrt(-np.expm1(-growth)), time)
    options = {"clock": "time", "s_churn": 30, "s_min": 0.01, "s_max": 1, "s_noise": 1.007}
    told = "-1.771443709929851 -1.0770491259657415 -0.9532301243841321 0.5247094188774689 0.7436667321540087 \
        0.8847632285423115 0.8250044538993843"
    told = [float(v) for v in told.split()]
    close(solver.edm(p, grid, variant="public", **options), HEUN, told)
    assert np.max(np.abs(end(solver.edm(p, grid, **options), HEUN) - told)) > 1e-5  # the exact jump ends elsewhere
    # churn of the first step as well, which rescales the start
    told = "-0.931423225694413 -1.3560480568268625 -0.4895009061582691 0.3477343960295657 0.5341443668643069 \
        -1.406798239226232 0.2091176673502646"
    table = solver.edm(p, grid, clock="time", variant="public", s_churn=30, s_noise=1.007)
    close(table, HEUN, [float(v) for v in told.split()])
    assert float(table.blocks.start_gain) < 0.8 and float(table.time[0]) > 1
    with pytest.raises(ValueError, match=r"clock='time'.*do not give unless, at their times, they lie on"):
        solver.edm(p, explicit(grid.alpha, grid.sigma, 1000 * time), clock="time")


def test_dpm2_with_churn():
    """k-diffusion's dpm_2: its midpoint is the geometric mean of the raised level and the next."""
    sigma, x = np.array([80.0, 30.0, 9.0, 2.0, 0.5, 0.1, 0.0]), 80 * X
    for i in range(6):
        raised = sigma[i] * (1 + (min(4 / 6, np.sqrt(2) - 1) if 0.3 <= sigma[i] <= 80 else 0))
        x = x + 1.003 * np.sqrt(raised**2 - sigma[i] ** 2) * DRAWS[i]
        slope = posterior(WORLD, x, 1.0, raised)[1]
        if i < 5:
            middle = np.sqrt(raised * sigma[i + 1])
            slope = posterior(WORLD, x + (middle - raised) * slope, 1.0, middle)[1]
        x = x + (sigma[i + 1] - raised) * slope
    p = process.edm()
    grid = explicit(np.ones(7), sigma, process=p)
    np.testing.assert_allclose(end(solver.dpm2(p, grid, s_churn=4, s_min=0.3, s_noise=1.003), HEUN), x, atol=1e-11)


never = {"lower_order_final": "never"}
EACH = {k: k for k in range(6)}
PAIRS = {3 * i + j: 2 * i + j for i in range(6) for j in range(2)}
# azula's samplers on its rectified schedule, six equal steps
AZULA = {
    "vAB 3": (
        P(solver.velocity_ab, order=3),
        EACH,
        "-1.4405832710775677 -1.1598434856049329 0.5239446389011531 0.6212912449295216 0.7834929019598593 0.9035555466399591 "
        "1.012279375130254",
    ),
    "zEAB 3": (
        P(solver.dpm_solver, order=3, method="multistep", variant="lagrange", **never),
        EACH,
        "-1.4875794621589047 -0.7744074412103046 0.8014237557810189 0.4026799109271978 0.8195661657296605 1.0060333734478473 "
        "1.1389675259623582",
    ),
    "xEAB 3": (
        P(solver.dpm_solver_pp, order=3, variant="lagrange", **never),
        EACH,
        "2.176110285612036 4.826008320486218 3.835529160221049 -3.314937739256807 -0.8991537197738991 0.5379418091154223 "
        "1.498559878158758",
    ),
    # its root of alpha_s^2 + sigma_t^2 read as alpha_s^2 + sigma_s^2, and its weights integrated to rounding
    "REAB 3 mended": (
        P(solver.velocity_ab, order=3, clock="rosenbrock"),
        EACH,
        "-1.5569443200499173 -0.8317350200332214 0.8585752479807192 0.3948648609022361 0.8537612853811414 1.062370915865451 "
        "1.2180673439406935",
    ),
    "Ito": (
        P(solver.euler_maruyama, eta=0.7, temperature=1.5),
        EACH,
        "-27.340813944998633 -43.38543611475443 -9.144205056509632 11.996136277320902 34.23495040531643 2.7519463817331946 "
        "-17.191606219716668",
    ),
    "PC": (
        P(solver.predictor_corrector, corrections=2, delta=0.3),
        PAIRS,
        "-1.386895640020828 -0.7177429726388992 -1.244348209412 0.635789585585086 -0.3374984544488781 -0.9966262509193091 "
        "0.4365724422178753",
    ),
    "Heun": (
        P(solver.heun, clock="rho"),
        {},
        "-3.4191597244763074 -2.4727232218258153 -1.4496970344330855 0.9601393887392834 1.5459797929056842 2.0743334731945025 "
        "2.5587179339359665",
    ),
    "DDIM 0.4": (
        P(solver.ddim, eta=np.sqrt(0.4)),
        EACH,
        "-1.311809768851348 -1.3005162203612672 0.5572787366280599 0.5942357858747281 0.6573727651865984 0.40660320989457543 "
        "0.7061572085448685",
    ),
}


@pytest.mark.parametrize("name", AZULA)
def test_azula(name):
    make, rows, told = AZULA[name]
    t = np.linspace(1.0, 0.0, 7)
    grid = explicit(t * 1e-3 + (1 - t), t + (1 - t) * 1e-3, 1000 * t)
    close(make(process.vp(), grid), rows, [float(v) for v in told.split()])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_velocity_multistep_is_adams_bashforth_on_the_flow(order):
    """From alpha = 0 to sigma = 0 in equal steps of time, whatever the process that carries the arrays."""
    adams = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    t, x, past = np.linspace(1.0, 0.0, 9), X, []
    for i in range(8):
        data, noise = posterior(WORLD, x, 1 - t[i], t[i])
        past = [noise - data, *past][:order]
        x = x - sum(w * v for w, v in zip(adams[len(past)], past)) / 8
    np.testing.assert_allclose(
        end(solver.velocity_ab(process.edm(), explicit(1 - t, t, t), order=order), {}), x, atol=1e-12
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_euler_maruyama_without_noise_is_multistep_dpm_solver(order):
    t = np.linspace(0.98, 0.02, 9)
    grid = explicit(1 - t, t, 1000 * t)
    for variant in ("midpoint", "lagrange", "heun"):
        ours = solver.unroll(solver.euler_maruyama(process.vp(), grid, order=order, variant=variant, eta=0.0))
        plain = solver.dpm_solver(process.vp(), grid, order=order, method="multistep", variant=variant)
        np.testing.assert_allclose(ours.W, solver.unroll(plain).W, atol=1e-12)
        assert not np.any(ours.N)


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_noise_form_sde_of_second_order(variant):
    """diffusers' sde-dpmsolver: twice the increments of the probability flow, and noise ``sigma_s sqrt(e^{2h} - 1)``."""
    t = np.array([0.95, 0.8, 0.6, 0.45, 0.2, 0.1])
    lam = np.log(1 - t) - np.log(t)
    x, past = t[0] * X, []
    for i in range(5):
        past = [posterior(WORLD, x, 1 - t[i], t[i])[1], *past][:2]
        h, s = lam[i + 1] - lam[i], t[i + 1]
        x = (1 - s) / (1 - t[i]) * x - 2 * s * np.expm1(h) * past[0] + s * np.sqrt(np.expm1(2 * h)) * DRAWS[i]
        if i:
            slope = (past[0] - past[1]) * h / (lam[i] - lam[i - 1])
            x = x - s * (np.expm1(h) if variant == "midpoint" else 2 * (np.expm1(h) / h - 1)) * slope
    table = solver.euler_maruyama(
        process.vp(), explicit(1 - t, t, 1000 * t), order=2, variant=variant, lower_order_final="never"
    )
    np.testing.assert_allclose(end(table, EACH), x, atol=1e-12)


@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_public_mixtures_of_dpm_solver(prediction):
    """Variant "heun" of order 3: exact second-order steps, and the published third-order ones (diffusers' heun)."""
    t = np.array([0.95, 0.8, 0.6, 0.45, 0.2, 0.1])
    lam, data = np.log(1 - t) - np.log(t), prediction == "data"
    x, past = t[0] * X, []
    for i in range(5):
        past = [posterior(WORLD, x, 1 - t[i], t[i])[0 if data else 1], *past][:3]
        h, s = lam[i + 1] - lam[i], t[i + 1]
        if data:
            ratio, gains = s / t[i], [-np.expm1(-h), np.expm1(-h) / h + 1, -((np.expm1(-h) + h) / h**2 - 0.5)]
        else:
            ratio, gains = (
                (1 - s) / (1 - t[i]),
                [-np.expm1(h), -(np.expm1(h) / h - 1), -((np.expm1(h) - h) / h**2 - 0.5)],
            )
        terms = [past[0]]
        if i:
            r0 = (lam[i] - lam[i - 1]) / h
            terms.append((past[0] - past[1]) / r0)
        if i > 1:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            bend = (terms[1] - (past[1] - past[2]) / r1) / (r0 + r1)
            terms = [terms[0], terms[1] + r0 * bend, bend]
        x = ratio * x + (1 - s if data else s) * sum(g * v for g, v in zip(gains, terms))
    make = solver.dpm_solver_pp if data else solver.dpm_solver
    table = make(process.vp(), explicit(1 - t, t, 1000 * t), order=3, method="multistep", variant="heun", **never)
    np.testing.assert_allclose(end(table, {}), x, atol=1e-12)


def test_fast_steps_with_the_taylor_option():
    """The step from t to s through its three predictions' parabola, the last stage by a plain linear slope (dpm-solver)."""
    t = np.array([0.9, 0.75, 0.4, 0.3])
    lam = np.log(1 - t) - np.log(t)
    x0 = t[0] * X
    h, r1, r2 = lam[3] - lam[0], *((lam[1:3] - lam[0]) / (lam[3] - lam[0]))
    phi = lambda c: -np.expm1(-c * h)
    D0 = posterior(WORLD, x0, 1 - t[0], t[0])[0]
    x1 = t[1] / t[0] * x0 + (1 - t[1]) * phi(r1) * D0
    D1 = posterior(WORLD, x1, 1 - t[1], t[1])[0] - D0
    x2 = t[2] / t[0] * x0 + (1 - t[2]) * (phi(r2) * D0 + r2 / r1 * (1 - phi(r2) / (r2 * h)) * D1)
    D2 = posterior(WORLD, x2, 1 - t[2], t[2])[0] - D0
    slope, bend = (r2 * D1 / r1 - r1 * D2 / r2) / (r2 - r1), 2 * (D2 / r2 - D1 / r1) / (r2 - r1)
    first = 1 - phi(1) / h
    x = t[3] / t[0] * x0 + (1 - t[3]) * (phi(1) * D0 + first * slope + (0.5 - first / h) * bend)
    # a grid of five steps has the orders 3, 2; the first three rows are the step above
    more = explicit(1 - np.append(t, [0.2, 0.1]), np.append(t, [0.2, 0.1]), np.arange(6.0, 0.0, -1.0))
    table = solver.dpm_solver_pp(process.vp(), more, order=3, method="fast", variant="taylor")
    dense = solver.unroll(table, rows=True)
    y = dense.a[2] * x0 + dense.W[2, 0] * D0 + dense.W[2, 1] * (D1 + D0) + dense.W[2, 2] * (D2 + D0)
    np.testing.assert_allclose(y, x, atol=1e-12)
