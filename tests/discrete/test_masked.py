"""Absorbing corruption: schedules, the share of masks, paths that stay masked; tables of its reverse chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import discrete, exact, process, solver
from jaxdiff.solver import grid

PROCESSES = {
    "linear": discrete.masked(3),
    "polynomial": discrete.masked(3, "polynomial", exponent=3.0),
    "cosine": discrete.masked(3, "cosine"),
}
WORLD = exact.enumerable(np.random.default_rng(0).dirichlet(np.ones(27) / 2).reshape(3, 3, 3))


@pytest.mark.parametrize("name", PROCESSES)
def test_schedules_are_shares(name):
    p = PROCESSES[name]
    t = np.linspace(0, 1, 41)
    c = p.coefficients(t)
    np.testing.assert_allclose(c.alpha + c.sigma, 1, rtol=0, atol=1e-15)
    assert c.alpha[0] == 1 and c.sigma[0] == 0 and c.sigma[-1] == 1 and abs(c.alpha[-1]) < 1e-30
    wanted = {"linear": 1 - t, "polynomial": 1 - t**3, "cosine": 1 - np.cos(np.pi / 2 * (1 - t))}[name]
    np.testing.assert_allclose(c.alpha, wanted, rtol=0, atol=1e-15)
    inside = t[1:-1]
    slope = (p.coefficients(inside + 1e-6).alpha - p.coefficients(inside - 1e-6).alpha) / 2e-6
    np.testing.assert_allclose(p.coefficients(inside).da, slope, rtol=0, atol=1e-8)
    np.testing.assert_array_equal(c.ds, -c.da)
    np.testing.assert_allclose(p.time(p.half_log_snr(inside)), inside, rtol=0, atol=1e-12)
    for points in (grid.uniform(p, 7), grid.cosine(p, 7), grid.logsnr(p, 7)):
        assert len(points) == 7 and points.sigma[0] == 1 and points.sigma[-1] == 0


def test_positions_are_masked_with_the_schedules_share():
    p, x0 = PROCESSES["cosine"], jnp.tile(jnp.arange(3), 20000)[None]
    n = p.noise.sample(jax.random.key(3), x0.shape, x0.dtype)
    before = np.zeros(x0.shape, bool)
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        x = np.asarray(p.corrupt(x0, n, t))
        masked, sigma = x == 3, float(p.coefficients(t).sigma)
        np.testing.assert_array_equal(x[~masked], np.asarray(x0)[~masked])
        # five standard errors of a share of 60,000; none at the ends
        assert abs(masked.mean() - sigma) <= 5 * np.sqrt(sigma * (1 - sigma) / 60000)
        assert not np.any(before & ~masked)  # masked positions stay masked
        before = masked
    rows = p.corrupt(jnp.zeros((2, 9), jnp.int32), jnp.zeros((2, 9), jnp.uint32), jnp.array([0.0, 0.1]))
    assert np.all(rows[0] == 0) and np.all(rows[1] == 3)  # times (B,) are aligned from the left
    assert np.all(p.prior.sample(jax.random.key(0), (4,)) == 3)
    np.testing.assert_array_equal(p.prior.log_prob(jnp.array([[3, 3], [3, 0]])), [0, -np.inf])


@pytest.mark.parametrize("remask", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", PROCESSES)
def test_rows_keep_the_schedules_share(name, remask):
    """Whatever mu is, ``alpha_s = (1 - c) alpha_t + u (1 - alpha_t)``, with probabilities u and c."""
    p = PROCESSES[name]
    for points in (grid.uniform(p, 6), grid.logsnr(p, 9), grid.from_times(p, [0.8, 0.3, 0.1])):
        block = discrete.ancestral(p, points, remask=remask).blocks
        u, c = block.B[:, 0], np.zeros(len(points)) if block.remask is None else block.remask
        assert np.all((u >= 0) & (u <= 1 + 1e-15) & (c >= 0) & (c <= 1))
        np.testing.assert_allclose((1 - c) * block.alpha[:-1] + u * block.sigma[:-1], block.alpha[1:], atol=1e-15)
        if points.sigma[-1] == 0:
            assert u[-1] == 1 and c[-1] == 0  # the last step leaves no mask
        if remask == 1:
            assert np.all((c == 1) | (u > 1 - 1e-15) | (block.alpha[:-1] == 0))  # no more could be masked


def distance(p, steps, remask=0.0):
    """Total variation between the data and what a table returns, by enumeration."""
    block = discrete.ancestral(p, grid.uniform(p, steps), remask=remask).blocks
    law = WORLD.output_law(block.B, block.remask)
    np.testing.assert_allclose(law.sum(), 1, rtol=0, atol=1e-12)
    assert abs(1 - law[:3, :3, :3].sum()) < 1e-12  # no mask is left
    return 0.5 * np.abs(law[:3, :3, :3] - WORLD.probs).sum()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ancestral_converges_in_law_with_order_one(name):
    errors = np.array([distance(PROCESSES[name], steps) for steps in (32, 64, 128)])
    assert np.all(np.abs(np.log2(errors[:-1] / errors[1:]) - 1) < 0.03) and errors[-1] < 4e-3
    assert distance(PROCESSES[name], 1) > 0.2  # all at once: the product of the marginals


def test_remasking_also_converges():
    errors = np.array([distance(PROCESSES["linear"], steps, remask=1.0) for steps in (8, 32, 128)])
    assert np.all(errors[1:] < errors[:-1] / 1.8) and errors[-1] < 0.02


def test_one_position_a_step_is_the_data_itself():
    for order in ([0, 1, 2], [2, 0, 1]):
        law = WORLD.output_law(np.eye(3)[order])
        np.testing.assert_allclose(law[:3, :3, :3], WORLD.probs, rtol=0, atol=1e-15)


def test_bad_arguments_are_one_line_errors():
    p = PROCESSES["linear"]
    cases = {
        "schedule: 'cosin' is unknown; allowed: linear, polynomial, cosine; did you mean 'cosine'?": lambda: (
            discrete.masked(3, "cosin")
        ),
        "tokens: 0 given": lambda: discrete.masked(0),
        "tokens: 2.5 given": lambda: discrete.masked(2.5),
        "t_max: 1.5 given": lambda: discrete.masked(3, t_max=1.5),
        "exponent: 0.5 given": lambda: discrete.masked(3, "polynomial", exponent=0.5),
        "remask: 1.5 given": lambda: discrete.ancestral(p, [0.9, 0.1], remask=1.5),
        "remask: nan given": lambda: discrete.ancestral(p, [0.9, 0.1], remask=float("nan")),
        "process: 'linear' given; ancestral() needs a masked process": lambda: discrete.ancestral(
            process.linear(), [0.9, 0.1]
        ),
        "x0: dtype float32 given": lambda: p.corrupt(jnp.zeros((1, 2)), jnp.zeros((1, 2), jnp.uint32), 0.5),
        "times: 0.1, then 0.9 given": lambda: discrete.ancestral(p, [0.1, 0.9]),
        "table: needs one affine block": lambda: solver.check(discrete.ancestral(p, [0.9, 0.1])),
    }
    for message, build in cases.items():
        with pytest.raises(ValueError) as error:
            build()
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
