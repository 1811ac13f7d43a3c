"""DPM-Solver-12/23: the published control, per sample; error follows tolerance; one loop, one compile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, guidance, process
from jaxdiff.prediction import Prediction
from jaxdiff.solver import adaptive_pair as dpm

LINEAR, VP, EDM = process.linear(), process.vp(), process.edm()
SOLVE = jax.jit(dpm.adaptive_dpm)
WORLD = exact.GaussianMixture([0.3, 0.7], [[-1.5], [1.0]], [[[0.05]], [[0.1]]])
T_MIN = {"linear": 1e-6, "vp": 1e-9}  # where sigma^2 is below the smallest tolerance
TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


@pytest.mark.parametrize(
    ("make", "form", "path"),
    [(dpm.dpm12, "noise", VP), (dpm.dpm23, "noise", LINEAR), (dpm.dpm23, "data", VP), (dpm.dpm12, "data", LINEAR)],
)
def test_error_tracks_tolerance_over_four_decades(make, form, path):
    with jax.enable_x64(True):
        d = exact.denoiser(WORLD, path)
        x = jnp.linspace(-2.5, 2.5, 21)[:, None]
        truth = exact.quantile_flow(WORLD, path)(x, 1.0, 0.0)

        @jax.jit
        def solve(tol):
            pair = make(path, atol=tol, rtol=tol, form=form, t_min=T_MIN[path.name], t_err=1e-9)
            return dpm.adaptive_dpm(pair, d, x, max_steps=10**5)

        runs = [solve(tol) for tol in TOLERANCES]
        assert solve._cache_size() == 1
    errors = np.array([np.max(np.abs(np.asarray(run.x) - np.asarray(truth))) for run in runs])
    assert np.all(errors[1:] < errors[:-1]) and np.all(errors < 50 * np.array(TOLERANCES))
    assert 0.75 < np.polyfit(np.log10(TOLERANCES), np.log10(errors), 1)[0] < 1.25
    assert len(np.unique(runs[2].steps)) > 3 and len(np.unique(runs[2].nfe)) > 3


def published(path, d, x, order, atol, rtol, theta=0.9, h=0.05, t_end=1e-3, t_err=1e-5):
    """The published algorithm for one sample, in numpy, from its formulas (noise form)."""
    level = lambda lam: tuple(float(v) for v in (lambda c: (c.alpha, c.sigma))(path.coefficients(path.time(lam))))
    E = lambda y, lam: np.asarray(d.world.predict(jnp.asarray(y), *level(lam)).noise)
    lam, end = float(path.half_log_snr(np.float64(1.0))), float(path.half_log_snr(np.float64(t_end)))
    x = np.asarray(x)
    low_before, nfe, accepted = x, 0, []
    while abs(float(path.time(np.float64(lam))) - t_end) > t_err:
        e0 = E(x, lam)
        to = {r: level(lam + r * h) for r in (1 / 3, 1 / 2, 2 / 3, 1)}
        euler = {r: a / level(lam)[0] * x - s * np.expm1(r * h) * e0 for r, (a, s) in to.items()}
        s = to[1][1]
        if order == 2:
            low = euler[1]
            high = low - s * np.expm1(h) * (E(euler[1 / 2], lam + h / 2) - e0)
        else:
            r, tilt = 2 / 3 * h, E(euler[1 / 3], lam + h / 3) - e0
            far = E(euler[2 / 3] - 2 * to[2 / 3][1] * (np.expm1(r) / r - 1) * tilt, lam + r) - e0
            low = euler[1] - 1.5 * s * np.expm1(h) * tilt
            high = euler[1] - 1.5 * s * (np.expm1(h) / h - 1) * far
        delta = np.maximum(atol, rtol * np.maximum(np.abs(low), np.abs(low_before)))
        error = np.sqrt(np.mean(((high - low) / delta) ** 2))
        nfe += order
        if error <= 1:
            x, low_before, lam = high, low, lam + h
            accepted.append(lam)
        h = min(theta * h * error ** (-1 / order), end - lam)
    return x, nfe, accepted


@pytest.mark.parametrize("order", [2, 3])
def test_is_the_published_algorithm_sample_by_sample(order):
    world = exact.GaussianMixture([0.5, 0.5], np.array([[1.0, 0, 0], [0, -1, 0.5]]), [0.1 * np.eye(3)] * 2)
    with jax.enable_x64(True):
        d = exact.denoiser(world, VP)
        x = 1.2 * jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
        pair = (dpm.dpm12 if order == 2 else dpm.dpm23)(VP, growth=np.inf)
        state = pair.start(d, x)
        step = jax.jit(lambda s: pair.step(d, s))
        while not bool(jnp.all(pair.done(state))):
            state = step(state)
        for i in range(4):
            one, nfe, accepted = published(VP, d, x[i : i + 1], order, 0.0078, 0.05)
            np.testing.assert_allclose(state.x[i], one[0], rtol=1e-9)
            assert int(state.nfe[i]) == nfe
            np.testing.assert_allclose(state.lam[i], accepted[-1], rtol=1e-12)
    assert len(np.unique(state.nfe)) > 1


def test_samples_do_not_meet_and_tolerances_vmap():
    d = exact.denoiser(WORLD, VP)
    x = jnp.linspace(-2, 2, 6)[:, None]
    solve = jax.jit(lambda tol, x: dpm.adaptive_dpm(dpm.dpm23(VP, atol=tol, rtol=tol), d, x))
    both = jax.vmap(solve, (0, None))(jnp.array([1e-2, 1e-3]), x)
    for tol, x_out, steps in zip((1e-2, 1e-3), both.x, both.steps):
        one = solve(jnp.float32(tol), x[2:4])
        np.testing.assert_allclose(one.x, x_out[2:4], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(one.steps, steps[2:4])
    assert np.all(both.steps[1] > both.steps[0])


@pytest.mark.parametrize("form", ["noise", "data"])
@pytest.mark.parametrize("path", [LINEAR, VP, EDM, process.cosine(), process.ve()], ids=lambda p: p.name)
def test_float32_on_every_kind_of_path(path, form):
    d = exact.denoiser(WORLD, path)
    x = path.coefficients(1.0).sigma * jnp.linspace(-2, 2, 9, dtype=jnp.float32)[:, None]
    out = SOLVE(dpm.dpm23(path, atol=1e-4, rtol=1e-4, form=form), d, x)
    truth = exact.quantile_flow(WORLD, path)(x, path.t_max, 0.0)
    np.testing.assert_allclose(out.x, truth, rtol=0, atol=5e-3)


def test_guidance_conditions_and_counting():
    labelled = exact.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.1]], [[0.1]]], labels=[0, 1])
    d = exact.denoiser(labelled, LINEAR)
    x = jnp.array([[0.3], [-0.8], [0.1]])
    label = jnp.array([0, 1, 1])
    guided = guidance.cfg(d, 1.0, null=-1)
    pair = dpm.dpm23(LINEAR, atol=1e-3, rtol=1e-3)
    out = SOLVE(pair, guided, x, cond=label)
    plain = SOLVE(pair, d.condition(label), x)
    np.testing.assert_allclose(out.x, plain.x, rtol=1e-5, atol=1e-6)
    assert np.all(np.sign(out.x[:, 0]) == np.array([-1, 1, 1]))
    calls = []

    def counted(x, t, r=None):
        jax.debug.callback(lambda _: calls.append(1), t)
        return d.condition(label[:1])(x, t)

    one = jax.jit(lambda x: dpm.adaptive_dpm(pair, counted, x))(x[:1])
    jax.effects_barrier()
    assert len(calls) == int(one.nfe[0]) == 3 * int(one.steps[0]) + 2


def test_refusals_and_failures_are_visible():
    d, x = exact.denoiser(WORLD, LINEAR), jnp.zeros((2, 1))
    assert np.all(np.isnan(SOLVE(dpm.dpm23(LINEAR, atol=1e-5, rtol=1e-5), d, x, max_steps=3).x))
    broken = lambda x, t, r: Prediction(jnp.where(x > 0, jnp.nan, x), x)
    out = jax.jit(lambda x: dpm.adaptive_dpm(dpm.dpm12(VP, form="data"), broken, x))(jnp.array([[-1.0], [1.0]]))
    assert np.isnan(out.x[1, 0]) and int(out.steps[1]) == 1 and np.isfinite(out.x[0, 0])
    for text, call in {
        "form: 'eps'": lambda: dpm.dpm12(VP, form="eps"),
        "atol: 0": lambda: dpm.dpm23(VP, atol=0),
        "theta: 1.5": lambda: dpm.dpm23(VP, theta=1.5),
        "rtol: -1": lambda: dpm.dpm23(VP, rtol=-1),
        "growth: 1": lambda: dpm.dpm12(VP, growth=1),
        "t_min: 0": lambda: dpm.dpm23(VP, t_min=0.0),
        "d: stateful": lambda: dpm.adaptive_dpm(dpm.dpm12(LINEAR), Stateful(), jnp.zeros((1, 1))),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stateful:
    """Carries one number a sample."""

    def start(self, x):
        return jnp.zeros(x.shape[0])

    def step(self, state, x, query):
        return Prediction(x, x), state
