"""Adaptive solves: the error follows the tolerance over four decades, steps are each sample's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, guidance, process
from jaxdiff.solver import adaptive

LINEAR = process.linear()
WORLD = exact.GaussianMixture([0.3, 0.7], [[-1.5], [1.0]], [[[0.05]], [[0.1]]])


def test_error_tracks_tolerance_and_steps_differ_by_sample():
    with jax.enable_x64(True):
        d = exact.denoiser(WORLD, LINEAR)
        x = jnp.linspace(-2.5, 2.5, 21)[:, None]
        truth = exact.quantile_flow(WORLD, LINEAR)(x, 1.0, 0.0)

        @jax.jit
        def solve(x, tolerance):
            return adaptive.adaptive_ode(LINEAR, d, x, rtol=tolerance, atol=tolerance, t_min=1e-6)

        out = {tol: solve(x, tol) for tol in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)}
    errors = np.array([np.max(np.abs(np.asarray(v.x) - np.asarray(truth))) for v in out.values()])
    assert np.all(errors[1:] < errors[:-1]) and np.all(errors < 50 * np.array(list(out)))
    slope = np.polyfit(np.log10(list(out)), np.log10(errors), 1)[0]
    assert 0.7 < slope < 1.3
    assert len(np.unique(out[1e-6].steps)) > 3
    assert solve._cache_size() == 1


@pytest.mark.parametrize("method", ["tsit5", "heun"])
def test_evaluations_are_counted(method):
    calls, plain = [], exact.denoiser(WORLD, LINEAR)

    def counted(x, t, r=None):
        jax.debug.callback(lambda _: calls.append(1), t)
        return plain(x, t)

    solve = lambda x: adaptive.adaptive_ode(LINEAR, counted, x, rtol=1e-3, atol=1e-3, method=method)
    out = jax.jit(solve)(jnp.ones((1, 1)))
    jax.effects_barrier()
    assert len(calls) == int(out.nfe[0])


def test_guided_denoisers_with_labels():
    world = exact.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.1]], [[0.1]]], labels=[0, 1])
    d, x, labels = exact.denoiser(world, LINEAR), jnp.array([[0.3], [-0.8]]), jnp.array([0, 1])
    solve = jax.jit(lambda d: adaptive.adaptive_ode(LINEAR, d, x, cond=labels).x)
    np.testing.assert_allclose(solve(guidance.cfg(d, 1.0, null=-1)), solve(d), rtol=0, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="did you mean 'tsit5'"):
        adaptive.adaptive_ode(LINEAR, None, jnp.zeros((1, 1)), method="tsit")
    with pytest.raises(ValueError, match="t_min: 0"):
        adaptive.adaptive_ode(LINEAR, None, jnp.zeros((1, 1)), t_min=0)
    with pytest.raises(ValueError, match="rtol, atol"):
        adaptive.adaptive_ode(LINEAR, None, jnp.zeros((1, 1)), rtol=0)
