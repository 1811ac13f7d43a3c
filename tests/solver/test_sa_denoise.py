"""SA-Solver's last correction and evaluation: the published "more steps", its law, its cost."""

import numpy as np
import pytest
from solver_cases import MIXTURE, PROCESSES, middle

from jaxdiff import solver
from jaxdiff.solver import grid
from jaxdiff.solver.order import posterior

X = np.linspace(-1.5, 2.0, 7)
DRAWS = np.random.default_rng(6).normal(size=(6, 7))


def weights(H, nodes):
    """``int_0^1 H e^{-(1-u)H} L_j(u) du`` by Gauss-Legendre."""
    u, w = np.polynomial.legendre.leggauss(40)
    u, w = (u + 1) / 2, w / 2
    basis = [np.prod([(u - o) / (n - o) for o in nodes if o != n], 0) * np.ones(40) for n in nodes]
    return [np.sum(w * H * np.exp(-(1 - u) * H) * b) for b in basis]


def more_steps(g, tau, pece):
    """Two-prediction Adams predictor and corrector with the tail lowered, corrected to the end, then x0_hat there."""
    lam, steps = np.log(g.alpha / g.sigma), len(g)
    data = lambda x, i: posterior(MIXTURE, x, g.alpha[i], g.sigma[i])[0]
    x = g.sigma[0] * X
    past = [(0, data(x, 0))]
    for i in range(steps):
        h = lam[i + 1] - lam[i]
        at = lambda j, i=i, h=h: (lam[j] - lam[i]) / h
        H = (1 + tau**2) * h

        def move(nodes, x=x, i=i, H=H, h=h, at=at):
            total = sum(w * d for w, (_, d) in zip(weights(H, [at(j) for j, _ in nodes]), nodes))
            noise = g.sigma[i + 1] * np.sqrt(-np.expm1(-2 * tau**2 * h)) * DRAWS[i]
            return g.sigma[i + 1] / g.sigma[i] * np.exp(-(tau**2) * h) * x + g.alpha[i + 1] * total + noise

        predicted = move(past[: min(2, steps - i)])
        new = (i + 1, data(predicted, i + 1))
        x = move([new, past[0]])
        if pece and i + 1 < steps:
            new = (i + 1, data(x, i + 1))
        past = [new, *past]
    return data(x, steps)


@pytest.mark.parametrize("pece", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_more_steps_written_out(tau, pece):
    p = PROCESSES["vp"]
    g = middle(p, 6)
    table = solver.sa_solver(p, g, tau=tau, pece=pece, denoise=True, lower_order_final="always", stochastic=True)
    b = table.blocks
    y, ds, drawn = float(b.start_scale) * X, [np.zeros(7)] * b.B.shape[1], 0
    for k in range(table.rows):
        ds = [posterior(MIXTURE, y, b.alpha[k], b.sigma[k])[0], *ds[:-1]]
        y = b.A[k, 0] * y + sum(w * d for w, d in zip(b.B[k], ds))
        if b.C[k] > 0:
            y, drawn = y + b.C[k] * DRAWS[drawn], drawn + 1
    assert drawn == (6 if tau else 0)
    np.testing.assert_allclose(y, more_steps(g, tau, pece), rtol=0, atol=1e-11)


def test_cost_ends_and_law():
    for p in PROCESSES.values():
        g = middle(p, 9)
        for corrector, more in ((2, 2), (3, 2), (0, 1)):
            plain, last = (solver.sa_solver(p, g, corrector=corrector, denoise=d) for d in (False, True))
            assert last.nfe == plain.nfe + more == 9 + more
            assert last.blocks.sigma[-1] == 0 and last.blocks.alpha[-1] == 1 and last.blocks.C[-1] == 0
            assert solver.check(last).ok(1e-10)
    with pytest.raises(ValueError, match=r"^denoise: True given, but the grid ends at sigma = 0"):
        solver.sa_solver(p, grid.uniform(p, 4), denoise=True)
