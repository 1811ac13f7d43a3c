"""Games of several players: periods, order of moves, private keys, separate refusals."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_training import assert_bitwise, devices, host, run

from jaxdiff.train import Player, averages, create_state, make_step, optimiser


def chase(params, batch, keys, ctx):
    """Move towards the runner's current position."""
    draw = jax.vmap(jax.random.uniform)(keys).mean()
    return (params["x"] - ctx.players["runner"]["x"]) ** 2, {"seen": ctx.players["runner"]["x"], "draw": draw}


def flee(params, batch, keys, ctx):
    """Move with constant speed; not finite where the data are not."""
    draw = jax.vmap(jax.random.uniform)(keys).mean()
    return -params["x"] + 0.0 * batch["x0"].mean(), {"draw": draw}


def make(runner_period=1, chaser_period=1, order=("runner", "chaser")):
    players = {
        "runner": Player(flee, optimiser("sgd", learning_rate=1.0), period=runner_period),
        "chaser": Player(chase, optimiser("sgd", learning_rate=0.5), period=chaser_period, ema=averages(0.5)),
    }
    return {name: players[name] for name in order}


def start(game, mesh):
    params = {name: {"x": jnp.zeros(())} for name in game}
    return create_state(game, params, jax.random.key(0), mesh)


def test_moves_are_made_in_turn_and_seen():
    mesh = devices(2)
    for order, seen in ((("runner", "chaser"), 1.0), (("chaser", "runner"), 0.0)):
        game = make(order=order)
        _, state, metrics = run(make_step(game, mesh), start(game, mesh), mesh, 1)
        assert float(metrics["chaser"]["seen"]) == seen
        assert float(state.params["runner"]["x"]) == 1.0  # slope -1, rate 1
        assert float(state.params["chaser"]["x"]) == seen  # rate 1/2 on a square: all the way


def test_players_move_at_their_period_and_rest_bitwise():
    mesh = devices(2)
    game = make(runner_period=3, chaser_period=2)
    step, state = make_step(game, mesh), start(game, mesh)
    moved = {name: [] for name in game}
    shapes = set()
    for s in range(7):
        before = host(state)
        _, state, metrics = run(step, state, mesh, 1, start=s)
        shapes.add(str(jax.tree.map(lambda x: (x.shape, x.dtype), metrics)))
        for name in game:
            active = int(metrics[name]["active"])
            moved[name].append(active)
            if not active:
                assert float(metrics[name]["loss"]) == 0.0
                for field in ("params", "opt", "ema"):
                    assert_bitwise(getattr(before, field)[name], getattr(state, field)[name])
    assert moved == {"runner": [1, 0, 0, 1, 0, 0, 1], "chaser": [1, 0, 1, 0, 1, 0, 1]}
    assert len(shapes) == 1
    assert float(state.params["runner"]["x"]) == 3.0 and int(state.step) == 7


def test_players_draw_their_own_keys():
    mesh = devices(1)
    game = make()
    _, _, metrics = run(make_step(game, mesh), start(game, mesh), mesh, 1)
    assert abs(float(metrics["runner"]["draw"]) - float(metrics["chaser"]["draw"])) > 1e-3


def test_one_player_is_refused_alone():
    mesh = devices(2)
    game = make()
    poison = lambda s, batch: {**batch, "x0": batch["x0"] * np.float32(np.nan)}
    _, state, _ = run(make_step(game, mesh), start(game, mesh), mesh, 2, change=poison)
    assert {name: int(count) for name, count in state.skipped.items()} == {"runner": 2, "chaser": 0}
    assert float(state.params["runner"]["x"]) == 0.0
