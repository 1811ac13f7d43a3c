"""Regression: exact values, equality across targets, what each example's loss may depend on, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff import exact, prediction, process
from jaxdiff.network import MLP
from jaxdiff.objective import Ctx, minibatch_ot, over_lam, regression
from jaxdiff.objective.weighting import WEIGHTINGS
from jaxdiff.process import PROCESSES

CTX = Ctx(step=jnp.int32(3))


def batch_of(size, dimension=3, seed=0):
    x = 0.7 * jax.random.normal(jax.random.key(seed), (size, dimension)) + 0.2
    return {"x": x, "label": jnp.arange(size) % 4, "index": 1000 + jnp.arange(size, dtype=jnp.uint32)}


def keys_of(size):
    return jax.random.split(jax.random.key(9), size)


def linear_net(params, x, c_noise, cond):
    return params["a"] * x + params["b"] * jnp.asarray(c_noise)[:, None]


PARAMS = {"a": jnp.float32(0.3), "b": jnp.float32(-0.2)}


def test_losses_and_gradients_are_the_same_for_every_target():
    """One model of the data, written as each kind of output: w|F - F_hat|^2 and its gradient do not change."""
    path = process.vp()

    def model(target):
        def apply(params, x_in, c_noise, cond):
            c = path.coefficients(c_noise)
            column = lambda v: v[:, None]
            q = jnp.sqrt(c.sigma**2 + 0.25 * c.alpha**2)
            x = x_in * column(q) if target == "edm" else x_in
            data = params["a"] * jnp.tanh(x) + params["b"]
            return prediction.target_of(target, c, data, (x - column(c.alpha) * data) / column(c.sigma))

        return apply

    results = []
    with jax.enable_x64(True):
        batch = jax.tree.map(lambda v: v.astype(jnp.float64) if v.dtype == jnp.float32 else v, batch_of(16))
        for target in prediction.TARGETS:
            loss = regression(
                path, model(target), target=target, weighting="min_snr", clock="time", t_min=0.01, time="logit_normal"
            )
            results.append(jax.value_and_grad(lambda p, f=loss: f(p, batch, keys_of(16), CTX)[0])(PARAMS))
    assert float(results[0][0]) > 0.1
    for value, gradient in results[1:]:
        np.testing.assert_allclose(value, results[0][0], rtol=2e-4)  # losses are reduced in float32
        np.testing.assert_allclose(gradient["a"], results[0][1]["a"], rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(gradient["b"], results[0][1]["b"], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("draw", ["stratified", "iid"])
def test_exact_denoiser_reaches_the_conditional_variance(draw):
    """Data N(0, var): the flat velocity loss of the exact network is E_t Var(eps - x0 | x_t), an integral."""
    var, size = 0.6, 20_000
    path = process.linear()
    world = exact.Gaussian(np.zeros(1), var * np.eye(1))

    def apply(params, x, c_noise, cond):
        return world.velocity(x, path.coefficients(c_noise))

    t = (np.arange(100_000) + 0.5) / 100_000
    variance = (var + 1) - (t - (1 - t) * var) ** 2 / ((1 - t) ** 2 * var + t**2)
    loss = regression(path, apply, target="velocity", bins=4, draw=draw)
    batch = {"x": jnp.sqrt(var) * jax.random.normal(jax.random.key(1), (size, 1)), "index": jnp.arange(size)}
    value, metrics = jax.jit(loss)({}, batch, keys_of(size), CTX)
    error = np.sqrt(2 * np.mean(variance**2) / size)  # a squared Gaussian has standard deviation sqrt(2) its mean
    assert abs(float(value) - variance.mean()) < 4 * error
    assert metrics["loss"] == value and metrics["mse"] == pytest.approx(float(value), rel=1e-6)
    found = [float(metrics[f"loss_bin{k}"]) for k in range(4)]
    np.testing.assert_allclose(np.mean(found), value, rtol=1e-5)
    np.testing.assert_allclose(found, variance.reshape(4, -1).mean(1), atol=10 * error)
    assert max(found) - min(found) > 20 * error  # the bins differ, so their order was tested


def test_likelihood_weight_is_the_bound():
    """With the exact denoiser of N(0, var), the diffusion term is its integral over lam, in nats, for any density."""
    var, size, path = 2.0, 40_000, process.vp()
    world = exact.Gaussian(np.zeros(1), var * np.eye(1))
    low, high = path.half_log_snr(1.0), path.half_log_snr(1e-2)
    lam = np.linspace(low, high, 200_001)
    snr = np.exp(2 * lam)
    integral = np.mean(var * snr / (1 + var * snr)) * (high - low)  # Var(eps | x) = SNR var / (SNR var + 1)

    def apply(params, x, c_noise, cond):
        c = path.coefficients(c_noise)
        return world.predict(x, c.alpha, c.sigma).noise

    batch = {"x": jnp.sqrt(var) * jax.random.normal(jax.random.key(1), (size, 1)), "index": jnp.arange(size)}
    for time in ("uniform", lambda u, p: 1e-2 + 0.99 * u**2):
        loss = regression(path, apply, target="noise", weighting="likelihood", time=time, t_min=1e-2, reduce="sum")
        value, _ = jax.jit(loss)({}, batch, keys_of(size), CTX)
        np.testing.assert_allclose(value, integral, rtol=0.04)


def test_the_network_is_told_what_the_sampler_tells_it():
    path = process.edm()
    seen = []

    def apply(params, x_in, c_noise, cond):
        seen.append((x_in, c_noise))
        return x_in

    regression(path, apply, target="edm", time="log_normal")({}, batch_of(8), keys_of(8), CTX)
    x_in, c_noise = seen.pop()
    sigma = jnp.exp(4 * c_noise)
    d = prediction.denoiser(path, apply, {}, target="edm")
    d.raw(x_in * jnp.sqrt(sigma**2 + 0.25)[:, None], prediction.Query(sigma / 80, None, jnp.ones(8), sigma))
    np.testing.assert_allclose(seen[0][0], x_in, rtol=1e-5)
    np.testing.assert_allclose(seen[0][1], c_noise, rtol=1e-5, atol=1e-6)


def test_an_example_does_not_see_its_batch():
    """The batch loss is the mean of single-example losses, in any order, and the same on 8 devices."""
    loss = jax.jit(
        regression(
            process.linear(), linear_net, target="velocity", cond_key="label", null_label=4, weighting="min_snr"
        )
    )
    batch, keys = batch_of(16), keys_of(16)
    whole = loss(PARAMS, batch, keys, CTX)[0]
    singles = [loss(PARAMS, {k: v[i : i + 1] for k, v in batch.items()}, keys[i : i + 1], CTX)[0] for i in range(16)]
    np.testing.assert_allclose(np.mean(singles), whole, rtol=1e-6)
    assert np.std(singles) > 0.1
    order = jax.random.permutation(jax.random.key(2), 16)
    np.testing.assert_allclose(
        loss(PARAMS, {k: v[order] for k, v in batch.items()}, keys[order], CTX)[0], whole, rtol=1e-6
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put((batch, keys), NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(loss(PARAMS, *spread, CTX)[0], whole, rtol=1e-6)
    assert loss(PARAMS, batch, keys, Ctx(step=jnp.int32(4)))[0] != whole  # another step, other times


def test_groups_are_consecutive_rows():
    loss = jax.jit(regression(process.linear(), linear_net, target="velocity", coupling=minibatch_ot(4)))
    plain = jax.jit(regression(process.linear(), linear_net, target="velocity"))
    one = jax.jit(regression(process.linear(), linear_net, target="velocity", coupling=minibatch_ot(1)))
    batch, keys = batch_of(16), keys_of(16)
    whole = loss(PARAMS, batch, keys, CTX)[0]
    part = lambda k: loss(PARAMS, {n: v[4 * k : 4 * k + 4] for n, v in batch.items()}, keys[4 * k : 4 * k + 4], CTX)[
        0
    ]
    np.testing.assert_allclose(np.mean([part(k) for k in range(4)]), whole, rtol=1e-6)
    assert whole < plain(PARAMS, batch, keys, CTX)[0] == one(PARAMS, batch, keys, CTX)[0]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spread = jax.device_put((batch, keys), NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(loss(PARAMS, *spread, CTX)[0], whole, rtol=1e-6)


def test_labels_are_dropped_at_the_stated_rate_by_key():
    size, seen = 4000, []

    def apply(params, x, c_noise, cond):
        seen.append(np.asarray(cond))
        return x

    loss = regression(process.linear(), apply, target="velocity", cond_key="label", label_drop=0.15, null_label=9)
    batch, keys = batch_of(size, 1), keys_of(size)
    loss({}, batch, keys, CTX)
    dropped = seen[0] == 9
    assert abs(dropped.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / size)
    np.testing.assert_array_equal(seen[0][~dropped], np.asarray(batch["label"])[~dropped])
    loss({}, {k: v[100:200] for k, v in batch.items()}, keys[100:200], CTX)
    np.testing.assert_array_equal(seen[1], seen[0][100:200])


@pytest.mark.parametrize("path", list(PROCESSES))
def test_finite_for_every_target_and_weighting(path):
    p = PROCESSES[path]() if path not in ("linear", "cosine", "trig", "ddpm") else PROCESSES[path](t_max=0.999)
    batch, keys = batch_of(32, 2), keys_of(32)
    for target in prediction.TARGETS:
        for name in ("flat", "min_snr", "likelihood"):  # the others: finite weights, test_weighting.py
            loss = regression(p, linear_net, target=target, weighting=name)
            value, metrics = loss(PARAMS, batch, keys, CTX)
            assert all(bool(jnp.isfinite(v)) for v in jax.tree.leaves((value, metrics))), (target, name)


def test_networks_may_return_more_and_take_random_streams():
    from jaxdiff.network import NetOut

    def apply(params, x, c_noise, cond, rngs=None):
        return NetOut(x + jax.random.normal(rngs["dropout"], x.shape), {"taps": {}})

    loss = regression(process.linear(), apply, target="data", rngs=("dropout",))
    first = loss({}, batch_of(4), keys_of(4), CTX)[0]
    assert first == loss({}, batch_of(4), keys_of(4), CTX)[0] and bool(jnp.isfinite(first))


def build(**options):
    return regression(process.linear(), linear_net, **{"target": "velocity", **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": "velocty"}, "target: 'velocty' .*'velocity'"),
        ({"target": "noise"}, "t_max"),
        ({"time": "unifrom"}, "time: 'unifrom' .*'uniform'"),
        ({"time": 3}, "time: 3 given"),
        ({"weighting": "minsnr"}, "weighting: 'minsnr' .*'min_snr'"),
        ({"weighting": lambda lam: lam}, "need a name of WEIGHTINGS"),
        ({"coupling": "otto"}, "coupling: 'otto' .*'ot'"),
        ({"clock": "sundial"}, "clock: 'sundial' is unknown; allowed: time"),
        ({"draw": "stratifid"}, "draw: 'stratifid' is unknown; allowed: stratified, iid; did you mean 'stratified'"),
        ({"sigma_data": 0.0}, "sigma_data: 0.0 given"),
        ({"draw": "sobol"}, "draw: 'sobol' is unknown"),
        ({"reduce": "max"}, "reduce: 'max' is unknown"),
        ({"t_min": 1.0}, "t_min: 1.0 given"),
        ({"label_drop": 1.5}, "label_drop: 1.5 given"),
        ({"bins": -1}, "bins: -1 given"),
        ({"cond_key": "label"}, "null_label: missing"),
        ({"weighting": over_lam(WEIGHTINGS["snr"]()), "time": "discrete"}, "have no density"),
    ],
)
def test_errors_when_built(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_a_null_label_that_the_network_does_not_know_is_refused():
    """Inside a compiled step it would only be NaN."""
    apply = MLP(width=4, depth=1, num_classes=3).apply
    for null in (4, -1):
        with pytest.raises(
            ValueError, match=rf"null_label: label {null} given; this network knows 0..2, and 3 for none"
        ):
            regression(process.linear(), apply, target="velocity", cond_key="label", null_label=null)
    regression(process.linear(), apply, target="velocity", cond_key="label", null_label=3)


@pytest.mark.parametrize(
    "options, change, message",
    [
        ({}, {"x": None}, "data_key: the batch has no field 'x0'; it has index, label"),
        ({"data_key": "latent"}, {}, "data_key: the batch has no field 'latent'"),
        ({"cond_key": "text", "null_label": 0}, {}, "cond_key: the batch has no field 'text'"),
        ({}, {"index": None}, "draw='stratified': the batch has no field 'index'"),
        ({}, {"x": jnp.zeros((4, 3), jnp.uint8)}, "dtype uint8 given"),
        ({"coupling": minibatch_ot(3)}, {}, "it must divide the batch"),
        ({}, {"x": jnp.zeros((5, 3))}, "keys: shape"),
    ],
)
def test_errors_when_traced(options, change, message):
    batch = {k: v for k, v in {**batch_of(4), **change}.items() if v is not None}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        build(**options)(PARAMS, batch, keys_of(4), CTX)
    assert "\n" not in str(error.value)


def test_data_is_found_by_its_usual_names():
    batch = batch_of(4)
    losses = [build()(PARAMS, {**batch, **other}, keys_of(4), CTX)[0] for other in ({}, {"x0": 2 * batch["x"]})]
    renamed = {"image" if k == "x" else k: v for k, v in batch.items()}
    assert build()(PARAMS, renamed, keys_of(4), CTX)[0] == losses[0] != losses[1]


def test_a_network_of_the_wrong_shape_is_named():
    loss = regression(process.linear(), lambda p, x, c, y: x[:, :1], target="velocity")
    with pytest.raises(ValueError, match=r"the network gives shape \(4, 1\); target 'velocity' has \(4, 3\)"):
        loss({}, batch_of(4), keys_of(4), CTX)
