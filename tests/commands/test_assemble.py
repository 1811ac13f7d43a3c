"""From config to objects: what a field promises is what is built."""

import re
import types

import jax
import jax.numpy as jnp
import pytest

from jaxdiff import config as config_lib
from jaxdiff.commands import assemble
from jaxdiff.objective.context import Ctx

SMALL = {
    "mlp": {"width": "16", "depth": "2"},
    "unet": {"channels": "8"},
    "dit": {"width": "16", "depth": "2", "heads": "2"},
}


def products(network, **given):
    """(dtype, count) of the matrix products and convolutions of the loss, traced on the parameters the step hands it."""
    config = config_lib.default()
    options = {f"network.{name}": value for name, value in SMALL[network].items()}
    config_lib.check(config_lib.apply_overrides(config, {"network.name": network, **options, **given}))
    made = assemble.setup(config, types.SimpleNamespace(shape=(8, 8, 1), num_classes=10))
    player = assemble.game(made)["model"]
    params = jax.eval_shape(lambda: made.init(jax.random.key(0)))["model"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    seen = jnp.bfloat16 if config.train.precision == "bfloat16" else jnp.float32
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, seen), params)
    batch = {
        "x0": jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        "index": jax.ShapeDtypeStruct((4,), jnp.uint32),
    }
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    text = str(jax.make_jaxpr(lambda p, b, k: player.loss(p, b, k, Ctx(step=0))[0])(params, batch, keys))
    found = re.findall(r":(\w+)\[[^\]]*\] = (?:dot_general|conv_general_dilated)", text)
    return {kind: found.count(kind) for kind in set(found)}


@pytest.mark.parametrize("network", SMALL)
def test_precision_is_what_the_network_computes_in(network):
    plain = products(network)
    assert set(plain) == {"f32"}
    mixed = products(network, **{"train.precision": "bfloat16"})
    assert sum(mixed.values()) == plain["f32"]
    assert mixed["bf16"] > 0.8 * plain["f32"]  # the output layer may stay float32
    kept = products(network, **{"train.precision": "bfloat16", "network.dtype": "float32"})
    assert kept == plain  # asked for by name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"process.df": "4"}, "config.process.df: 4 given; only process.noise='student_t' has it, not 'gaussian'"),
        ({"process.noise": "[]"}, "noise: '[]' is unknown"),
        (
            {"solver.name": "restart", "solver.solver": "heun"},
            "config.solver: solver='heun' given; one of these is of a wrong",
        ),
        ({"solver.name": "restart", "solver.intervals": "3"}, "config.solver: intervals=3 given"),
        ({"solver.grid": "dynamic_shift", "solver.grid_options": "{'low': None}"}, "config.solver.grid_options"),
    ],
)
def test_options_of_a_wrong_kind_are_one_line(given, message):
    with pytest.raises(config_lib.ConfigError) as caught:
        config = config_lib.check(config_lib.apply_overrides(config_lib.default(), {"network.name": "mlp", **given}))
        assemble.table(assemble.setup(config, assemble.dataset(config, "train")))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_faults_without_options_keep_their_traceback():
    with pytest.raises(TypeError, match="not callable"):
        assemble.built("solver", {}, None)
