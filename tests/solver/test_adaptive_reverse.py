"""The adaptive reverse SDE: closed-form moments, strong convergence on one Brownian path, steps of each sample's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, process, solver
from jaxdiff.solver.adaptive_reverse import adaptive_sde

LINEAR, VP = process.linear(), process.vp()
GAUSSIAN = exact.Gaussian([0.7, -0.2], np.diag([0.3, 1.5]))
UNIMODAL = exact.GaussianMixture([0.3, 0.7], [[-0.5], [0.4]], [[[0.5]], [[0.2]]])  # two modes are a coin to toss
TOLERANCES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 3e-4)


@pytest.mark.parametrize("path", [LINEAR, VP], ids=lambda p: p.name)
def test_gaussian_moments_within_monte_carlo_error(path):
    """Means and covariances within 4 standard errors (8 numbers of two paths and two eta: 1 false alarm in 1,000 runs)."""
    B, d = 2048, exact.denoiser(GAUSSIAN, path)
    x = jax.random.normal(jax.random.key(3), (B, 2))
    mean, cov = GAUSSIAN.moments()
    var = np.diag(cov)
    solve = jax.jit(lambda x, eta: adaptive_sde(path, d, x, jax.random.key(1), eta=eta, rtol=5e-2, atol=5e-2).x)
    for eta in (1.0, 0.4):
        out = np.asarray(solve(x, eta), np.float64)
        assert np.all(np.abs(out.mean(0) - mean) < 4 * np.sqrt(var / B))
        assert np.all(np.abs(out.var(0) - var) < 4 * var * np.sqrt(2 / B))
        assert abs(np.cov(out.T)[0, 1]) < 4 * np.sqrt(var[0] * var[1] / B)
        # the SDE forgets its start as far as its noise goes; the probability flow keeps it entirely
        kept = np.corrcoef(out[:, 0], x[:, 0])[0, 1]
        assert (abs(kept) < 4 / np.sqrt(B)) if eta == 1.0 else (0.2 < kept < 0.98)


def test_strong_error_falls_with_tolerance_on_the_same_path():
    with jax.enable_x64(True):
        d = exact.denoiser(UNIMODAL, VP)
        x = jax.random.normal(jax.random.key(0), (24, 1), jnp.float64)
        solve = jax.jit(lambda x, tol, key, index: adaptive_sde(VP, d, x, key, index=index, rtol=tol, atol=tol))
        everyone, key = jnp.arange(24), jax.random.key(5)
        runs = {tol: solve(x, tol, key, everyone) for tol in TOLERANCES}
        other, moved = solve(x, 1e-2, jax.random.key(6), everyone), solve(x, 1e-2, key, everyone[::-1])
        assert solve._cache_size() == 1
        alone = solve(x[7:8], 1e-2, key, everyone[7:8])
    runs, (other, moved, alone) = jax.tree.map(np.asarray, (runs, (other, moved, alone)))
    fine = runs[TOLERANCES[-1]].x
    rms = lambda a: float(np.sqrt(np.mean((a - fine) ** 2)))
    errors = np.array([rms(runs[tol].x) for tol in TOLERANCES[:-1]])
    assert np.all(errors[1:] < errors[:-1]) and errors[-1] < 0.04 * errors[0]
    assert 0.7 < np.polyfit(np.log(TOLERANCES[:-1]), np.log(errors), 1)[0] < 1.3
    assert (
        rms(other.x) > 0.3 and rms(moved.x) > 0.3
    )  # another path is another sample: the figure above means something
    assert len(np.unique(runs[1e-2].steps)) > 5 and np.all(runs[1e-2].nfe == 2 * runs[1e-2].steps + 1)
    # a sample knows nothing of its neighbours, but which steps are taken on a rough path is a matter of rounding
    assert 0 < abs(alone.x[0, 0] - fine[7, 0]) < 5 * errors[3] and rms(runs[1e-2].x) == errors[3]


@pytest.mark.parametrize(("path", "method"), [(LINEAR, "spark"), (VP, "shark")], ids=["linear", "vp"])
def test_evaluations_are_counted(path, method):
    """The jump at the end, and on a path from alpha = 0 the one at the start, included."""
    calls, plain = [], exact.denoiser(GAUSSIAN, path)

    def counted(x, t, r=None):
        jax.debug.callback(lambda _: calls.append(1), x)
        return plain(x, t)

    out = adaptive_sde(path, counted, jnp.ones((1, 2)), jax.random.key(0), rtol=0.3, atol=0.3, method=method)
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert len(calls) == int(out.nfe[0]) > 5


def test_without_noise_it_is_the_probability_flow():
    d = exact.denoiser(UNIMODAL, LINEAR)
    x = jnp.linspace(-1.5, 1.5, 5)[:, None]
    solve = lambda x, key: adaptive_sde(LINEAR, d, x, key, eta=0.0, rtol=1e-5, atol=1e-5, method="sra1").x
    flow = exact.quantile_flow(UNIMODAL, LINEAR)(x, 1.0, 0.0)
    np.testing.assert_allclose(jax.jit(solve)(x, jax.random.key(2)), flow, rtol=0, atol=1e-4)


def test_refusals():
    d, x, key = exact.denoiser(GAUSSIAN, LINEAR), jnp.zeros((1, 2)), jax.random.key(0)
    for text, call in {
        "did you mean 'shark'": lambda: adaptive_sde(LINEAR, d, x, key, method="shar"),
        "rtol, atol: 0": lambda: adaptive_sde(LINEAR, d, x, key, rtol=0),
        "eta: -1": lambda: adaptive_sde(LINEAR, d, x, key, eta=-1),
        "t_min: 0": lambda: adaptive_sde(LINEAR, d, x, key, t_min=0),
        "lam_first: 9": lambda: adaptive_sde(LINEAR, d, x, key, lam_first=9),
        "resolution: 0": lambda: adaptive_sde(LINEAR, d, x, key, resolution=0),
        "key: int": lambda: adaptive_sde(LINEAR, d, x, 3),
        "needs Gaussian noise": lambda: adaptive_sde(process.linear(noise=process.student_t(4.0)), d, x, key),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()
    assert solver.adaptive_sde is adaptive_sde
