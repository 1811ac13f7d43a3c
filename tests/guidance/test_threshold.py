"""Bounds on the data estimate: identity inside, the bound outside, and a pair that still makes the state."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, process
from jaxdiff.guidance.threshold import clip, threshold

LINEAR = process.linear()
D = exact.denoiser(exact.Gaussian(np.zeros(4), 4.0), LINEAR)
X = jnp.array([[0.1, -0.2, 0.05, 0.0], [5.0, -2.0, 0.5, 1.0]])


@pytest.mark.parametrize(
    "bounded", [lambda **k: clip(D, -10, 10, **k), lambda **k: threshold(D, 0.9, bound=10.0, **k)]
)
def test_identity_where_all_is_inside(bounded):
    for noise in ("consistent", "kept"):
        one, other = bounded(noise=noise)(X, 0.3), D(X, 0.3)
        assert np.array_equal(one.data, other.data) and np.array_equal(one.noise, other.noise)


def test_bounds_and_noise():
    plain, held = D(X, 0.3), clip(D)(X, 0.3)
    np.testing.assert_array_equal(held.data, np.clip(plain.data, -1, 1))
    np.testing.assert_allclose(0.7 * held.data + 0.3 * held.noise, X, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(clip(D, noise="kept")(X, 0.3).noise, plain.noise)
    moving = threshold(D, 0.75)(X, 0.3)
    size = np.maximum(np.quantile(np.abs(plain.data), 0.75, axis=1), 1)[:, None]
    np.testing.assert_allclose(moving.data, np.clip(plain.data, -size, size) / size, rtol=1e-6)
    assert size[0] == 1 and size[1] > 1.5  # samples are bounded one by one
    np.testing.assert_allclose(0.7 * moving.data + 0.3 * moving.noise, X, rtol=0, atol=2e-6)


def test_refusals():
    with pytest.raises(ValueError, match="low < high"):
        clip(D, 1, -1)
    with pytest.raises(ValueError, match="noise: 'consistent' needs alpha and sigma"):
        clip(lambda x, t, r=None: D(x, t))(X, 0.3)
    with pytest.raises(ValueError, match="percentile: 2"):
        threshold(D, 2)
    with pytest.raises(ValueError, match="noise: 'free'"):
        clip(D, noise="free")
