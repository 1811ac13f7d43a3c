"""Closed-form worlds against brute-force quadrature, autodiff and the Fokker-Planck identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, process

COV = np.array([[0.5, 0.2], [0.2, 0.15]])
LEVELS = [(1.0, 0.0), (0.9, 0.2), (0.4, 0.9), (1.0, 3.0), (0.02, 1.0), (0.0, 1.0)]


def line():
    return exact.GaussianMixture([2.0, 5.0, 3.0], [-2.0, 0.3, 1.5], [0.05, 0.3, 0.01])


def plane():
    covs = np.stack([COV, 0.1 * np.eye(2), np.array([[0.2, -0.15], [-0.15, 0.3]])])
    return exact.GaussianMixture([0.3, 0.5, 0.2], [[1.0, 0.5], [-1.0, 0.0], [0.3, -1.2]], covs, labels=[0, 1, 1])


def density(weights, means, covs, x):
    """The mixture's density at x (..., d), written with inverses and determinants."""
    total = 0
    for w, m, c in zip(weights, means, covs):
        offset = x - m
        power = np.einsum("...i,ij,...j->...", offset, np.linalg.inv(c), offset)
        total = total + w * np.exp(-0.5 * power) / np.sqrt(np.linalg.det(2 * np.pi * c))
    return total


def posterior(x, alpha, sigma, grid, prior):
    """E[x0 | x], E[eps | x] and p(x) by summing over a grid of data points (N, d) with cell mass prior (N,)."""
    mass = (
        prior
        * np.exp(-0.5 * ((x - alpha * grid) ** 2).sum(-1) / sigma**2)
        / (2 * np.pi * sigma**2) ** (grid.shape[-1] / 2)
    )
    data = (mass[:, None] * grid).sum(0) / mass.sum()
    return data, (x - alpha * data) / sigma, mass.sum()


@pytest.mark.parametrize("alpha,sigma", [(0.9, 0.2), (0.4, 0.9), (1.0, 3.0), (0.0, 1.0)])
def test_line_prediction_is_the_posterior_mean(alpha, sigma):
    world = line()
    grid = np.linspace(-6, 6, 40001)[:, None]
    covs = world.spectra[:, :, None]
    prior = density(world.weights, world.means, covs, grid) * (grid[1, 0] - grid[0, 0])
    x = np.array([-2.5, -0.4, 0.0, 1.1, 3.0])
    with jax.enable_x64(True):
        p = world.predict(jnp.asarray(x), alpha, sigma)
        log_prob = world.log_prob(jnp.asarray(x), alpha, sigma)
    for i, each in enumerate(x):
        data, noise, mass = posterior(each, alpha, sigma, grid, prior)
        np.testing.assert_allclose(p.data[i], data[0], rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(p.noise[i], noise[0], rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(log_prob[i], np.log(mass), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("which", ["gaussian", "mixture"])
def test_plane_prediction_is_the_posterior_mean(which):
    alpha, sigma, x = 0.6, 0.7, np.array([0.4, -0.9])
    side = np.linspace(-6, 6, 481)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    cell = (side[1] - side[0]) ** 2
    world = exact.Gaussian([0.5, -0.2], COV) if which == "gaussian" else plane()
    if which == "gaussian":
        prior = density([1.0], [world.mean], [COV], grid) * cell
    else:
        covs = (world.bases * world.spectra[:, None, :]) @ world.bases.mT
        prior = density(world.weights, world.means, covs, grid) * cell
    data, noise, mass = posterior(x, alpha, sigma, grid, prior)
    with jax.enable_x64(True):
        p = world.predict(jnp.asarray(x), alpha, sigma)
        np.testing.assert_allclose(p.data, data, rtol=1e-9)
        np.testing.assert_allclose(p.noise, noise, rtol=1e-9)
        np.testing.assert_allclose(world.log_prob(jnp.asarray(x), alpha, sigma), np.log(mass), rtol=1e-9)
        np.testing.assert_allclose(
            world.log_prob(jnp.asarray(grid[::4001])), np.log(prior[::4001] / cell), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("world", [exact.Gaussian([0.5, -0.2], COV), plane()], ids=["gaussian", "mixture"])
def test_score_is_the_gradient_and_tweedie_holds(world):
    x = np.random.default_rng(0).normal(size=(7, 2)) * 2
    with jax.enable_x64(True):
        x = jnp.asarray(x)
        score, slope = jax.jit(world.score), jax.jit(jax.grad(lambda x, a, s: world.log_prob(x, a, s).sum()))
        predict = jax.jit(world.predict)
        for alpha, sigma in LEVELS:
            p = predict(x, alpha, sigma)
            np.testing.assert_allclose(score(x, alpha, sigma), slope(x, alpha, sigma), rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(p.noise, -sigma * score(x, alpha, sigma), rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(alpha * p.data + sigma * p.noise, x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "vp", "cosine", "subvp", "edm", "ve"])
def test_velocity_carries_the_density(name):
    """Continuity ``phi_t + div v + v . s = 0`` and the Fokker-Planck identity S4."""
    path, world = process.PROCESSES[name](), plane()

    def residuals(t, x):
        def phi(t, x):
            c = path.coefficients(t)
            return world.log_prob(x, c.alpha, c.sigma)

        def velocity(x):
            return world.velocity(x, path.coefficients(t))

        phi_t, s = jax.grad(phi, (0, 1))(t, x)
        v = velocity(x)
        carried = phi_t + jnp.trace(jax.jacfwd(velocity)(x)) + v @ s
        c = path.coefficients(t)
        f = c.da / c.pace / c.alpha
        g2 = 2 * c.sigma * (c.ds / c.pace - f * c.sigma)
        curvature = jnp.trace(jax.hessian(phi, 1)(t, x)) + s @ s
        return carried, phi_t + 2 * f + f * x @ s - 0.5 * g2 * curvature, jnp.abs(phi_t)

    with jax.enable_x64(True):
        times = jnp.asarray([0.05, 0.3, 0.6, 0.9])
        points = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))
        scale = path.coefficients(times)
        points = points * jnp.hypot(scale.alpha, scale.sigma)[:, None]
        carried, planck, size = jax.jit(jax.vmap(residuals))(times, points)
        assert np.all(size > 1e-3)
        np.testing.assert_array_less(np.abs(carried), 1e-9 * (1 + size))
        np.testing.assert_array_less(np.abs(planck), 1e-9 * (1 + size))


@pytest.mark.parametrize("alpha,sigma", LEVELS)
def test_float32_is_finite_and_close_far_out(alpha, sigma):
    world = plane()
    spread = np.sqrt(alpha**2 + sigma**2)
    x = (np.linspace(-40, 40, 161)[:, None] * np.array([[0.8, 0.6]]) * spread).astype(np.float32)
    run = jax.jit(
        lambda x: (world.predict(x, alpha, sigma), world.score(x, alpha, sigma), world.log_prob(x, alpha, sigma))
    )
    single = run(jnp.asarray(x))
    with jax.enable_x64(True):
        double = run(jnp.asarray(x, jnp.float64))
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(double)):
        assert a.dtype == np.float32 and np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * (1 + np.abs(b).max() / 40))


def test_ends_are_the_limits():
    x = np.array([[0.7, -0.3], [0.2, 1.4]], np.float32)
    for world in (exact.Gaussian([0.5, -0.2], COV), plane()):
        mean = world.moments()[0]
        clean, noise = world.predict(x, 0.5, 0.0), world.predict(x, 0.0, 2.0)
        np.testing.assert_allclose(clean.data, x / 0.5, rtol=1e-5)
        np.testing.assert_array_equal(clean.noise, 0)
        np.testing.assert_allclose(noise.noise, x / 2, rtol=1e-5)
        np.testing.assert_allclose(noise.data, np.broadcast_to(mean, x.shape), rtol=1e-5)


def test_flat_and_point_components_at_zero_noise():
    flat = exact.Gaussian([1.0, 2.0], np.diag([1.0, 0.0]))
    p = flat.predict(jnp.asarray([[0.5, 2.0]]), 1.0, 0.0)
    np.testing.assert_allclose(p.data, [[0.5, 2.0]])
    np.testing.assert_array_equal(p.noise, 0)
    points = exact.GaussianMixture([0.2, 0.8], [[-1.0, 0.0], [1.0, 0.5]], 0.0)
    p = points.predict(jnp.asarray([[-0.3, 0.1], [0.4, 0.0]]), 1.0, 0.0)
    np.testing.assert_allclose(p.data, [[-1.0, 0.0], [1.0, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(p.noise, 0)


def test_delta_is_the_narrow_gaussian():
    x = np.random.default_rng(3).normal(size=(5, 2)).astype(np.float32)
    delta, point = exact.Delta(np.array([0.3, -1.0])), exact.Gaussian([0.3, -1.0], 0.0)
    c = process.linear().coefficients(0.6)
    for alpha, sigma in [(0.4, 0.6), (0.0, 1.0), (1.0, 0.0)]:
        a, b = delta.predict(x, alpha, sigma), point.predict(x, alpha, sigma)
        np.testing.assert_allclose(a.data, b.data, rtol=1e-5)
        np.testing.assert_allclose(a.noise, b.noise, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(delta.log_prob(x, 0.4, 0.6), point.log_prob(x, 0.4, 0.6), rtol=1e-5)
    np.testing.assert_allclose(delta.score(x, 0.4, 0.6), point.score(x, 0.4, 0.6), rtol=1e-5)
    np.testing.assert_allclose(delta.velocity(x, c), point.velocity(x, c), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(delta.sample(jax.random.key(0), 3), np.float32([[0.3, -1.0]] * 3))
    image = exact.Delta(0.25)
    assert image.predict(jnp.ones((2, 4, 4, 1)), jnp.array([0.4, 0.0]), jnp.array([0.6, 1.0])).noise.shape == (
        2,
        4,
        4,
        1,
    )


def test_batched_times_vmap_and_shapes():
    world, x = plane(), jax.random.normal(jax.random.key(1), (3, 2))
    alpha, sigma = jnp.array([0.9, 0.5, 0.0]), jnp.array([0.1, 0.5, 1.0])
    predict = jax.jit(lambda w, x, a, s: w.predict(x, a, s))
    batched = predict(world, x, alpha, sigma)
    mapped = jax.jit(jax.vmap(world.predict))(x, alpha, sigma)
    for i in range(3):
        one = predict(world, x[i], alpha[i], sigma[i])
        np.testing.assert_allclose(batched.data[i], one.data, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mapped.noise[i], one.noise, rtol=1e-5, atol=1e-6)
    frames = predict(world, jnp.stack([x, x], 1), jnp.stack([alpha, alpha], 1), jnp.stack([sigma, sigma], 1))
    np.testing.assert_allclose(frames.data[:, 1], batched.data, rtol=1e-5, atol=1e-6)
    d1 = line()
    bare, column = jnp.linspace(-2, 2, 5), jnp.linspace(-2, 2, 5)[:, None]
    np.testing.assert_array_equal(predict(d1, bare, 0.5, 0.5).data, predict(d1, column, 0.5, 0.5).data[:, 0])
    assert d1.log_prob(bare, 0.5, 0.5).shape == d1.log_prob(column, 0.5, 0.5).shape == (5,)
    assert predict(world, x.astype(jnp.bfloat16), 0.5, 0.5).data.dtype == jnp.bfloat16
    # a world is a pytree: its parameters are data to jit, grad and vmap
    shifted = jax.vmap(
        lambda m: exact.Gaussian(m, basis=jnp.eye(2), spectrum=jnp.ones(2)).predict(x[0], 1.0, 1.0).data
    )
    np.testing.assert_allclose(shifted(x), x[0] / 2 + x / 2, rtol=1e-6)
    traces = []
    run = jax.jit(lambda w: (traces.append(1), w.log_prob(x, 0.5, 0.5))[1])
    run(world), run(plane())
    assert len(traces) == 1


def test_samples_have_the_moments_of_the_law():
    """Mean and covariance of 40000 draws within five standard errors of the closed form."""
    n = 40_000
    for world in (exact.Gaussian([0.5, -0.2], COV), plane()):
        mean, cov = world.moments()
        x = np.asarray(world.sample(jax.random.key(0), n), np.float64)
        assert x.shape == (n, 2) and world.sample(jax.random.key(0), (3, 4)).shape == (3, 4, 2)
        centred = x - mean
        np.testing.assert_array_less(np.abs(centred.mean(0)), 5 * np.sqrt(np.diag(cov) / n))
        products = centred[:, :, None] * centred[:, None, :]
        np.testing.assert_array_less(np.abs(products.mean(0) - cov), 5 * products.std(0) / np.sqrt(n))


def test_labels_select_components():
    world, x = plane(), jax.random.normal(jax.random.key(2), (4, 2))
    path = process.linear()
    d = exact.denoiser(world, path)
    alone = exact.GaussianMixture(
        world.weights[1:], world.means[1:], (world.bases * world.spectra[:, None, :] @ world.bases.mT)[1:]
    )
    first = exact.Gaussian(world.means[0], COV)
    ask = jax.jit(lambda d, x: d(x, 0.4))
    mixed = ask(d.condition(np.array([0, 1, -1, 1])), x)
    for i, each in enumerate([first, alone, world, alone]):
        np.testing.assert_allclose(mixed.data[i], ask(exact.denoiser(each, path), x).data[i], rtol=2e-5)
    np.testing.assert_allclose(ask(d.condition(1), x).noise, ask(exact.denoiser(alone, path), x).noise, rtol=2e-5)
    drawn = world.sample(jax.random.key(0), 4000, cond=jnp.zeros(4000, int))
    np.testing.assert_allclose(drawn.mean(0), world.means[0], atol=5 * np.sqrt(0.5 / 4000))
    # Bayes: log p(x | class) - log p(x) = log p(class | x) - log p(class)
    ratio = world.log_prob(x, 0.6, 0.4, cond=1) - world.log_prob(x, 0.6, 0.4)
    classes = jax.nn.logsumexp(world.log_posterior(x, 0.6, 0.4)[:, 1:], -1)
    np.testing.assert_allclose(ratio, classes - np.log(0.7), rtol=1e-4, atol=1e-5)


def test_exact_denoiser_reads_the_query():
    from jaxdiff.prediction import Query

    world, x = plane(), jax.random.normal(jax.random.key(4), (4, 2))
    for name in ("vp", "edm"):
        path = process.PROCESSES[name]()
        d, c = exact.denoiser(world, path), path.coefficients(0.3)
        np.testing.assert_allclose(d(x, 0.3).data, world.predict(x, c.alpha, c.sigma).data, rtol=1e-6)
        np.testing.assert_array_equal(d.at(x, Query(None, None, 0.7, 0.2)).noise, world.predict(x, 0.7, 0.2).noise)


@pytest.mark.parametrize(
    "build,words",
    [
        (lambda: exact.Gaussian([0.0, 0.0], np.eye(3)), "cov: shape (3, 3)"),
        (
            lambda: exact.Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]),
            "cov: a matrix that is not finite and symmetric",
        ),
        (lambda: exact.Gaussian([0.0, 0.0], np.diag([1.0, -0.1])), "cov: smallest eigenvalue -0.1"),
        (lambda: exact.Gaussian(np.eye(2), 1.0), "mean: shape (2, 2)"),
        (lambda: exact.Gaussian([0.0, np.nan], 1.0), "mean: shape (2,) given; need (d,) finite numbers"),
        (lambda: exact.GaussianMixture([1, 1], [0.0, np.inf], 1.0), "means: 1 of 2 numbers given are not finite"),
        (lambda: exact.GaussianMixture([1.0, -1.0], [0.0, 1.0], 1.0), "weights:"),
        (lambda: exact.GaussianMixture([1.0], [0.0, 1.0], 1.0), "need (2,) non-negative"),
        (lambda: exact.GaussianMixture([1, 1], [0.0, 1.0], [1.0, 1.0, 1.0]), "covs: shape (3,)"),
        (lambda: exact.GaussianMixture([1, 1], [0.0, 1.0], 1.0, labels=[0, -2]), "labels:"),
        (lambda: plane().predict(jnp.zeros((3, 4)), 1.0, 1.0), "x: shape (3, 4)"),
        (lambda: plane().predict(jnp.zeros((3, 2), int), 1.0, 1.0), "x: dtype int32"),
        (lambda: plane().predict(jnp.zeros((3, 2)), jnp.ones((3, 2)), 1.0), "alpha, sigma: shape (3, 2)"),
        (lambda: exact.denoiser(plane(), process.edm(noise=process.student_t(3))), "noise law 'student_t'"),
        (lambda: exact.denoiser(line(), process.vp(), cond=1), "has no labels"),
        (lambda: exact.denoiser(plane(), process.vp()).condition([0, 7]), "cond: [7] given"),
        (lambda: exact.quantile_flow(plane(), process.vp()), "world: GaussianMixture with 2 dimensions"),
        (lambda: exact.gaussian_flow(plane(), process.vp()), "world: GaussianMixture given"),
        (lambda: exact.quantile_flow(line(), process.edm(noise=process.student_t(3))), "noise law 'student_t'"),
    ],
)
def test_bad_input_is_one_line(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_covariance_is_named():
    with pytest.raises(TypeError, match="cov"):
        exact.Gaussian([0.0])
    with pytest.raises(TypeError, match="covs"):
        exact.GaussianMixture([1.0], [0.0])
