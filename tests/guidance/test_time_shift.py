"""Time shift: the matched time is the closed form's, window 0 the denoiser, wrapper and hook the published step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, guidance, prediction, process, solver
from jaxdiff.solver import grid

VP, LINEAR = process.vp(), process.linear()
N, V = 4096, 0.25
KEY = jax.random.key(0)


def states(path, t, scale=1.0, batch=3):
    """Marginal states of N(0, V) data at t, their variance exact, times ``scale``."""
    x = np.random.default_rng(0).standard_normal((batch, N))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    c = path.coefficients(np.float64(t))
    return jnp.asarray(scale * np.sqrt(c.alpha**2 * V + c.sigma**2) * x)


@pytest.mark.parametrize("path", [VP, LINEAR], ids=lambda p: p.name)
@pytest.mark.parametrize("scale", [1.0, 1.02, 0.99])
def test_gaussian_data_gives_the_closed_form_time(path, scale):
    t = 0.6
    x = states(path, t, scale)
    found = solver.matched_time(path, x, t, window=0.3, data_variance=V)
    fine = np.linspace(0.45, 0.75, 30001)  # alpha_u^2 V + sigma_u^2 = the state's variance, solved on the host
    c = path.coefficients(fine)
    truth = fine[np.argmin(np.abs(c.alpha**2 * V + c.sigma**2 - float(np.var(x[0]))))]
    np.testing.assert_allclose(found, truth, rtol=0, atol=5.1e-4)  # half the resolution
    assert (truth > t + 1e-3) if scale > 1 else (truth < t - 1e-3) if scale < 1 else abs(truth - t) < 1e-4


def test_published_rule_without_data_variance():
    """Among t + j/1000, |j| <= 15, the one whose sigma^2 is nearest, as a loop would find it; samples on their own."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((4, 8, 8)) * np.array([0.7, 0.8, 0.9, 0.95])[:, None, None], jnp.float32)
    found = solver.matched_time(VP, x, 0.5, window=0.03)
    for i in range(4):
        times = 0.5 + np.arange(-15, 16) / 1000
        best = times[np.argmin(np.abs(VP.coefficients(times).sigma ** 2 - np.var(np.asarray(x[i], np.float64))))]
        np.testing.assert_allclose(found[i], best, rtol=0, atol=1e-6)


def test_window_zero_is_the_denoiser():
    d = exact.denoiser(exact.Gaussian(np.zeros(16), V), LINEAR)
    table = solver.dpm_solver_pp(LINEAR, grid.uniform(LINEAR, 8))
    x = jax.random.normal(KEY, (5, 16))
    np.testing.assert_array_equal(solver.matched_time(LINEAR, x, 0.4, window=0.0), np.full(5, np.float32(0.4)))
    go = jax.jit(lambda d: solver.run(table, d, x))
    np.testing.assert_allclose(go(guidance.time_shift(d, window=0.0, cutoff=0.0)), go(d), rtol=2e-6, atol=2e-6)
    below = guidance.time_shift(d, window=0.3, cutoff=1.0)  # never above the cutoff
    np.testing.assert_allclose(go(below), go(d), rtol=2e-6, atol=2e-6)


def net(params, x, t, cond):
    """A noise network that depends on what time it is told."""
    return x * jnp.reshape(jnp.sqrt(t), (-1,) + (1,) * (x.ndim - 1)) * params


def test_wrapper_hook_and_a_hand_written_loop_agree():
    early = process.vp(t_max=0.999)
    d = prediction.denoiser(early, net, jnp.float32(0.9), target="noise")
    points = grid.uniform(early, 6)
    table, x = solver.ddim(early, points), 1.1 * jax.random.normal(KEY, (4, 64))
    shifted = guidance.time_shift(d, window=0.04, cutoff=0.2)
    wrapped = jax.jit(lambda: solver.run(table, shifted, x))()
    retime = lambda y, row: shifted.time(y, row.tau)
    hooked = jax.jit(lambda: solver.run(table, d, x, hooks=solver.hooks(retime=retime)))()
    np.testing.assert_allclose(wrapped, hooked, rtol=2e-5, atol=2e-6)
    y, moved = np.asarray(x, np.float64), 0
    for k in range(6):
        t, to = float(points.time[k]), k + 1
        told = np.full(4, t)
        if 0.2 < t < early.t_max:
            told = np.asarray(solver.matched_time(early, jnp.asarray(y, jnp.float32), t, window=0.04), np.float64)
        moved += int(np.sum(np.abs(told - t) > 1e-6))
        eps = 0.9 * y * np.sqrt(told)[:, None]
        data = (y - points.sigma[k] * eps) / points.alpha[k]
        y = points.alpha[to] * data + points.sigma[to] * eps
    assert moved > 4
    np.testing.assert_allclose(wrapped, y, rtol=1e-3, atol=1e-3)
    assert np.max(np.abs(np.asarray(solver.run(table, d, x)) - y)) > 1e-2


def test_an_inflated_state_is_understood_better():
    """Exposure bias in closed form: x = 1.1 x_t is the marginal of a later time; asked there, eps has the right scale."""
    d, t = exact.denoiser(exact.Gaussian([0.0], V), LINEAR), 0.7  # every number a sample of a 1-D world
    x = states(LINEAR, t, 1.1).astype(jnp.float32)
    told = guidance.time_shift(d, window=0.3, cutoff=0.0, data_variance=V)(x, t)
    # Var(eps_hat) of a marginal state at u is sigma_u^2/(alpha_u^2 V + sigma_u^2); the naive question is off by 1.1^2
    u = float(solver.matched_time(LINEAR, x, t, window=0.3, data_variance=V)[0])
    right = u**2 / ((1 - u) ** 2 * V + u**2)
    np.testing.assert_allclose(np.var(told.noise), right, rtol=2e-3)
    assert abs(np.var(d(x, t).noise) - right) > 0.1


def test_where_the_nominal_level_has_no_signal_the_data_are_the_answer_themselves():
    d = exact.denoiser(exact.Gaussian(np.zeros(N), V), LINEAR)
    x, shifted = states(LINEAR, 0.8), guidance.time_shift(d, window=0.3, cutoff=0.0, data_variance=V)
    query = prediction.Query(0.9, None, 0.0, 1.0)  # an explicit grid may say so before t_max
    told = shifted.step(shifted.start(x), x, query)[0]
    assert np.all(shifted.time(x, 0.9) < 0.85)
    np.testing.assert_allclose(told.data, d(x, shifted.time(x, 0.9)).data, rtol=1e-5, atol=1e-6)


def test_refusals():
    d = exact.denoiser(exact.Gaussian([0.0], 1.0), LINEAR)
    for text, call in {
        "process: missing": lambda: guidance.time_shift(lambda x, t, r: x),
        "window, resolution: -1": lambda: guidance.time_shift(d, window=-1),
        "window, resolution: 0.1, 0": lambda: solver.matched_time(
            LINEAR, jnp.zeros((1, 1)), 0.5, window=0.1, resolution=0
        ),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()
