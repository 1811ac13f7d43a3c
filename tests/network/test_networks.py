"""Every network keeps the same contract: shapes, conditions, taps, two times, independence of samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.network import NETWORKS, NetOut, parameter_count, parameter_table

SMALL = {
    "mlp": {"width": 16, "depth": 2, "time_features": 8},
    "unet": {"channels": 8, "multipliers": (1, 2), "time_features": 8, "heads": 2},
    "dit": {"width": 16, "depth": 2, "heads": 2, "time_features": 8},
}
SHAPES = [
    ("mlp", (2,)),
    ("mlp", (3, 2)),
    ("unet", (8, 8, 1)),
    ("unet", (7, 5, 2)),
    ("dit", (8, 8, 1)),
    ("dit", (4, 6, 3)),
]
TAP = {"mlp": ("block_1", (16,)), "unet": ("middle", (4, 4, 16)), "dit": ("block_0", (16, 16))}
INPUT = {"mlp": (2,), "unet": (8, 8, 1), "dit": (8, 8, 1)}
KEY = jax.random.key(0)


def build(name, *, shape=None, batch=3, **options):
    """A network whose every parameter is random, so that nothing is hidden behind a zero layer."""
    net = NETWORKS[name](**(SMALL[name] | options))
    x = jax.random.normal(jax.random.key(1), (batch, *(shape or INPUT[name])))
    shapes = jax.eval_shape(net.init, KEY, x, jnp.zeros(()))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    return net, jax.tree.unflatten(tree, drawn), x


@pytest.mark.parametrize("name, shape", SHAPES)
def test_output_has_the_shape_of_the_input(name, shape):
    net, variables, x = build(name, shape=shape)
    out = jax.jit(net.apply)(variables, x, 0.3)
    assert isinstance(out, NetOut) and out.aux == {}
    assert out.raw.shape == x.shape and out.raw.dtype == x.dtype
    assert np.isfinite(out.raw).all() and np.std(out.raw) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_conditions_times_and_batch(name):
    """One compiled table of calls: labels, null, scalar and per-sample times, permutation of the batch."""
    net, variables, x = build(name, num_classes=4)
    label, t = jnp.array([0, 3, 1]), jnp.array([0.1, 0.5, 0.9])
    order = jnp.array([2, 0, 1])

    @jax.jit
    def calls(variables, x):
        def f(x, t, cond):
            return net.apply(variables, x, t, cond).raw

        return {
            "label": f(x, t, label),
            "dict": f(x, t, {"label": label}),
            "permuted": f(x[order], t[order], label[order]),
            "column": f(x, t.reshape((3,) + (1,) * (x.ndim - 1)), label),
            "none": f(x, t, None),
            "null": f(x, t, jnp.full(3, 4)),
            "scalar": f(x, 0.5, label),
            "full": f(x, jnp.full(3, 0.5), label),
            "neighbour": f(x.at[1].set(7.0), t.at[1].set(0.2), label.at[1].set(2)),
        }

    out = calls(variables, x)
    scale = float(np.std(out["label"]))
    close = {"rtol": 0, "atol": 1e-5 * scale}
    np.testing.assert_allclose(out["dict"], out["label"], **close)
    np.testing.assert_allclose(out["column"], out["label"], **close)
    np.testing.assert_allclose(out["permuted"], out["label"][order], **close)
    np.testing.assert_allclose(out["none"], out["null"], **close)
    np.testing.assert_allclose(out["scalar"], out["full"], **close)
    np.testing.assert_allclose(out["neighbour"][0], out["label"][0], **close)
    np.testing.assert_allclose(out["neighbour"][2], out["label"][2], **close)
    for other in ("none", "scalar", "neighbour"):  # and the inputs that should matter do
        assert np.abs(out[other] - out["label"]).max() > 1e-2 * scale


@pytest.mark.parametrize("name", NETWORKS)
def test_taps(name):
    net, variables, x = build(name)
    tap, shape = TAP[name]
    out = jax.jit(lambda v, x: net.apply(v, x, 0.2, taps=(tap,)))(variables, x)
    assert list(out.aux["taps"]) == [tap] and out.aux["taps"][tap].shape == (3, *shape)
    plain = jax.jit(lambda v, x: net.apply(v, x, 0.2))(variables, x)
    np.testing.assert_allclose(plain.raw, out.raw, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=rf"no block named '{tap[:-1]}'.*did you mean"):
        net.apply(variables, x, 0.2, taps=(tap[:-1],))


@pytest.mark.parametrize("name", [n if n != "unet" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def test_two_time(name):
    """A one-time checkpoint plus the fresh second embedding gives the one-time output until it is trained."""
    net, variables, x = build(name, two_time=True)
    single, one, _ = build(name)
    fresh = net.init(KEY, x, jnp.zeros(()))["params"]["conditioning"].pop("second_time")
    grown = {"params": {**one["params"], "conditioning": {**one["params"]["conditioning"], "second_time": fresh}}}

    @jax.jit
    def calls(grown, variables):
        return (
            single.apply(one, x, 0.7).raw,
            net.apply(grown, x, 0.7, c_noise_r=jnp.array([0.1, 0.2, 0.3])).raw,
            net.apply(grown, x, 0.7).raw,
            net.apply(variables, x, 0.7, c_noise_r=0.1).raw,
            net.apply(variables, x, 0.7, c_noise_r=0.6).raw,
        )

    first, with_r, without_r, near, far = calls(grown, variables)
    np.testing.assert_allclose(with_r, first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(without_r, first, rtol=1e-5, atol=1e-5)
    assert np.abs(near - far).max() > 1e-3
    with pytest.raises(ValueError, match="two_time=False"):
        single.apply(one, x, 0.7, c_noise_r=0.1)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_zero_at_initialisation(name):
    net = NETWORKS[name](**SMALL[name], num_classes=3)
    x = jax.random.normal(KEY, (2, 8, 8, 1))
    variables = jax.jit(net.init)(KEY, x, jnp.zeros(()))
    assert not np.any(jax.jit(net.apply)(variables, x, 0.5, jnp.array([0, 1])).raw)


def test_dit_blocks_are_the_identity_at_initialisation():
    net = NETWORKS["dit"](**SMALL["dit"])
    x = jax.random.normal(KEY, (2, 8, 8, 1))
    variables = jax.jit(net.init)(KEY, x, jnp.zeros(()))
    taps = jax.jit(lambda v: net.apply(v, x, 0.5, taps=("embed", "block_1")).aux["taps"])(variables)
    assert np.std(taps["embed"]) > 0.1
    np.testing.assert_array_equal(taps["embed"], taps["block_1"])


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_compute_keeps_float32_parameters_and_output(name):
    net, variables, x = build(name, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    full, _, _ = build(name)
    low, high = jax.jit(lambda v: (net.apply(v, x, 0.4).raw, full.apply(v, x, 0.4).raw))(variables)
    assert low.dtype == jnp.float32
    error = np.sqrt(np.mean((low - high) ** 2)) / np.std(high)
    assert 1e-5 < error < 0.05  # bf16 really was used, and norms and softmax did not break


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_remat_changes_no_gradient(name):
    net, variables, x = build(name, batch=2)
    kept, _, _ = build(name, remat=True)

    def gradient(n):
        return jax.grad(lambda v: jnp.mean(n.apply(v, x, 0.4).raw ** 2))

    assert str(jax.make_jaxpr(gradient(kept))(variables)).count("remat") > 0
    assert str(jax.make_jaxpr(gradient(net))(variables)).count("remat") == 0
    a, b = jax.jit(lambda v: (gradient(net)(v), gradient(kept)(v)))(variables)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5 * float(np.abs(left).max() + 1e-3))


def test_unet_dropout_acts_only_with_a_key():
    net, variables, x = build("unet", dropout=0.5)
    f = jax.jit(lambda key: net.apply(variables, x, 0.4, rngs={"dropout": key}).raw)
    plain = jax.jit(lambda: net.apply(variables, x, 0.4).raw)()
    assert np.abs(f(jax.random.key(1)) - f(jax.random.key(2))).max() > 1e-3
    assert np.abs(f(jax.random.key(1)) - plain).max() > 1e-3


def test_unet_attends_at_named_sides():
    plain, _, _ = build("unet", shape=(7, 7, 1))
    _, variables, x = build("unet", shape=(7, 7, 1), attention=(4,))
    added = parameter_count(variables) - parameter_count(jax.eval_shape(plain.init, KEY, x, jnp.zeros(())))
    one = 2 * 16 + (16 + 1) * 48 + (16 + 1) * 16  # norm, qkv and out on 16 channels
    assert added == 3 * one  # one block down, two up
    with pytest.raises(ValueError, match=r"no level of side 5; sides: \[7, 4\]"):
        build("unet", shape=(7, 7, 1), attention=(5,))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("unet", {"chanels": 8}, r"unknown option 'chanels' \(did you mean 'channels'\?\)"),
        ("mlp", {"width": 0}, "width=0 must be >= 1"),
        ("mlp", {"width": 1.5}, "width=1.5 must be a whole number"),
        ("dit", {"num_classes": True}, "num_classes=True must be a whole number"),
        ("mlp", {"dtype": "float8"}, "dtype='float8' must be one of float32"),
        ("dit", {"size": "M/2"}, "size='M/2' must be one of S, B, L, XL"),
        ("dit", {"width": 18, "heads": 4}, "width=18 must be a multiple of 4 and of heads=4"),
        ("dit", {"dpeth": 4}, "did you mean 'depth'"),
        ("unet", {"multipliers": []}, "multipliers=.* must be one or more"),
        ("unet", {"dropout": 1.0}, "dropout=1.0 must be below 1"),
        ("unet", {"out_channels": 0}, "out_channels=0 must be >= 1"),
        ("dit", {"width": 16, "heads": 4, "mlp_ratio": 0.0}, "mlp_ratio=0.0 must be a finite number > 0"),
        ("mlp", {"frequencies": (1.0, 0.1)}, "frequencies=.* must be two positive"),
        ("mlp", {"time_features": 7}, "time_features=7 must be even"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        NETWORKS[name](**options)


@pytest.mark.parametrize(
    "name, options, shape, t, cond, message",
    [
        ("mlp", {"num_classes": 4}, (3, 2), 0.1, np.array([0, 1, 5]), "label 5 is out of range; allowed 0..4"),
        ("mlp", {"num_classes": 4}, (3, 2), 0.1, np.array([0, 1, -1]), "label -1 is out of range"),
        ("mlp", {"num_classes": 4}, (3, 2), 0.1, np.array([0.0, 1.0, 2.0]), "give integers"),
        ("mlp", {"num_classes": 4}, (3, 2), 0.1, np.array([0, 1]), "2 labels for a batch of 3"),
        ("mlp", {"num_classes": 4}, (3, 2), 0.1, {"lable": np.array([0, 1, 2])}, "reads only 'label'"),
        ("mlp", {}, (3, 2), 0.1, np.array([0, 1, 2]), "num_classes=0"),
        ("mlp", {}, (3, 2), np.zeros(2), None, r"c_noise has shape \(2,\)"),
        ("mlp", {}, (3, 2), np.zeros((3, 2)), None, r"c_noise has shape \(3, 2\)"),
        ("dit", {}, (3, 7, 8, 1), 0.1, None, "patch=2"),
        ("unet", {}, (3, 8, 1), 0.1, None, r"needs \(B, H, W, C\)"),
    ],
)
def test_bad_calls_are_named(name, options, shape, t, cond, message):
    net = NETWORKS[name](**(SMALL[name] | options))
    with pytest.raises(ValueError, match=message):
        net.init(KEY, jnp.zeros(shape), t, cond)


def test_labels_closed_over_under_jit():
    net, variables, x = build("mlp", num_classes=4)
    label = jnp.array([0, 1, 2])
    inside = jax.jit(lambda v: net.apply(v, x, 0.1, label).raw)(variables)
    np.testing.assert_allclose(inside, net.apply(variables, x, 0.1, label).raw, rtol=1e-5, atol=1e-6)
    listed = jax.jit(lambda v, labels: net.apply(v, x, 0.1, labels).raw)(variables, [0, 1, 2])  # a list of tracers
    np.testing.assert_array_equal(listed, inside)


def test_count_and_table():
    _, variables, _ = build("mlp", num_classes=4)
    width, features = 16, 8
    conditioning = (features + 1) * width + (width + 1) * width + 5 * width
    blocks = 2 * (2 * (width + 1) * width + width * width)
    assert parameter_count(variables) == conditioning + blocks + 3 * width + (width + 1) * 2
    lines = parameter_table(variables).splitlines()
    assert lines[0].split() == ["parameter", "shape", "dtype", "count"]
    assert any(line.split() == ["params/conditioning/label/embedding", "5x16", "float32", "80"] for line in lines)
    assert lines[-1].split() == ["total", f"{parameter_count(variables):,}"]
