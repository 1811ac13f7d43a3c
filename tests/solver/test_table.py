"""Tables without a network: the delta-data test on everything, identities between solvers, stacks, refusals."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import DETERMINISTIC, GRIDS, PROCESSES, SOLVERS, STOCHASTIC, delta_fails, middle

from jaxdiff import process, solver
from jaxdiff.solver import grid
from jaxdiff.solver.table import blocks_of

LENGTHS = (1, 2, 3, 10, 60)


def same(left, right, tolerance=1e-12):
    """Whether two tables are one solver: equal dense forms, noise compared by covariance. Weights are O(1)."""
    a, b = solver.unroll(left), solver.unroll(right)
    np.testing.assert_allclose(a.a, b.a, rtol=0, atol=tolerance)
    np.testing.assert_allclose(a.W, b.W, rtol=0, atol=tolerance)
    np.testing.assert_allclose(a.e, b.e, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.sum(a.N**2), np.sum(b.N**2), rtol=0, atol=tolerance)


@pytest.mark.parametrize("path", PROCESSES)
@pytest.mark.parametrize("name", SOLVERS)
def test_delta_data(name, path):
    p = PROCESSES[path]
    # errors are relative to max(alpha, sigma) of the row; variances to its square
    errors = [
        solver.check(SOLVERS[name](p, make(p, steps))) for make, steps in itertools.product(GRIDS.values(), LENGTHS)
    ]
    if delta_fails(name, path):
        # a listed failure must be seen: every grid of several steps, and by far more than rounding
        several = [c for c, (_, steps) in zip(errors, itertools.product(GRIDS, LENGTHS)) if steps in (10, 60)]
        assert min(max(c) for c in several) > 1e-4
        assert not any(c.ok() for c in several)
    else:
        assert max(max(c) for c in errors) < 1e-10
        assert all(c.ok() for c in errors)


def test_makers_stay_on_the_host():
    p = PROCESSES["vp"]
    with jax.transfer_guard("disallow"), jax.checking_leaks():
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            jnp.sin(np.ones(3))  # the guard is awake: no jax call goes unseen
        for maker, path in itertools.product(SOLVERS.values(), PROCESSES.values()):
            table = maker(path, grid.logsnr(path, 6))
            solver.check(table), solver.unroll(table), solver.stack([table, maker(path, grid.uniform(path, 3))])
            for leaf in jax.tree_util.tree_leaves(table):
                assert isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype in (np.float64, np.bool_)
    assert solver.ddim(p, [0.9, 0.5]).rows == 1


def test_makers_compile_nothing():
    seen = []
    listen = lambda event, *_, **__: seen.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for maker, path in itertools.product(SOLVERS.values(), PROCESSES.values()):
            maker(path, grid.edm_rho(path, 5))
        assert not [event for event in seen if "compile" in event]
        jax.jit(lambda v: v * 3.25 + 1)(1.0)  # the listener is awake
        assert [event for event in seen if "compile" in event]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("path", PROCESSES)
def test_explicit_arrays_replay_the_grid(path):
    p = PROCESSES[path]
    for make, steps in itertools.product(GRIDS.values(), (1, 6)):
        g = make(p, steps)
        replay = grid.explicit(g.alpha, g.sigma, g.time)
        numbered = grid.explicit(g.alpha, g.sigma, 1000 * g.time + 1)  # the network's numbers are no path
        for name, maker in SOLVERS.items():
            if name in ("euler", "heun") or name.startswith("edm_churn"):
                with pytest.raises(ValueError, match=r"^grid: .* explicit \(alpha, sigma\) arrays do not give"):
                    maker(p, numbered)
            ours, theirs = jax.tree_util.tree_leaves(maker(p, g)), jax.tree_util.tree_leaves(maker(p, replay))
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("path", PROCESSES)
def test_one_solver_under_two_names(path):
    p = PROCESSES[path]
    for make in (grid.uniform, grid.logsnr, grid.cosine):
        g = make(p, 9)
        ddim = solver.ddim(p, g)
        scale = 80 if path in ("edm", "ve") else 1  # weights on y_0 and N are in units of sigma
        same(solver.euler(p, g, clock="rho"), ddim)
        same(solver.edm(p, g, heun=False), ddim)
        same(solver.dpm_solver_pp(p, g, order=1), ddim)
        same(solver.ddim(p, g, eta=1.0), solver.ancestral(p, g), 1e-12 * scale**2)
        same(solver.edm(p, g), solver.heun(p, g, clock="rho"))
        same(solver.ddim(p, g, stochastic=True), ddim)
        if path in ("linear", "linear_early", "linear_floor", "edm"):
            same(solver.euler(p, g), ddim)  # DDIM is Euler on the velocity
    g = middle(p, 7)
    with pytest.raises(AssertionError):  # negative control
        same(solver.heun(p, g, clock="rho"), solver.ddim(p, g))
    with pytest.raises(AssertionError):
        same(solver.ddim(p, g, eta=0.5), solver.ancestral(p, g))


def published_betas(schedule, T):
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, T)
    if schedule == "scaled_linear":
        return np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2
    bar = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar(np.arange(1, T + 1) / T) / bar(np.arange(T) / T), 0.999)


def test_ancestral_is_the_ddpm_posterior():
    for schedule, T in (("linear", 1000), ("cosine", 50), ("scaled_linear", 200)):
        p = process.ddpm(T, schedule)
        betas = published_betas(schedule, T)
        bar = np.cumprod(1 - betas)
        before = np.append(1.0, bar[:-1])
        on_data = np.sqrt(before) * betas / (1 - bar)
        on_state = np.sqrt(1 - betas) * (1 - before) / (1 - bar)
        variance = betas * (1 - before) / (1 - bar)
        flip = slice(None, None, -1)  # row k goes from chain index T-k to T-k-1
        for name, expected in (("small", variance), ("large", np.where(before < 1, betas, 0.0))):
            block = solver.ancestral(p, grid.uniform(p, T), variance=name).blocks
            np.testing.assert_allclose(block.A[:, 0], on_state[flip], rtol=0, atol=1e-12)
            np.testing.assert_allclose(block.B[:, 0], on_data[flip], rtol=0, atol=1e-12)
            np.testing.assert_allclose(block.C**2, expected[flip], rtol=0, atol=1e-12)
            assert block.q is None and np.all(block.p == 1)


def test_dpm_pp_second_order_weights():
    p = PROCESSES["vp"]
    g = middle(p, 6)
    exact = solver.dpm_solver_pp(p, g, variant="lagrange", lower_order_final="never").blocks
    paper = solver.dpm_solver_pp(p, g, variant="midpoint", lower_order_final="never").blocks
    u, gauss = np.polynomial.legendre.leggauss(40)
    for i in range(1, 6):
        at, to, prev = g[i], g[i + 1], g[i - 1]
        # int e^lam x0_hat d lam by brute force, x0_hat linear through the last two nodes
        lam = at.lam + (u + 1) / 2 * (to.lam - at.lam)
        kernel = to.sigma * np.exp(lam) * gauss * (to.lam - at.lam) / 2
        newest, older = (lam - prev.lam) / (at.lam - prev.lam), (lam - at.lam) / (prev.lam - at.lam)
        np.testing.assert_allclose(exact.B[i], [kernel @ newest, kernel @ older], rtol=0, atol=1e-12)
        np.testing.assert_allclose(exact.A[i], [to.sigma / at.sigma], rtol=1e-12)
        h = to.lam - at.lam
        r = (at.lam - prev.lam) / h
        half = to.alpha * (1 - np.exp(-h)) / (2 * r)
        np.testing.assert_allclose(paper.B[i], [to.alpha * (1 - np.exp(-h)) + half, -half], rtol=0, atol=1e-12)


def test_lower_order_final():
    p = PROCESSES["linear"]
    orders = lambda steps, tail: (
        (solver.dpm_solver_pp(p, grid.uniform(p, steps), lower_order_final=tail).blocks.B != 0).sum(1).tolist()
    )
    # alpha(1) = 0: the node at lam = -inf is never used; the step to sigma = 0 is first-order
    assert orders(6, "never") == [1, 1, 2, 2, 2, 1] == orders(6, "zero") == orders(6, "auto") == orders(6, "always")
    early = lambda steps, tail: (
        (solver.dpm_solver_pp(p, middle(p, steps), lower_order_final=tail).blocks.B != 0).sum(1).tolist()
    )
    assert early(4, "never") == early(4, "zero") == [1, 2, 2, 2]
    assert early(4, "auto") == early(4, "always") == [1, 2, 2, 1]
    assert early(15, "auto")[-1] == 2 and early(15, "always")[-1] == 1


def test_structure_says_what_a_table_needs():
    p = PROCESSES["linear"]
    g = grid.uniform(p, 4)
    shape = lambda t: (t.blocks.A.shape, t.blocks.B.shape, t.blocks.C is None, t.blocks.E is None)
    assert shape(solver.ddim(p, g)) == ((4, 1), (4, 1), True, True)
    assert shape(solver.ancestral(p, g)) == ((4, 1), (4, 1), False, True)
    assert shape(solver.dpm_solver_pp(p, g)) == ((4, 1), (4, 2), True, True)
    heun = solver.heun(p, g)
    assert heun.rows == heun.nfe == 7 and heun.out.tolist() == [False, True] * 3 + [True]
    np.testing.assert_allclose(heun.tau, [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])
    np.testing.assert_allclose(heun.time[-1], 0)
    treedef = jax.tree_util.tree_structure
    assert treedef(solver.ddim(p, g)) == treedef(solver.dpm_solver_pp(p, grid.logsnr(p, 9), order=1))
    assert treedef(solver.ddim(p, g)) != treedef(solver.euler(p, g))  # data form against a mixture
    assert treedef(solver.ddim(p, g, eta=0.0, stochastic=True)) == treedef(solver.ddim(p, g, eta=1.0))
    with pytest.raises(ValueError, match="read-only"):
        heun.blocks.A[0] = 2.0


def test_stack_lifts_to_the_union_and_pads():
    p = PROCESSES["edm"]
    tables = [
        solver.ddim(p, grid.edm_rho(p, 3)),
        solver.dpm_solver_pp(p, grid.edm_rho(p, 5)),
        solver.edm(p, grid.edm_rho(p, 4), s_churn=2.0),
    ]
    many = solver.stack(tables)
    block = many.blocks
    assert block.A.shape == (3, 7, 1) and block.B.shape == (3, 7, 2) and block.C.shape == block.q.shape == (3, 7)
    assert block.start_noise.shape == (3,) and block.start_noise[0] == 0 < block.start_noise[2]
    assert many.nfe.tolist() == [3, 5, 7] and many.live.sum(1).tolist() == [3, 5, 7]
    assert block.E is None
    for i, t in enumerate(tables):
        np.testing.assert_array_equal(block.A[i, : t.rows, 0], t.blocks.A[:, 0])
        assert np.all(block.A[i, t.rows :, 0] == 1) and np.all(block.B[i, t.rows :] == 0)
        assert np.all(block.C[i, t.rows :] == 0) and not np.any(many.out[i, t.rows :])
        assert np.all(block.sigma[i, :-1] > 0)  # padding is evaluated at a point every denoiser accepts
    lone = solver.stack(tables[:1])
    assert lone.blocks.C is None and lone.blocks.q is None and lone.rows == 3


def test_stack_refusals():
    p, g = PROCESSES["linear"], [0.9, 0.5, 0.1]
    table = solver.ddim(p, g)
    student = solver.ddim(process.linear(noise=process.student_t(3.0)), g)
    moded = lambda *mode: dataclasses.replace(table, mode=mode)
    cases = {
        "tables: none given": [],
        "tables: table 0 assumes gaussian noise, table 1 student_t": [table, student],
        "tables: mode is None in table 0, (0, 1) in table 1": [table, moded(0, 1)],
        "tables: modes differ between tables": [moded(0, 0), moded(0, 1)],
        "tables: table 1 has another tree of blocks": [table, dataclasses.replace(table, blocks={"a": table.blocks})],
    }
    for message, tables in cases.items():
        with pytest.raises(ValueError) as error:
            solver.stack(tables)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


LINEAR = PROCESSES["linear"]
STUDENT = process.linear(noise=process.student_t(4.0))
POINTS = [0.9, 0.5, 0.1]
BAD = {
    "eta": (lambda: solver.ddim(LINEAR, POINTS, eta=1.5), "eta: 1.5 given"),
    "eta negative": (lambda: solver.ddim(LINEAR, POINTS, eta=-0.1), "eta: -0.1 given"),
    "eta nan": (lambda: solver.ddim(LINEAR, POINTS, eta=float("nan")), "eta: nan given"),
    "variance": (lambda: solver.ancestral(LINEAR, POINTS, variance="big"), "variance: 'big' given"),
    "clock": (lambda: solver.euler(LINEAR, POINTS, clock="lam"), "clock: 'lam' given"),
    "heun clock": (lambda: solver.heun(LINEAR, POINTS, clock="t"), "clock: 't' given"),
    "order": (lambda: solver.dpm_solver_pp(LINEAR, POINTS, order=0), "order: 0 given"),
    "variant": (lambda: solver.dpm_solver_pp(LINEAR, POINTS, variant="heum"), "variant: 'heum' "),
    "tail": (lambda: solver.dpm_solver_pp(LINEAR, POINTS, lower_order_final="no"), "lower_order_final: 'no' "),
    "s_churn": (lambda: solver.edm(LINEAR, POINTS, s_churn=-1.0), "s_churn, s_min, s_max, s_noise: -1.0"),
    "s_min": (lambda: solver.edm(LINEAR, POINTS, s_min=2.0, s_max=1.0), "s_churn, s_min, s_max, s_noise"),
    "law ddim": (lambda: solver.ddim(STUDENT, POINTS, eta=0.5), "process: ddim(eta=0.5) draws fresh noise"),
    "law ancestral": (lambda: solver.ancestral(STUDENT, POINTS), "process: ancestral draws fresh noise"),
    "law edm": (lambda: solver.edm(STUDENT, POINTS, s_churn=1.0), "process: edm(s_churn=1) draws fresh noise"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_line_errors(case):
    build, message = BAD[case]
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_tables_take_any_noise_law(name):
    table = DETERMINISTIC[name](STUDENT, grid.uniform(STUDENT, 5))
    assert table.law.name == "student_t" and not table.blocks.stochastic


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_tables_end_without_noise(name):
    for p in PROCESSES.values():
        table = STOCHASTIC[name](p, grid.logsnr(p, 5))
        if p.coefficients(np.float64(0.0)).sigma == 0:
            assert table.blocks.C[-1] == 0  # nothing is added at sigma = 0
    assert all(block.stochastic for block in blocks_of(table))
