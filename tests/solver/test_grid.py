"""Time grids: every grid on every process, the identities they are known by, and what they refuse."""

import numpy as np
import pytest
from solver_cases import GRIDS, PROCESSES

from jaxdiff import process, solver
from jaxdiff.solver import grid

EXACT_END = {name: 0.05 if name == "linear_floor" else 0.0 for name in PROCESSES}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("path", PROCESSES)
def test_every_length_is_monotone_with_exact_ends(path, name):
    p = PROCESSES[path]
    for steps in range(1, 201):
        g = GRIDS[name](p, steps)
        assert len(g) == steps and g.time.shape == g.alpha.shape == g.sigma.shape == (steps + 1,)
        assert g.time.dtype == g.alpha.dtype == g.sigma.dtype == np.float64
        assert g.time[0] == p.t_max and g.time[-1] == 0.0
        start = p.coefficients(np.float64(p.t_max))
        assert (g.alpha[0], g.sigma[0]) == (start.alpha, start.sigma)
        assert g.alpha[-1] == 1.0 and g.sigma[-1] == EXACT_END[path]
        ratio = g.sigma[1:] * g.alpha[:-1] - g.sigma[:-1] * g.alpha[1:]
        assert np.all(ratio < 0)  # signal to noise rises strictly
        fall = np.diff(g.time)
        # ve ends with (t=0, sigma_min), then its clean point, also told t=0
        assert np.all(fall[:-1] < 0) and (fall[-1] < 0 or (path == "ve" and fall[-1] == 0))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("path", PROCESSES)
def test_half_log_snr_round_trip(path, name):
    p = PROCESSES[path]
    g = GRIDS[name](p, 50)
    inner = (g.alpha > 0) & (g.sigma > 0)
    lam = np.log(g.alpha[inner]) - np.log(g.sigma[inner])
    # relative to t where lam resolves t; log alpha near t=0 resolves it to about eps / lam' only
    np.testing.assert_allclose(p.time(lam), g.time[inner], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(p.half_log_snr(p.time(lam)), lam, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose([g[i].lam for i in np.flatnonzero(inner)], lam, rtol=1e-15)


@pytest.mark.parametrize("path", PROCESSES)
def test_logsnr_is_uniform_inside(path):
    p = PROCESSES[path]
    g = grid.logsnr(p, 40)
    lam = np.array([g[i].lam for i in range(41)])
    inside = np.diff(lam[1:-1])  # the start is moved to t_max, the end is data
    np.testing.assert_allclose(inside, inside[0], rtol=1e-9)
    chosen = grid.logsnr(p, 8, lam_min=-1.0, lam_max=2.0)
    expected = np.linspace(-1, 2, 8 if p.path.clean or p.path.appends_clean else 9)
    got = np.array([chosen[i].lam for i in range(expected.size)])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_edm_rho_is_the_papers():
    N, rho = 18, 7.0
    i = np.arange(N)
    sigma = (80.0 ** (1 / rho) + i / (N - 1) * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho
    g = grid.edm_rho(process.edm(), N)
    np.testing.assert_allclose(g.sigma, np.append(sigma, 0.0), rtol=1e-13)
    np.testing.assert_allclose(g.time * 80, g.sigma, rtol=1e-13)
    assert np.all(g.alpha == 1)
    # elsewhere in rho = sigma/alpha, between ends that may be given
    vp = grid.edm_rho(process.vp(), N, sigma_min=0.002, sigma_max=80.0)
    np.testing.assert_allclose((vp.sigma / vp.alpha)[:-1], sigma, rtol=1e-9)
    other = grid.edm_rho(process.edm(), 4, rho=3.0, sigma_min=0.1, sigma_max=10.0)
    steps = (10 ** (1 / 3) + np.arange(4) / 3 * (0.1 ** (1 / 3) - 10 ** (1 / 3))) ** 3
    np.testing.assert_allclose(other.sigma, np.append(steps, 0.0), rtol=1e-13)


def test_formulas_and_identities():
    p, N = process.linear(), 16
    i = np.arange(N + 1)
    np.testing.assert_allclose(grid.uniform(p, N, t_min=0.2).time, 1 + i / N * (0.2 - 1), rtol=1e-14)
    np.testing.assert_allclose(grid.cosine(p, N).time, (1 + np.cos(np.pi * i / N)) / 2, atol=1e-15)
    np.testing.assert_allclose(grid.quadratic(p, N).time, (1 - i / N) ** 2, atol=1e-15)
    np.testing.assert_array_equal(grid.power(p, N, exponent=1.0).time, grid.uniform(p, N).time)
    # roots of both ends, as DEIS has it, and not (1 - i/N)^k squeezed between them
    roots = 0.9**0.5 + i / N * (1e-3**0.5 - 0.9**0.5)
    np.testing.assert_allclose(grid.quadratic(process.vp(t_max=0.9), N, t_min=1e-3).time, roots**2, rtol=1e-12)
    cubic = (1 + i / N * (1e-3 ** (1 / 3) - 1)) ** 3
    np.testing.assert_allclose(grid.power(p, N, exponent=3.0, t_min=1e-3).time, cubic, rtol=1e-12)
    np.testing.assert_array_equal(grid.shift(p, N, factor=1.0).time, grid.uniform(p, N).time)
    for s in (0.5, 3.0, 12.0):  # shift translates lam by -log s on the linear path
        shifted, plain = grid.shift(p, N, factor=s), grid.uniform(p, N)
        lam = lambda g: np.array([g[k].lam for k in range(1, N)])
        np.testing.assert_allclose(lam(shifted), lam(plain) - np.log(s), atol=1e-12)
    # on ve, uniform in time is uniform in log sigma: the exponential grid
    ve = process.ve()
    np.testing.assert_allclose(grid.uniform(ve, N).sigma, grid.logsnr(ve, N).sigma, rtol=1e-12)


def test_explicit_arrays_find_their_times():
    for name, p in PROCESSES.items():
        g = grid.uniform(p, 12)
        replay = grid.explicit(g.alpha, g.sigma, process=p)
        assert not replay.on_path and grid.as_grid(p, replay).on_path
        np.testing.assert_allclose(replay.time, g.time, rtol=1e-9, atol=1e-12, err_msg=name)
    told = grid.explicit([0.1, 0.5, 1.0], [1.0, 0.5, 0.0], time=[999.0, 500.0, 0.0])
    assert told.time.tolist() == [999.0, 500.0, 0.0]


LINEAR, VE = PROCESSES["linear"], PROCESSES["ve"]
BAD = {
    "steps zero": (lambda: grid.uniform(LINEAR, 0), "steps: 0 given"),
    "steps negative": (lambda: grid.logsnr(LINEAR, -1), "steps: -1 given"),
    "steps fraction": (lambda: grid.edm_rho(LINEAR, 2.5), "steps: 2.5 given"),
    "steps nan": (lambda: grid.uniform(LINEAR, float("nan")), "steps: nan given"),
    "steps bool": (lambda: grid.uniform(LINEAR, True), "steps: True given"),
    "steps text": (lambda: grid.cosine(LINEAR, "ten"), "steps: ten given"),
    "t_min": (lambda: grid.uniform(LINEAR, 4, t_min=1.0), "t_min: 1.0 given"),
    "t_min negative": (lambda: grid.uniform(LINEAR, 4, t_min=-0.1), "t_min: -0.1 given"),
    "exponent": (lambda: grid.power(LINEAR, 4, exponent=0.0), "exponent: 0.0 given"),
    "factor": (lambda: grid.shift(LINEAR, 4, factor=-1.0), "factor: -1.0 given"),
    "rho": (lambda: grid.edm_rho(LINEAR, 4, rho=0.0), "rho: 0.0 given"),
    "sigma_min": (lambda: grid.edm_rho(LINEAR, 4, sigma_min=0.0), "sigma_min: 0.0 given"),
    "sigma_max": (lambda: grid.edm_rho(LINEAR, 4, sigma_max=-3.0), "sigma_max: -3.0 given"),
    "beyond t_max": (lambda: grid.edm_rho(process.edm(), 4, sigma_max=100.0), "sigma/alpha=80 to 0"),
    "below sigma_min": (lambda: grid.logsnr(process.ve(), 4, lam_max=6.0), "lam=-3.91202 to 4.60517"),
    "levels swapped": (lambda: grid.logsnr(LINEAR, 4, lam_min=2.0, lam_max=1.0), "grid: noise level must fall"),
    "unsorted": (lambda: solver.ddim(LINEAR, [0.9, 0.2, 0.5]), "times: 0.2, then 0.5 given; must decrease strictly"),
    "increasing": (
        lambda: solver.ddim(LINEAR, [0.1, 0.5, 0.9]),
        "times: 0.1, then 0.5 given; must decrease strictly",
    ),
    "repeated": (lambda: solver.ddim(LINEAR, [0.9, 0.5, 0.5]), "times: 0.5, then 0.5 given; must decrease strictly"),
    "negative": (lambda: solver.ddim(LINEAR, [0.9, 0.5, -0.1]), "times: range [-0.1, 0.9] given"),
    "above one": (lambda: solver.ddim(LINEAR, [1.2, 0.5]), "times: range [0.5, 1.2] given"),
    "above t_max": (lambda: solver.ddim(PROCESSES["linear_early"], [1.0, 0.5]), "t_max = 0.95"),
    "nan": (lambda: solver.ddim(LINEAR, [0.9, np.nan, 0.1]), "grid: time, alpha and sigma must be finite"),
    "one point": (lambda: solver.ddim(LINEAR, [0.9]), "times: shape (1,) given"),
    "a number": (lambda: solver.ddim(LINEAR, 20), "times: shape () given"),
    "a name": (lambda: solver.ddim(LINEAR, "unifrom"), "grid: 'unifrom' given; need a Grid, as grid.uniform("),
    "process's name": (
        lambda: grid.uniform("linear", 4),
        "process: 'linear' given; need a Process, such as process.linear()",
    ),
    "process's maker": (lambda: grid.logsnr(process.vp, 4), "process: <function vp"),
    "maker's process": (lambda: solver.ddim("linear", [0.9, 0.1]), "process: 'linear' given"),
    "starts clean": (lambda: grid.explicit([1.0, 1.0], [0.0, 0.0], time=[0.1, 0.0]), "grid: starts at sigma = 0"),
    "shapes differ": (
        lambda: grid.explicit([0.5, 1.0], [1.0, 0.5, 0.0], time=[1, 0]),
        "alpha, sigma: shapes (2,), (3,)",
    ),
    "time shape": (lambda: grid.explicit([0.5, 1.0], [1.0, 0.0], time=[1.0]), "time: shape (1,) given"),
    "no time": (lambda: grid.explicit([0.5, 1.0], [1.0, 0.0]), "time: missing"),
    "level rises": (lambda: grid.explicit([0.5, 0.4], [0.5, 0.6], time=[1, 0]), "grid: noise level must fall"),
    "negative sigma": (
        lambda: grid.explicit([0.5, 1.0], [1.0, -0.1], time=[1, 0]),
        "grid: alpha and sigma must be >= 0",
    ),
    "infinite": (
        lambda: grid.explicit([0.5, 1.0], [np.inf, 0.1], time=[1, 0]),
        "grid: time, alpha and sigma must be",
    ),
    "other process": (
        lambda: solver.euler(VE, grid.uniform(LINEAR, 4)),
        "grid: its points do not lie on process 've'",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD)
def test_bad_grids_are_one_line_errors(case):
    build, message = BAD[case]
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value).startswith(message) or message in str(error.value)
    assert "\n" not in str(error.value)


def test_grids_are_read_only():
    g = grid.uniform(LINEAR, 4)
    for column in (g.time, g.alpha, g.sigma):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 3.0
