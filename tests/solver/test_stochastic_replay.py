"""Tables against the published recurrences, written out step by step, on one grid, start, noise and nonlinear denoiser."""

import itertools
import math

import numpy as np
import pytest
from solver_cases import MIXTURE

from jaxdiff import process, solver
from jaxdiff.solver import grid
from jaxdiff.solver.grid import from_times
from jaxdiff.solver.order import posterior

X = np.linspace(-1.5, 2.0, 7)
VE, VP = process.ve(), process.vp()
SIGMAS = grid.edm_rho(VE, 8, sigma_min=0.02, sigma_max=20.0)
TIMES = from_times(VP, np.linspace(0.95, 0.05, 9))


def data(x, alpha, sigma):
    return posterior(MIXTURE, x, alpha, sigma)[0]


def replay(table, y, z):
    """The table's rows in numpy float64 with given draws, one a row."""
    b = table.blocks
    K = b.A.shape[0]
    p, q, C = (np.zeros(K) if v is None else np.asarray(v) for v in (b.p, b.q, b.C))
    ys, ds = [y] * b.A.shape[1], [np.zeros_like(y)] * b.B.shape[1]
    for k in range(K):
        x0, eps = posterior(MIXTURE, ys[0], float(b.alpha[k]), float(b.sigma[k]))
        ds = [p[k] * x0 + q[k] * eps, *ds[:-1]]
        y = sum(a * v for a, v in zip(b.A[k], ys)) + sum(w * v for w, v in zip(b.B[k], ds)) + C[k] * z[k]
        ys = [y, *ys[:-1]]
    return ys[0]


def draws(count):
    return np.random.default_rng(3).normal(size=(count, X.size))


def split(s, t, eta):
    up = min(t, eta * math.sqrt(t * t * (s * s - t * t) / (s * s)))
    return math.sqrt(t * t - up * up), up


def ancestral(kind, eta, z):
    """k-diffusion's three, sigma as the clock."""
    x, sigmas, row = 20.0 * X, SIGMAS.sigma, 0
    for s, t in itertools.pairwise(sigmas):
        down, up = split(s, t, eta) if t > 0 else (0.0, 0.0)
        d = (x - data(x, 1.0, s)) / s
        if kind == "euler" or down == 0:
            x, row = x + (down - s) * d + up * z[row], row + 1
            continue
        mid = math.sqrt(s * down)
        if kind == "dpm2":
            x_mid = x + (mid - s) * d
            x = x + (down - s) * (x_mid - data(x_mid, 1.0, mid)) / mid
        else:
            x_mid = mid / s * x + (1 - mid / s) * (x - s * d)
            x = down / s * x + (1 - down / s) * data(x_mid, 1.0, mid)
        x, row = x + up * z[row + 1], row + 2
    return x


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_ancestral_family(eta):
    z = draws(16)
    makers = {"euler": solver.euler_ancestral, "dpm2": solver.dpm2_ancestral, "2s": solver.dpmpp_2s_ancestral}
    for kind, maker in makers.items():
        got = replay(maker(VE, SIGMAS, eta=eta), 20.0 * X, z)
        np.testing.assert_allclose(got, ancestral(kind, eta, z), rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_sde_of_two_stages(eta):
    """The public Brownian tree: increments of one path in sigma, so the step's noise holds the stage's."""
    z, x = draws(16), 20.0 * X
    for i, (s, t) in enumerate(zip(SIGMAS.sigma[:-1], SIGMAS.sigma[1:])):
        first = data(x, 1.0, s)
        if t == 0:
            x = first
            break
        mid = math.sqrt(s * t)
        down, up = split(s, mid, eta)
        z1, z2 = z[2 * i], z[2 * i + 1]
        x_mid = down / s * x + (1 - down / s) * first + up * z1
        whole = math.sqrt((s - mid) / (s - t)) * z1 + math.sqrt((mid - t) / (s - t)) * z2
        down, up = split(s, t, eta)
        x = down / s * x + (1 - down / s) * data(x_mid, 1.0, mid) + up * whole
    table = solver.dpm_solver_pp_sde(VE, SIGMAS, method="singlestep", coupling="rho", eta=eta)
    np.testing.assert_allclose(replay(table, 20.0 * X, z), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["midpoint", "heun", "3m"])
def test_sde_multistep(kind, eta):
    z, x, past, steps = draws(16), 20.0 * X, [], []
    for i, (s, t) in enumerate(zip(SIGMAS.sigma[:-1], SIGMAS.sigma[1:])):
        past = [data(x, 1.0, s), *past]
        if t == 0:
            x = past[0]
            break
        h = math.log(s / t)
        steps = [h, *steps]
        H = (1 + eta) * h
        x = math.exp(-H) * x - math.expm1(-H) * past[0]
        phi_2 = math.expm1(-H) / H + 1
        if len(past) > 2 and kind == "3m":
            r0, r1 = steps[1] / h, steps[2] / h
            d0, d1 = (past[0] - past[1]) / r0, (past[1] - past[2]) / r1
            x = x + phi_2 * (d0 + (d0 - d1) * r0 / (r0 + r1)) - (phi_2 / H - 0.5) * (d0 - d1) / (r0 + r1)
        elif len(past) > 1:
            weight = -math.expm1(-H) / 2 if kind == "midpoint" else phi_2
            x = x + weight * (past[0] - past[1]) / (steps[1] / h)
        x = x + t * math.sqrt(-math.expm1(-2 * eta * h)) * z[i]
    options = {"order": 3, "variant": "public"} if kind == "3m" else {"variant": kind}
    table = solver.dpm_solver_pp_sde(VE, SIGMAS, eta=eta, lower_order_final="never", **options)
    np.testing.assert_allclose(replay(table, 20.0 * X, z), x, rtol=0, atol=1e-9)


PHI = {
    "x^2": lambda x: x**2,
    "sde_1": lambda x: x * (np.exp(-1 / x) + 10),
    "sde_4": lambda x: x**0.9 * np.log10(1 + 100 * x**1.5),
    "sde_5": lambda x: x * (np.exp(x**0.3) + 10),
}


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_published_er_sde(order, phi):
    z, x, f = draws(16), X, PHI[phi]
    a, rho = TIMES.alpha, TIMES.sigma / TIMES.alpha
    old = slope = None
    for i in range(8):
        x0 = data(x, TIMES.alpha[i], TIMES.sigma[i])
        s, t = rho[i], rho[i + 1]
        r = f(t) / f(s)
        variance = t * t - s * s * r * r
        mean = a[i + 1] / a[i] * r * x + a[i + 1] * (1 - r) * x0
        if old is not None and order > 1:
            points = t + np.arange(100) / 100 * (s - t)
            one = np.sum(1 / f(points) * (s - t) / 100)
            two = np.sum((points - s) / f(points) * (s - t) / 100)
            new = (x0 - old) / (s - rho[i - 1])
            mean = mean + a[i + 1] * (t - s + one * f(t)) * new
            if slope is not None and order > 2:
                second = 2 * (new - slope) / (s - rho[i - 2])
                mean = mean + a[i + 1] * ((t - s) ** 2 / 2 + two * f(t)) * second
            slope = new
        x = mean + a[i + 1] * math.sqrt(variance if abs(variance) >= 1e-6 else 0.0) * z[i]
        old = x0
    table = solver.er_sde(VP, TIMES, order=order, phi=phi, variant="public")
    np.testing.assert_allclose(replay(table, X, z), x, rtol=0, atol=1e-10)


def lagrange_integral(end, nodes, k):
    """``(1+k) int_{lam_0}^{lam_1} e^{(1+k)(lam - lam_1)} L_j d lam`` by quadrature; ``end = (lam_0, lam_1)``."""
    points, gains = np.polynomial.legendre.leggauss(40)
    lam = 0.5 * (end[0] + end[1]) + 0.5 * (end[1] - end[0]) * points
    kernel = (1 + k) * np.exp((1 + k) * (lam - end[1])) * gains * 0.5 * (end[1] - end[0])
    basis = [np.prod([(lam - m) / (n - m) for m in nodes if m != n], axis=0) * np.ones_like(lam) for n in nodes]
    return [float(np.sum(kernel * b)) for b in basis]


@pytest.mark.parametrize("pece", [False, True])
@pytest.mark.parametrize(("predictor", "corrector", "tau", "public"), [
    (1, 1, 1.0, False), (2, 2, 0.5, False), (2, 2, 1.0, True), (3, 4, 1.0, False), (3, 2, 0.8, True), (4, 3, 0.0, False),
])  # fmt: skip
def test_sa_solver_with_two_states(predictor, corrector, tau, public, pece):
    """Predicted and corrected state kept apart, one draw for both: what the fused rows fold together."""
    z, k = draws(16), tau**2
    a, s, lam = TIMES.alpha, TIMES.sigma, np.log(TIMES.alpha / TIMES.sigma)
    past, x_start = [], None

    def step(i, x, nodes, values, noise):
        """From point i - 1 to i."""
        h = lam[i] - lam[i - 1]
        w = lagrange_integral((lam[i - 1], lam[i]), nodes, k)
        if public and len(nodes) == 2:
            base = -math.expm1(-(1 + k) * h)
            slope = (1 + k) * h * h / 2 / (nodes[0] - nodes[1])
            w = [slope, base - slope] if nodes[0] == lam[i] else [base + slope, -slope]
        out = s[i] / s[i - 1] * math.exp(-k * h) * x + s[i] * math.sqrt(-math.expm1(-2 * k * h)) * noise
        return out + a[i] * sum(u * v for u, v in zip(w, values))

    x = X
    rows = iter(z)
    noise = None
    for i in range(8):
        value = data(x, a[i], s[i])
        if i > 0:
            count = min(corrector, len(past) + 1)
            nodes = [lam[i - j] for j in range(count)]
            x = step(i, x_start, nodes, [value, *past][:count], noise)
            if pece:
                value = data(x, a[i], s[i])
                next(rows)
        past, x_start, noise = [value, *past], x, next(rows)
        count = min(predictor, len(past))
        x = step(i + 1, x, [lam[i - j] for j in range(count)], past[:count], noise)
    table = solver.sa_solver(
        VP, TIMES, predictor=predictor, corrector=corrector, tau=tau, pece=pece,
        variant="public" if public else "lagrange", lower_order_final="never",
    )  # fmt: skip
    assert table.nfe == (15 if pece else 8)
    np.testing.assert_allclose(replay(table, X, z), x, rtol=0, atol=1e-9)


def test_restart_step_by_step():
    """EDM's Heun down, noise up to rho_max at the grid point nearest rho_min, and down again."""

    def heun(x, sigmas):
        for s, t in itertools.pairwise(sigmas):
            d = (x - data(x, 1.0, s)) / s
            y = x + (t - s) * d
            x = y if t == 0 else x + (t - s) * (d + (y - data(y, 1.0, t)) / t) / 2
        return x

    sigmas, z = SIGMAS.sigma, draws(40)
    stop = int(np.argmin(np.abs(sigmas[:-1] - 0.3)))
    x = heun(20.0 * X, sigmas[: stop + 1])
    again = (2.0 ** (1 / 7) + np.linspace(0, 1, 4) * (sigmas[stop] ** (1 / 7) - 2.0 ** (1 / 7))) ** 7
    rows = (2 * stop - 1, 2 * stop + 5)  # the rows that carry the noise
    for row in rows:
        x = heun(x + 1.003 * math.sqrt(4.0 - sigmas[stop] ** 2) * z[row], again)
    x = heun(x, sigmas[stop:])
    table = solver.restart(VE, SIGMAS, intervals=[(4, 2, 0.3, 2.0)], s_noise=1.003)
    np.testing.assert_allclose(replay(table, 20.0 * X, z), x, rtol=0, atol=1e-9)
