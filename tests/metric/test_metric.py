"""Distances, kernels and MMD against direct computation and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import metric

RNG = np.random.default_rng(0)


def gaussian_kernel_mean(shift_squared, variance_sum, bandwidth, dimension):
    """E exp(-|u|^2/(2h^2)) for u ~ N(d, v I), with |d|^2 and v given."""
    total = bandwidth**2 + variance_sum
    return (bandwidth**2 / total) ** (dimension / 2) * np.exp(-shift_squared / (2 * total))


def test_pairwise_distances_equal_direct_differences():
    x, y = RNG.normal(size=(7, 2, 3)), RNG.normal(size=(5, 2, 3))
    direct = np.square(x.reshape(7, 1, 6) - y.reshape(1, 5, 6)).sum(-1)
    np.testing.assert_allclose(metric.pairwise_squared_distances(x, y), direct, rtol=1e-12)
    np.testing.assert_allclose(metric.pairwise_squared_distances(jnp.asarray(x), jnp.asarray(y)), direct, rtol=2e-6)


def test_pairwise_distances_survive_a_far_origin_in_float32():
    # without centring, |x|^2 = 3e6 swamps distances of order 1 in float32
    x, y = RNG.normal(size=(6, 3)), RNG.normal(size=(4, 3))
    far_x, far_y = jnp.float32(x + 1000), jnp.float32(y + 1000)
    direct = np.square(np.asarray(far_x, float)[:, None] - np.asarray(far_y, float)).sum(-1)
    np.testing.assert_allclose(metric.pairwise_squared_distances(far_x, far_y), direct, rtol=1e-4)


def test_nearest_distances_are_the_sorted_column_and_exact_for_copies():
    x, y = RNG.normal(size=(9, 4)) + 50, RNG.normal(size=(12, 4)) + 50
    x[3] = y[5]
    every = np.sort(np.linalg.norm(x[:, None] - y, axis=-1), axis=1)
    for k in (1, 3, 12):
        np.testing.assert_allclose(metric.nearest_distances(x, y, k, chunk=4), every[:, k - 1], rtol=1e-12)
    assert metric.nearest_distances(x, y)[3] == 0.0
    own = np.sort(np.linalg.norm(y[:, None] - y, axis=-1), axis=1)
    np.testing.assert_allclose(metric.nearest_distances(y, y, 2, same=True, chunk=5), own[:, 2], rtol=1e-12)


def test_rbf_averages_bandwidths_and_matches_its_formula():
    x, y = RNG.normal(size=(4, 3)), RNG.normal(size=(5, 3))
    squared = np.square(x[:, None] - y).sum(-1)
    expected = (np.exp(-squared / (2 * 0.5**2)) + np.exp(-squared / (2 * 2.0**2))) / 2
    np.testing.assert_allclose(metric.rbf(x, y, [0.5, 2.0]), expected, rtol=1e-12)
    np.testing.assert_allclose(metric.rbf(jnp.asarray(x), y, [0.5, 2.0]), expected, rtol=1e-5, atol=1e-7)


def test_polynomial_is_the_kid_kernel():
    x, y = RNG.normal(size=(4, 3)), RNG.normal(size=(5, 3))
    np.testing.assert_allclose(metric.polynomial(x, y), (x @ y.T / 3 + 1) ** 3, rtol=1e-12)
    np.testing.assert_allclose(metric.polynomial(x, y, 2, 0.7, 0.2), (0.7 * x @ y.T + 0.2) ** 2, rtol=1e-12)


def test_mmd_does_not_depend_on_the_chunk_and_agrees_between_numpy_and_jax():
    x, y = RNG.normal(size=(23, 3)), RNG.normal(size=(17, 3)) + 0.5
    whole = metric.mmd_squared(x, y)
    xx, yy, xy = metric.rbf(x, x), metric.rbf(y, y), metric.rbf(x, y)
    by_hand = (xx.sum() - 23) / (23 * 22) + (yy.sum() - 17) / (17 * 16) - 2 * xy.mean()
    assert whole == pytest.approx(by_hand, rel=1e-12)
    assert metric.mmd_squared(x, y, chunk=5) == pytest.approx(whole, rel=1e-12)
    assert float(jax.jit(metric.mmd_squared)(jnp.asarray(x), jnp.asarray(y))) == pytest.approx(whole, abs=2e-6)
    assert metric.mmd_squared(x, x, unbiased=False) == pytest.approx(0.0, abs=1e-14)


def test_unbiased_mmd_has_mean_zero_for_equal_laws_and_the_biased_form_does_not():
    generator = np.random.default_rng(1)
    draws = generator.normal(size=(2, 400, 20, 2))
    unbiased = np.array([metric.mmd_squared(a, b) for a, b in zip(*draws)])
    biased = np.array([metric.mmd_squared(a, b, unbiased=False) for a, b in zip(*draws)])
    error = unbiased.std() / np.sqrt(len(unbiased))
    assert abs(unbiased.mean()) < 4 * error  # 4 standard errors
    assert biased.mean() > 20 * error


@pytest.mark.parametrize("shift, scale", [(0.0, 1.6), (0.8, 1.0), (0.5, 0.6)])
def test_mmd_of_gaussians_has_its_closed_form(shift, scale):
    """x ~ N(0, I), y ~ N(d, s^2 I) in 3 dimensions, |d| = shift."""
    generator, bandwidth, dimension = np.random.default_rng(2), 1.3, 3
    mean = np.array([shift, 0.0, 0.0])
    values = []
    for _ in range(60):
        x = generator.normal(size=(300, dimension))
        y = mean + scale * generator.normal(size=(300, dimension))
        values.append(metric.mmd_squared(x, y, partial(metric.rbf, bandwidths=bandwidth)))
    exact = (
        gaussian_kernel_mean(0, 2, bandwidth, dimension)
        + gaussian_kernel_mean(0, 2 * scale**2, bandwidth, dimension)
        - 2 * gaussian_kernel_mean(shift**2, 1 + scale**2, bandwidth, dimension)
    )
    error = np.std(values) / np.sqrt(len(values))
    assert error < 0.03 * exact  # the check has teeth: three per cent of the value
    assert np.mean(values) == pytest.approx(exact, abs=4 * error)


def test_mmd_gradient_pulls_samples_to_the_reference():
    x, y = jnp.asarray(RNG.normal(size=(30, 2)), jnp.float32), jnp.asarray(RNG.normal(size=(30, 2)) + 1, jnp.float32)
    gradient = jax.grad(metric.mmd_squared)(x, y)
    assert np.isfinite(gradient).all() and (np.asarray(gradient).mean(axis=0) < 0).all()


def test_median_bandwidth():
    points = np.array([[0.0], [1.0], [3.0]])
    assert metric.median_bandwidth(points) == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"median distance of 4 points is 0"):
        metric.median_bandwidth(np.zeros((4, 2)))


def linear(params, images):
    flat = images.reshape(len(images), -1)
    return flat @ params["w"], flat[:, :2]


def test_extract_pads_without_changing_anything_and_compiles_once():
    traces = []

    def apply(params, images):
        traces.append(images.shape)
        return linear(params, images)

    network = metric.FeatureNetwork(apply, {"w": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)}, "linear")
    images = RNG.normal(size=(11, 2, 3)).astype(np.float32)
    direct = images.reshape(11, 6) @ np.asarray(network.params["w"])
    for n in (11, 4, 3):
        found = metric.extract(network, images[:n], batch=4)
        np.testing.assert_allclose(found.features, direct[:n], rtol=1e-5, atol=1e-6)
        assert found.features.dtype == np.float64 and found.logits.shape == (n, 2)
    other = metric.FeatureNetwork(apply, {"w": 2 * network.params["w"]}, "linear")
    np.testing.assert_allclose(metric.extract(other, images, batch=4).features, 2 * direct, rtol=1e-5, atol=1e-6)
    assert traces == [(4, 2, 3)]


def test_pixels_is_the_identity():
    images = RNG.normal(size=(3, 2, 2, 1)).astype(np.float32)
    found = metric.extract(metric.pixels(), images)
    np.testing.assert_array_equal(found.features, images.reshape(3, 4))
    assert found.logits is None


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: metric.rbf(np.ones((2, 2)), np.ones((2, 3))), "dimensions 2 and 3"),
        (lambda: metric.rbf(np.ones((2, 2)), np.ones((2, 2)), [1.0, 0.0]), "bandwidths"),
        (lambda: metric.polynomial(np.ones((2, 2)), np.ones((2, 2)), 0), "degree"),
        (lambda: metric.flat(np.array([[1.0], [np.nan]])), "1 of 2 hold NaN"),
        (lambda: metric.flat(np.ones((0, 3))), "N >= 1"),
        (lambda: metric.nearest_distances(np.ones((3, 2)), np.ones((3, 2)), 3, same=True), r"allowed 1\.\.2"),
        (lambda: metric.mmd_squared(np.ones((1, 2)), np.ones((3, 2))), "at least 2"),
        (lambda: metric.extract(metric.pixels(), np.ones((0, 2))), "images"),
        (lambda: metric.extract(metric.pixels(), np.ones((3, 2)), batch=0), "batch"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
