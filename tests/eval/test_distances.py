"""Transport, Frechet, KID, precision/recall and memorisation against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import eval as ev

RNG = np.random.default_rng(0)


def random_covariance(generator, dimension, rank=None):
    root = generator.normal(size=(dimension, rank or dimension))
    return root @ root.T / dimension


# ---- one-dimensional and sliced transport


def test_w2_on_the_line_is_exact_for_equal_and_unequal_counts():
    assert float(ev.wasserstein_1d(np.array([3.0, 1.0]), np.array([2.0, 6.0]))) == pytest.approx(np.sqrt((1 + 9) / 2))
    # quantile steps of {0, 3} against {0, 1, 2}: [0,1/3): 0-0, [1/3,1/2): 0-1, [1/2,2/3): 3-1, [2/3,1): 3-2
    exact = np.sqrt(1 / 6 * 1 + 1 / 6 * 4 + 1 / 3 * 1)
    assert float(ev.wasserstein_1d(np.array([0.0, 3.0]), np.array([0.0, 1.0, 2.0]))) == pytest.approx(
        exact, rel=1e-12
    )


def test_w2_with_unequal_counts_equals_repeated_points():
    x, y = RNG.normal(size=12), RNG.normal(size=8) + 0.3
    assert float(ev.wasserstein_1d(x, y)) == pytest.approx(
        float(ev.wasserstein_1d(x.repeat(2), y.repeat(3))), rel=1e-12
    )


def test_directions_are_seeded_orthonormal_bases():
    theta = ev.directions(5, 12, seed=3)
    np.testing.assert_allclose(theta[:, 5:10].T @ theta[:, 5:10], np.eye(5), atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(theta, axis=0), 1.0)
    np.testing.assert_array_equal(theta, ev.directions(5, 12, seed=3))
    assert np.abs(theta - ev.directions(5, 12, seed=4)).max() > 0.1
    many = ev.directions(2, 4000)
    assert abs(many[0].mean()) < 0.05 and abs((many[0] ** 2).mean() - 0.5) < 1e-3


def test_sliced_w2_of_a_shift_is_its_length_over_root_dimension():
    x = RNG.normal(size=(50, 4))
    shift = np.array([1.0, -2.0, 0.5, 0.0])
    exact = np.linalg.norm(shift) / 2
    assert float(ev.sliced_wasserstein(x, x + shift, projections=8)) == pytest.approx(exact, rel=1e-12)
    assert float(ev.sliced_wasserstein(x, x[::-1])) == 0.0


def test_sliced_w2_of_gaussians():
    """N(0, I) against N(m, s^2 I) in d dimensions: sqrt(|m|^2/d + (s-1)^2)."""
    generator, dimension, scale = np.random.default_rng(5), 3, 1.7
    mean = np.array([0.6, 0.0, -0.8])
    x = generator.normal(size=(20000, dimension))
    y = mean + scale * generator.normal(size=(15000, dimension))
    exact = np.sqrt(1.0 / dimension + (scale - 1) ** 2)
    assert float(ev.sliced_wasserstein(x, y, projections=60)) == pytest.approx(exact, rel=0.01)


def test_sliced_w2_is_traceable():
    x, y = RNG.normal(size=(30, 2)), RNG.normal(size=(20, 2))
    traced = jax.jit(ev.sliced_wasserstein)(jnp.asarray(x), jnp.asarray(y))
    assert float(traced) == pytest.approx(float(ev.sliced_wasserstein(x, y)), rel=1e-5)


# ---- Frechet


def test_frechet_of_commuting_gaussians():
    """Shared eigenvectors: |m1-m2|^2 + sum (sqrt a_i - sqrt b_i)^2."""
    basis = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
    a, b = np.array([4.0, 1.0, 0.25, 0.0, 2.0]), np.array([1.0, 1.0, 9.0, 3.0, 0.0])
    m1, m2 = RNG.normal(size=(2, 5))
    exact = np.sum((m1 - m2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    found = ev.frechet_from_moments(ev.Moments(m1, basis * a @ basis.T), ev.Moments(m2, basis * b @ basis.T))
    assert found == pytest.approx(exact, rel=1e-12)


def test_frechet_of_gaussians_that_do_not_commute():
    """In two dimensions tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)), by Cayley-Hamilton."""
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.4], [-0.4, 3.0]])
    assert np.abs(a @ b - b @ a).max() > 0.5
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    exact = 1.0 + np.trace(a) + np.trace(b) - 2 * root
    found = ev.frechet_from_moments(ev.Moments(np.zeros(2), a), ev.Moments(np.array([1.0, 0.0]), b))
    assert found == pytest.approx(exact, rel=1e-12)


def test_frechet_agrees_with_the_eigenvalues_of_the_product_in_many_dimensions():
    generator = np.random.default_rng(3)
    a, b = random_covariance(generator, 12), random_covariance(generator, 12)
    root = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    found = ev.frechet_from_moments(ev.Moments(np.zeros(12), a), ev.Moments(np.zeros(12), b))
    assert found == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-9)


def test_frechet_is_exact_for_rank_deficient_covariances():
    """Rank one against rank one: tr (S1 S2)^(1/2) = |u.v| for S1 = u u^T, S2 = v v^T."""
    u, v = RNG.normal(size=(2, 40))
    exact = u @ u + v @ v - 2 * abs(u @ v)
    found = ev.frechet_from_moments(
        ev.Moments(np.zeros(40), np.outer(u, u)), ev.Moments(np.zeros(40), np.outer(v, v))
    )
    assert found == pytest.approx(exact, rel=1e-10)
    few = RNG.normal(size=(10, 40)) + 5  # ten points in forty dimensions
    assert ev.frechet_distance(few, few[::-1]) < 1e-11
    assert ev.frechet_distance(few, few + 0.5) == pytest.approx(40 * 0.25, rel=1e-10)


def test_moments_are_the_unbiased_ones():
    mean, covariance = ev.moments(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]))
    np.testing.assert_allclose(mean, [2.0, 2.0])
    np.testing.assert_allclose(covariance, [[4.0, 3.0], [3.0, 3.0]])


def test_frechet_of_samples_is_biased_like_one_over_n():
    """The reason for floors: equal laws, equal counts, yet far from zero, and halved by doubling N."""
    generator = np.random.default_rng(4)

    def value(n):
        return np.mean([ev.frechet_distance(*generator.normal(size=(2, n, 16))) for _ in range(40)])

    small, large = value(200), value(400)
    assert small > 0.3 and large / small == pytest.approx(0.5, abs=0.05)


# ---- KID and MMD


def test_kid_of_equal_laws_is_zero_within_its_error_and_of_a_shift_is_not():
    generator = np.random.default_rng(6)
    pairs = generator.normal(size=(30, 2, 200, 8))
    equal = np.array([ev.kid(x, y, subsets=5).mean for x, y in pairs])
    error = equal.std() / np.sqrt(len(equal))
    assert abs(equal.mean()) < 4 * error
    assert ev.kid(pairs[0, 0], pairs[0, 1] + 0.5).mean > 20 * error


def test_kid_draws_half_of_the_smaller_set_so_that_draws_differ():
    x, y = np.random.default_rng(7).normal(size=(2, 40, 3))
    assert ev.kid(x, y[:30], subsets=8) == ev.kid(x, y[:30], subsets=8, subset_size=15)
    assert ev.kid(x, y[:30], subsets=8).spread > 0


def test_kid_of_a_shift_has_its_closed_form():
    """Degree 3, x ~ N(0, I), y ~ N(m, I), u = x.x'/D: E (1+u)^3 = 1 + 3 E u + 3 E u^2 + E u^3."""
    dimension, length = 4, 0.9
    mean = np.zeros(dimension)
    mean[0] = length

    def third(p, q):  # laws N(p, I), N(q, I): moments of s = x.y given by conditioning on x
        dot, pp, qq, d = p @ q, p @ p, q @ q, dimension
        first = dot
        second = dot**2 + pp + qq + d
        # s | x ~ N(x.q, |x|^2): E s^3 = E (x.q)^3 + 3 E (x.q) |x|^2
        xq3 = dot**3 + 3 * dot * qq
        xq_xx = dot * (pp + d) + 2 * dot
        return 1 + 3 * first / d + 3 * second / d**2 + (xq3 + 3 * xq_xx) / d**3

    zero = np.zeros(dimension)
    exact = third(zero, zero) + third(mean, mean) - 2 * third(zero, mean)
    generator = np.random.default_rng(7)
    values = []
    for _ in range(60):
        x, y = generator.normal(size=(2, 400, dimension))
        values.append(ev.kid(x, y + mean, subsets=1, subset_size=400).mean)
    error = np.std(values) / np.sqrt(len(values))
    assert error < 0.05 * exact
    assert np.mean(values) == pytest.approx(exact, abs=4 * error)


def test_mmd_takes_its_bandwidths_from_the_reference_alone():
    x, y = 3 * RNG.normal(size=(60, 3)), RNG.normal(size=(50, 3))
    distances = np.linalg.norm(y[:, None] - y, axis=-1)[np.triu_indices(50, k=1)]
    widths = np.median(distances) * np.array([0.25, 0.5, 1.0, 2.0, 4.0])
    assert ev.mmd(x, y) == pytest.approx(ev.mmd(x, y, bandwidths=widths), rel=1e-12)
    assert ev.mmd(x, y) != pytest.approx(ev.mmd(y, x), rel=1e-3)  # the other reference is another ruler


# ---- neighbours


def test_precision_and_recall_of_identical_and_disjoint_sets():
    x = RNG.normal(size=(60, 4))
    assert ev.precision_recall(x, x[::-1]) == (1.0, 1.0)
    assert ev.precision_recall(x, x + 100) == (0.0, 0.0)
    doubled = x.repeat(5, axis=0)  # every ball has radius zero
    assert ev.precision_recall(doubled, doubled) == (1.0, 1.0)


def test_balls_reach_the_kth_neighbour():
    """Points 0, 1, 3, 7: the k-th neighbours are 1, 1, 2, 4 away, then 3, 2, 3, 6, then 7, 6, 4, 7."""
    samples, real = np.array([[-1.5], [-4.0], [13.5], [0.5]]), np.array([[0.0], [1.0], [3.0], [7.0]])
    assert [ev.precision_recall(samples, real, k=k).precision for k in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert [ev.precision_recall(real, samples, k=k).recall for k in (1, 2, 3)] == [0.25, 0.5, 1.0]


def test_precision_falls_with_outliers_and_recall_with_a_missing_mode():
    generator = np.random.default_rng(8)
    left, right = generator.normal(size=(2, 200, 2))
    real = np.concatenate([left - 20, right + 20])
    one_mode = generator.normal(size=(400, 2)) - 20
    precision, recall = ev.precision_recall(one_mode, real)
    assert precision > 0.85 and 0.4 < recall <= 0.5
    spoiled = np.concatenate([real[:300] + 1e-3, generator.normal(size=(100, 2)) * 300])
    assert 0.7 < ev.precision_recall(spoiled, real).precision < 0.8


def test_memorisation_catches_copies_and_passes_new_data():
    generator = np.random.default_rng(9)
    train, heldout, fresh = (generator.normal(size=(n, 8)) for n in (800, 400, 400))
    honest = ev.memorisation(fresh, train, heldout)
    assert 0.9 < honest.ratio < 1.1 and honest.copied < 0.05
    copied = ev.memorisation(train[:400], train, heldout)
    assert copied.ratio == 0.0 and copied.copied == 1.0
    noisy = ev.memorisation(train[:400] + 0.01, train, heldout)
    assert noisy.ratio < 0.1 and noisy.copied == 1.0
    mixed = ev.memorisation(np.concatenate([fresh[:300], train[:100]]), train, heldout)
    assert 0.24 < mixed.copied < 0.3


def test_agreement_counts_the_largest_logit():
    logits = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert ev.agreement_of_logits(logits, np.array([1, 0, 0, 0])) == 0.75


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ev.wasserstein_1d(np.ones((3, 2)), np.ones((3, 2))), "dimension 2"),
        (lambda: ev.directions(3, 0), "count: 0"),
        (lambda: ev.moments(np.ones((1, 3))), "at least 2"),
        (lambda: ev.frechet_distance(np.ones((4, 3)), np.ones((4, 2))), "3 and 2 features"),
        (
            lambda: ev.frechet_from_moments(*[ev.Moments(np.zeros(2), np.diag([1.0, -1.0]))] * 2),
            "negative eigenvalue",
        ),
        (lambda: ev.frechet_from_moments(*[ev.Moments(np.zeros(2), np.triu(np.ones((2, 2))))] * 2), "not symmetric"),
        (lambda: ev.kid(np.ones((9, 2)), np.ones((1, 2))), "x, y: sets of 9 and 1; kid.. needs at least 4"),
        (lambda: ev.kid(np.ones((9, 2)), np.ones((5, 2)), subset_size=6), r"subset_size: 6 .* allowed 2\.\.5"),
        (lambda: ev.kid(np.ones((9, 2)), np.ones((5, 2)), subsets=0), "subsets: 0"),
        (lambda: ev.memorisation(np.ones((3, 2)), np.ones((3, 2)), np.ones((3, 2))), "no scale to judge by"),
        (lambda: ev.memorisation(np.ones((3, 2)), np.ones((3, 2)), np.zeros((3, 2)), quantile=1.0), "quantile: 1.0"),
        (lambda: ev.agreement_of_logits(np.ones((2, 3)), np.array([0, 3])), r"allowed 0\.\.2"),
        (lambda: ev.agreement_of_logits(np.ones((2, 3)), np.array([0.0, 1.0])), "expected integers"),
        (lambda: ev.agreement_of_logits(np.ones((2, 3)), np.array([0])), r"expected \(2,\)"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
