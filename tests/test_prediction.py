"""What raw outputs mean: round trips, ends, refusals, clocks, dispatch, other paths, no retracing."""

import dataclasses
import types
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, guidance, process, solver
from jaxdiff import prediction as pred
from jaxdiff.network import MLP
from jaxdiff.prediction import TARGETS, Prediction, Query, pair, target_of

PATHS = {
    "linear": lambda: process.linear(),
    "linear_floor": lambda: process.linear(0.01),
    "vp": lambda: process.vp(),
    "ddpm": lambda: process.ddpm(1000),
    "cosine": lambda: process.cosine(),
    "cosine_both": lambda: process.cosine(0.008, 0.7),
    "subvp": lambda: process.subvp(),
    "ve": lambda: process.ve(),
    "edm": lambda: process.edm(),
}
TIMES = np.concatenate([[0.0, 1e-6, 1e-4, 1e-2], np.linspace(0.05, 0.95, 13), [0.99, 0.9999, 1.0]])
every_path = pytest.mark.parametrize("name", PATHS)


def world():
    return exact.GaussianMixture([0.4, 0.6], [[1.0, 0.5], [-1.0, 0.2]], 0.2, labels=[0, 1])


def draws(shape):
    return (jax.random.normal(jax.random.key(i), shape) for i in range(2))


@every_path
def test_round_trip_in_float32(name):
    """pair(target_of(x0, eps)) = (x0, eps), to 1e-5 times the condition number of what the target leaves out."""
    path, (x0, eps) = PATHS[name](), draws((len(TIMES), 16))

    @jax.jit
    def back(x0, eps, t):
        c = path.coefficients(t)
        x = path.corrupt(x0, eps, t)
        return c, {k: pair(k, c, x, target_of(k, c, x0, eps)) for k in TARGETS}

    c, pairs = back(x0, eps, jnp.asarray(TIMES, jnp.float32))
    alpha, sigma, pace = (np.asarray(v, np.float64)[:, None] for v in (c.alpha, c.sigma, c.pace))
    with np.errstate(divide="ignore"):
        low, high = 1 + sigma / alpha, 1 + alpha / sigma
    tangent = np.asarray(c.alpha * c.ds - c.sigma * c.da, np.float64)[:, None]
    scale = {  # error of (x0, eps) for a relative rounding error of the target and the state
        "data": (1, high),
        "noise": (low, 1),
        "score": (low, 1),
        "vpred": (1 + 1 / np.hypot(alpha, sigma), 1 + 1 / np.hypot(alpha, sigma)),
        "velocity": tuple(
            1 + np.abs(np.asarray(d, np.float64))[:, None] * (alpha + sigma) / tangent for d in (c.ds, c.da)
        ),
        "edm": (1, 1),
    }
    size = 1 + np.abs(np.asarray(x0)) + np.abs(np.asarray(eps))
    for target, p in pairs.items():
        told = np.ones_like(sigma, bool)
        if target == "score":
            told = sigma > 0
        if target == "velocity":
            told = pace > 0
        known = told & (alpha > 0) if target in ("noise", "score") else told
        for got, want, condition, where in (
            (p.data, x0, scale[target][0], known),
            (p.noise, eps, scale[target][1], told & (sigma > 0)),
        ):
            error = np.abs(np.asarray(got, np.float64) - np.asarray(want))
            bound = np.broadcast_to(1e-5 * size * condition, error.shape)
            rows = np.broadcast_to(where, error.shape)
            assert rows[3:-3].all()
            np.testing.assert_array_less(error[rows], bound[rows], err_msg=target)


@every_path
def test_well_conditioned_targets_lose_nothing(name):
    """edm keeps both members to 1e-5 at every level; velocity and vpred too where the path is bounded."""
    path, (x0, eps) = PATHS[name](), draws((len(TIMES), 16))
    t = jnp.asarray(TIMES[1:], jnp.float32)
    targets = ("edm",) if name in ("ve", "edm") else ("edm", "vpred", "velocity")
    c = path.coefficients(t)
    x = path.corrupt(x0[1:], eps[1:], t)
    for target in targets:
        p = pair(target, c, x, target_of(target, c, x0[1:], eps[1:]))
        # eps is not defined to better than eps_machine / sigma once alpha and sigma themselves are rounded
        np.testing.assert_allclose(p.data, x0[1:], atol=1e-5, rtol=1e-5, err_msg=target)
        np.testing.assert_allclose(p.noise, eps[1:], atol=2e-5, rtol=2e-5, err_msg=target)


@every_path
@pytest.mark.parametrize("target", TARGETS)
def test_any_output_gives_a_finite_pair_at_the_ends(name, target):
    path = PATHS[name]()
    x, raw = draws((2, 8))
    for dtype in (jnp.float32, jnp.bfloat16):
        p = pair(target, path.coefficients(jnp.array([0.0, 1.0])), x.astype(dtype), raw.astype(dtype))
        assert np.all(np.isfinite(np.float32(p.data))) and np.all(np.isfinite(np.float32(p.noise)))
    c = path.coefficients(jnp.float32(0.0))

    def total(raw, x):
        p = pair(target, c, x, raw)
        return jnp.sum(p.data**2 + p.noise**2)

    assert all(np.all(np.isfinite(g)) for g in jax.grad(total, (0, 1))(raw, x))


def test_clean_end_returns_the_state():
    """At sigma = 0 on a path with sigma ~ sqrt(t): velocity gives x0 = x and eps = 0."""
    x, raw = draws((2, 8))
    for name in ("vp", "ddpm", "cosine_both"):
        for target in ("velocity", "noise", "score", "edm", "vpred"):
            c = PATHS[name]().coefficients(jnp.float32(0.0))
            p = pair(target, c, x, raw)
            np.testing.assert_allclose(p.data, x, rtol=1e-6)
        np.testing.assert_array_equal(pair("velocity", c, x, raw).noise, 0)
        np.testing.assert_array_equal(pair("data", c, x, raw).noise, 0)


@every_path
def test_all_targets_agree_on_an_exact_world(name):
    """Networks of every kind that are told the truth make the same pair as the world itself."""
    path, x = PATHS[name](), draws((5, 2)).__next__()
    t = jnp.array([0.05, 0.2, 0.5, 0.7, 0.9])
    c = path.coefficients(t)
    x = x * jnp.hypot(c.alpha, c.sigma)[:, None]
    truth = world().predict(x, c.alpha, c.sigma)
    raws = {
        "data": truth.data,
        "noise": truth.noise,
        "score": world().score(x, c.alpha, c.sigma),
        "velocity": world().velocity(x, c),
        "vpred": c.alpha[:, None] * truth.noise - c.sigma[:, None] * truth.data,
    }
    for target, raw in raws.items():
        p = pair(target, c, x, raw)
        np.testing.assert_allclose(p.data, truth.data, rtol=1e-3, atol=3e-5 * (1 + np.max(c.sigma / c.alpha)))
        np.testing.assert_allclose(p.noise, truth.noise, rtol=1e-3, atol=3e-5 * (1 + np.max(c.alpha / c.sigma)))


def test_edm_is_the_published_preconditioning():
    """D = c_skip x + c_out F(c_in x; c_noise), table 1 of 2206.00364, at alpha = 1."""
    sd, path = 0.7, process.edm()
    seen = {}

    def network(params, x_in, c_noise, cond):
        seen.update(x_in=x_in, c_noise=c_noise)
        return jnp.sin(x_in) + c_noise[:, None]

    t = jnp.array([0.002, 0.3, 5.0, 80.0]) / 80
    x = draws((4, 8)).__next__() * 3
    d = pred.denoiser(path, network, target="edm", sigma_data=sd)
    out = d(x, t)
    sigma = np.asarray(path.coefficients(np.asarray(t, np.float64)).sigma)[:, None]
    np.testing.assert_allclose(sigma[:, 0], [0.002, 0.3, 5.0, 80.0], rtol=1e-6)
    c_in = 1 / np.sqrt(sigma**2 + sd**2)
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / np.sqrt(sigma**2 + sd**2)
    np.testing.assert_allclose(seen["x_in"], c_in * x, rtol=1e-5)
    np.testing.assert_allclose(seen["c_noise"], np.log(sigma[:, 0]) / 4, rtol=1e-5, atol=1e-6)
    raw = np.sin(c_in * np.asarray(x)) + np.log(sigma) / 4
    np.testing.assert_allclose(out.data, c_skip * x + c_out * raw, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(out.data + sigma * np.asarray(out.noise), x, rtol=1e-4, atol=1e-5)
    # the target is unit variance for data of deviation sigma_data: Var F = 1 at every level
    x0, eps = sd * draws((4, 20_000)).__next__(), jax.random.normal(jax.random.key(9), (4, 20_000))
    f = target_of("edm", path.coefficients(t), x0, eps, sd)
    np.testing.assert_allclose(np.var(f, 1), 1, atol=5 * np.sqrt(2 / 20_000))
    want = (x0 - c_skip * (x0 + sigma * eps)) / c_out
    np.testing.assert_allclose(f[1:], want[1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["noise", "score"])
@pytest.mark.parametrize("make", [process.linear, process.cosine])
def test_unidentifiable_targets_are_refused_with_advice(target, make):
    with pytest.raises(ValueError, match=r"alpha = 0; build the process with t_max < 1") as error:
        pred.denoiser(make(), lambda *a: a[1], target=target)
    assert "\n" not in str(error.value) and repr(target) in str(error.value)
    for other in ("data", "vpred", "velocity", "edm"):
        assert pred.denoiser(make(), identity, target=other).target == other
    assert pred.denoiser(make(t_max=0.999), identity, target=target).target == target
    assert pred.denoiser(process.vp(), identity, target=target).target == target


def labelled(classes, **options):
    return pred.denoiser(process.linear(), MLP(width=4, num_classes=classes), {}, target="velocity", **options)


def identity(params, x_in, c_noise, cond):
    return x_in


@pytest.mark.parametrize(
    "build,words",
    [
        (lambda: pred.denoiser(process.vp(), identity, target="velocty"), "did you mean 'velocity'?"),
        (lambda: pred.denoiser("vp", identity, target="data"), "process: 'vp' given; need a Process"),
        (lambda: pred.denoiser(process.vp(), identity, target=None), "target: None is unknown; allowed: data,"),
        (lambda: pred.denoiser(process.vp(), identity, target="data", clock="sigma"), "clock: 'sigma' is unknown"),
        (lambda: pred.denoiser(process.vp(), identity, target="edm", sigma_data=0.0), "sigma_data: 0.0"),
        (lambda: pair("eps", process.vp().coefficients(0.5), jnp.ones(2), jnp.ones(2)), "target: 'eps' is unknown"),
        (lambda: target_of("v", process.vp().coefficients(0.5), jnp.ones(2), jnp.ones(2)), "target: 'v' is unknown"),
        (lambda: pred.condition(pred.lift(lambda x, t, r: x), 1), "cond: given, but a denoiser of type Lifted"),
        (lambda: pred.on_path(pred.lift(lambda x, t, r: x), process.vp()), "trained: missing"),
        (lambda: pred.on_path(Momentum(0.5), process.vp()), "trained: missing"),
        (
            lambda: pred.on_path(Momentum(0.5), process.vp(), process.linear())(jnp.ones((2, 3)), 0.5),
            "inner: a stateful denoiser cannot change paths",
        ),
        (lambda: pred.lift(None), "d: NoneType given"),
        (
            lambda: pred.denoiser(process.vp(), lambda p, x, t, c: x[:, :1], target="data")(jnp.ones((2, 3)), 0.5),
            "apply: the network gives shape (2, 1) for a state (2, 3)",
        ),
        (
            lambda: pred.condition(labelled(3), jnp.array([0, 4])),
            "cond: label 4 given; this network knows 0..2, and 3",
        ),
        (lambda: pred.condition(labelled(3), {"label": np.array([-1])}), "cond: label -1 given"),
        (lambda: labelled(3, cond=jnp.int32(9)), "cond: label 9 given"),
        (
            lambda: pred.on_path(exact.denoiser(world(), process.vp()), process.edm(noise=process.student_t(3))),
            "sampled: noise law 'student_t'",
        ),
    ],
)
def test_bad_input_is_one_line(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert words in str(error.value) and "\n" not in str(error.value)


def listener(seen):
    def network(params, x_in, c_noise, cond, c_noise_r=None):
        seen.append((np.asarray(x_in), np.asarray(c_noise), None if c_noise_r is None else np.asarray(c_noise_r)))
        return x_in

    return network


def test_clocks():
    seen, x = [], jnp.ones((3, 2))
    t = jnp.array([0.0, 0.4, 1.0])
    for path in (process.linear(), process.vp(), process.ddpm(1000)):
        lam = np.clip(path.half_log_snr(np.array([1e-12, 0.4, 1 - 1e-12])), -20, 20)
        ends = path.name == "linear"
        for clock in ("time", "half_log_snr", "log_sigma"):
            pred.denoiser(path, listener(seen), target="velocity", clock=clock)(x, t)
            told = seen.pop()[1]
            if clock == "time":
                np.testing.assert_allclose(told, t * 1000 - 1 if path.name == "ddpm" else t, rtol=1e-6)
            else:
                want = lam if clock == "half_log_snr" else -lam / 4
                np.testing.assert_allclose(told[1], want[1], rtol=1e-5)
                assert np.all(np.isfinite(told))
                np.testing.assert_allclose(np.abs(told[0]), 20 if clock == "half_log_snr" else 5)
                if ends:
                    np.testing.assert_allclose(told[2], -told[0])
    assert pred.denoiser(process.edm(), identity, target="edm").clock == "log_sigma"
    assert pred.denoiser(process.edm(), identity, target="data").clock == "time"


def test_two_time_networks_are_told_where_to_jump():
    seen, x, path = [], jnp.ones((3, 2)), process.vp()
    d = pred.denoiser(path, listener(seen), target="velocity", two_time=True)
    d(x, 0.7, 0.2), d(x, 0.7)
    np.testing.assert_allclose([c for _, _, c in seen], [0.2, 0.7], rtol=1e-6)
    d = pred.denoiser(path, listener(seen), target="edm", two_time=True)
    d(x, jnp.full(3, 0.7), jnp.array([0.0, 0.2, 0.7]))
    want = -np.clip(path.half_log_snr(np.array([1e-30, 0.2, 0.7])), -20, 20) / 4
    np.testing.assert_allclose(seen[-1][2], want, rtol=1e-5)
    pred.denoiser(path, listener(seen), target="velocity")(x, 0.7, 0.2)
    assert seen[-1][2] is None


def test_queries_bring_their_own_coefficients():
    x, path = draws((3, 2)).__next__(), process.vp()
    d = pred.denoiser(path, identity, target="data")
    q = Query(0.3, None, 0.8, 0.6)
    np.testing.assert_allclose(d.at(x, q).noise, (x - 0.8 * x) / 0.6, rtol=1e-5)
    c = path.coefficients(0.3)
    called, asked = d(x, 0.3), d.at(x, Query(0.3, None, c.alpha, c.sigma))
    np.testing.assert_allclose(called.noise, asked.noise, rtol=1e-6)
    batch = pred.denoiser(path, identity, target="velocity")(x, jnp.array([0.1, 0.5, 0.9]))
    for i, t in enumerate((0.1, 0.5, 0.9)):
        one = pred.denoiser(path, identity, target="velocity")(x[i : i + 1], t)
        np.testing.assert_allclose(batch.data[i], one.data[0], rtol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Momentum:
    """Averages the data estimate along the trajectory."""

    rate: float

    def start(self, x):
        return jnp.zeros_like(x)

    def step(self, state, x, query):
        mean = self.rate * state + (1 - self.rate) * x
        return Prediction(mean, x - mean), mean


def test_start_and_evaluate_dispatch():
    x, q = jnp.ones((2, 3)), Query(0.5, None, 0.5, 0.5)
    stateful = Momentum(jnp.float32(0.5))
    state = pred.start(stateful, x)
    p, state = pred.evaluate(stateful, state, x, q)
    p, state = pred.evaluate(stateful, state, x, q)
    np.testing.assert_allclose(p.data, 0.75)
    np.testing.assert_allclose(state, 0.75)

    plain = exact.denoiser(world(), process.linear())
    assert pred.start(plain, x) == ()
    p, state = pred.evaluate(plain, (), x[:, :2], q)
    np.testing.assert_array_equal(p.data, plain.at(x[:, :2], q).data)
    assert state == ()

    calls = []
    lifted = pred.lift(lambda x, t, r: (calls.append((t, r)), Prediction(x, 0 * x))[1])
    p, state = pred.evaluate(lifted, pred.start(lifted, x), x, Query(0.5, 0.25, None, None))
    assert calls == [(0.5, 0.25)] and state == ()
    np.testing.assert_array_equal(p.data, x)


def test_lift():
    def f(x, t, r):
        return Prediction(x, x)

    assert pred.lift(f) != f and isinstance(pred.lift(f), pred.Lifted)
    for already in (pred.lift(f), Momentum(0.5), exact.denoiser(world(), process.vp()), exact.Delta(0.0)):
        assert pred.lift(already) is already
    traces = []
    run = jax.jit(lambda d, x: (traces.append(1), d(x, 0.5).data)[1])
    run(pred.lift(f), jnp.ones(2)), run(pred.lift(f), jnp.ones(2))
    assert len(traces) == 1


class Named(NamedTuple):
    """A stateful denoiser as the pair of functions it is."""

    start: Callable
    step: Callable


@pytest.mark.parametrize("kind", [Named, types.SimpleNamespace])
def test_a_pair_of_functions_is_a_stateful_denoiser(kind):
    pytree = Momentum(jnp.float32(0.5))
    d, x, q = pred.lift(kind(start=pytree.start, step=pytree.step)), jnp.ones((2, 3)), Query(0.5, None, 0.5, 0.5)

    @jax.jit
    def two(d, x):
        _, state = pred.evaluate(d, pred.start(d, x), x, q)
        return pred.evaluate(d, state, x, q)[0].data

    np.testing.assert_array_equal(two(d, x), two(pytree, x))
    np.testing.assert_array_equal(d(x, 0.5).data, pytree.step(pytree.start(x), x, q)[0].data)
    assert pred.lift(d) is d


def test_labels_out_of_range_are_refused_also_behind_guidance():
    d, good = labelled(3), jnp.array([0, 3])
    assert pred.condition(d, good).cond is good  # 3 means none
    pred.condition(d, jnp.ones((2, 4)))  # not labels
    guided = guidance.cfg(d, 2.0, null=3)
    pred.condition(guided, good)
    jax.jit(lambda c: pred.condition(guided, c).cond)(jnp.array([7]))  # not known while tracing
    for wrong in (guided, guidance.interval(guided, 0.1, 1.0), guidance.linear_mix((d, d), (0.5, 0.5))):
        with pytest.raises(ValueError, match="cond: label 7 given; this network knows"):
            pred.condition(wrong, jnp.array([0, 7]))
    with pytest.raises(ValueError, match="null: label 10 given"):
        guidance.cfg(d, 2.0, null=10)
    with pytest.raises(ValueError, match="conds: label 5 given"):
        guidance.compose(d, [good, [5, 0]], [1.0, 1.0], null=3)


@pytest.mark.parametrize("sampled", ["edm", "linear", "cosine", "ve", "subvp"])
@pytest.mark.parametrize("trained", ["vp", "linear", "ddpm", "edm"])
def test_on_path_equals_the_worlds_own_prediction(trained, sampled):
    """A perfect model of one path, asked on another, is perfect there: at grid times and at both ends."""
    model, path = exact.denoiser(world(), PATHS[trained]()), PATHS[sampled]()
    crossed = pred.on_path(model, path)
    t = jnp.array([0.0, 0.001, 0.02, 0.1, 0.3, 0.6, 0.9, 1.0])
    c = path.coefficients(t)
    x = draws((8, 2)).__next__() * jnp.hypot(c.alpha, c.sigma)[:, None]
    got = jax.jit(lambda d, x, t: d(x, t))(crossed, x, t)
    want = world().predict(x, c.alpha, c.sigma)
    assert np.all(np.isfinite(got.data)) and np.all(np.isfinite(got.noise))
    lam = np.asarray(path.half_log_snr(t), np.float64)
    inner = PATHS[trained]()
    ends = [inner.half_log_snr(np.array(e)) for e in (0.0, 1.0)]
    known = (lam <= ends[0]) & (lam >= ends[1])
    assert known.sum() >= 6
    np.testing.assert_allclose(got.data[known], np.asarray(want.data)[known], rtol=1e-4, atol=1e-4)
    # at sigma = 0 no row weighs the noise; elsewhere its error is that of the data over the noise level
    noisy = known & (np.asarray(c.sigma) > 0)
    slack = 2e-6 * np.asarray(jnp.hypot(c.alpha, c.sigma) / jnp.maximum(c.sigma, 1e-9))[noisy][:, None]
    assert np.all(np.abs(got.noise[noisy] - np.asarray(want.noise)[noisy]) < 1e-4 + slack)
    # beyond the trained levels the pure-noise estimate is still the model's most noisy one, close to the mean
    if not known[-1]:
        np.testing.assert_allclose(got.data[-1], world().moments()[0], atol=0.05)


def test_on_path_carries_conditions_and_jump_times():
    model = exact.denoiser(world(), process.vp())
    x = draws((4, 2)).__next__()
    crossed = pred.condition(pred.on_path(model, process.linear()), np.array([0, 1, -1, 0]))
    want = exact.denoiser(world(), process.linear()).condition(np.array([0, 1, -1, 0]))(x, 0.4)
    np.testing.assert_allclose(crossed(x, 0.4).data, want.data, rtol=1e-4, atol=1e-5)
    seen = []
    two = pred.denoiser(process.vp(), listener(seen), target="velocity", two_time=True)
    pred.on_path(two, process.linear())(x, 0.6, 0.3)
    vp, linear = process.vp(), process.linear()
    np.testing.assert_allclose(seen[0][1:], vp.time(linear.half_log_snr(np.array([0.6, 0.3]))), rtol=1e-5)
    lone = pred.on_path(pred.lift(lambda x, t, r: Prediction(x, x)), process.linear(), trained=process.vp())
    c, d = linear.coefficients(np.float64(0.4)), vp.coefficients(vp.time(linear.half_log_snr(np.float64(0.4))))
    np.testing.assert_allclose(lone(x, 0.4).data, x * (d.alpha / c.alpha), rtol=1e-5)


def test_on_path_tells_no_time_beyond_the_trained_ones():
    trained = process.vp(t_max=0.9)
    told = pred.on_path(pred.lift(lambda x, t, r: Prediction(x * 0 + t, x)), process.linear(), trained)
    x = jnp.ones((1, 2))
    assert [float(told(x, t).data[0, 0]) for t in (0.0, 0.999, 1.0)] == [0.0, np.float32(0.9), np.float32(0.9)]


def test_on_path_hands_on_the_mode_of_a_row():
    inner = types.SimpleNamespace(start=lambda x: (), step=lambda s, x, query: (Prediction(x * query.mode, x), s))
    query = Query(0.4, None, 0.6, 0.4, jnp.int32(3))
    crossed = pred.on_path(inner, process.linear(), process.linear())
    assert float(pred.evaluate(crossed, (), jnp.ones((1, 1)), query)[0].data[0, 0]) == pytest.approx(3.0)


def test_guided_denoisers_change_paths():
    """Guidance is arithmetic on predictions, so it may stand on either side of the change of path."""
    x, labels = draws((4, 2)).__next__(), np.array([0, 1, 1, 0])
    model, path = exact.denoiser(world(), process.vp()), process.edm()
    inside = pred.condition(pred.on_path(guidance.cfg(model, 2.0, null=-1), path), labels)
    outside = guidance.cfg(pred.on_path(model, path), 2.0, cond=labels, null=-1)
    for t in (0.001, 0.02, 0.5):
        got, want = inside(x, t), outside(x, t)
        np.testing.assert_allclose(got.data, want.data, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.noise, want.noise, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, c_noise, cond=None):
        h = nn.Dense(self.width)(x) + jnp.reshape(c_noise, (-1, 1))
        return nn.Dense(x.shape[-1])(jnp.tanh(h)) + (0 if cond is None else cond[:, None])


def test_new_values_do_not_retrace():
    """Parameters, conditions, sigma_data, process parameters and fresh equal modules are data."""
    x = draws((3, 2)).__next__()
    params = Net().init(jax.random.key(0), x, jnp.zeros(()))
    traces = []

    @jax.jit
    def run(d, x, t):
        traces.append(1)
        return d(x, t).data

    first = run(pred.denoiser(process.vp(), Net().apply, params, target="edm"), x, 0.4)
    doubled = jax.tree.map(lambda v: 2 * v, params)
    second = run(pred.denoiser(process.vp(0.2, 10), Net().apply, doubled, target="edm", sigma_data=1), x, 0.3)
    assert len(traces) == 1 and not np.allclose(first, second)
    run(pred.denoiser(process.vp(), Net(), params, target="edm", sigma_data=np.float32(2)), x, 0.4)
    assert len(traces) == 1
    told = pred.denoiser(process.vp(), Net().apply, params, target="edm", cond=jnp.zeros(3))
    np.testing.assert_allclose(run(told, x, 0.4), first, rtol=1e-6)
    third = run(pred.condition(told, jnp.ones(3)), x, 0.4)
    assert len(traces) == 2 and not np.allclose(third, first)
    run(pred.denoiser(process.vp(), Net().apply, params, target="velocity"), x, 0.4)
    assert len(traces) == 3  # another meaning is another program


def test_scales_can_be_vmapped():
    x = draws((3, 2)).__next__()
    params = Net().init(jax.random.key(0), x, jnp.zeros(()))
    d = pred.denoiser(process.edm(), Net().apply, params, target="edm")
    spread = jax.vmap(lambda s: dataclasses.replace(d, sigma_data=s)(x, 0.1).data)(jnp.array([0.5, 1.0]))
    one = pred.denoiser(process.edm(), Net().apply, params, target="edm", sigma_data=1.0)(x, 0.1).data
    np.testing.assert_allclose(spread[1], one, rtol=1e-5)
    assert not np.allclose(spread[0], spread[1])


@pytest.mark.parametrize("target", TARGETS)
def test_tabulated_forms_say_the_same(target):
    """All rows at once, then one row at a time in query.form: what the denoiser makes of each query itself."""
    path, x = process.vp(), draws((3, 2)).__next__()
    params = Net().init(jax.random.key(0), x, jnp.zeros(()))
    d = pred.denoiser(path, Net().apply, params, target=target, clock="half_log_snr", sigma_data=0.8)
    t = jnp.array([0.0, 0.3, 1.0])
    c = path.coefficients(t)
    table = d.tabulate(Query(t, None, c.alpha, c.sigma))
    for k in range(3):
        query = Query(t[k], None, c.alpha[k], c.sigma[k])
        want = d.at(x, query)
        got = d.at(x, dataclasses.replace(query, form=jax.tree.map(lambda v, k=k: v[k], table)))
        np.testing.assert_allclose(got.data, want.data, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.noise, want.noise, rtol=1e-5, atol=1e-6)
        a, b = (v[k] for v in table.linear[:2])
        np.testing.assert_allclose(a * x + b * d.raw(x, query), want.data, rtol=1e-5, atol=1e-6)
        # what is identified is consistent: alpha x0 + sigma eps = x for any raw output
        if not (target == "data" and k == 0):
            np.testing.assert_allclose(c.alpha[k] * want.data + c.sigma[k] * want.noise, x, rtol=1e-3, atol=2e-4)


def test_a_denoiser_tells_the_process_it_was_given():
    """Whose float64 numbers makers of tables need: its own copy is in float32, and no grid of the process lies on that."""
    x, path = draws((3, 2)).__next__(), process.vp()
    d = pred.denoiser(path, Net().apply, Net().init(jax.random.key(0), x, jnp.zeros(())), target="vpred")
    outer = solver.ddim(path, solver.grid.uniform(path, 2))
    held = {
        "plain": d,
        "told": d.condition(None),
        "guided": guidance.autoguidance(d, d, 2.0),
        "clipped": guidance.clip(d),
        "shifted": guidance.time_shift(d),
        "nested": guidance.nested(d, outer, lambda p: solver.ddim(p, solver.grid.uniform(p, 1))),
        "twice": pred.denoiser(d.process, Net().apply, d.params, target="vpred"),
        "elsewhere": pred.on_path(d, path, process.vp(0.2)),
    }
    assert {name for name, one in held.items() if one.process is not path} == set()
    own = solver.heun(d.process, solver.grid.logsnr(path, 5)).blocks
    np.testing.assert_array_equal(own.B, solver.heun(path, solver.grid.logsnr(path, 5)).blocks.B)
    assert np.isfinite(solver.learn.kl_bound(solver.grid.logsnr(path, 3), d, x, fine=1))
    count = sum(leaf.size for leaf in jax.tree.leaves(d.params))
    assert repr(d) == f"Denoiser(Net of {count} parameters, 'vpred' on 'vp')"
    # what went through jax has its own numbers alone
    np.testing.assert_allclose(jax.jit(lambda d: d)(d).process.path.beta_min, 0.1, rtol=1e-6)
