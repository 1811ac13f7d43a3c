"""Layers split over ``tensor`` by a network's own rules: less work a device, the same numbers, and a table that says so."""

import jax
import pytest
from dit_training import DEPTH, MIN_BYTES, WIDTH, agrees, game, prepare, start, train

from jaxdiff.train import abstract_state, cost, make_mesh, sharding_table
from jaxdiff.train.sharding import TENSOR_RULES

RULES = TENSOR_RULES["dit"]


@pytest.mark.slow
def test_work_is_split():
    """By XLA's count of the compiled step: two devices along tensor halve what is done for every token of a block."""
    flops, held = {}, {}
    tokens, features = 4, 48
    halved = DEPTH * tokens * (12 * WIDTH**2 + 2 * tokens * WIDTH)
    kept = DEPTH * 6 * WIDTH**2 + 2 * tokens * features * WIDTH + 4 * WIDTH**2
    for tensor in (1, 2):
        step, *args = prepare(make_mesh(data=2, tensor=tensor), RULES if tensor > 1 else ())
        program = step.lower(*args).compile()
        flops[tensor] = program.cost_analysis()["flops"]
        held[tensor] = program.memory_analysis().argument_size_in_bytes
    # elementwise work, which XLA counts too, is halved in part
    assert flops[2] / flops[1] == pytest.approx((halved / 2 + kept) / (halved + kept), rel=0.1)
    assert held[2] < 0.75 * held[1]


@pytest.mark.slow
def test_equal_to_whole_layers():
    default = train(make_mesh(data=8))
    agrees(train(make_mesh(data=2, tensor=4), rules=RULES), default)


def test_averages_and_moments_are_split_alike_and_the_table_shows_it():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = abstract_state(game(), start, mesh, RULES, MIN_BYTES)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    table = sharding_table(state.params, layout.params, MIN_BYTES).splitlines()
    row = lambda name: next(line for line in table if f"{name}/kernel" in line)
    assert row("mlp_in").endswith("('fsdp', 'tensor')") and row("mlp_out").endswith("('tensor', 'fsdp')")
    assert row("qkv").endswith("('fsdp', 'tensor')") and row("attention/out").endswith("('tensor', 'fsdp')")
    assert cost.shard_bytes(state.params) < 0.5 * sum(cost.nbytes(x) for x in jax.tree.leaves(state.params))
