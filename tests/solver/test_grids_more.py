"""Published grids: their formulas, their identities, their errors (ends and monotonicity: test_grid.py)."""

import numpy as np
import pytest

from jaxdiff import process, solver
from jaxdiff.solver import grid

EDM, FLOW = process.edm(), process.linear()


def test_beta_identities():
    np.testing.assert_allclose(grid.beta(FLOW, 9, a=1, b=1).time, grid.uniform(FLOW, 9).time, atol=1e-15)
    np.testing.assert_allclose(grid.beta(FLOW, 9, a=0.5, b=0.5).time, grid.cosine(FLOW, 9).time, atol=1e-14)
    time = grid.beta(FLOW, 9).time
    np.testing.assert_allclose(time + time[::-1], 1, atol=1e-14)
    assert np.all(time[1:4] > grid.uniform(FLOW, 9).time[1:4])  # dense at both ends


def test_cosmap_walks_the_cosine_path():
    lam = process.cosine().half_log_snr(grid.uniform(process.cosine(), 12).time[1:-1])
    np.testing.assert_allclose(FLOW.half_log_snr(grid.cosmap(FLOW, 12).time[1:-1]), lam, atol=1e-12)


def test_arctan_is_the_exact_euler_contraction_of_a_gaussian():
    g = grid.arctan(EDM, 7, data_std=0.5)
    angle = np.arctan(g.sigma / 0.5)
    np.testing.assert_allclose(np.diff(angle[:-1]), np.diff(angle[:-1])[0], rtol=1e-12)
    # Euler on N(0, c^2): each step multiplies the standard deviation by cos(d angle) of the exact flow's
    s, t = g.sigma[1:-1], g.sigma[:-2]
    euler = 1 + (s - t) * t / (0.25 + t * t)
    exact = np.sqrt((0.25 + s * s) / (0.25 + t * t))
    np.testing.assert_allclose(euler / exact, np.cos(np.diff(angle[:-1])), rtol=1e-13)


def test_ays_reproduces_the_published_levels():
    for name, levels in grid.AYS.items():
        g = grid.ays(FLOW, 11, name=name)
        np.testing.assert_allclose((g.sigma / np.maximum(g.alpha, 1e-300))[1:-1], levels[1:], rtol=1e-12)
        assert g.time[-1] == 0
    fine = grid.ays(FLOW, 21)
    coarse = grid.ays(FLOW, 11)
    np.testing.assert_allclose(fine.time[2:-1:2], coarse.time[1:-1], rtol=1e-12)  # log-midpoints in between
    assert grid.ays(EDM, 11, name="svd").sigma[0] == 80.0  # levels beyond the process are left out


def test_level_grids_follow_their_formulas():
    i = np.arange(8) / 7
    np.testing.assert_allclose(
        grid.polyexponential(EDM, 8, rho=2.0).sigma[:-1],
        np.exp(np.log(0.002) + (1 - i) ** 2 * (np.log(80) - np.log(0.002))),
        rtol=1e-12,
    )
    np.testing.assert_allclose(grid.exponential(EDM, 8).sigma, grid.logsnr(EDM, 8).sigma, rtol=1e-12)
    vp = process.vp(0.1, 20.0)
    t = np.linspace(1, 1e-3, 8)
    g = grid.vp(vp, 8)
    np.testing.assert_allclose((g.sigma / g.alpha)[:-1], np.sqrt(np.expm1(19.9 * t * t / 2 + 0.1 * t)), rtol=1e-10)
    np.testing.assert_allclose(g.time[:-1], t, rtol=1e-9)  # on its own process the clock is linear


def test_shift_stretches_to_its_terminal():
    """LTX-Video's own order: shift the noise levels 1 .. 1/N, stretch them, append 0."""
    levels = 2.5 * np.linspace(1.0, 1 / 8, 8) / (1 + 1.5 * np.linspace(1.0, 1 / 8, 8))
    scale = (1 - levels[-1]) / (1 - 0.1)
    g = grid.shift(FLOW, 8, factor=2.5, terminal=0.1)
    np.testing.assert_allclose(g.time, np.append(1 - (1 - levels) / scale, 0.0), rtol=1e-13)
    np.testing.assert_allclose(g.time[-2:], [0.1, 0.0], atol=1e-15)
    assert grid.shift(process.ve(), 8, terminal=0.1).time[-2] == pytest.approx(0.1)
    assert grid.shift(EDM, 8, terminal=0.1).sigma[-2] == pytest.approx(8.0)
    assert grid.dynamic_shift(FLOW, 6, tokens=2048, terminal=0.1).time[-2] == pytest.approx(0.1)


def test_dynamic_shift():
    np.testing.assert_allclose(
        grid.dynamic_shift(FLOW, 6, tokens=4096).time, grid.shift(FLOW, 6, factor=np.exp(1.15)).time, rtol=1e-14
    )
    u = grid.uniform(FLOW, 6).time[1:-1]
    expected = np.exp(0.5) / (np.exp(0.5) + 1 / u - 1)
    np.testing.assert_allclose(grid.dynamic_shift(FLOW, 6, tokens=256).time[1:-1], expected, rtol=1e-13)


def test_discrete_spacings():
    ddpm = process.ddpm(1000)
    index = lambda **o: np.round(grid.discrete(ddpm, 4, **o).time[:-1] * 1000 - 1).astype(int).tolist()
    assert index(spacing="leading") == [750, 500, 250, 0]
    assert index(spacing="leading", offset=1) == [751, 501, 251, 1]
    assert index(spacing="linspace") == [999, 666, 333, 0]
    assert index(spacing="trailing") == [999, 749, 499, 249]
    assert grid.discrete(process.ddpm(10), 10).time[0] == 1.0


def test_discrete_spacings_of_multistep_schedulers():
    """N + 1 points without the last, as diffusers' multistep schedulers have it, and chains that end at their first index."""
    ddpm = process.ddpm(1000)
    index = lambda n, **o: np.round(grid.discrete(ddpm, n, extra=True, **o).time[:-1] * 1000 - 1).astype(int).tolist()
    assert index(4, spacing="leading") == [800, 600, 400, 200]
    assert index(4, spacing="leading", offset=1) == [801, 601, 401, 201]
    assert index(4, spacing="linspace") == [999, 749, 500, 250]  # numpy rounds 749.25, 499.5 and 249.75
    assert index(1, spacing="linspace") == [999]
    for options in (
        {"spacing": "leading", "offset": 1},
        {"spacing": "trailing"},
        {"spacing": "linspace", "extra": True},
    ):
        data, first = (grid.discrete(ddpm, 5, end=end, **options) for end in ("data", "first"))
        np.testing.assert_array_equal(first.time[:-1], data.time[:-1])
        assert (data.time[-1], first.time[-1]) == (0.0, 0.001) and data.sigma[-1] == 0
        np.testing.assert_allclose(first.sigma[-1] ** 2, 1e-4, rtol=1e-9)  # beta of the chain's first step
    assert solver.check(solver.ddim(ddpm, first)).ok()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: grid.ays(FLOW, 5, name="sd3"), "sd3.*sd15"),
        (lambda: grid.beta(FLOW, 5, a=0.0), "a: 0.0"),
        (lambda: grid.arctan(FLOW, 5, data_std=-1), "data_std: -1"),
        (lambda: grid.discrete(process.ddpm(10), 11), "11.*10"),
        (lambda: grid.discrete(FLOW, 5, spacing="middle"), "middle.*leading"),
        (lambda: grid.discrete(FLOW, 5, offset=1), "offset"),
        (lambda: grid.discrete(FLOW, 5, spacing="linspace", offset=1), "only spacing='leading'"),
        (lambda: grid.discrete(FLOW, 5, extra=True), "spacing='trailing' has neither"),
        (lambda: grid.discrete(FLOW, 5, spacing="leading", end="first"), "give extra=True"),
        (lambda: grid.discrete(process.ddpm(10), 10, end="first"), "give fewer steps"),
        (lambda: grid.discrete(process.ddpm(10), 10, spacing="leading", extra=True), "no more than 9"),
        (lambda: grid.discrete(FLOW, 5, end="zero"), "'zero' given; allowed: data, first"),
        (lambda: grid.discrete(FLOW, 5, train_steps=99.5), "train_steps: 99.5"),
        (lambda: grid.vp(FLOW, 5, t_min=0.0), "t_min"),
        (lambda: grid.vp(FLOW, 5, beta_d=np.inf), "beta_d: inf"),
        (lambda: grid.dynamic_shift(FLOW, 5, low=(64, 0.5), high=(64, 1.0)), "low, high: .* tokens"),
        (lambda: grid.shift(FLOW, 5, terminal=1.0), "terminal: 1.0 given"),
        (lambda: grid.shift(FLOW, 1, terminal=0.1), "terminal: 0.1 given .steps=1"),
        (lambda: grid.shift(FLOW, 5, factor=np.inf), "factor: inf given; need a finite number > 0"),
    ],
)
def test_errors_name_the_argument(make, words):
    with pytest.raises(ValueError, match=words):
        make()
