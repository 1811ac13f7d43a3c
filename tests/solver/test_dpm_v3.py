"""DPM-Solver-v3 against its published sampler written out: correctors, pseudo orders, statistics; their orders."""

import functools
import itertools
import math

import numpy as np
import pytest

from jaxdiff import process, solver
from jaxdiff.solver import grid, weights
from jaxdiff.solver.order import WORLD, posterior, trace

P = functools.partial
VP = process.vp()
X = np.linspace(-2.5, 2.5, 11)
CORRECTORS = {  # the published use_corrector, c_pseudo, as options of ours
    (False, False): {},
    (True, False): {"corrector": True, "variant": "public"},
    (True, True): {"corrector": True, "c_pseudo": True},
}


class Exact:
    """The integrals of constant statistics from index i to j, in closed form."""

    def __init__(self, at, l, s, b):  # noqa: E741
        self.at, self.rate, self.stats = at, l + s, (l, s, b)

    def l(self, i):  # noqa: E743
        return self.stats[0]

    def step(self, i, j, n):
        """``int e^{L+S} (lam - lam_i)^n / n!`` relative to i."""
        h = self.at[j] - self.at[i]
        x, w = np.polynomial.legendre.leggauss(40)
        u = 0.5 * (x + 1) * h
        return float(np.sum(0.5 * h * w * np.exp(self.rate * u) * u**n) / math.factorial(n))

    def L(self, i, j):
        return self.stats[0] * (self.at[j] - self.at[i])

    def S(self, i, j):
        return self.stats[1] * (self.at[j] - self.at[i])

    def B(self, i, j):
        """``int e^{-S} b`` relative to i."""
        _, s, b = self.stats
        return b * -np.expm1(-s * (self.at[j] - self.at[i])) / s

    def C(self, i, j):
        """``int e^{L+S} B`` relative to i."""
        _, s, b = self.stats
        h = self.at[j] - self.at[i]
        return b / s * (np.expm1(self.rate * h) / self.rate - np.expm1((self.rate - s) * h) / (self.rate - s))


class Trapezoid:
    """The integrals of arrays of statistics by the published trapezoid sums; ``at`` are indices into them."""

    def __init__(self, at, lam, l, s, b):  # noqa: E741
        self.at, self.lam, self.values = at, lam, l
        run = lambda f: np.concatenate([[0.0], np.cumsum(0.5 * np.diff(lam) * (f[1:] + f[:-1]))])
        self.cl, self.cs = run(l), run(s)
        self.cb = run(np.exp(-self.cs) * b)

    def l(self, i):  # noqa: E743
        return self.values[self.at[i]]

    def _sum(self, i, j, f):
        cut = slice(self.at[i], self.at[j] + 1)
        weight = np.exp((self.cl + self.cs)[cut] - (self.cl + self.cs)[self.at[i]])
        lam, f = self.lam[cut], weight * f[cut]
        return float(np.sum(0.5 * np.diff(lam) * (f[1:] + f[:-1])))

    def step(self, i, j, n):
        return self._sum(i, j, (self.lam - self.lam[self.at[i]]) ** n / math.factorial(n))

    def L(self, i, j):
        return self.cl[self.at[j]] - self.cl[self.at[i]]

    def S(self, i, j):
        return self.cs[self.at[j]] - self.cs[self.at[i]]

    def B(self, i, j):
        return np.exp(self.cs[self.at[i]]) * (self.cb[self.at[j]] - self.cb[self.at[i]])

    def C(self, i, j):
        return self._sum(i, j, np.exp(self.cs[self.at[i]]) * (self.cb - self.cb[self.at[i]]))


def published(g, integrals, order, *, use_corrector, p_pseudo, c_pseudo, tail, half=None):
    """The public sampler: caches of states and noises, derivatives, predictor, corrector, refreshed noise."""
    a, s, lam = g.alpha, g.sigma, np.log(g.alpha) - np.log(g.sigma)

    def derivatives(n, at, values, pseudo):
        if pseudo:
            D = [values]
            for i in range(1, n + 1):
                pairs = range(n - i + 1)
                D.append([(D[i - 1][j] - D[i - 1][j + 1]) / (at[j] - at[i + j]) for j in pairs])
            return [D[i][0] * math.factorial(i) for i in range(1, n + 1)]
        powers = np.array([[(at[j] - at[0]) ** i for i in range(1, n + 1)] for j in range(1, n + 1)])
        solution = np.linalg.solve(powers, np.array([v - values[0] for v in values[1:]]))
        return [solution[i - 1] * math.factorial(i) for i in range(1, n + 1)]

    def update(nodes, end, order, pseudo):
        i = nodes[0]
        f = lambda j: (s[j] * eps[j] - integrals.l(j) * x[j]) / a[j]
        values = [np.exp(-integrals.S(i, j)) * f(j) - integrals.B(i, j) for j in nodes[:order]]
        outer = a[end] * np.exp(-integrals.L(i, end))
        y = outer / a[i] * x[i] - outer * (integrals.step(i, end, 0) * values[0] + integrals.C(i, end))
        if order > 1:
            for n, d in enumerate(derivatives(order - 1, [lam[j] for j in nodes[:order]], values, pseudo), 1):
                y = y - outer * integrals.step(i, end, n) * d
        return y

    x, eps, p, y = [], [], 0, X
    for k in range(len(g)):
        x.append(y)
        eps.append(posterior(WORLD, y, a[k], s[k])[1])
        c = p + c_pseudo
        if use_corrector and c > 1 and (half is None or g.time[k] > half):
            new = update([k - 1, k, *range(k - 2, -1, -1)], k, c, c_pseudo)
            kept = s[k] * eps[k] - integrals.l(k) * x[k]
            x[k], eps[k] = new, (kept + integrals.l(k) * new) / s[k]
        p = min(k + 1, order)
        if tail:
            p = min(p, len(g) - k)
        y = update(list(range(k, -1, -1)), k + 1, p, p_pseudo)
    return y


def run(table):
    return trace(table, X, P(posterior, WORLD))


@pytest.mark.parametrize("use_corrector, c_pseudo", CORRECTORS)
@pytest.mark.parametrize("p_pseudo", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_as_published_with_constant_statistics(order, p_pseudo, use_corrector, c_pseudo):
    g = grid.from_times(VP, np.linspace(0.98, 0.02, 10))
    l, s, b = 0.7, -0.1, 0.2  # noqa: E741
    integrals = Exact(np.log(g.alpha) - np.log(g.sigma), l, s, b)
    for tail in (False, True):
        expected = published(
            g, integrals, order, use_corrector=use_corrector, p_pseudo=p_pseudo, c_pseudo=c_pseudo, tail=tail
        )
        table = solver.dpm_solver_v3(
            VP,
            g,
            l=l,
            s=s,
            b=b,
            order=order,
            p_pseudo=p_pseudo,
            lower_order_final="always" if tail else "never",
            **CORRECTORS[use_corrector, c_pseudo],
        )
        np.testing.assert_allclose(run(table), expected, rtol=1e-10, atol=1e-10)
        assert table.nfe == 9 and table.blocks.A.shape[1] == 1


def test_as_published_with_arrays_of_statistics_as_their_trapezoid_sums_converge():
    differences = []
    for count in (500, 1000, 2000):
        lam = np.linspace(-3, 3, count + 1)
        l, s, b = 0.6 + 0.3 * np.tanh(lam), -0.2 + 0.1 * np.sin(lam), 0.3 * np.cos(lam)  # noqa: E741
        at = np.array([0, 80, 150, 230, 300, 360, 440, 500]) * count // 500
        times = VP.time(lam[at])
        times[0] = min(times[0], VP.t_max)
        g = grid.from_times(VP, times)
        expected = published(
            g, Trapezoid(at, lam, l, s, b), 3, use_corrector=True, p_pseudo=False, c_pseudo=True, tail=True
        )
        table = solver.dpm_solver_v3(
            VP, g, l=l, s=s, b=b, lam=lam, order=3, corrector=True, c_pseudo=True, lower_order_final="always"
        )
        differences.append(run(table) - expected)
    sizes = np.max(np.abs(differences), axis=1)
    np.testing.assert_allclose(sizes[:-1] / sizes[1:], 4, rtol=0.02)
    # their limit, extrapolated: no difference but the sums'
    assert sizes[-1] < 1e-5 and np.max(np.abs(4 * differences[2] - differences[1])) / 3 < 1e-8


def test_half_corrected_as_published():
    """The corrector acts above t = 1/2 only, which one flag a step says."""
    g = grid.from_times(VP, np.linspace(0.98, 0.02, 10))
    integrals = Exact(np.log(g.alpha) - np.log(g.sigma), 0.7, -0.1, 0.2)
    expected = published(g, integrals, 2, use_corrector=True, p_pseudo=False, c_pseudo=True, tail=True, half=0.5)
    make = P(solver.dpm_solver_v3, VP, g, l=0.7, s=-0.1, b=0.2, c_pseudo=True, lower_order_final="always")
    flags = [*(g.time[1:-1] > 0.5), False]
    assert 0 < sum(flags) < 8
    np.testing.assert_allclose(run(make(corrector=flags)), expected, rtol=1e-10, atol=1e-10)
    assert np.max(np.abs(run(make(corrector=True)) - expected)) > 1e-6


def test_pseudo_orders_agree_with_true_ones_up_to_two_values_and_differ_beyond():
    g = grid.from_times(VP, np.linspace(0.98, 0.02, 10))
    make = P(solver.dpm_solver_v3, VP, g, l=0.7, s=-0.1, b=0.2, lower_order_final="never")
    norm = lambda **options: np.concatenate([v.ravel() for v in solver.unroll(make(**options))])
    np.testing.assert_allclose(norm(order=2, p_pseudo=True), norm(order=2), atol=1e-13)
    np.testing.assert_allclose(
        norm(order=1, corrector=True, c_pseudo=True), norm(order=1, corrector=True), atol=1e-13
    )
    assert np.max(np.abs(norm(order=3, p_pseudo=True) - norm(order=3))) > 1e-3
    for one, two in itertools.combinations([{}, {"variant": "public"}, {"c_pseudo": True}, {"corrector": False}], 2):
        both = [norm(**{"order": 2, "corrector": True, **options}) for options in (one, two)]
        assert np.max(np.abs(both[0] - both[1])) > 1e-4


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("form, statistics", [("data", (1.0, 0.0)), ("noise", (0.0, -1.0))])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_pseudo_steps_of_usf_are_those_of_v3(order, form, statistics, corrector):
    g = grid.from_times(VP, np.linspace(0.98, 0.02, 10))
    ours = solver.usf(VP, g, solver.Step(order, form, "lam", corrector, "pseudo"))
    l, s = statistics  # noqa: E741
    rules = {"p_pseudo": True, "corrector": corrector, "c_pseudo": corrector, "lower_order_final": "never"}
    for a, b in zip(solver.unroll(ours), solver.unroll(solver.dpm_solver_v3(VP, g, l=l, s=s, order=order, **rules))):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * (1 + np.max(np.abs(b))))


def test_pseudo_weights_in_every_clock():
    """Against divided differences by recursion, on x_0, x_1, ..., and two-thousand-point quadrature."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=4)
    for H, nodes in ((1.3, [0.0, -0.7, -1.9, -2.2]), (-0.8, [0.0, 1.0, -0.4, -1.1])):
        nodes = np.array(nodes)
        D = [list(values)]
        for k in range(1, 4):
            D.append([(D[-1][j] - D[-1][j + 1]) / (nodes[j] - nodes[j + k]) for j in range(4 - k)])
        curve = lambda u: sum(D[k][0] * (u - nodes[0]) ** k for k in range(4))  # noqa: B023
        x, w = np.polynomial.legendre.leggauss(200)
        u, w = 0.5 * (x + 1), 0.5 * w
        exact = np.sum(w * H * np.exp(-(1 - u) * H) * curve(u))
        for clock in (None, lambda u: u):
            made = weights.exponential(H, nodes, clock, pseudo=True)
            np.testing.assert_allclose(made @ values, exact, rtol=1e-12)
        made = weights.exponential(H, 1 + 2 * nodes, lambda u: 1 + 2 * u, pseudo=True)
        np.testing.assert_allclose(made @ values, exact, rtol=1e-12)  # a clock's unit and zero do not matter
        np.testing.assert_allclose(weights.polynomial(nodes, pseudo=True) @ values, np.sum(w * curve(u)), rtol=1e-12)
        pair = nodes[:2]
        np.testing.assert_allclose(weights.nearest(pair, u), weights.lagrange(pair, u), atol=1e-14)
        np.testing.assert_allclose(
            weights.exponential(H, pair, pseudo=True), weights.exponential(H, pair), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("variable", ["t", "rho"])
def test_pseudo_steps_in_other_clocks_are_of_second_order(variable):
    make = P(solver.usf, steps=solver.Step(3, "noise", variable, False, "pseudo"))
    measured = solver.order(make, VP, warm=5, steps=(128, 256))
    assert abs(measured.slope - 2) < 0.2, measured


@pytest.mark.parametrize(
    "options, expected, steps",
    [
        ({"order": 3, "p_pseudo": True}, 2, (128, 256)),
        ({"order": 2, "corrector": True, "c_pseudo": True}, 2, (128, 256)),
        ({"order": 2, "corrector": True, "variant": "public"}, 2, (128, 256)),
        # two error terms cancel on coarser grids: slopes 3.48, 3.45, 3.16, 3.00 from 128 to 2048 steps
        pytest.param({"order": 3, "corrector": True, "variant": "public"}, 3, (512, 1024), marks=pytest.mark.slow),
    ],
)
def test_measured_orders(options, expected, steps):
    make = P(solver.dpm_solver_v3, l=0.7, s=-0.1, b=0.2, lower_order_final="never", **options)
    measured = solver.order(make, VP, warm=5, steps=steps)
    assert abs(measured.slope - expected) < 0.2, measured


def test_refusals_name_what_is_wrong():
    make = P(solver.dpm_solver_v3, VP, grid.uniform(VP, 5))
    for match, options in {
        "variant: 'publik' given; allowed: lagrange, public": {"corrector": True, "variant": "publik"},
        "variant: 'public' given without a corrector": {"variant": "public"},
        "c_pseudo: True given without a corrector": {"c_pseudo": True},
        "corrector: 3 values given; need one, or one a step": {"corrector": [True] * 3},
        "order: 5 given": {"order": 5},
        "b: not finite": {"b": math.nan},
    }.items():
        with pytest.raises(ValueError, match=match):
            make(**options)
    with pytest.raises(ValueError, match="estimator: 'taylor' given; allowed: lagrange, pseudo"):
        solver.usf(VP, grid.uniform(VP, 5), {"estimator": "taylor"})
