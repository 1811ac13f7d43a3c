"""Guidance against closed forms: identities bitwise, Gaussian worlds, structure (retraces, vmaps, collectives)."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxdiff.guidance as guidance
from jaxdiff import exact, prediction, process
from jaxdiff.prediction import DiscretePrediction, Prediction, Query

PATH = process.linear()
SHARED = np.array([[1.0, 0.6], [0.6, 0.8]])
MEANS = np.array([[1.0, 0.0], [-0.5, 0.7], [0.3, -2.0]])
EQUAL = exact.denoiser(exact.GaussianMixture([1, 1, 1], MEANS, [SHARED] * 3, labels=[0, 1, 2]), PATH)
UNEQUAL = exact.denoiser(
    exact.GaussianMixture([1, 1, 1], MEANS, [0.3 * SHARED, SHARED, np.eye(2)], labels=[0, 1, 2]), PATH
)
X = jax.random.normal(jax.random.key(0), (6, 2))
LABELS = jnp.array([0, 2, 0, 2, 2, 0])
NULL = 1


def same(a, b):
    return all(bool(jnp.array_equal(u, v)) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def close(a, b, tolerance=2e-6):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("branches", ["separate", "loop", "stacked"])
def test_scale_one_is_conditional_and_scale_zero_unconditional(branches):
    d = guidance.cfg(UNEQUAL, 1, cond=LABELS, null=NULL, branches=branches)
    told, free = UNEQUAL.condition(LABELS), UNEQUAL.condition(NULL)
    # vmap computes the same products by other kernels, hence to rounding there, bitwise elsewhere
    equal = close if branches != "separate" else lambda a, b: np.testing.assert_equal(same(a, b), True)
    equal(d(X, 0.4), told(X, 0.4))
    equal(dataclasses.replace(d, scale=jnp.float32(0))(X, 0.4), free(X, 0.4))
    close(
        dataclasses.replace(d, scale=jnp.float32(3))(X, 0.4).data, 3 * told(X, 0.4).data - 2 * free(X, 0.4).data, 1e-5
    )
    mixed = guidance.cfg(UNEQUAL, jnp.array([0.0, 1, 0, 1, 2, 2]), cond=LABELS, null=NULL, branches=branches)(X, 0.4)
    close(mixed.noise[:2], jnp.stack([free(X, 0.4).noise[0], told(X, 0.4).noise[1]]))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_equal_covariances_shift_the_mean(scale):
    """The guided field is that of N(mu_u + w (mu_c - mu_u), S) at every time, hence so are its samples."""
    d = guidance.cfg(EQUAL, scale, cond=jnp.zeros(6, int), null=NULL)
    world = exact.denoiser(exact.Gaussian(MEANS[1] + scale * (MEANS[0] - MEANS[1]), SHARED), PATH)
    for t in (0.02, 0.3, 0.7, 1.0):
        close(d(X, t), world(X, t), 5e-6)


def _ddim(d, x, steps=150):
    """Deterministic samples with 1 - t spaced evenly; both members of the pair are used."""
    grid = jnp.linspace(1, 0, steps + 1)

    def row(x, ts):
        p = d(x, ts[0])
        return (1 - ts[1]) * p.data + ts[1] * p.noise, None

    return jax.lax.scan(row, x, jnp.stack([grid[:-1], grid[1:]], 1))[0]


def test_guided_samples_are_shifted_and_are_not_the_tilted_law():
    """Equal covariances: exact moments. Unequal ones: neither prediction nor samples are p_c^w p_u^(1-w)."""
    scale, z = 3.0, jax.random.normal(jax.random.key(1), (4000, 2))
    z = (z - z.mean(0)) @ jnp.linalg.inv(jnp.linalg.cholesky(jnp.cov(z.T, bias=True))).T  # moments exactly (0, I)
    run = jax.jit(lambda d: _ddim(d, z))
    out = run(guidance.cfg(EQUAL, scale, cond=0, null=NULL))
    np.testing.assert_allclose(out.mean(0), MEANS[1] + scale * (MEANS[0] - MEANS[1]), atol=2e-3)
    np.testing.assert_allclose(jnp.cov(out.T, bias=True), SHARED, atol=0.03)  # first order in 1/150

    cov_c, cov_u = 0.3 * SHARED, SHARED
    precision = scale * np.linalg.inv(cov_c) + (1 - scale) * np.linalg.inv(cov_u)
    tilted_cov = np.linalg.inv(precision)
    information = scale * np.linalg.solve(cov_c, MEANS[0]) + (1 - scale) * np.linalg.solve(cov_u, MEANS[1])
    tilted = exact.denoiser(exact.Gaussian(tilted_cov @ information, tilted_cov), PATH)
    d = guidance.cfg(UNEQUAL, scale, cond=0, null=NULL)
    close(d(X, 1e-4).noise / 1e-4, tilted(X, 1e-4).noise / 1e-4, 0.02)  # same score as t -> 0 ...
    assert float(jnp.max(jnp.abs(d(X, 0.5).data - tilted(X, 0.5).data))) > 0.1  # ... and not at t > 0
    spread = np.sqrt(np.diag(np.cov(np.asarray(run(d)).T)) / np.diag(tilted_cov))
    assert np.all(np.abs(spread - 1) > 0.15)


def test_plus_plus_is_cfg_with_the_step_dependent_weight():
    told, free = UNEQUAL.condition(LABELS), UNEQUAL.condition(NULL)
    pp = guidance.cfg_pp(UNEQUAL, 0.6, cond=LABELS, null=NULL)
    p = pp(X, 0.6)
    assert same(p.noise, free(X, 0.6).noise)
    close(p.data, free(X, 0.6).data + 0.6 * (told(X, 0.6).data - free(X, 0.6).data))
    step = lambda q, s: (1 - s) * q.data + s * q.noise
    for s in (0.5, 0.2):
        weight = guidance.cfg_pp_weight(0.6, PATH.half_log_snr(0.6), PATH.half_log_snr(s))
        close(step(p, s), step(guidance.cfg(UNEQUAL, weight, cond=LABELS, null=NULL)(X, 0.6), s), 1e-5)
    assert float(guidance.cfg_pp_weight(0.6, 0.0, np.inf)) == pytest.approx(0.6)


IMAGES = jax.random.normal(jax.random.key(2), (3, 4, 4, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """An inconsistent but smooth world on images whose answer depends on the label."""

    process: object
    cond: object

    def __call__(self, x, t, r=None):
        c = self.process.coefficients(t)
        return self.at(x, Query(t, r, c.alpha, c.sigma))

    def at(self, x, query):
        shape = (-1,) + (1,) * (x.ndim - 1) if jnp.ndim(self.cond) else ()
        gain = jnp.reshape(0.3 + 0.2 * self.cond, shape)
        raw = gain * jnp.sin(3 * x) - 0.5 * x
        return prediction.pair("vpred", process.Coefficients(query.alpha, query.sigma, None, None, None), x, raw)

    def condition(self, cond):
        return dataclasses.replace(self, cond=cond)


jax.tree_util.register_dataclass(Affine, ["process", "cond"], [])


@pytest.mark.parametrize("space", ["vpred", "noise", "data"])
def test_rescale_keeps_the_conditional_spread(space):
    path = process.linear(t_max=0.99)
    labels = jnp.array([1.0, 2.0, 4.0])
    inner = Affine(path, None)
    plain = guidance.cfg(inner, 5, cond=labels, null=0.0)(IMAGES, 0.5)
    rescaled = lambda phi: guidance.cfg_rescale(inner, 5, phi=phi, space=space, cond=labels, null=0.0)(IMAGES, 0.5)
    assert same(rescaled(0.0), plain)
    c = path.coefficients(0.5)
    spread = lambda p: np.std(prediction.target_of(space, c, p.data, p.noise), (1, 2, 3))
    told, full, half = spread(inner.condition(labels)(IMAGES, 0.5)), spread(rescaled(1.0)), spread(rescaled(0.5))
    np.testing.assert_allclose(full, told, rtol=1e-5)
    np.testing.assert_allclose(half, (spread(plain) + told) / 2, rtol=1e-5)
    assert np.all(np.abs(spread(plain) - told) > 0.1 * told)  # there was something to restore
    p = rescaled(1.0)
    close(c.alpha * p.data + c.sigma * p.noise, IMAGES, 1e-5)  # the pair was re-formed at the same x


@pytest.mark.parametrize(
    "by, lo, hi", [("time", 0.3, 0.6), ("sigma", 3 / 7, 1.5), ("half_log_snr", -0.4054652, 0.8472979)]
)
def test_interval_is_the_conditional_outside(by, lo, hi):
    inside, outside = guidance.cfg(UNEQUAL, 4, cond=LABELS, null=NULL), UNEQUAL.condition(LABELS)
    d = guidance.interval(inside, lo, hi, by=by)
    for t in (0.0, 0.2, 0.61, 1.0):
        assert same(d(X, t), outside(X, t)), t
    for t in (0.31, 0.5, 0.59):
        assert same(d(X, t), inside(X, t)), t
    assert not same(inside(X, 0.2), outside(X, 0.2))
    per_sample = d(X, jnp.array([0.2, 0.5, 0.2, 0.5, 0.2, 0.5]))
    close(per_sample.data[0], outside(X, 0.2).data[0])
    close(per_sample.data[1], inside(X, 0.5).data[1])


def test_interval_holds_its_upper_end_and_not_its_lower():
    inside, outside = guidance.cfg(UNEQUAL, 4, cond=LABELS, null=NULL), UNEQUAL.condition(LABELS)
    d = guidance.interval(inside, 0.25, 0.5, by="time")
    assert same(d(X, 0.25), outside(X, 0.25)) and same(d(X, 0.5), inside(X, 0.5))


def test_autoguidance_identities():
    main, weak = UNEQUAL.condition(LABELS), EQUAL.condition(LABELS)
    assert same(guidance.autoguidance(main, main, 2.7)(X, 0.3), main(X, 0.3))
    assert same(guidance.autoguidance(main, weak, 1)(X, 0.3), main(X, 0.3))
    assert same(guidance.autoguidance(main, weak, 0.0)(X, 0.3), weak(X, 0.3))
    d = guidance.autoguidance(UNEQUAL, EQUAL, 2).condition(LABELS)
    close(d(X, 0.3).data, 2 * main(X, 0.3).data - weak(X, 0.3).data, 1e-5)
    plain = guidance.interval(d, 0.5, 2.0)
    assert same(plain(X, 0.1), main(X, 0.1))


def test_compose_is_linear_and_one_concept_is_cfg():
    d = guidance.compose(EQUAL, [0, 2], [1.5, -0.5], null=NULL)
    one = guidance.compose(EQUAL, [LABELS], [2.5], null=NULL)
    assert same(one(X, 0.5), guidance.cfg(EQUAL, 2.5, cond=LABELS, null=NULL)(X, 0.5))
    mean = MEANS[1] + 1.5 * (MEANS[0] - MEANS[1]) - 0.5 * (MEANS[2] - MEANS[1])
    close(d(X, 0.5), exact.denoiser(exact.Gaussian(mean, SHARED), PATH)(X, 0.5), 5e-6)
    for branches in ("loop", "stacked"):
        close(guidance.compose(EQUAL, [0, 2], [1.5, -0.5], null=NULL, branches=branches)(X, 0.5), d(X, 0.5))
    zero = guidance.compose(EQUAL, [0, 2], [0, 0], null=NULL)
    assert same(zero(X, 0.5), EQUAL.condition(NULL)(X, 0.5))
    swapped = d.condition((2, 0))
    assert not same(swapped(X, 0.5), d(X, 0.5))


def test_linear_mix_takes_functions_of_the_query():
    parts = [EQUAL.condition(k) for k in range(3)]
    d = guidance.linear_mix(parts, [None, lambda q: q.t, lambda q: q.sigma * q.alpha])
    mean = 0.2 * MEANS[1] + 0.16 * MEANS[2] + 0.64 * MEANS[0]
    close(d(X, 0.2), exact.denoiser(exact.Gaussian(mean, SHARED), PATH)(X, 0.2), 5e-6)
    e = guidance.linear_mix(
        [lambda x, t, r: Prediction(x, 2 * x), lambda x, t, r: Prediction(3 * x, x)], [0.25, 0.75]
    )
    close(e(X, 0.2), Prediction(2.5 * X, 1.25 * X))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    logits: jax.Array
    cond: jax.Array | int = 0

    def __call__(self, x, t, r=None):
        rows = jnp.broadcast_to(self.logits[self.cond], (*x.shape, self.logits.shape[-1]))
        return {"a": DiscretePrediction(jax.nn.log_softmax(rows)), "b": Prediction(x * 1.0, x + self.cond)}

    def condition(self, cond):
        return dataclasses.replace(self, cond=cond)


def test_tokens_mix_as_a_normalised_product_and_forbidden_stays_forbidden():
    logits = jnp.array([[0.1, 0.5, -1.0, -jnp.inf], [1.0, -0.3, -jnp.inf, -jnp.inf]])
    x = jnp.zeros((2, 3))
    out = guidance.cfg(Tokens(logits), 2.0, cond=0, null=1)(x, 0.5)
    with np.errstate(all="ignore"):
        p_c, p_u = np.exp(jax.nn.log_softmax(logits))
    product = np.array([p_c[0] ** 2 / p_u[0], p_c[1] ** 2 / p_u[1], 0, 0])
    np.testing.assert_allclose(np.exp(out["a"].log_probs[0, 0]), product / product.sum(), rtol=1e-5)
    np.testing.assert_allclose(out["b"].noise, x - 1.0)
    told = guidance.cfg(Tokens(logits), 1.0, cond=0, null=1)(x, 0.5)
    np.testing.assert_allclose(np.exp(told["a"].log_probs[0, 0]), p_c, rtol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Remembering:
    """Answers its own previous state plus the label; the state is (B,)."""

    cond: jax.Array | int = 0

    def start(self, x):
        return jnp.zeros(x.shape[0])

    def step(self, state, x, query):
        after = state + self.cond
        return Prediction(x * 0 + after[:, None], x), after

    def condition(self, cond):
        return dataclasses.replace(self, cond=cond)


@pytest.mark.parametrize("branches", ["separate", "loop", "stacked"])
def test_every_branch_keeps_its_own_state(branches):
    d = guidance.interval(guidance.cfg(Remembering(), 2.0, cond=5.0, null=1.0, branches=branches), 0, 1, by="time")
    state = prediction.start(d, X)
    for k in range(1, 4):
        out, state = prediction.evaluate(d, state, X, Query(0.5))
        np.testing.assert_array_equal(out.data, np.full((6, 2), 9.0 * k))
    assert all(leaf.shape[0] == 6 for leaf in jax.tree.leaves(state))


def test_new_values_do_not_retrace_and_scales_are_vmapped():
    traces = []

    @jax.jit
    def call(d, x):
        traces.append(1)
        return d(x, 0.5).data

    make = lambda scale, cond: guidance.cfg(UNEQUAL, scale, cond=cond, null=NULL)
    for scale in (1, 2.5, np.float32(3), np.float64(4), jnp.float32(5)):
        call(make(scale, LABELS), X)
    call(make(1, [0, 0, 0, 2, 2, 2]), X)
    call(make(1, None).condition(LABELS), X)
    for null in (-1, np.int64(-1), jnp.int32(-1), jnp.asarray(-1)):
        call(guidance.cfg(UNEQUAL, 1, cond=LABELS, null=null), X)
    assert len(traces) == 1
    for lo, hi in ((0, 1), (0.1, 0.5), (np.float32(0.2), 3)):
        call(guidance.interval(make(1, LABELS), lo, hi), X)
    assert len(traces) == 2
    scales = jnp.array([0.0, 1.0, 2.0, 7.5])
    swept = jax.vmap(lambda s: make(s, LABELS)(X, 0.5).data)(scales)
    close(swept, jnp.stack([make(s, LABELS)(X, 0.5).data for s in scales]), 1e-5)


def test_branches_do_not_move_a_sharded_batch():
    """A convolution under vmap, or a concatenation, gathers a sharded batch; the default and "loop" never do."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def apply(params, x, c_noise, cond):
        x = x + params["label"][cond][:, None, None, None]
        layout = jax.lax.conv_dimension_numbers(x.shape, (3, 3, 1, 1), ("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=layout)

    params = {"label": jnp.zeros(11), "kernel": jnp.ones((3, 3, 1, 1))}
    x, cond = jnp.zeros((16, 8, 8, 1)), jnp.zeros(16, int)

    def collectives(branches):
        def call(params, x, cond):
            d = prediction.denoiser(PATH, apply, params, target="velocity")
            return guidance.cfg(d, 2.0, cond=cond, null=10, branches=branches)(x, 0.5).data

        jitted = jax.jit(call, in_shardings=(whole, split, split), out_shardings=split)
        text = jitted.lower(params, x, cond).compile().as_text()
        return len(re.findall(r"(?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text))

    assert collectives("separate") == 0
    assert collectives("loop") == 0
    assert collectives("stacked") > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: guidance.cfg(EQUAL, 1, cond=0, null=1, branches="stack"), r"branches: 'stack' .*'stacked'"),
        (lambda: guidance.cfg(EQUAL, np.inf, cond=0, null=1), "scale: inf given"),
        (lambda: guidance.cfg(EQUAL, "high", cond=0, null=1), "scale: 'high' given"),
        (lambda: guidance.cfg(EQUAL, np.ones((2, 2)), cond=0, null=1), r"scale: shape \(2, 2\)"),
        (lambda: guidance.cfg(EQUAL, 1, null=1)(X, 0.5), "cond: cfg has none"),
        (lambda: guidance.cfg_rescale(EQUAL, 1, space="vprd", cond=0, null=1), "space: 'vprd' .*'vpred'"),
        (lambda: guidance.cfg_rescale(EQUAL, 1, space="noise", cond=0, null=1), "t_max"),
        (lambda: guidance.cfg_rescale(EQUAL, 1, phi=2, cond=0, null=1), "phi: 2 given"),
        (lambda: guidance.linear_mix([EQUAL], [0.5]), "must sum to one"),
        (lambda: guidance.linear_mix([EQUAL, EQUAL], [0.5, 0.501]), "must sum to one"),
        (lambda: guidance.linear_mix([EQUAL, EQUAL], [0.5]), "1 given for 2 parts"),
        (lambda: guidance.linear_mix([EQUAL, EQUAL], [0.5, lambda q: 0.5]), r"weights\[0\]: given"),
        (lambda: guidance.compose(EQUAL, [0], [1, 2], null=1), "2 given for 1 conditions"),
        (lambda: guidance.compose(EQUAL, [0], [1], null=1).condition(3), "needs a tuple of 1"),
        (lambda: guidance.interval(EQUAL, 0, 1), "needs a guided denoiser"),
        (lambda: guidance.interval(guidance.cfg(EQUAL, 1, null=1), 2, 1), "lo < hi"),
        (lambda: guidance.interval(guidance.cfg(EQUAL, 1, null=1), 1, 2, by="sigm"), "by: 'sigm' .*'sigma'"),
        (lambda: guidance.cfg(EQUAL, 1, cond=LABELS, null=None, branches="loop")(X, 0.5), "use 'separate'"),
        (lambda: guidance.cfg(lambda x, t, r: Prediction(x, x), 1, cond=0, null=1)(X, 0.5), "takes no condition"),
    ],
)
def test_errors_are_one_line_and_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
