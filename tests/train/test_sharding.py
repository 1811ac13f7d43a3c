"""Meshes, path rules, the automatic split, and the table that tells."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxdiff.network import NETWORKS
from jaxdiff.train import Player, abstract_state, averages, make_mesh, sharding_table, tree_specs
from jaxdiff.train.sharding import TENSOR_RULES, parse_rules, path_name, without_axis


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TREE = {
    "block_0": {"attention": {"kernel": leaf(64, 192)}, "mlp": {"kernel": leaf(64, 256), "bias": leaf(256)}},
    "block_1": {"attention": {"kernel": leaf(64, 192)}, "mlp": {"kernel": leaf(64, 256), "bias": leaf(256)}},
    "embed": leaf(1001, 64),
    "odd": leaf(1001, 63),
}
RULES = (
    (r"mlp/kernel$", (None, "tensor")),
    (r"embed", "replicated"),
    (r"kernel$", P("tensor", None)),
    (r"mlp/kernel$", (("data", "tensor"),)),  # never reached: the first match wins
)


def mesh(**sizes):
    return make_mesh(**sizes)


def test_mesh_sizes_and_axis_types():
    made = mesh(data=-1, fsdp=2)
    assert dict(made.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert made.axis_types == (AxisType.Auto,) * 3
    assert mesh(data=3).size == 3
    assert dict(mesh(data=2, tensor=-1).shape)["tensor"] == 4


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 8, "fsdp": 2}, r"data=8 x fsdp=2 x tensor=1 needs at least 16 devices, 8 are present"),
        ({"data": -1, "fsdp": 3}, r"8 devices are not divisible by 3"),
        ({"data": -1, "fsdp": -1}, r"only one size may be -1, got -1 for data and fsdp"),
        ({"data": 0}, r"mesh.data=0: allowed are an integer >= 1, or -1"),
        ({"fsdp": 2.0}, r"mesh.fsdp=2.0"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh(**sizes)


def test_first_rule_wins_and_the_rest_is_split_over_fsdp():
    specs = tree_specs(TREE, mesh(data=2, fsdp=2, tensor=2), RULES, min_bytes=4096)
    assert specs["block_0"]["mlp"]["kernel"] == P("fsdp", "tensor")
    assert specs["block_1"]["attention"]["kernel"] == P("tensor", "fsdp")
    assert specs["embed"] == P()
    assert specs["odd"] == P()  # nothing divides by 2
    assert specs["block_0"]["mlp"]["bias"] == P()  # below the size from which splitting pays


def test_automatic_split_takes_the_largest_dimension_that_divides():
    specs = tree_specs(TREE, mesh(data=2, fsdp=4), min_bytes=4096)
    assert specs["block_0"]["mlp"]["kernel"] == P(None, "fsdp")
    assert specs["embed"] == P(None, "fsdp")  # 1001 is larger but does not divide by 4
    assert tree_specs(TREE, mesh(data=8), min_bytes=1) == jax.tree.map(lambda _: P(), TREE)
    assert tree_specs(TREE, mesh(data=2, fsdp=4), min_bytes=2**20) == jax.tree.map(lambda _: P(), TREE)


def test_rules_hold_alike_for_averages_and_optimiser():
    zeros = lambda key: {"net": jax.tree.map(lambda s: jnp.zeros(s.shape), TREE)}
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    for rule in (chain, optax.contrib.muon(1e-3), optax.sgd(0.1, momentum=0.9)):
        game = {"net": Player(lambda *a: None, rule, ema=averages((0.9, 0.99)))}
        state = abstract_state(game, zeros, mesh(data=2, fsdp=2, tensor=2), RULES, min_bytes=4096)
        wanted = {tuple(leaf.shape): leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
        mirrored = [x for x in jax.tree.leaves((state.opt, state.ema)) if x.shape in wanted]
        assert len(mirrored) >= 3 * len(jax.tree.leaves(TREE))
        for x in mirrored:
            assert x.sharding.spec == wanted[x.shape]


@pytest.mark.parametrize(
    "rule, message",
    [
        (("embed", ("tensr",)), r"unknown mesh axis 'tensr'.*did you mean 'tensor'"),
        (("embed", ("tensor",)), r"rule 'embed' for embed \(1001, 64\): dimension 0 of size 1001 .* by 2"),
        (("embed", (None, None, "fsdp")), r"3 entries for 2 dimensions"),
        (("block_0/mlp/kernel", ("fsdp", "fsdp")), r"used twice"),
        (("embed", "replicate"), r"got 'replicate'; allowed are a tuple of axis names or 'replicated'"),
    ],
)
def test_bad_rules_name_rule_path_and_dimension(rule, message):
    with pytest.raises(ValueError, match=message):
        tree_specs(TREE, mesh(data=2, fsdp=2, tensor=2), (rule,))


def test_table_shows_bytes_and_what_stayed_whole():
    made = mesh(data=2, fsdp=2, tensor=2)
    specs = tree_specs(TREE, made, RULES, min_bytes=4096)
    shardings = jax.tree.map(lambda s: jax.sharding.NamedSharding(made, s), specs, is_leaf=lambda x: isinstance(x, P))
    table = sharding_table(TREE, shardings, min_bytes=4096).splitlines()
    row = next(line.split() for line in table if line.startswith("block_*/mlp/kernel"))
    assert row[1] == "2" and float(row[4]) == round(2 * 64 * 256 * 4 / 1e6, 3)
    assert float(row[5]) == round(2 * 64 * 256 * 4 / 4 / 1e6, 3)
    total = next(line.split() for line in table if line.startswith("total"))
    assert float(total[1]) == round(sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(TREE)) / 1e6, 3)
    whole = [line for line in table if line.startswith("stayed replicated")]
    assert len(whole) == 2 and "embed" in whole[0] and "odd" in whole[1]


def test_removing_an_axis():
    assert without_axis(P(("data", "fsdp"), None, "fsdp", "tensor"), "fsdp") == P("data", None, None, "tensor")


def test_rules_as_a_config_writes_them():
    """Lists (from JSON), tuples and text mean the same."""
    wanted = (
        ("mlp", (None, "tensor")),
        ("qkv", ("tensor", None)),
        ("out", (("data", "fsdp"),)),
        ("norm", "replicated"),
    )
    assert parse_rules(wanted) == wanted
    assert parse_rules([[p, list(s) if isinstance(s, tuple) else s] for p, s in wanted]) == wanted
    text = [("mlp", "*, tensor"), ("qkv", "tensor,*"), ("out", (("data", "fsdp"),)), ("norm", "replicated")]
    assert parse_rules(text) == wanted


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["mlp"], r"mesh.rules\[0\]='mlp': need a pair"),
        ([("a", "tensor"), ("mlp(", "tensor")], r"mesh.rules\[1\]=.*'mlp\(' is no regular expression"),
        ([("mlp", "tensor *")], r"axis names and \* between commas"),
        ([("mlp", None)], r"a tuple of them, or 'replicated'"),
    ],
)
def test_bad_rules_of_a_config(rules, message):
    with pytest.raises(ValueError, match=message):
        parse_rules(rules)


SMALL = {
    "dit": ({"width": 32, "depth": 1, "heads": 2, "patch": 2}, (8, 8, 3)),
    "unet": ({"channels": 16, "multipliers": (1, 2), "heads": 2}, (8, 8, 3)),
    "mlp": ({"width": 32, "depth": 2}, (2,)),
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_has_rules_that_pair_columns_with_rows(name):
    options, shape = SMALL[name]
    net = NETWORKS[name](**options)
    params = jax.eval_shape(net.init, jax.random.key(0), leaf(1, *shape), leaf(1))
    specs = tree_specs(params, mesh(data=2, tensor=4), TENSOR_RULES[name])
    found = {path_name(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs)}
    for pattern, _ in TENSOR_RULES[name]:
        assert any(re.search(pattern, path) for path in found), pattern
    split = {path: spec for path, spec in found.items() if spec != P() and path.endswith("kernel")}
    depth = {path_name(path): len(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    columns = [path for path, spec in split.items() if len(spec) == depth[path]]  # the last dimension is split
    rows = [path for path, spec in split.items() if path not in columns]
    pairs = [("/qkv/", "/out/"), ("/mlp_in/", "/mlp_out/"), ("/conv_0/", "/conv_1/"), ("_0/kernel", "_1/kernel")]
    for path in columns:
        partner = [path.replace(a, b) for a, b in pairs if path.replace(a, b) != path]
        assert any(other in rows for other in partner) or path.endswith("_c/kernel"), path
    assert rows and len(rows) <= len(columns)
