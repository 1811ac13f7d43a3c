"""A denoising MLP on 512 points and its data pipeline: small enough that every test compiles in a second."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.train import Player, averages, make_mesh, optimiser, power, put_batch, replicated

POINTS = np.random.default_rng(0).normal(size=(512, 4)).astype(np.float32)


def init(key):
    first, second = jax.random.split(key)
    return {
        "net": {
            "inner": {"kernel": jax.random.normal(first, (4, 32)) / 2, "bias": jnp.zeros(32)},
            "outer": {"kernel": jax.random.normal(second, (32, 4)) / 6},
        }
    }


def predict(params, x):
    hidden = jnp.tanh(x @ params["inner"]["kernel"] + params["inner"]["bias"])
    return hidden @ params["outer"]["kernel"]


def loss(params, batch, keys, ctx):
    eps = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    each = jnp.sum((predict(params, batch["x0"] + eps) - batch["x0"]) ** 2, axis=-1)
    return each.mean(), {"largest_possible": 2 * each.mean()}


def player(**changes):
    settings = {
        "loss": loss,
        "optimiser": optimiser("adam", learning_rate=1e-2, clip=1.0),
        "ema": averages((0.99, power(std=0.1))),
    }
    return Player(**{**settings, **changes})


def batch_at(step, size=32):
    position = np.arange(size, dtype=np.int64) + size * step
    return {"x0": POINTS[position % 512], "index": position.astype(np.uint32)}


class Pipeline:
    """Batches as a function of the step; ``poison`` makes the data of one step not finite."""

    batch_size = 32

    def __init__(self, poison=(), end=None):
        self.poison, self.end, self.started = poison, end, []

    def stream(self, start=0, stop=None):
        self.started.append(start)
        for step in range(start, self.end or stop):
            batch = batch_at(step)
            if step in self.poison:
                batch["x0"] = batch["x0"] * np.float32(np.nan)
            yield batch


def devices(count):
    return make_mesh(data=count, devices=jax.devices()[:count])


def run(step, state, mesh, steps, start=0, size=32, change=lambda s, batch: batch):
    """Losses of some steps, and the state after them."""
    key = jax.device_put(jax.random.key(7), replicated(mesh))
    losses = []
    for s in range(start, start + steps):
        state, metrics = step(state, put_batch(change(s, batch_at(s, size)), mesh), key)
        losses.append(float(next(iter(metrics.values()))["loss"]))
    return np.array(losses), state, metrics


def host(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_bitwise(a, b):
    a, b = jax.tree.leaves_with_path(host(a)), jax.tree.leaves(host(b))
    assert len(a) == len(b)
    for (path, left), right in zip(a, b, strict=True):
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), jax.tree_util.keystr(path)


def largest_difference(a, b):
    """Largest difference over leaves, relative to each leaf's largest entry."""
    pairs = zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True)
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)) for x, y in pairs)
