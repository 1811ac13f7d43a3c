"""Float32 on every family of grids: runs follow float64, rewritten tables are the same solver, and what is left is known."""

import dataclasses
import functools

import deterministic_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import solver_cases
import stochastic_cases
from solver_cases import PROCESSES, rms

from jaxdiff import exact, solver
from jaxdiff.solver import grid, rounding

P = functools.partial
CASES = {**solver_cases.SOLVERS, **deterministic_cases.ALL, **stochastic_cases.ALL}
NAMES = "heun_rho edm edm_churn dpm2 rho_rk f_pndm_public s_pndm ipndm_public lms deis_t deis_lam dpm_solver dpm_solver_3m"
NAMES += " unipc_3_noise velocity_ab velocity_ab_angle velocity_ab_rosenbrock dpm2_ancestral_1 conjugate_0 restart"
MAKERS = {
    **{name: CASES[name] for name in NAMES.split()},
    "deis_4": P(solver.deis, order=4),
    "velocity_4": P(solver.velocity_ab, order=4),
    "unipc_4_noise": P(solver.unipc, order=4, prediction="noise"),
}
WORLD = exact.GaussianMixture([0.5, 0.5], [-0.6, 0.7], [0.4, 0.3])


@jax.jit
def ends(tables, d, x, noise):
    hook = solver.hooks(noise=lambda keys, row, y: noise[row.k])
    return jax.vmap(lambda table: solver.run(table, d, x, jax.random.key(0), hooks=hook))(tables)


def errors(p, tables):
    """Relative RMS over 64 samples of float32 runs against float64 runs, the same start and draws in both."""
    many = solver.stack(tables)
    many = dataclasses.replace(many, blocks=dataclasses.replace(many.blocks, start_noise=None, start_gain=None))
    x = np.random.default_rng(7).normal(size=(64, 1)).astype(np.float32) * np.float32(many.blocks.start_scale[0])
    noise = np.random.default_rng(1).normal(size=(many.rows, 64, 1)).astype(np.float32)
    low = np.asarray(ends(many, exact.denoiser(WORLD, p), jnp.asarray(x), jnp.asarray(noise)))
    with jax.enable_x64(True):
        wide = (jnp.asarray(v, jnp.float64) for v in (x, noise))
        high = np.asarray(ends(many, exact.denoiser(WORLD, p), *wide))
    assert low.dtype == np.float32 and high.dtype == np.float64
    return [rms(a, b) for a, b in zip(low, high)]


def product(p, steps):
    """Every maker on every family of grids."""
    grids = {name: make(p, steps) for name, make in grid.GRIDS.items()}
    return {(name, g): make(p, points) for name, make in MAKERS.items() for g, points in grids.items()}


@pytest.mark.parametrize(
    ("path", "steps"),
    [("linear", 8), ("vp", 5)]
    + [pytest.param(p, n, marks=pytest.mark.slow) for p in ("linear", "vp", "cosine", "subvp") for n in (12, 20)],
)
def test_float32_follows_float64_on_every_grid(path, steps):
    tables = product(PROCESSES[path], steps)
    found = dict(zip(tables, errors(PROCESSES[path], list(tables.values()))))
    wrong = {key: e for key, e in found.items() if not e < 2e-5}
    # of order 4 in the clock of time, and from alpha = 0, weights on x0_hat are of thousands whatever a row keeps
    assert {name for name, _ in wrong} <= {"deis_4", "velocity_4"} and len(wrong) <= 4, wrong
    assert all(rounding.LIMIT < rounding.rounding(tables[key]) > e / 3 for key, e in wrong.items()), wrong


def test_rewritten_tables_are_the_same_solver(monkeypatch):
    """Every state is the same combination of start, predictions and draws; rounding falls wherever rows are rewritten."""
    changed = set()
    for path, steps in (("linear", 8), ("vp", 5)):
        new = product(PROCESSES[path], steps)
        with monkeypatch.context() as patch:
            patch.setattr(rounding, "LIMIT", np.inf)
            old = product(PROCESSES[path], steps)
        for key, table in new.items():
            if np.array_equal(table.blocks.A, old[key].blocks.A):
                continue
            changed.add(key[0])
            assert rounding.rounding(table) < rounding.rounding(old[key]) > rounding.LIMIT
            one, two = solver.unroll(table, rows=True), solver.unroll(old[key], rows=True)
            for a, b in zip(one, two):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(1, np.max(np.abs(two.W))))
    assert changed >= {
        "edm",
        "edm_churn",
        "dpm2_ancestral_1",
        "unipc_3_noise",
        "deis_4",
        "velocity_4",
        "f_pndm_public",
    }


def test_rows_behind_fresh_noise_are_left_alone():
    """A record that is used after a draw cannot be inferred from a later state; one that is not, can."""
    p = PROCESSES["vp"]
    table = solver.dpm2_ancestral(p, grid.ays(p, 5))
    block = dataclasses.replace(table.blocks, B=np.pad(table.blocks.B, ((0, 0), (0, 1))))
    assert rounding._noisy(dataclasses.replace(table, blocks=block)) == rounding._noisy(table) != []
    block.B[2, 2] = 0.1  # the second step looks at the first one's record
    assert 0 not in rounding._noisy(dataclasses.replace(table, blocks=block))


@pytest.mark.parametrize(("make", "steps"), [(grid.beta, 5), (grid.shift, 20)])
def test_rewriting_stops_where_float64_would_lose_more_digits_than_float32_has(make, steps):
    """Rewritten to the least rounding, these are exact on delta data to 6e-11 and 2.4e-11 only."""
    p = PROCESSES["edm"]
    assert max(solver.check(solver.velocity_ab(p, make(p, steps), order=4))) < 1.5e-11


@pytest.mark.parametrize("make", [solver.heun, solver.rk4])
def test_fine_grids_are_left_as_they_are(make, monkeypatch):
    """What a thousand states are rounded by is not removed by keeping other records, nor is it tried."""
    monkeypatch.setattr(rounding, "_keep_data", lambda *_: pytest.fail("rewritten"))
    p = PROCESSES["linear"]
    assert rounding.rounding(make(p, grid.uniform(p, 1000))) > rounding.LIMIT


def test_rounding_of_one_step_is_the_closed_form():
    """x_s = x0_hat from the step's two terms: sizes 1 and A, all of them rounded once."""
    p = PROCESSES["linear"]
    table = solver.ddim(p, np.array([0.5, 0.25]))
    a, b = 0.5, 0.5  # sigma_s/sigma_t, and what is left of alpha_s
    y = np.sqrt(0.5)
    record = 0.5 / 0.5 * y  # the posterior mean of unit-variance data: alpha/(alpha^2 + sigma^2) y
    end = a * y + b * record
    wanted = (
        2.0**-24
        * np.sqrt((a * y) ** 2 + (b * record) ** 2 + end**2 + (0.4 * b) ** 2)
        / max(end, np.hypot(0.75, 0.25))
    )
    np.testing.assert_allclose(rounding.rounding(table), wanted, rtol=1e-12)
    own = 2.0**-24 * end / max(end, np.hypot(0.75, 0.25))
    np.testing.assert_allclose(rounding._rounding(table)[1], own, rtol=1e-12)
