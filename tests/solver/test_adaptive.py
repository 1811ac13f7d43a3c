"""Adaptive solves: the error follows the tolerance over four decades, steps are each sample's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, process
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


def test_refusals():
    with pytest.raises(ValueError, match="did you mean 'tsit5'"):
        adaptive.adaptive_ode(LINEAR, None, jnp.zeros((1, 1)), method="tsit")
    with pytest.raises(ValueError, match="t_min: 0"):
        adaptive.adaptive_ode(LINEAR, None, jnp.zeros((1, 1)), t_min=0)
    with pytest.raises(ValueError, match="rtol, atol"):
        adaptive.adaptive_ode(LINEAR, None, jnp.zeros((1, 1)), rtol=0)
