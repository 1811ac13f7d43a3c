"""The train step: equal on every device count, exact accumulation, donation, refused updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_training import (
    assert_bitwise,
    batch_at,
    devices,
    host,
    init,
    largest_difference,
    loss,
    player,
    run,
)

from jaxdiff.train import (
    abstract_state,
    create_state,
    example_keys,
    make_mesh,
    make_step,
    optimiser,
    put_batch,
    replicated,
    schedule,
    state_shardings,
)
from jaxdiff.train import step as step_module

GAME = {"net": player()}
SPLIT_RULES = ((r"inner/kernel$", (None, "tensor")), (r"outer/kernel$", ("tensor", None)))


def train(mesh, steps, *, game=None, rules=(), min_bytes=2**22, **settings):
    game = game or GAME
    state = create_state(game, init, jax.random.key(0), mesh, rules, min_bytes)
    layout = state_shardings(state, mesh, rules, min_bytes)
    step = make_step(game, mesh, layout, **settings)
    return run(step, state, mesh, steps)


@pytest.fixture(scope="module")
def one_device():
    return train(devices(1), 50)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_losses_equal_on_every_device_count(count, one_device):
    losses, state, _ = train(devices(count), 50)
    assert np.abs(losses / one_device[0] - 1).max() < 1e-6
    # the mean gradient really is over the whole batch: parameters agree too, up to Adam's early divisions
    assert largest_difference(state.params, one_device[1].params) < 1e-4


def test_equal_counts_are_bitwise(one_device):
    losses, state, _ = train(devices(1), 50)
    assert losses.tobytes() == one_device[0].tobytes()
    assert_bitwise(state, one_device[1])


def test_device_equality_would_fail_with_keys_by_position_in_the_shard():
    """Negative control: keys that forget the global index give other losses on other device counts."""

    def forgetful(params, batch, keys, ctx):
        keys = jax.vmap(jax.random.key)(jnp.arange(batch["x0"].shape[0]))
        return loss(params, batch, keys, ctx)

    game = {"net": player(loss=forgetful)}
    one, _, _ = train(devices(1), 2, game=game)
    two, _, _ = train(devices(2), 2, game=game)
    assert np.abs(two / one - 1).max() > 1e-3


@pytest.mark.parametrize("parallel", ["shard_map", "jit"])
def test_accumulation_equals_one_large_batch(parallel, one_device):
    losses, state, _ = train(devices(2), 10, accumulate=4, parallel=parallel)
    assert np.abs(losses / one_device[0][:10] - 1).max() < 1e-6
    single, whole, _ = train(devices(2), 10, parallel=parallel)
    assert np.abs(losses / single - 1).max() < 1e-6
    assert largest_difference(state.params, whole.params) < 1e-5


def test_gradient_of_accumulation_is_the_large_batch_gradient():
    """With plain gradient descent the first update is the gradient itself: equal to 1e-6."""
    game = {"net": player(optimiser=optimiser("sgd", learning_rate=1.0), ema=())}
    _, whole, _ = train(devices(1), 1, game=game)
    _, parts, _ = train(devices(2), 1, game=game, accumulate=4)
    assert largest_difference(parts.params, whole.params) < 1e-6


def test_split_parameters_equal_whole_ones(one_device):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    losses, state, _ = train(mesh, 20, rules=SPLIT_RULES, min_bytes=256, accumulate=2)
    assert np.abs(losses / one_device[0][:20] - 1).max() < 1e-6
    kernel = state.params["net"]["inner"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 16)
    moments = [x for x in jax.tree.leaves(state.opt) if x.shape == (4, 32)]
    averages = [tree["inner"]["kernel"] for tree in state.ema["net"]]
    assert len(moments) == 2 and len(averages) == 2
    assert {x.sharding.spec for x in moments + averages} == {kernel.sharding.spec}


def test_one_reduction_after_the_scan():
    mesh = devices(8)
    step = make_step(GAME, mesh, accumulate=4)
    state = create_state(GAME, init, jax.random.key(0), mesh)
    text = step.lower(state, put_batch(batch_at(0), mesh), jax.random.key(0)).compile().as_text()
    reductions = [line for line in text.splitlines() if " all-reduce(" in line]
    assert len(reductions) == 1
    entry = text[text.index("\nENTRY ") :]
    assert reductions[0] in entry  # not in the body of the scan


@pytest.mark.parametrize("count", [1, 2])
def test_one_device_alone_reduces_nothing(count):
    def where(params, batch, keys, ctx):  # a loss may ask which device it is on, on one device too
        value, metrics = loss(params, batch, keys, ctx)
        return value, {**metrics, "device": jnp.float32(jax.lax.axis_index("data"))}

    mesh, game = devices(count), {"net": player(loss=where)}
    step = make_step(game, mesh)
    state = abstract_state(game, init, mesh)
    text = step.lower(state, put_batch(batch_at(0), mesh), jax.random.key(0)).as_text()
    assert ("stablehlo.all_reduce" in text) == (count > 1)


def test_state_is_donated_and_shares_no_memory():
    mesh = devices(2)
    state = create_state(GAME, init, jax.random.key(0), mesh)
    buffers = [
        shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards
    ]
    assert len(set(buffers)) == len(buffers)
    assert_bitwise(state.params["net"], state.ema["net"][0])
    # a state of which no host copy was taken: jax 0.11 keeps arrays that numpy still looks into
    state = create_state(GAME, init, jax.random.key(0), mesh)
    old = jax.tree.leaves(state)
    run(make_step(GAME, mesh), state, mesh, 1)
    assert all(leaf.is_deleted() for leaf in old)


def test_given_parameters_are_copied():
    given = init(jax.random.key(3))
    mesh = devices(1)
    state = create_state(GAME, given, jax.random.key(0), mesh)
    run(make_step(GAME, mesh), state, mesh, 1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize("branches", [True, False])  # as on CPU, as on accelerators
def test_refused_update_changes_nothing_and_is_counted(branches, monkeypatch):
    monkeypatch.setattr(step_module, "_branches", lambda mesh: branches)
    mesh = devices(2)
    state = create_state(GAME, init, jax.random.key(0), mesh)
    step = make_step(GAME, mesh)

    def poison(s, batch):
        return {**batch, "x0": batch["x0"] * np.float32(np.nan)} if s in (3, 4) else batch

    _, state, _ = run(step, state, mesh, 3, change=poison)
    before = host(state)
    losses, state, metrics = run(step, state, mesh, 2, start=3, change=poison)
    assert np.isnan(losses).all()
    for field in ("params", "opt", "ema"):
        assert_bitwise(getattr(before, field), getattr(state, field))
    assert int(state.step) == 5 and int(state.skipped["net"]) == 2
    assert int(state.skipped_in_a_row["net"]) == 2 and int(metrics["net"]["skipped"]) == 1
    losses, state, _ = run(step, state, mesh, 1, start=5, change=poison)
    assert np.isfinite(losses).all() and int(state.skipped_in_a_row["net"]) == 0
    assert int(state.skipped["net"]) == 2
    assert largest_difference(state.params, before.params) > 1e-4


def test_infinite_gradient_of_a_finite_loss_is_refused():
    def kinked(params, batch, keys, ctx):
        # sqrt has an infinite slope at 0; the loss itself is finite
        return jnp.sqrt(jnp.sum(params["outer"]["kernel"] * 0.0)) + batch["x0"].mean(), {}

    game = {"net": player(loss=kinked)}
    mesh = devices(1)
    state = create_state(game, init, jax.random.key(0), mesh)
    before = host(state.params)
    losses, state, _ = run(make_step(game, mesh), state, mesh, 1)
    assert np.isfinite(losses).all() and int(state.skipped["net"]) == 1
    assert_bitwise(before, state.params)


def test_keys_are_step_then_global_index():
    def reveal(params, batch, keys, ctx):
        draw = jax.vmap(jax.random.uniform)(keys)
        return loss(params, batch, keys, ctx)[0], {"draw": draw.mean(), "step": ctx.step}

    game = {"net": player(loss=reveal)}
    mesh = devices(4)
    state = create_state(game, init, jax.random.key(0), mesh)
    _, _, metrics = run(make_step(game, mesh), state, mesh, 3)
    index = batch_at(2)["index"]
    keys = example_keys(jax.random.fold_in(jax.random.key(7), 2), index)
    wanted = np.mean([float(jax.random.uniform(key)) for key in keys])
    assert abs(float(metrics["net"]["draw"]) - wanted) < 1e-6
    by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 2), int(index[5]))
    assert jax.random.key_data(keys[5]).tolist() == jax.random.key_data(by_hand).tolist()
    assert float(metrics["net"]["step"]) == 2


def test_bfloat16_is_seen_by_losses_only():
    seen = []

    def note(params, batch, keys, ctx):
        trees = (params, ctx.players, ctx.ema, ctx.teacher)
        seen.append({leaf.dtype for leaf in jax.tree.leaves(trees)})
        return loss(params, batch, keys, ctx)

    game = {"net": player(loss=note)}
    mesh = devices(2)
    state = create_state(game, init, jax.random.key(0), mesh)
    step = make_step(game, mesh, compute_dtype=jnp.bfloat16, teacher={"w": np.ones(3, np.float32)}, accumulate=2)
    losses, state, metrics = run(step, state, mesh, 10)
    assert all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in seen) and seen
    masters = {x.dtype for x in jax.tree.leaves((state.params, state.ema))}
    assert masters == {jnp.dtype(jnp.float32)} and metrics["net"]["loss"].dtype == jnp.float32
    whole, _, _ = train(devices(1), 10)
    assert 1e-5 < np.abs(losses / whole - 1).max() < 2e-2  # bf16 rounding shows, and no more


def test_norms_are_measured_when_due():
    rate = schedule("constant", peak=1e-2, warmup=10)
    game = {"net": player(schedule=rate)}
    mesh = devices(1)
    state = create_state(game, init, jax.random.key(0), mesh)
    step = make_step(game, mesh, stats_every=2)
    _, state, metrics = run(step, state, mesh, 1)
    assert int(metrics["net"]["stats/active"]) == 0 and float(metrics["net"]["stats/param_norm"]) == 0
    assert float(metrics["net"]["learning_rate"]) == pytest.approx(1e-3)
    before = host(state.params["net"])
    _, state, metrics = run(step, state, mesh, 1, start=1)
    own = metrics["net"]
    norm = lambda tree: np.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in jax.tree.leaves(tree)))
    assert int(own["stats/active"]) == 1
    assert float(own["stats/param_norm"]) == pytest.approx(norm(before), rel=1e-6)
    assert float(own["stats/param_norm/inner"]) == pytest.approx(norm(before["inner"]), rel=1e-6)
    assert float(own["stats/grad_norm"]) == pytest.approx(float(own["grad_norm"]), rel=1e-6)
    moved = jax.tree.map(np.subtract, host(state.params["net"]), before)
    assert float(own["stats/update_norm"]) == pytest.approx(norm(moved), rel=1e-4)


def test_bad_input_is_refused_before_compiling():
    mesh = devices(8)
    state = abstract_state(GAME, init, mesh)
    step = make_step(GAME, mesh)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"batch size 32 is not divisible by 96 .*accumulate = 12"):
        make_step(GAME, mesh, accumulate=12).lower(state, put_batch(batch_at(0), mesh), key)
    with pytest.raises(ValueError, match=r"batch size 12 is not divisible by 8"):
        put_batch(batch_at(0, 12), mesh)
    with pytest.raises(ValueError, match=r"batch needs 'index'.*\['x0'\]"):
        step.lower(state, {"x0": batch_at(0)["x0"]}, key)
    with pytest.raises(ValueError, match="same leading axis"):
        put_batch({"x0": np.zeros((8, 2)), "index": np.arange(16)}, mesh)
    with pytest.raises(ValueError, match="2\\^32"):
        put_batch({"index": np.arange(8) + 2**32}, mesh)
    with pytest.raises(ValueError, match=r"parallel='shardmap'.*did you mean 'shard_map'"):
        make_step(GAME, mesh, parallel="shardmap")
    with pytest.raises(ValueError, match="accumulate=0"):
        make_step(GAME, mesh, accumulate=0)
    with pytest.raises(ValueError, match=r"game\['net'\].period=0"):
        make_step({"net": player(period=0)}, mesh)
    with pytest.raises(ValueError, match="at least one player"):
        make_step({}, mesh)
    with pytest.raises(ValueError, match="game: list given; need a dict of players"):
        make_step([player()], mesh)
    with pytest.raises(ValueError, match=r"game\['net'\].ema=.*averages"):
        make_step({"net": player(ema=0.999)}, mesh)
    split = state_shardings(state, make_mesh(data=4, fsdp=2), (), 256)
    with pytest.raises(ValueError, match="use 'jit'"):
        make_step(GAME, mesh, split, parallel="shard_map")
    with pytest.raises(ValueError, match=r"keyed by player \['net'\], got \['other'\]"):
        create_state(GAME, {"other": {}}, key, mesh)


def test_teacher_is_placed_once():
    """Frozen arrays are put on the mesh when the step is built, so that steps transfer nothing."""

    def towards(params, batch, keys, ctx):
        return jnp.mean((params["outer"]["kernel"] - ctx.teacher["kernel"]) ** 2), {}

    game = {"net": player(loss=towards)}
    mesh = devices(4)
    teacher = {"kernel": np.full((32, 4), 0.5, np.float32)}
    step = make_step(game, mesh, teacher=teacher)
    assert step.fixed[0]["kernel"].sharding == replicated(mesh)
    state = create_state(game, init, jax.random.key(0), mesh)
    key = jax.device_put(jax.random.key(7), replicated(mesh))
    batch = put_batch(batch_at(0), mesh)
    with jax.transfer_guard("disallow"):
        state, metrics = step(state, batch, key)
    start = host(create_state(game, init, jax.random.key(0), mesh).params["net"]["outer"]["kernel"])
    assert float(metrics["net"]["loss"]) == pytest.approx(np.mean((start - 0.5) ** 2), rel=1e-6)
