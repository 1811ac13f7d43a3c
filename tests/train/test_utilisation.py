"""What a run says about its own work: model FLOPs, utilisation, norms by block; and that saying it costs no sync."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import Pipeline, batch_at, devices, host, init, player

from jaxdiff.train import Callback, cost, create_state, make_step, train
from jaxdiff.train import loop as loop_module
from jaxdiff.train import metrics as metrics_module
from jaxdiff.train.chips import peak_flops
from jaxdiff.train.step import count_flops

GAME = {"net": player()}
# two matrices of 4 x 32: forward, both gradients, and that of the hidden layer; 2 FLOP a multiply-add, 32 examples
STEP = 5 * 2 * 32 * 4 * 32


def go(steps, mesh, **settings):
    return train(GAME, init, Pipeline(), steps=steps, mesh=mesh, **{"log_every": 10, "save_every": 20, **settings})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_utilisation_is_counted_flops_over_the_peak(accumulate):
    row = go(10, devices(2), accumulate=accumulate, peak_flops=1e9).row
    assert row["flops_per_second"] / row["steps_per_second"] == pytest.approx(STEP, rel=1e-9)
    assert row["mfu"] == pytest.approx(row["flops_per_second"] / 2e9, rel=1e-9)


def test_no_utilisation_of_an_unknown_chip(monkeypatch):
    row = go(10, devices(1)).row
    assert "mfu" not in row and row["flops_per_second"] > 0
    assert peak_flops("cpu", True) is None
    assert peak_flops("NVIDIA H200", True) == 989.4e12 and peak_flops("NVIDIA H200", False) == 494.7e12
    monkeypatch.setattr(loop_module, "known_peak", lambda kind, bf16: {"cpu": 2e9 if bf16 else 1e9}[kind])
    row = go(10, devices(1), compute_dtype=jnp.bfloat16).row
    assert row["mfu"] == pytest.approx(row["flops_per_second"] / 2e9, rel=1e-9)


def test_recomputation_does_not_count():
    sizes = {"a": (5, 7), "b": (7, 9), "c": (9, 1)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}
    x = jax.ShapeDtypeStruct((11, 5), jnp.float32)

    def loss(p, x, wrap=lambda f: f):
        def halves(carry, part):
            y = wrap(lambda p, y: jnp.tanh(jnp.tanh(y @ p["a"]) @ p["b"]))(p, part)
            return carry + jax.jit(lambda y: jnp.sum(y @ p["c"]))(y), None

        return jax.lax.scan(halves, 0.0, jnp.stack([x, x]))[0], {}

    # forward and the weights' gradients of all three, the inputs' gradients of two; in two halves
    hand = 2 * 2 * 11 * (2 * (5 * 7 + 7 * 9 + 9) + 7 * 9 + 9)
    assert cost.gradient_flops(loss, params, x) == hand
    assert cost.gradient_flops(lambda p, x: loss(p, x, jax.checkpoint), params, x) == hand
    plain = lambda p, x: wrapped(p, x, lambda f: f)

    def wrapped(p, x, wrap=jax.checkpoint):
        y = wrap(lambda p, y: jnp.tanh(jnp.tanh(y @ p["a"]) @ p["b"]))(p, x)
        return jax.jit(lambda y: jnp.sum(y @ p["c"]))(y), {}

    assert cost.gradient_flops(wrapped, params, x) == cost.gradient_flops(plain, params, x) == hand // 2
    assert cost.flops(jax.make_jaxpr(jax.grad(lambda p, x: wrapped(p, x)[0]))(params, x)) > hand // 2


def test_players_count_as_often_as_they_move():
    game = {"net": player(), "other": player(period=4)}
    state = jax.eval_shape(
        lambda key: create_state(game, {n: init(key)["net"] for n in game}, key, devices(1)), jax.random.key(0)
    )
    assert count_flops(game, state, batch_at(0)) == 1.25 * STEP


def test_a_loss_that_cannot_be_counted_still_trains(monkeypatch):
    def refuse(*args):
        raise NameError("unbound axis name: data")

    monkeypatch.setattr(loop_module, "count_flops", refuse)
    outcome = go(10, devices(1))
    assert outcome.step == 10 and "flops_per_second" not in outcome.row


def test_norms_by_block_reach_the_log_without_a_sync(monkeypatch):
    """Every fifth step is measured on the device; the host copies at the log interval only, and logs the mean."""
    array = type(jnp.zeros(()))
    value = array._value
    copies, fetched, watched = [], [], {}
    fetch = metrics_module.fetch
    mesh = devices(2)
    # what a step by itself measures
    state, step, norms = (
        create_state(GAME, init, jax.random.split(jax.random.key(0))[0], mesh),
        make_step(GAME, mesh, stats_every=5),
        [],
    )
    for s in range(10):
        noise_key = jax.random.split(jax.random.key(0))[1]
        state, metrics = step(
            state, loop_module.put_batch(batch_at(s), mesh), loop_module.put_replicated(noise_key, mesh)
        )
        own = host(metrics["net"])
        assert own["stats/active"] == (s in (4, 9))
        norms += [own] if own["stats/active"] else []

    monkeypatch.setattr(array, "_value", property(lambda self: (copies.append(1), value.fget(self))[1]))
    monkeypatch.setattr(metrics_module, "fetch", lambda tree: (fetched.append(1), fetch(tree))[1])
    spy = Callback(1, lambda step, state: watched.update({step: len(copies)}))
    row = go(10, mesh, stats_every=5, callbacks=[spy]).row
    assert len(fetched) == 1 and len({watched[step] for step in range(1, 10)}) == 1 < watched[10]
    names = {
        f"stats/{kind}_norm{block}" for kind in ("grad", "param", "update") for block in ("", "/inner", "/outer")
    }
    assert {name for name in row if name.startswith("stats/")} == names
    for name in names:
        assert row[name] == pytest.approx(np.mean([own[name] for own in norms]), rel=1e-6), name
