"""Every path: tangents, inverses, ends, broadcasting, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import process

PATHS = {
    "linear": lambda: process.linear(),
    "linear_floor": lambda: process.linear(0.01),
    "vp": lambda: process.vp(),
    "ddpm": lambda: process.ddpm(50),
    "ddpm_cosine": lambda: process.ddpm(1000, "cosine"),
    "ddpm_zero": lambda: process.ddpm(20, "cosine", zero_terminal_snr=True),
    "cosine": lambda: process.cosine(),
    "cosine_offset": lambda: process.cosine(0.008),
    "cosine_shift": lambda: process.cosine(0.0, -0.7),
    "cosine_both": lambda: process.cosine(0.008, 1.3),
    "subvp": lambda: process.subvp(),
    "ve": lambda: process.ve(),
    "edm": lambda: process.edm(),
}
every_path = pytest.mark.parametrize("name", PATHS)
INNER = np.array([0.0137, 0.1103, 0.2936, 0.5073, 0.7314, 0.9117, 0.9873])  # off the nodes of both ddpm chains


def values(c):
    return {f: np.asarray(getattr(c, f)) for f in ("alpha", "sigma", "da", "ds", "pace")}


@every_path
def test_tangent_is_the_derivative(name):
    path, h = PATHS[name](), 1e-6
    c, up, down = (path.coefficients(INNER + d) for d in (0.0, h, -h))
    for tangent, attribute in ((c.da, "alpha"), (c.ds, "sigma")):
        difference = (getattr(up, attribute) - getattr(down, attribute)) / (2 * h)
        np.testing.assert_allclose(tangent / c.pace, difference, rtol=2e-7, atol=2e-8)
    assert np.all(c.alpha * c.ds - c.sigma * c.da > 0)


@every_path
def test_numpy_times_stay_numpy_float64_and_jax_agrees(name):
    path = PATHS[name]()
    host = path.coefficients(INNER)
    device = jax.jit(path.coefficients)(jnp.asarray(INNER, jnp.float32))
    again = path.coefficients(INNER.astype(np.float32).astype(np.float64))
    for (field, a), b, c in zip(values(host).items(), values(device).values(), values(again).values()):
        assert a.dtype == np.float64 and b.dtype == np.float32, field
        assert a.shape == b.shape == INNER.shape, field
        np.testing.assert_allclose(b, c, rtol=1e-5, atol=2e-6 * (1 + np.abs(c).max()), err_msg=field)
    assert isinstance(path.coefficients(0.5).alpha, np.ndarray | np.float64)
    np.testing.assert_allclose(
        jax.jit(path.half_log_snr)(jnp.asarray(INNER)), path.half_log_snr(INNER), rtol=1e-4, atol=1e-4
    )


@every_path
def test_half_log_snr_inverts(name):
    path = PATHS[name]()
    lam = path.half_log_snr(INNER)
    c = path.coefficients(INNER)
    np.testing.assert_allclose(lam, np.log(c.alpha / c.sigma), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lam, c.half_log_snr, rtol=1e-12, atol=1e-12)
    assert np.all(np.diff(lam) < 0)
    np.testing.assert_allclose(path.time(lam), INNER, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(path.half_log_snr(path.time(lam)), lam, rtol=1e-10, atol=1e-10)
    t = jnp.asarray(INNER, jnp.float32)
    np.testing.assert_allclose(jax.jit(lambda t: path.time(path.half_log_snr(t)))(t), t, rtol=2e-5, atol=2e-6)


@every_path
def test_time_near_the_ends(name):
    """Relative accuracy of t (and of 1 - t, where alpha vanishes) is kept towards the ends."""
    path = PATHS[name]()
    small = np.array([1e-8, 1e-6, 1e-4])
    if path.path.clean:
        np.testing.assert_allclose(path.time(path.half_log_snr(small)), small, rtol=1e-7)
        single = jax.jit(lambda t: path.time(path.half_log_snr(t)))(jnp.asarray(small[1:], jnp.float32))
        np.testing.assert_allclose(single, small[1:], rtol=3e-5)
    if float(path.coefficients(1.0).alpha) == 0:
        late = 1 - small
        np.testing.assert_allclose(1 - path.time(path.half_log_snr(late)), small, rtol=1e-7)
    lam = np.array([-200.0, -30.0, 30.0, 200.0])
    assert np.all(np.isfinite(path.time(lam)))
    if not path.path.appends_clean and name not in ("linear_floor", "edm"):
        single = jax.jit(path.time)(jnp.asarray(lam, jnp.float32))
        assert np.all(np.isfinite(single))


@every_path
def test_ends_are_exact_and_finite(name):
    path = PATHS[name]()
    for t in (np.array([0.0, 1.0]), jnp.array([0.0, 1.0])):
        c = path.coefficients(t)
        assert all(np.all(np.isfinite(v)) for v in values(c).values())
        if path.path.clean:
            assert float(c.sigma[0]) == 0 and float(c.alpha[0]) == pytest.approx(
                1, abs=1e-15 if t.dtype == float else 1e-7
            )
        if name.startswith(("linear", "cosine", "ddpm_zero")):
            assert float(c.alpha[1]) == 0
            assert float(c.sigma[1]) == pytest.approx(1, rel=1e-6)
        with np.errstate(divide="ignore"):
            assert not np.any(np.isnan(path.half_log_snr(t)))
    # the pair is identifiable from velocity at both ends: Delta > 0 there too, or pace-scaled form stays regular
    c = path.coefficients(np.array([0.0, 1.0]))
    assert np.all(c.alpha * c.ds - c.sigma * c.da > 0)


@every_path
def test_times_broadcast(name):
    path = PATHS[name]()
    x0, n = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    for shape in ((), (3,), (3, 5), (1, 5), (3, 5, 4)):
        t = np.linspace(0.10037, 0.90041, int(np.prod(shape))).reshape(shape)  # off the nodes of ddpm
        c = path.coefficients(t)
        assert np.shape(c.alpha) == shape
        alpha, sigma = (np.asarray(v).reshape(shape + (1,) * (3 - len(shape))) for v in (c.alpha, c.sigma))
        mixed = path.corrupt(jnp.asarray(x0), jnp.asarray(n), t)
        np.testing.assert_allclose(mixed, alpha * x0 + sigma * n, rtol=1e-5, atol=1e-4)
        up, down = (path.corrupt(x0.astype(float), n.astype(float), t + h) for h in (1e-6, -1e-6))
        moved = path.velocity(jnp.asarray(x0), jnp.asarray(n), t)
        np.testing.assert_allclose(moved, (up - down) / 2e-6, rtol=1e-4, atol=1e-3)
    assert isinstance(path.corrupt(x0, n, 0.5), np.ndarray)
    with pytest.raises(ValueError, match="aligned with the data from the left"):
        path.corrupt(jnp.asarray(x0[0, 0]), jnp.asarray(n[0, 0]), np.full((4, 2), 0.5))
    with pytest.raises(ValueError, match=r"shape \(4,\) does not meet the data's \(3, 5, 4\)"):
        path.corrupt(jnp.asarray(x0), jnp.asarray(n), np.full(4, 0.5))
    with pytest.raises(ValueError, match="data: dtype uint8 given; need floating-point"):
        path.corrupt(jnp.zeros((3, 5), jnp.uint8), jnp.asarray(n[..., 0]), 0.5)


@pytest.mark.parametrize("make", [process.vp, process.subvp], ids=["vp", "subvp"])
def test_vmap_and_gradients_over_beta_max(make):
    betas = jnp.array([5.0, 10.0, 20.0])
    t = jnp.array([0.0, 0.3, 1.0])

    def alphas(beta):
        return make(beta_max=beta).coefficients(t).alpha

    mapped = jax.jit(jax.vmap(alphas))(betas)
    for i, beta in enumerate([5.0, 10.0, 20.0]):
        np.testing.assert_allclose(
            mapped[i], make(beta_max=beta).coefficients(np.asarray(t, np.float64)).alpha, rtol=1e-5
        )
    stacked = jax.tree.map(lambda *v: np.stack(v), make(beta_max=5.0), make(beta_max=20.0))
    np.testing.assert_allclose(
        jax.vmap(lambda p: p.coefficients(jnp.float32(0.3)).alpha)(stacked), mapped[[0, 2], 1], rtol=1e-5
    )

    def total(beta, t):
        c = make(beta_max=beta).coefficients(t)
        return jnp.sum(c.alpha + c.sigma + c.da + c.ds + c.pace)

    for at in (0.0, 1e-12, 0.5, 1.0):
        slopes = jax.grad(total, (0, 1))(jnp.float32(20.0), jnp.float32(at))
        assert all(np.isfinite(v) for v in slopes), at
    lam = jax.grad(lambda b: make(beta_max=b).time(jnp.float32(0.0)))(jnp.float32(20.0))
    assert np.isfinite(lam) and lam < 0


@every_path
def test_gradients_in_time_are_finite(name):
    path = PATHS[name]()

    def total(t):
        c = path.coefficients(t)
        return jnp.sum(c.alpha + c.sigma + c.da + c.ds + c.pace)

    slopes = jax.jit(jax.vmap(jax.grad(total)))(jnp.array([0.0, 1e-6, 0.513, 1.0]))
    assert np.all(np.isfinite(slopes))
    inner = jax.jit(jax.vmap(jax.grad(lambda t: path.coefficients(t).alpha)))(jnp.array([0.313, 0.713]))
    c = path.coefficients(np.array([0.313, 0.713]))
    np.testing.assert_allclose(inner, c.da / c.pace, rtol=2e-4, atol=1e-6)


def test_learned_parameters_have_finite_gradients_everywhere():
    """d(alpha + sigma + time)/d(parameter) through traced parameters of the other paths, ends included."""
    t = jnp.array([0.0, 0.4, 1.0])
    cases = [
        (lambda v: process.cosine(v, 0.3), 0.008),
        (lambda v: process.cosine(0.008, v), 0.5),
        (lambda v: process.linear(v), 0.01),
        (lambda v: process.ve(0.01, v), 50.0),
        (lambda v: process.edm(0.002, v), 80.0),
        (lambda v: process.ddpm(schedule=jnp.array([0.01, 0.02, 0.1]) * v), 1.0),
    ]
    for build, value in cases:

        def total(v, build=build):
            p = build(v)
            c = p.coefficients(t)
            return jnp.sum(c.alpha + c.sigma + c.da + c.ds + c.pace) + p.time(jnp.float32(0.3))

        slope = jax.grad(total)(jnp.float32(value))
        assert np.isfinite(slope) and slope != 0, build(value).name


def test_variance_is_preserved():
    for name in ("vp", "ddpm", "cosine", "cosine_both"):
        c = PATHS[name]().coefficients(np.linspace(0, 1, 101))
        np.testing.assert_allclose(c.alpha**2 + c.sigma**2, 1, rtol=1e-14)
    c = process.subvp().coefficients(np.linspace(0, 1, 101))
    np.testing.assert_allclose(c.sigma, 1 - c.alpha**2, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(c.alpha, process.vp().coefficients(np.linspace(0, 1, 101)).alpha, rtol=1e-14)


def test_published_forms():
    t = np.linspace(0.01, 1, 20)
    c = process.vp(0.1, 20.0).coefficients(t)
    np.testing.assert_allclose(np.log(c.alpha), -0.25 * t**2 * 19.9 - 0.5 * t * 0.1, rtol=1e-12)
    u = (t + 0.008) / 1.008 * np.pi / 2
    c = process.cosine(0.008).coefficients(t[:-1])
    np.testing.assert_allclose(c.alpha, (np.cos(u) / np.cos(0.008 / 1.008 * np.pi / 2))[:-1], rtol=1e-10)
    c = process.cosine().coefficients(t)
    np.testing.assert_allclose(c.sigma, np.sin(np.pi * t / 2), rtol=1e-13)
    np.testing.assert_allclose(process.ve(0.01, 50.0).coefficients(t).sigma, 0.01 * 5000**t, rtol=1e-12)
    np.testing.assert_allclose(process.edm(0.002, 80.0).coefficients(t).sigma, 80 * t, rtol=1e-15)
    assert process.trig is process.cosine


@pytest.mark.parametrize("offset", [0.0, 0.008])
def test_shift_adds_to_half_log_snr(offset):
    t = np.linspace(0.01, 0.99, 25)
    base = process.cosine(offset).half_log_snr(t)
    for shift in (-2.0, 0.5, 3.0):
        np.testing.assert_allclose(process.cosine(offset, shift).half_log_snr(t), base + shift, rtol=0, atol=1e-13)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_ddpm_is_the_product_of_its_betas(schedule):
    steps = 1000
    bar_cosine = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = {
        "linear": np.linspace(1e-4, 0.02, steps),
        "scaled_linear": np.linspace(np.sqrt(0.00085), np.sqrt(0.012), steps) ** 2,
        "cosine": np.clip(1 - bar_cosine[1:] / bar_cosine[:-1], 0, 0.999),
    }[schedule]
    bar = np.cumprod(1 - betas)
    t = np.arange(1, steps + 1) / steps
    path = process.ddpm(steps, schedule)
    c = path.coefficients(t)
    np.testing.assert_allclose(c.alpha**2, bar, rtol=1e-11 if schedule == "cosine" else 1e-12)
    np.testing.assert_allclose(c.sigma**2, 1 - bar, rtol=1e-11)
    # the posterior q(x_{i-1} | x_i, x0) of DDPM eq. 7, from the library's alpha and sigma alone
    previous = path.coefficients(t - 1 / steps)
    before = np.concatenate([[1.0], bar[:-1]])
    variance = (previous.sigma / c.sigma) ** 2 * (1 - (c.alpha / previous.alpha) ** 2)
    np.testing.assert_allclose(variance, (1 - before) / (1 - bar) * betas, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(path.network_time(t).round(9), np.arange(steps))
    np.testing.assert_allclose(path.time(path.half_log_snr(t)), t, rtol=1e-10)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_moves_and_scales_alpha(schedule):
    """2305.08891, algorithm 1, in its own order; betas of 1 at the end are the same chain."""
    root = process.ddpm(1000, schedule).coefficients(np.arange(1, 1001) / 1000).alpha
    wanted = (root - root[-1]) * root[0] / (root[0] - root[-1])
    path = process.ddpm(1000, schedule, zero_terminal_snr=True)
    c = path.coefficients(np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(c.alpha, wanted, rtol=1e-10, atol=1e-15)
    assert c.alpha[-1] == 0 and c.sigma[-1] == 1
    betas = 1 - (wanted / np.concatenate([[1.0], wanted[:-1]])) ** 2
    np.testing.assert_allclose(process.ddpm(schedule=betas).path.n, path.path.n, rtol=1e-8, atol=1e-12)
    betas = np.full(20, 0.1)
    traced = jax.jit(lambda b: process.ddpm(schedule=b, zero_terminal_snr=True).coefficients(0.5).alpha)
    alpha = process.ddpm(schedule=betas, zero_terminal_snr=True).coefficients(0.5).alpha
    np.testing.assert_allclose(traced(jnp.asarray(betas, jnp.float32)), alpha, rtol=1e-5)


def test_ddpm_float32_at_every_index():
    """Times i/T rounded to float32 still land on index i."""
    path, index = process.ddpm(1000), np.arange(1, 1001)
    exact = path.coefficients(index / 1000)
    single = jax.jit(path.coefficients)(jnp.asarray(index / 1000, jnp.float32))
    np.testing.assert_allclose(single.alpha, exact.alpha, rtol=3e-6)
    np.testing.assert_allclose(single.sigma, exact.sigma, rtol=3e-6)


def test_processes_are_pytrees_that_do_not_retrace():
    traces = []

    @jax.jit
    def alpha(p, t):
        traces.append(1)
        return p.coefficients(t).alpha

    for value in (20, 20.0, np.float32(12)):
        alpha(process.vp(beta_max=value), 0.5)
    assert len(traces) == 1
    leaves = jax.tree.leaves(process.vp())
    assert len(leaves) == 2 and all(v.dtype == np.float64 for v in leaves)


def test_identity_members():
    p, x = process.linear(), jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(p.basis.inverse(p.basis.forward(x)), x)
    np.testing.assert_array_equal(p.domain.project(x), x)
    np.testing.assert_array_equal(p.endpoint.coefficient(np.ones(2)), 0)
    np.testing.assert_array_equal(p.corrupt(x, x, 0.3), p.corrupt(x, x, 0.3, y=100 * x))
    assert p.prior is p.noise


@pytest.mark.parametrize(
    "build,words",
    [
        (lambda: process.linear(1.5), "sigma_min: 1.5"),
        (lambda: process.linear(-0.1), "sigma_min: -0.1"),
        (lambda: process.vp(0.0, 20.0), "beta_min, beta_max: 0.0, 20.0"),
        (lambda: process.subvp(5.0, 1.0), "beta_min, beta_max: 5.0, 1.0"),
        (lambda: process.cosine(-0.5), "offset: -0.5"),
        (lambda: process.ve(1.0, 0.5), "sigma_min, sigma_max: 1.0, 0.5"),
        (lambda: process.edm(0.0), "sigma_min, sigma_max: 0.0"),
        (lambda: process.ddpm(0), "steps: 0"),
        (lambda: process.ddpm(10.5), "steps: 10.5 given; ddpm() needs a whole number"),
        (lambda: process.ddpm(10, "liner"), "schedule: 'liner'"),
        (lambda: process.ddpm(schedule=[0.1, 1.5]), "schedule: betas"),
        (lambda: process.ddpm(schedule=[1.0, 0.5]), "schedule: betas from 0.5 to 1 given"),
        (lambda: process.ddpm(schedule=[1.0]), "schedule: 1 beta given"),
        (lambda: process.ddpm(schedule=[[0.1]]), "schedule: betas of shape (1, 1)"),
        (lambda: process.vp(t_max=0.0), "t_max: 0.0"),
        (lambda: process.vp(t_max=1.5), "t_max: 1.5"),
        (lambda: process.student_t(0.0), "df: 0.0"),
        (lambda: process.edm(noise="student_t"), "noise: 'student_t' given; need a law, Gaussian() or student_t(df)"),
        (lambda: process.edm(noise=process.StudentT), "StudentT'> given; need a law"),
        (lambda: process.cosine(0.0, float("nan")), "shift: nan"),
        (lambda: process.student_t(float("inf")), "df: inf"),
        (lambda: process.vp(float("nan")), "beta_min, beta_max: nan"),
        (lambda: process.edm(0.002, float("inf")), "sigma_min, sigma_max: 0.002, inf"),
    ],
)
def test_bad_input_is_one_line(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert words in str(error.value) and "\n" not in str(error.value)
