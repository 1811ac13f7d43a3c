"""What replays of the public samplers turned up, each against the formula written out here."""

import math

import numpy as np
import pytest
from solver_cases import MIXTURE

from jaxdiff import process, solver
from jaxdiff.solver.grid import explicit
from jaxdiff.solver.order import posterior

X = np.linspace(-1.5, 2.0, 7)
RHO = np.array([12.0, 6.1, 3.3, 1.9, 1.2, 0.7, 0.4, 0.2, 0.08, 0.0])
A = 1 / np.sqrt(1 + RHO**2)
S = RHO * A
VP = process.vp()
GRID = explicit(A, S, np.linspace(1, 0, RHO.size))


def noise(x, i):
    return posterior(MIXTURE, x, A[i], S[i])[1]


def transfer(x, i, j, eps):
    return A[j] * (x / A[i] + (RHO[j] - RHO[i]) * eps)


def run(table):
    """A deterministic table in numpy float64."""
    b = table.blocks
    zero = np.zeros(table.rows)
    p, q, E = (zero if v is None else np.asarray(v) for v in (b.p, b.q, b.E))
    ys, ds = [X] * b.A.shape[1], [np.zeros_like(X)] * b.B.shape[1]
    for k in range(table.rows):
        x0, eps = posterior(MIXTURE, ys[0], float(b.alpha[k]), float(b.sigma[k]))
        ds = [p[k] * x0 + q[k] * eps, *ds[:-1]]
        y = sum(c * v for c, v in zip(b.A[k], ys)) + sum(c * v for c, v in zip(b.B[k], ds)) + E[k]
        ys = [y, *ys[:-1]]
    return ys[0]


ADAMS = {2: np.array([3, -1]) / 2, 3: np.array([23, -16, 5]) / 12, 4: np.array([55, -59, 37, -9]) / 24}


def rising(N, weights):
    """PLMS: one Heun step of the transfer, whose second prediction is not kept, then Adams steps."""
    x, past = X, []
    for i in range(N):
        past = [noise(x, i), *past][:4]
        if i == 0:
            ahead = noise(transfer(x, 0, 1, past[0]), 1)
            x = transfer(x, 0, 1, (past[0] + ahead) / 2)
        else:
            x = transfer(x, i, i + 1, sum(w * e for w, e in zip(weights(i, len(past)), past)))
    return x


def test_plms_starts_with_one_heun_step():
    table = solver.pndm(VP, GRID, order=4, warmup="heun", variant="public")
    assert table.nfe == len(GRID) + 1
    np.testing.assert_allclose(run(table), rising(9, lambda i, n: ADAMS[n]), rtol=0, atol=1e-12)


def test_plms_with_the_weights_of_the_increments():
    """Each weight is the mean over the step of a Lagrange polynomial in rho."""

    def weights(i, n):
        points, gains = np.polynomial.legendre.leggauss(6)
        rho = 0.5 * (RHO[i] + RHO[i + 1]) + 0.5 * (RHO[i + 1] - RHO[i]) * points
        nodes = RHO[i - np.arange(n)]
        return [0.5 * np.sum(gains * np.prod([(rho - m) / (c - m) for m in nodes if m != c], axis=0)) for c in nodes]

    table = solver.pndm(VP, GRID, order=4, warmup="heun")
    np.testing.assert_allclose(run(table), rising(9, weights), rtol=0, atol=1e-11)


def test_plms_on_short_grids_and_at_both_ends():
    """One step is one first-order jump; from alpha = 0 the Heun step is the second."""
    one = explicit(A[[0, -1]], S[[0, -1]], [1.0, 0.0])
    assert solver.pndm(VP, one, order=4, warmup="heun").nfe == 1
    pure = explicit(np.append(0.0, A), np.append(1.0, S), np.linspace(1, 0, RHO.size + 1))
    table = solver.pndm(VP, pure, order=4, warmup="heun")
    assert table.nfe == 11 and list(np.where(~np.asarray(table.out))[0]) == [1]
    assert solver.check(table).ok()
    with pytest.raises(ValueError, match="warmup: 'euler' given; allowed: rk, heun, ramp"):
        solver.pndm(VP, GRID, warmup="euler")


def test_full_renoising_is_the_ancestral_step_of_large_eta():
    """x_s = alpha_s x0_hat + sigma_s z: the public stochastic flow sampler."""
    s = np.array([0.98, 0.8, 0.55, 0.3, 0.08, 0.0])
    z = np.random.default_rng(0).normal(size=(5, X.size))
    x = X
    for i in range(5):
        x0 = posterior(MIXTURE, x, 1 - s[i], s[i])[0]
        x = (1 - s[i + 1]) * x0 + s[i + 1] * z[i]
    table = solver.euler_ancestral(process.linear(), explicit(1 - s, s, s), eta=1e3)
    b, y = table.blocks, X
    for k in range(5):
        y = b.A[k, 0] * y + b.B[k, 0] * posterior(MIXTURE, y, b.alpha[k], b.sigma[k])[0] + b.C[k] * z[k]
    np.testing.assert_allclose(y, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("variant", ["bh1", "bh2", "lagrange"])
def test_unipc_reaches_sigma_zero_in_every_variant(variant):
    """The last step is alpha_s x0_hat of the corrected state's own prediction; a public bh1 makes 0 * inf there."""
    table = solver.unipc(VP, GRID, order=3, variant=variant)
    last = len(GRID) - 1
    np.testing.assert_array_equal(np.asarray(table.blocks.A)[last], 0 * np.asarray(table.blocks.A)[last])
    np.testing.assert_array_equal(np.asarray(table.blocks.B)[last, :1], [1.0])
    assert np.all(np.isfinite(run(table)))


def test_third_order_sde_slope_vanishes_with_the_step():
    """The curvature weight of the 3M SDE is ``(1 - H - e^-H)/H^2 + 1/2``, of size H/6; one public code has -1/2."""
    for h in (1e-2, 1e-1, 1.0):
        rho = np.exp(-h * np.arange(4))
        g = explicit(np.ones(4), rho, np.linspace(1, 0, 4))
        table = solver.dpm_solver_pp_sde(process.ve(), g, order=3, variant="public", lower_order_final="never")
        H = 2 * h
        curvature = (1 - H - math.exp(-H)) / H**2 + 0.5
        # equal steps: D1 = (3 D_0 - 4 D_1 + D_2)/2 and D2 = (D_0 - 2 D_1 + D_2)/2
        first = math.expm1(-H) / H + 1
        want = [-math.expm1(-H), 0, 0] + first * np.array([1.5, -2, 0.5]) + curvature * np.array([0.5, -1, 0.5])
        np.testing.assert_allclose(np.asarray(table.blocks.B)[2], want, rtol=0, atol=1e-11)
        assert abs(curvature - H / 6) < H * H / 10
