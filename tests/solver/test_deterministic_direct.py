"""Tables against the methods written out as published, with their own buffers and difference formulas."""

import functools

import numpy as np
import pytest

from jaxdiff import exact, process, solver
from jaxdiff.solver import grid
from jaxdiff.solver.order import WORLD, posterior, trace

P = functools.partial
predict = P(posterior, WORLD)
VP = process.vp()
X = np.linspace(-2.5, 2.5, 11)


def points(g):
    alpha, sigma = g.alpha, g.sigma
    with np.errstate(divide="ignore"):
        return alpha, sigma, np.log(alpha) - np.log(sigma)


def close(table, expected, tolerance=1e-10, x=X):
    np.testing.assert_allclose(trace(table, x, predict), expected, rtol=tolerance, atol=tolerance)


def open_grid(steps=9):
    return grid.from_times(VP, np.linspace(0.98, 0.02, steps + 1))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("form", ["data", "noise"])
def test_third_order_multistep_in_difference_form(form, half):
    """The published recursion; ``half`` keeps its curvature term, otherwise it is doubled."""
    g = open_grid()
    a, s, lam = points(g)
    y, m, at = X, [], []
    for i in range(len(g)):
        m = [predict(y, a[i], s[i])[0 if form == "data" else 1], *m][:3]
        at = [lam[i], *at][:3]
        h = lam[i + 1] - lam[i]
        hh = -h if form == "data" else h  # the noise form is the data form with -h, alpha and sigma exchanged
        base = (s[i + 1] / s[i] if form == "data" else a[i + 1] / a[i]) * y
        scale = -(a[i + 1] if form == "data" else s[i + 1])
        first = scale * np.expm1(hh)
        y = base + first * m[0]
        if len(m) == 2:
            y = y + first * 0.5 * (m[0] - m[1]) / ((at[0] - at[1]) / h)
        if len(m) == 3:
            r0, r1 = (at[0] - at[1]) / h, (at[1] - at[2]) / h
            d10, d11 = (m[0] - m[1]) / r0, (m[1] - m[2]) / r1
            d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
            d2 = (d10 - d11) / (r0 + r1)
            phi2 = np.expm1(hh) / hh - 1
            phi3 = phi2 / hh - 0.5
            y = y + scale * (phi2 * d1 + (1 if half else 2) * phi3 * d2)
    make = solver.dpm_solver_pp if form == "data" else P(solver.dpm_solver, method="multistep")
    close(make(VP, g, order=3, variant="public" if half else "midpoint", lower_order_final="never"), y)


def test_singlestep_formulas():
    g = open_grid(4)
    at = lambda lam: (lambda c: (float(c.alpha), float(c.sigma)))(VP.coefficients(VP.time(np.float64(lam))))
    noise, data = X, X
    a, s, lam = points(g)
    for i in range(len(g)):
        h = lam[i + 1] - lam[i]
        (a1, s1), (a2, s2) = at(lam[i] + h / 3), at(lam[i] + 2 * h / 3)
        e = predict(noise, a[i], s[i])[1]
        e1 = predict(a1 / a[i] * noise - s1 * np.expm1(h / 3) * e, a1, s1)[1]
        second = 2 * s2 * (np.expm1(2 * h / 3) / (2 * h / 3) - 1)
        e2 = predict(a2 / a[i] * noise - s2 * np.expm1(2 * h / 3) * e - second * (e1 - e), a2, s2)[1]
        last = s[i + 1] / (2 / 3) * (np.expm1(h) / h - 1)
        noise = a[i + 1] / a[i] * noise - s[i + 1] * np.expm1(h) * e - last * (e2 - e)
        d = predict(data, a[i], s[i])[0]
        d1 = predict(s1 / s[i] * data - a1 * np.expm1(-h / 3) * d, a1, s1)[0]
        second = 2 * a2 * (np.expm1(-2 * h / 3) / (2 * h / 3) + 1)
        d2 = predict(s2 / s[i] * data - a2 * np.expm1(-2 * h / 3) * d + second * (d1 - d), a2, s2)[0]
        last = a[i + 1] / (2 / 3) * (np.expm1(-h) / h + 1)
        data = s[i + 1] / s[i] * data - a[i + 1] * np.expm1(-h) * d + last * (d2 - d)
    close(solver.dpm_solver(VP, g, order=3, method="singlestep"), noise)
    close(solver.dpm_solver_pp(VP, g, order=3, method="singlestep"), data)


@pytest.mark.parametrize("ratio", [1.0, 0.9])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_and_dc_as_published(order, variant, ratio):
    """Two states, a linear system for each step, the buffer overwritten by the compensation."""
    g = open_grid()
    a, s, lam = points(g)

    def rhos(h, r, corrector):
        hh, k = -h, len(r)
        b_h = hh if variant == "bh1" else np.expm1(hh)
        if k == 1:
            return b_h, np.array([0.5])
        phi, rows, right, factorial = np.expm1(hh) / hh - 1, [], [], 1.0
        for j in range(1, k + 1):
            rows.append(np.array(r) ** (j - 1))
            right.append(phi * factorial / b_h)
            factorial *= j + 1
            phi = phi / hh - 1 / factorial
        return b_h, np.linalg.solve(np.array(rows), np.array(right))

    y, m, t, before = X, [], [], None
    for i in range(len(g)):
        d = predict(y, a[i], s[i])[0]
        if before is not None:
            base, h, p, old, ratios = before
            b_h, rho = rhos(h, [*ratios, 1.0], True)
            total = sum(c * (o - old[0]) / r for c, o, r in zip(rho, old[1:p], ratios))
            y = base - a[i] * b_h * (total + rho[-1] * (d - old[0]))
        m, t = [d, *m][:3], [i, *t][:3]
        if ratio != 1 and len(m) == 3:
            time = g.time[t]
            to = ratio * time[0] + (1 - ratio) * time[1]
            basis = [np.prod([(to - time[q]) / (time[j] - time[q]) for q in range(3) if q != j]) for j in range(3)]
            m[0] = sum(c * v for c, v in zip(basis, m))
        p = min(order, len(m), len(g) - i)
        h = lam[i + 1] - lam[i]
        base = s[i + 1] / s[i] * y - a[i + 1] * np.expm1(-h) * m[0]
        ratios = [(lam[j] - lam[i]) / h for j in t[1:p]]
        before = (base, h, p, list(m), ratios)
        y = base
        if p > 1:
            b_h, rho = rhos(h, ratios, False)
            y = base - a[i + 1] * b_h * sum(c * (o - m[0]) / r for c, o, r in zip(rho, m[1:p], ratios))
    close(solver.unipc(VP, g, order=order, variant=variant, compensation=ratio), y, 1e-9)


def test_lms_as_k_diffusion_runs_it_down_to_zero():
    p = process.edm()
    g = grid.edm_rho(p, 9)
    nodes, w = np.polynomial.legendre.leggauss(20)
    y, e = 80 * X, []
    for i in range(9):
        e = [predict(y, 1.0, g.sigma[i])[1], *e][:4]
        u = g.sigma[i] + 0.5 * (nodes + 1) * (g.sigma[i + 1] - g.sigma[i])
        for j, value in enumerate(e):
            basis = np.prod(
                [(u - g.sigma[i - k]) / (g.sigma[i - j] - g.sigma[i - k]) for k in range(len(e)) if k != j], axis=0
            )
            y = y + 0.5 * (g.sigma[i + 1] - g.sigma[i]) * np.sum(w * basis) * value
    close(solver.lms(p, g), y, x=80 * X)
    close(solver.lms(p, grid.explicit(g.alpha, g.sigma, g.time)), y, x=80 * X)


def test_deis_in_time_against_brute_force_quadrature():
    g = open_grid(6)
    y, e = X, []
    for i in range(6):
        e = [predict(y, g.alpha[i], g.sigma[i])[1], *e][:3]
        t = np.linspace(g.time[i], g.time[i + 1], 20001)
        middle, c = 0.5 * (t[1:] + t[:-1]), VP.coefficients(t)
        rise = np.diff(c.sigma / c.alpha)
        total = y / g.alpha[i]
        for j, value in enumerate(e):
            others = [g.time[i - k] for k in range(len(e)) if k != j]
            total = (
                total + np.sum(rise * np.prod([(middle - o) / (g.time[i - j] - o) for o in others], axis=0)) * value
            )
        y = g.alpha[i + 1] * total
    close(solver.deis(VP, g, order=3), y, 1e-6)


def test_f_pndm_as_published():
    g = open_grid()
    a, s, _ = points(g)
    transfer = lambda y, i, o, e: o[0] / i[0] * y + (o[1] - o[0] * i[1] / i[0]) * e
    y, e = X, []
    for i in range(len(g)):
        here, to = (a[i], s[i]), (a[i + 1], s[i + 1])
        c = VP.coefficients(np.float64((g.time[i] + g.time[i + 1]) / 2))
        mid = (float(c.alpha), float(c.sigma))
        e = [predict(y, *here)[1], *e][:4]
        if len(e) < 4:
            e2 = predict(transfer(y, here, mid, e[0]), *mid)[1]
            e3 = predict(transfer(y, here, mid, e2), *mid)[1]
            e4 = predict(transfer(y, here, to, e3), *to)[1]
            mean = (e[0] + 2 * e2 + 2 * e3 + e4) / 6
        else:
            mean = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        y = transfer(y, here, to, mean)
    close(solver.f_pndm(VP, g, variant="public"), y)


@pytest.mark.parametrize("order", [0.7, 1.8, 2.6, 3.5, 4.9])
def test_ghvb_with_its_buffer(order):
    g = open_grid(11)
    p = int(np.ceil(order))
    b = 1 - (p - order)
    table = {
        1: [b],
        2: [(2 + b) / 2, -(2 - b) / 2],
        3: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
        4: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
        5: np.array([1650 + 251 * b, -(3420 - 646 * b), 2880 - 264 * b, -(1380 - 106 * b), 270 - 19 * b]) / 720,
    }
    y, v = X, []
    for i in range(len(g)):
        e = predict(y, g.alpha[i], g.sigma[i])[1]
        v = [e if not v else (1 - b) * v[0] + b * e, *v][:p]
        rise = g.sigma[i + 1] / g.alpha[i + 1] - g.sigma[i] / g.alpha[i]
        slope = sum(c * w for c, w in zip(table[len(v)], v)) / b
        y = g.alpha[i + 1] * (y / g.alpha[i] + rise * slope)
    made = solver.ghvb(VP, g, order=order)
    close(made, y, 1e-9)
    assert made.blocks.A.shape[1] == 2 and made.blocks.B.shape[1] == p


def test_heavy_ball_with_its_buffer():
    g, b = open_grid(11), 0.6
    y, e, v = X, [], None
    for i in range(len(g)):
        e = [predict(y, g.alpha[i], g.sigma[i])[1], *e][:3]
        adams = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12]}[len(e)]
        f = sum(c * w for c, w in zip(adams, e))
        v = f if v is None else (1 - b) * v + b * f
        rise = g.sigma[i + 1] / g.alpha[i + 1] - g.sigma[i] / g.alpha[i]
        y = g.alpha[i + 1] * (y / g.alpha[i] + rise * v)
    close(solver.heavy_ball(VP, g, order=3, beta=b), y, 1e-9)


def test_v3_with_the_statistics_of_gaussian_data_is_exact_in_one_step():
    """l = sigma^2/(alpha^2 s0^2 + sigma^2), s = 0, b = df/dlam with f = -l mean (closed-form EMS)."""
    mean, std = 0.7, 0.4
    lam = np.linspace(-4, 4, 4001)
    rho2 = np.exp(-2 * lam)
    linear = rho2 / (std**2 + rho2)
    b = -mean * (-2 * linear * (1 - linear))
    g = grid.from_times(VP, VP.time(np.array([-3.0, 2.5])))
    table = solver.dpm_solver_v3(VP, g, l=linear, s=0.0, b=b, lam=lam, order=1)
    world = exact.GaussianMixture([1.0], [mean], [std**2])
    y = trace(table, X, P(posterior, world))
    (a0, a1), (s0, s1) = g.alpha, g.sigma
    expected = a1 * mean + np.sqrt((a1**2 * std**2 + s1**2) / (a0**2 * std**2 + s0**2)) * (X - a0 * mean)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    plain = trace(solver.ddim(VP, g), X, P(posterior, world))
    assert np.max(np.abs(plain - expected)) > 0.1
