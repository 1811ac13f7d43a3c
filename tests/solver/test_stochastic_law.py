"""Laws of stochastic tables: exact on delta data, weak orders on Gaussian data, correct ends, refusals, finite in float32."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import MIXTURE, PROCESSES
from stochastic_cases import ALL, DELTA_FAILS, REDRAW

from jaxdiff import exact, process, solver
from jaxdiff.solver import grid
from jaxdiff.solver.weak import MEAN, gaussian_law, level_grid, weak_error, weak_order


@pytest.mark.parametrize("name", ALL)
def test_delta_data(name):
    for path, p in PROCESSES.items():
        for g in (grid.uniform(p, 1), grid.uniform(p, 2), grid.logsnr(p, 11), grid.edm_rho(p, 16)):
            result = solver.check(ALL[name](p, g))
            assert result.ok(1e-10), (path, len(g), result)


@pytest.mark.parametrize("name", DELTA_FAILS)
def test_the_listed_ones_fail_on_delta_data(name):
    p = PROCESSES["edm"]
    table = DELTA_FAILS[name](p, grid.edm_rho(p, 40))
    assert not solver.check(table).ok(1e-10)
    assert solver.check(table).mean_error < 1e-10  # it is the variance that is off


# nominal weak order, and what is measured: at steps of equal length in half log-SNR, and where first steps are so short that
# a cold start costs nothing (None: same)
WEAK = {
    "euler_ancestral_0.5": (1, 1.0, None),
    "euler_ancestral_1": (1, 1.0, None),
    "dpm2_ancestral_0.5": (2, 2.0, None),
    "dpm2_ancestral_1": (2, 2.0, None),
    "dpmpp_2s_ancestral_0.5": (2, 2.0, None),
    "dpmpp_2s_ancestral_1": (2, 2.0, None),
    "sde_1": (1, 1.0, None),
    "sde_2m": (2, 2.0, None),
    "sde_2m_half": (2, 2.0, None),
    "sde_2m_heun": (2, 2.0, None),
    "sde_3m": (3, 2.0, None),
    "sde_3m_public": (3, 2.0, None),
    "sde_2s": (2, 2.0, None),
    "sde_2s_half": (2, 2.0, None),
    "sde_2s_lagrange": (2, 2.0, None),
    "sde_2s_rho": (2, 2.0, None),
    "sde_2s_independent": (2, 1.0, None),  # the negative control: no common Brownian path
    "er_x^2_1": (1, 1.0, None),
    "er_sde_5_1": (1, 1.0, None),
    "er_x^2_2": (2, 2.0, None),
    "er_sde_5_2": (2, 2.0, None),
    "er_x^2_3": (3, 2.0, None),
    "er_x_3": (3, 2.1, 3.0),  # the ODE of the family
    "er_public_exact": (3, 2.0, None),
    "sa_p1c0_tau1": (1, 1.0, None),
    "sa_p2c0_tau1": (2, 2.0, None),
    "sa_p3c4_tau1": (3, 2.0, None),
    "sa_p3c4_tau0.6": (3, 2.0, None),
    "sa_p2c3_tau0": (3, 3.0, None),
    "sa_p3c4_tau0": (4, None, 4.0),
    "sa_pece": (3, 2.0, None),
    "sa_public": (2, 2.1, None),
    "pc": (1, 1.0, None),
}


@pytest.mark.parametrize("name", WEAK)
def test_weak_order(name):
    _, plain, warm = WEAK[name]
    p = PROCESSES["cosine"]
    if plain is not None:
        slope, errors, _ = weak_order(ALL[name], p)
        assert abs(slope - plain) < 0.12 and errors[1] > 1e-11, (slope, errors)
    if warm is not None:
        slope, errors, _ = weak_order(ALL[name], p, grid=lambda p, n: level_grid(p, n, power=2.0))
        assert abs(slope - warm) < 0.12 and errors[1] > 1e-11, (slope, errors)


def test_the_page_of_weak_orders_is_what_is_measured():
    page = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "experiments" / "solver_orders" / "weak.py"))
    lines = page["PAGE"].read_text().splitlines()
    for name in (
        "sde-dpm++ 2M midpoint eta=1",
        "sde-dpm++ 2S exact eta=0.5",
        "er_sde 3 phi=sde_5",
        "sa_solver p3c4 tau=1",
    ):
        assert "| " + " | ".join(page["measure"](name)) + " |" in lines
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == list(page["CASES"])
    for row in rows:
        assert row[2] == "-" or abs(float(row[3]) - float(row[2])) < 0.2, row


def test_one_brownian_path_is_worth_two_hundred_fold():
    p = PROCESSES["vp"]
    g = level_grid(p, 128)
    shared, tree, own = (weak_error(ALL[f"sde_2s{kind}"](p, g)) for kind in ("", "_rho", "_independent"))
    assert own > 50 * shared and own > 50 * tree


def test_published_er_sde_is_limited_by_its_sums():
    """1 % off in the weights of D' keeps 1 % of the first-order error."""
    p = PROCESSES["cosine"]
    slope, (_, error), _ = weak_order(DELTA_FAILS["er_public"], p)
    assert slope < 1.5 and error > 3 * weak_error(ALL["er_public_exact"](p, level_grid(p, 256)))


def test_restart_contracts_errors_and_keeps_the_law():
    """From a wrong start, each repeat brings the variance closer; from the right one, the law stays as the points grow."""
    p, variance = PROCESSES["edm"], 0.3
    g = grid.logsnr(p, 40, lam_min=-1.5)
    gap = []
    for count in (0, 1, 2, 3):
        table = solver.restart(p, g, intervals=[(40, count, 0.15, 1.0)])
        right = float(g.sigma[0] ** 2 + variance)
        gap.append(
            gaussian_law(table, MEAN, variance, start=2 * right)[1]
            - gaussian_law(table, MEAN, variance, start=right)[1]
        )
    # noise from rho .15 to 1 and back multiplies the share of an old state in the variance by (v + .15^2)/(v + 1)
    stop = g.sigma[int(np.argmin(np.abs(g.sigma - 0.15)))]
    np.testing.assert_allclose(np.array(gap[1:]) / gap[:-1], (variance + stop**2) / (variance + 1), rtol=2e-2)
    assert gap[0] > 0.25
    errors = [weak_error(solver.restart(p, grid.logsnr(p, n), intervals=[(n, 3, 0.15, 1.0)])) for n in (30, 60, 120)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    mean, _ = gaussian_law(solver.restart(p, g, intervals=[(3, 5, 0.15, 1.0)]), MEAN, variance)
    np.testing.assert_allclose(mean, MEAN, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_ends(name):
    """sigma = 0 returns the prediction made there, without noise; a start at alpha = 0 is the first-order data-form row."""
    for path in ("linear", "cosine", "ve"):
        p = PROCESSES[path]
        for steps in (1, 5):
            block = ALL[name](p, grid.uniform(p, steps)).blocks
            zero = np.zeros(block.A.shape[0])
            C, q = (zero if v is None else np.asarray(v) for v in (block.C, block.q))
            assert C[-1] == 0 and q[-1] == 0 and block.p[-1] == 1
            last = np.asarray(block.B[-1])
            # a corrector's change is multiplied by A = 0: x0_hat alone is left
            np.testing.assert_array_equal(block.A[-1], 0.0)
            np.testing.assert_array_equal(last[1:], 0.0)
            assert last[0] == block.alpha[-1] == 1.0
            if block.alpha[0] == 0 and steps > 1 and name not in REDRAW:  # these redraw the start first
                assert q[0] == 0 and block.B[0][0] == block.alpha[1]
                np.testing.assert_allclose(block.A[0][0] ** 2 * block.sigma[0] ** 2 + C[0] ** 2, block.sigma[1] ** 2)


@pytest.mark.parametrize("path", ["vp", "linear_early", "edm", "subvp"])
@pytest.mark.parametrize(("eta", "temperature"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8)])
def test_euler_maruyama_has_the_law_of_its_formula(path, eta, temperature):
    """Mean and variance of ``v = x/alpha`` step by step for data N(m, s): drift (1 + eta^2)/T E, diffusion eta^2 d(rho^2)."""
    p, m, s = PROCESSES[path], 0.7, 0.3
    g = grid.from_times(p, np.linspace(0.9, 0.2, 8))
    mean, variance = m, s + (g.sigma[0] / g.alpha[0]) ** 2
    for t, u in zip(g.sigma[:-1] / g.alpha[:-1], g.sigma[1:] / g.alpha[1:]):
        slope = (1 + eta**2) / temperature * (u - t) * t / (s + t**2)  # E = rho (v - m)/(s + rho^2)
        mean, variance = mean + slope * (mean - m), (1 + slope) ** 2 * variance + eta**2 * (t**2 - u**2)
    table = solver.euler_maruyama(p, g, eta=eta, temperature=temperature)
    a = g.alpha[-1]
    np.testing.assert_allclose(gaussian_law(table, m, s), (a * mean, a * a * variance), rtol=1e-12)


def test_gaussian_noise_is_required():
    p = dataclasses.replace(PROCESSES["edm"], noise=process.student_t(5.0))
    g = grid.edm_rho(p, 6)
    for make in (
        solver.euler_ancestral,
        solver.dpm2_ancestral,
        solver.dpmpp_2s_ancestral,
        solver.dpm_solver_pp_sde,
        solver.er_sde,
        solver.sa_solver,
        solver.euler_maruyama,
        solver.predictor_corrector,
        lambda p, g: solver.restart(p, g, intervals=[(3, 1, 0.1, 0.5)]),
    ):
        with pytest.raises(ValueError, match=r"process: .* needs Gaussian noise"):
            make(p, g)
    # without noise they are for any law
    for make in (
        lambda p, g: solver.euler_ancestral(p, g, eta=0.0),
        lambda p, g: solver.dpm_solver_pp_sde(p, g, eta=0.0),
        lambda p, g: solver.er_sde(p, g, phi="x"),
        lambda p, g: solver.sa_solver(p, g, tau=0.0),
    ):
        assert make(p, g).blocks.C is None


def test_explicit_arrays_suffice_where_stages_lie_on_the_grid():
    p = PROCESSES["vp"]
    own = grid.logsnr(p, 8)
    told = grid.explicit(own.alpha, own.sigma, 1000 * own.time)
    for name in (
        "euler_ancestral_0.5",
        "dpm2_ancestral_1",
        "dpmpp_2s_ancestral_1",
        "sde_3m",
        "er_sde_5_3",
        "sa_pece",
    ):
        one, two = (solver.unroll(ALL[name](p, g)) for g in (own, told))
        np.testing.assert_allclose(one.W, two.W, rtol=0, atol=1e-10)
        np.testing.assert_allclose(one.N, two.N, rtol=0, atol=1e-10)
    for name in ("dpm2_ancestral_0.5", "dpmpp_2s_ancestral_0.5", "sde_2s"):
        with pytest.raises(ValueError, match=r"grid: .* needs points between the grid's"):
            ALL[name](p, told)


BAD = {
    "eta": (lambda p, g: solver.euler_ancestral(p, g, eta=-0.1), "eta: -0.1 given"),
    "eta nan": (lambda p, g: solver.dpm_solver_pp_sde(p, g, eta=float("nan")), "eta: nan given"),
    "s_noise": (lambda p, g: solver.dpm2_ancestral(p, g, s_noise=-1.0), "s_noise: -1.0 given"),
    "sde order": (lambda p, g: solver.dpm_solver_pp_sde(p, g, order=4), "order: 4 given"),
    "sde single order": (lambda p, g: solver.dpm_solver_pp_sde(p, g, order=3, method="singlestep"), "order: 3 given"),
    "sde method": (lambda p, g: solver.dpm_solver_pp_sde(p, g, method="fast"), "method: 'fast' given"),
    "sde variant": (lambda p, g: solver.dpm_solver_pp_sde(p, g, variant="taylor"), "variant: 'taylor' given"),
    "coupling": (lambda p, g: solver.dpm_solver_pp_sde(p, g, coupling="none"), "coupling: 'none' given"),
    "tail": (lambda p, g: solver.dpm_solver_pp_sde(p, g, lower_order_final="yes"), "lower_order_final: 'yes' given"),
    "er order": (lambda p, g: solver.er_sde(p, g, order=0), "order: 0 given"),
    "er phi": (lambda p, g: solver.er_sde(p, g, phi="x^3"), "phi: 'x^3' given"),
    "er falling phi": (lambda p, g: solver.er_sde(p, g, phi=lambda x: x**0.5), "phi: phi(x)/x falls"),
    "er negative phi": (lambda p, g: solver.er_sde(p, g, phi=lambda x: -x), "phi: not positive"),
    "er quadrature": (lambda p, g: solver.er_sde(p, g, quadrature="sum"), "quadrature: 'sum' given"),
    "sa predictor": (lambda p, g: solver.sa_solver(p, g, predictor=5), "predictor: 5 given"),
    "sa corrector": (lambda p, g: solver.sa_solver(p, g, corrector=5), "corrector: 5 given"),
    "sa tau": (lambda p, g: solver.sa_solver(p, g, tau=[1.0, 0.5]), "tau: shape (2,) given"),
    "sa tau inf": (lambda p, g: solver.sa_solver(p, g, tau=float("inf")), "tau: mean square inf"),
    "sa range": (lambda p, g: solver.sa_solver(p, g, tau_range=(1.0, 0.05)), "tau_range: (1.0, 0.05) given"),
    "restart entry": (lambda p, g: solver.restart(p, g, intervals=[(3, 2, 0.06)]), "intervals: (3, 2, 0.06) given"),
    "restart points": (lambda p, g: solver.restart(p, g, intervals=[(1, 2, 0.06, 0.3)]), "intervals: (1, 2"),
    "restart order": (lambda p, g: solver.restart(p, g, intervals=[(3, 2, 0.3, 0.06)]), "intervals: (3, 2, 0.3"),
    "restart high": (lambda p, g: solver.restart(p, g, intervals=[(3, 2, 0.06, 1e4)]), "intervals: rho_max=10000"),
    "restart low": (lambda p, g: solver.restart(p, g, intervals=[(3, 2, 1e-9, 1e-4)]), "intervals: rho_max=0.0001"),
    "restart noise": (lambda p, g: solver.restart(p, g, s_noise=-1.0), "s_noise, spacing: -1.0"),
    "tau below 0": (lambda p, g: solver.sa_solver(p, g, tau=-0.5), "tau: -0.5 given"),
    "restart churn": (
        lambda p, g: solver.restart(
            p, g, intervals=[(3, 1, 1.0, 50.0)], solver=lambda p, g: solver.edm(p, g, s_churn=3.0)
        ),
        "solver: adds churn",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_line_errors(case):
    build, message = BAD[case]
    p = PROCESSES["edm"]
    with pytest.raises(ValueError) as error:
        build(p, grid.edm_rho(p, 12))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def finite(path, counts, names):
    """Run in float32 as one stack; all but the noise-form stages, which overshoot in long steps, also stay near the data."""
    p = PROCESSES[path]
    d = exact.denoiser(MIXTURE, p)
    labels = [(name, n) for name in names for n in counts]
    tables = [ALL[name](p, grid.GRIDS[("uniform", "logsnr")[n % 2]](p, n)) for name, n in labels]
    z = jnp.linspace(-3, 3, 9, dtype=jnp.float32)[:, None]
    scale = jnp.asarray([float(t.blocks.start_scale) for t in tables], jnp.float32)
    go = jax.jit(jax.vmap(lambda table, scale: solver.run(table, d, scale * z, jax.random.key(0))))
    ends = np.asarray(go(solver.stack(tables), scale))
    assert ends.dtype == np.float32
    loose = [name.startswith(("dpm2", "restart")) for name, _ in labels]
    most = np.where(loose, np.inf, 50.0)
    bad = [
        label for label, end, m in zip(labels, ends, most) if not np.all(np.isfinite(end)) or np.abs(end).max() > m
    ]
    assert not bad, bad


NAMES = [
    "euler_ancestral_1", "dpm2_ancestral_1", "dpmpp_2s_ancestral_1", "dpmpp_2s_ancestral_0.5", "sde_1", "sde_2m", "sde_3m",
    "sde_2s", "sde_2s_half", "er_sde_5_3", "er_sde_4_3", "er_x^2_2", "sa", "sa_pece", "sa_p3c4_tau1", "sa_band", "restart",
]  # fmt: skip


@pytest.mark.parametrize("path", ["linear", "vp", "ve"])
def test_finite_in_float32(path):
    finite(path, (1, 2, 3, 10, 25), NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("path", PROCESSES)
def test_finite_in_float32_up_to_200(path):
    finite(path, (1, 2, 3, 4, 5, 8, 15, 30, 50), list(ALL))
    finite(path, (99, 200), list(ALL))


STILL = ("dpmpp_2s_ancestral_1", "sde_3m", "sde_2s", "sde_2s_rho", "er_sde_5_3", "sa_p3c4_tau1", "sa_pece", "restart")


@pytest.mark.parametrize("name", STILL)
def test_float32_follows_float64(name):
    """With the same draws, the float32 run is within 2e-5 (relative RMS over a batch) of the float64 run."""
    p = PROCESSES["vp"]
    table = ALL[name](p, grid.logsnr(p, 12))
    x = np.random.default_rng(0).normal(size=(256, 1))
    ends = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            dtype = jnp.float64 if x64 else jnp.float32
            fixed = jnp.asarray(np.random.default_rng(1).normal(size=(64, 256, 1)), dtype)
            # which draw: rows are told apart by their noise level and whether they end a step
            noise = lambda keys, row, y, fixed=fixed: fixed[(row.tau * 1000).astype(jnp.int32) % 32 + 32 * row.out]
            hooks = solver.hooks(noise=noise)
            y = solver.run(table, exact.denoiser(MIXTURE, p), jnp.asarray(x, dtype), jax.random.key(0), hooks=hooks)
            ends.append(np.asarray(y, np.float64))
    assert np.sqrt(np.mean((ends[0] - ends[1]) ** 2) / np.mean(ends[1] ** 2)) < 2e-5
