"""Fully-sharded data parallelism with its collectives written out, on a small DiT and eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dit_training import DEPTH, IMAGE, MIN_BYTES, PATH, WIDTH, agrees, images, prepare, train
from jax.sharding import AxisType
from tiny_training import batch_at, host, init, largest_difference, loss, player, run

from jaxdiff.network import make_dit
from jaxdiff.objective import regression
from jaxdiff.train import (
    Player,
    abstract_state,
    cost,
    create_state,
    make_mesh,
    make_step,
    optimiser,
    put_batch,
    replicated,
    state_shardings,
)
from jaxdiff.train.fsdp import split_blocks
from jaxdiff.train.sharding import TENSOR_RULES

# of a block: modulation, qkv, out and two mlp matrices with their biases; only what has 1 kB or more is split
BLOCK = 18 * WIDTH**2
ROUTES = {"2x4": {"data": 2, "fsdp": 4}, "1x8": {"data": 1, "fsdp": 8}}


@pytest.fixture(scope="module")
def default():
    """The default route: parameters whole on eight devices."""
    return train(make_mesh(data=8))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("route", ROUTES)
def test_two_gathers_and_one_scatter_a_block(route, accumulate, dtype):
    """In StableHLO, under remat: what every backend is given, in the dtype of the computation."""
    mesh = make_mesh(**ROUTES[route])
    step, state, batch, key = prepare(mesh, parallel="fsdp", accumulate=accumulate, compute_dtype=dtype)
    text = step.lower(state, batch, key).as_text()
    n, kind = mesh.shape["fsdp"], "bf16" if dtype else "f32"
    gathers = re.findall(r'"stablehlo.all_gather"[^\n]*-> tensor<(\S+)>', text)
    scatters = re.findall(r'"stablehlo.reduce_scatter".*?-> tensor<(\S+)>', text, re.DOTALL)
    assert gathers.count(f"{n}x{BLOCK // n}x{kind}") == 2 * DEPTH
    assert scatters.count(f"1x{BLOCK // n}xf32") == DEPTH  # gradients are summed in float32
    # around the blocks too: one scatter each, and no more than two gathers
    blocks = split_blocks(state_shardings(state, mesh, (), MIN_BYTES).params["net"])
    assert len(scatters) == len(blocks) and len(gathers) <= 2 * len(blocks)
    assert {block.name.split("/")[-1] for block in blocks} > {f"block_{i}" for i in range(DEPTH)}


def test_the_default_routes_ask_for_neither():
    """Negative control of the count: the compiler places the gathers of jit, and whole parameters need none."""
    for sizes, parallel in (({"data": 2, "fsdp": 4}, "jit"), ({"data": 8}, "auto")):
        step, state, batch, key = prepare(make_mesh(**sizes), parallel=parallel)
        text = step.lower(state, batch, key).as_text()
        assert "all_gather" not in text and "reduce_scatter" not in text


@pytest.mark.slow
@pytest.mark.parametrize(("route", "accumulate"), [("2x4", 1), ("1x8", 2)])
def test_equal_to_the_default_route(route, accumulate, default):
    agrees(train(make_mesh(**ROUTES[route]), parallel="fsdp", accumulate=accumulate), default)


@pytest.mark.slow
def test_bytes_and_reductions():
    mesh = make_mesh(data=2, fsdp=4)
    step, state, batch, key = prepare(mesh, parallel="fsdp", accumulate=2)
    found = cost.traced_collectives(jax.make_jaxpr(step.jitted)(state, batch, key, step.fixed))
    blocks = [c for c in found if c.kind == "all-gather" and c.bytes == 4 * BLOCK]
    assert len(blocks) == 2 * DEPTH and {(c.group, c.times) for c in blocks} == {(4, 2)}  # every microbatch gathers
    scattered = [c for c in found if c.kind == "reduce-scatter"]
    assert {(c.group, c.times) for c in scattered} == {(4, 2)}  # and scatters: no whole gradient waits for the next
    whole = [x.size for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    assert sum(c.bytes for c in scattered) == sum(whole)  # 4 bytes x parameters / 4 devices
    reduced = [c for c in found if c.kind == "all-reduce"]
    assert all(c.times == 1 for c in reduced)  # over copies, after the scan
    # the pieces along data, the arrays that were never split along both; loss and metrics beside them
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    along = lambda group: sum(c.bytes for c in reduced if c.group == group)
    assert along(2) == sum(whole)
    assert 0 <= along(8) - 4 * (parameters - sum(whole)) < 100
    # the compiled program holds to it, and to the pieces
    program = step.lower(state, batch, key).compile()
    compiled = cost.collectives(program.as_text(), 8)
    assert [c.times for c in compiled if c.kind == "reduce-scatter"] == [2] * len(scattered)
    counted = cost.shard_bytes((state, batch, key, step.fixed))
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(counted, rel=1e-3)
    assert counted == pytest.approx(sum(whole) + 4 * (parameters - sum(whole)), rel=0.1)


@pytest.mark.slow
def test_few_blocks_are_whole_at_once():
    """Where barriers order operations, as on GPUs, a step holds less beside its arguments than all parameters."""
    net = make_dit(width=64, depth=8, heads=4, patch=4, time_features=32, remat=True)
    init = lambda key: {"net": net.init(key, jnp.zeros((1, *IMAGE)), jnp.zeros(()))}
    objective = regression(PATH, net.apply, target="velocity", data_key="x0")
    entries, mesh = {"net": Player(objective, optax.sgd(0.1))}, make_mesh(data=1, fsdp=8)
    state = abstract_state(entries, init, mesh, (), MIN_BYTES)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(entries, mesh, layout, parallel="fsdp", accumulate=2)
    key = jax.device_put(jax.random.key(7), replicated(mesh))
    lowered = step.lower(state, put_batch(images(0), mesh), key)
    # XLA for CPU takes barriers out before it orders operations
    program = lowered.compile(compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"})
    held, block = program.memory_analysis().temp_size_in_bytes, 4 * 18 * 64**2
    whole = sum(cost.nbytes(x) for x in jax.tree.leaves(state.params))
    assert whole > 8 * block
    # two blocks of parameters, two of gradients and one in the making; gradients' pieces before and after a microbatch
    assert held < 5 * block + 2 * whole / 8 + 0.1 * whole < whole
    gathers = [c for c in cost.collectives(program.as_text(), 8) if c.kind == "all-gather"]
    assert sum(c.bytes >= block for c in gathers) == 2 * 8


@pytest.mark.slow
def test_tensor_beside_fsdp(default):
    agrees(train(make_mesh(data=2, fsdp=2, tensor=2), parallel="fsdp", rules=TENSOR_RULES["dit"]), default)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [({"data": 8}, {}), ({"data": 2, "fsdp": 4}, {"parallel": "fsdp"}), ({"data": 2, "fsdp": 2, "tensor": 2}, {})],
    ids=["whole", "fsdp", "jit"],
)
def test_explicit_axis_types(sizes, settings):
    """Every route gives on a mesh of Explicit axes what it gives on one of Auto axes, and keeps the layout."""
    rules = ((r"inner/kernel$", (None, "tensor")), (r"outer/kernel$", ("tensor", None)))
    entries, out = {"net": player()}, {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = make_mesh(**sizes, axis_type=kind)
        state = create_state(entries, init, jax.random.key(0), mesh, rules, 256)
        layout = state_shardings(state, mesh, rules, 256)
        step = make_step(entries, mesh, layout, accumulate=2, **settings)
        losses, state, _ = run(step, state, mesh, 5)
        kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, layout)
        assert jax.tree.all(kept)
        out[kind] = losses, state
    assert np.abs(out[AxisType.Explicit][0] / out[AxisType.Auto][0] - 1).max() < 1e-6
    assert largest_difference(out[AxisType.Explicit][1].params, out[AxisType.Auto][1].params) < 1e-6


def test_losses_may_look_at_players_averages_and_a_teacher():
    """What a loss reads beside its own parameters reaches it whole."""

    def curious(params, batch, keys, ctx):
        value, metrics = loss(params, batch, keys, ctx)
        pull = lambda other: sum(
            jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other))
        )
        return value + pull(ctx.ema["net"]) + pull(ctx.players["net"]) + 0.1 * pull(ctx.teacher), metrics

    entries = {"net": player(loss=curious, optimiser=optimiser("sgd", learning_rate=1e-2))}
    mesh, out = make_mesh(data=2, fsdp=4), {}
    for parallel in ("jit", "fsdp"):
        state = create_state(entries, init, jax.random.key(0), mesh, (), 256)
        layout = state_shardings(state, mesh, (), 256)
        step = make_step(entries, mesh, layout, parallel=parallel, teacher=init(jax.random.key(5))["net"])
        for s in range(2):
            state, metrics = step(
                state, put_batch(batch_at(s), mesh), jax.device_put(jax.random.key(7), replicated(mesh))
            )
        out[parallel] = float(metrics["net"]["loss"]), host(state.params)
    assert out["fsdp"][0] == pytest.approx(out["jit"][0], rel=1e-6)
    assert largest_difference(out["fsdp"][1], out["jit"][1]) < 1e-6


def test_what_cannot_be_gathered_is_refused():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for spec in ((("fsdp", "tensor"),), ("data",)):
        with pytest.raises(ValueError, match=r"fsdp_mode='explicit': params/final/kernel is split as"):
            step, *rest = prepare(mesh, rules=((r"final/kernel", spec),), parallel="fsdp")
            step.lower(*rest)
