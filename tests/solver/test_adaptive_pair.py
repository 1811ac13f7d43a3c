"""DPM-Solver-12/23: the published control, per sample; error follows tolerance; one loop, one compile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, guidance, process
from jaxdiff.prediction import Prediction
from jaxdiff.solver import adaptive_pair as dpm
from jaxdiff.solver import weights

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


def test_from_pure_noise_the_first_level_misses_a_tenth_of_the_tolerance():
    """alpha^2 = atol/10 there, so alpha/sigma is its square root: what the jump to it neglects of the data."""
    d = exact.denoiser(exact.Gaussian([0.0], 1.0), LINEAR)
    state = dpm.dpm12(LINEAR, atol=1e-3).start(d, jnp.ones((2, 1)))
    np.testing.assert_allclose(state.lam, 0.5 * np.log(1e-4), rtol=1e-6)
    assert state.nfe.tolist() == [1, 1]
    c = LINEAR.coefficients(np.float64(LINEAR.time(0.5 * np.log(1e-4))))
    np.testing.assert_allclose(state.x, np.full((2, 1), c.sigma), rtol=1e-5)


# dpm-solver 52bc3fb, dpm_solver_adaptive of its JAX file in float64 with its default tolerances, one sample at a time:
# evaluations and last states (at t = 1e-3) from these starts on this mixture
STARTS = [[0.4, -1.1, 0.8], [1.7, 0.2, -0.5]]
PUBLIC = {
    ("noise", 2): ([60, 68], [
        [0.26154358363641167, -1.2289998698537203, 0.6966261390593372],
        [1.4676324770028666, -0.018611776558247993, -0.12094454023888569]]),
    ("noise", 3): ([39, 39], [
        [0.2632496192599246, -1.2109892338134096, 0.6848914300169288],
        [1.4509937123437346, -0.020412405107623807, -0.11606997825990281]]),
    ("data", 2): ([26, 36], [
        [0.26732455204344335, -1.1841654502467136, 0.6676713793393497],
        [1.4359420290461031, -0.022750085589028843, -0.1114958183664499]]),
    ("data", 3): ([42, 33], [
        [0.26812456366615933, -1.2005501741744775, 0.6787404669961193],
        [1.4481571342959276, -0.023920974258819318, -0.1144956798416069]]),
}  # fmt: skip


@pytest.mark.parametrize(("form", "order"), PUBLIC)
def test_is_the_public_algorithm_for_every_sample_of_a_batch(form, order):
    world = exact.GaussianMixture([0.5, 0.5], np.array([[1.0, 0, 0], [0, -1, 0.5]]), [0.1 * np.eye(3)] * 2)
    nfe, states = PUBLIC[form, order]
    with jax.enable_x64(True):
        d = exact.denoiser(world, VP)
        pair = (dpm.dpm12 if order == 2 else dpm.dpm23)(VP, growth=np.inf, form=form)
        state = pair.start(d, jnp.array(STARTS))
        step = jax.jit(lambda s: pair.step(d, s))
        while not bool(jnp.all(pair.done(state))):
            state = step(state)
        np.testing.assert_allclose(state.x, states, rtol=1e-11)
        np.testing.assert_array_equal(state.nfe, nfe)


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


def test_the_first_moment_is_the_host_weight_on_both_sides_of_its_switch():
    H = np.concatenate([s * np.array([1e-6, 1e-3, 0.05, 0.19, 0.1999, 0.2001, 0.5, 2.0]) for s in (1, -1)])
    with jax.enable_x64(True):
        found = np.asarray(dpm._first_moment(jnp.asarray(H)))
    np.testing.assert_allclose(found, [weights.moments(h, 2)[1] for h in H], rtol=1e-13)
