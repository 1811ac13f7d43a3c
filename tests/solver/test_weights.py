"""The weight generator: moments against quadrature, exactness on polynomials, both forms."""

import numpy as np
import pytest

from jaxdiff.solver import weights

POINTS, GAINS = np.polynomial.legendre.leggauss(80)
U, DU = 0.5 * (POINTS + 1), 0.5 * GAINS


@pytest.mark.parametrize("H", [1e-8, 1e-3, 0.3, 1.0, 2.5, 4.0, 9.0, -1e-8, -1e-3, -0.3, -1.0, -4.0, -9.0])
def test_moments_match_quadrature(H):
    expected = [np.sum(DU * H * np.exp(-(1 - U) * H) * U**m) for m in range(5)]
    np.testing.assert_allclose(weights.moments(H, 5), expected, rtol=5e-14)


@pytest.mark.parametrize("H", [0.01, 0.7, 5.0, -0.7, -5.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_exponential_is_exact_on_polynomials(H, count):
    nodes = np.array([0.0, -0.8, -2.1, -3.0])[:count]
    w = weights.exponential(H, nodes)
    for degree in range(count):
        expected = np.sum(DU * H * np.exp(-(1 - U) * H) * U**degree)
        np.testing.assert_allclose(w @ nodes**degree, expected, rtol=1e-11)
    np.testing.assert_allclose(np.sum(w), -np.expm1(-H), rtol=1e-12)


def test_clock_interpolates_in_another_variable():
    clock = lambda u: np.exp(-0.9 * u)
    nodes = np.array([1.0, 1.7, 2.4])
    w = weights.exponential(-0.9, nodes, clock)
    for degree in range(3):
        expected = np.sum(DU * -0.9 * np.exp((1 - U) * 0.9) * clock(U) ** degree)
        np.testing.assert_allclose(w @ nodes**degree, expected, rtol=1e-12)
    identity = weights.exponential(0.9, np.array([0.0, -0.5, -1.2]), lambda u: u)
    np.testing.assert_allclose(identity, weights.exponential(0.9, np.array([0.0, -0.5, -1.2])), rtol=1e-11)


def test_polynomial_gives_adams_bashforth():
    adams = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    for order, expected in adams.items():
        np.testing.assert_allclose(weights.polynomial(-np.arange(order)), expected, rtol=1e-12)
