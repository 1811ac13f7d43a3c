"""A small DiT to train on eight devices, away from its start where most gradients vanish."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_training import host, largest_difference

import jaxdiff as jd
from jaxdiff.network import make_dit
from jaxdiff.objective import regression
from jaxdiff.train import Player, create_state, make_step, put_batch, replicated, state_shardings

WIDTH, DEPTH, BATCH, IMAGE, MIN_BYTES = 32, 2, 16, (8, 8, 3), 1024
NET = make_dit(width=WIDTH, depth=DEPTH, heads=4, patch=4, num_classes=10, time_features=32, remat=True)
PATH = jd.process.linear()


def start(key):
    """Parameters away from adaLN-zero, where most gradients vanish."""
    variables = NET.init(key, jnp.zeros((1, *IMAGE)), jnp.zeros(()), jnp.zeros((1,), jnp.int32))
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))
    return {"net": treedef.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])}


def images(step):
    rng = np.random.default_rng(step)
    index = np.arange(BATCH, dtype=np.uint32) + BATCH * step
    return {
        "x0": rng.normal(size=(BATCH, *IMAGE)).astype(np.float32),
        "label": index.astype(np.int32) % 10,
        "index": index,
    }


def game():
    objective = regression(PATH, NET.apply, target="velocity", cond_key="label", null_label=10, data_key="x0")
    # the second update is so large that the parameters' change is its gradient, free of their own rounding
    return {"net": Player(objective, optax.sgd(lambda count: jnp.where(count == 0, 0.1, 1e4)))}


def prepare(mesh, rules=(), min_bytes=MIN_BYTES, **settings):
    """(step, state, batch placed, key) on a mesh."""
    state = create_state(game(), start, jax.random.key(0), mesh, rules, min_bytes)
    step = make_step(game(), mesh, state_shardings(state, mesh, rules, min_bytes), **settings)
    return step, state, put_batch(images(0), mesh), jax.device_put(jax.random.key(7), replicated(mesh))


def train(mesh, steps=2, **settings):
    """Losses of two steps, and the parameters' change: the second gradient."""
    step, state, _, key = prepare(mesh, **settings)
    before, losses = host(state.params), []
    for s in range(steps):
        state, metrics = step(state, put_batch(images(s), mesh), key)
        losses.append(float(metrics["net"]["loss"]))
    return np.array(losses), jax.tree.map(np.subtract, host(state.params), before)


def agrees(found, default):
    assert np.abs(found[0] / default[0] - 1).max() < 1e-6
    assert largest_difference(found[1], default[1]) < 1e-6
