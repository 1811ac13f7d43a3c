"""What only a GPU or TPU can show: it agrees with the CPU, computes in bfloat16, donates, and its memory does not grow.

    make test-accelerator                       # on a machine with an accelerator
    JAXDIFF_ACCELERATOR=cpu pytest -m accelerator tests/test_accelerator.py      # the tests themselves, on CPU devices

Forced on a CPU, its last device plays the accelerator, and the comparisons are between two CPU devices.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.train import Player, averages, create_state, make_mesh, make_step, optimiser, put_batch

FORCED = os.environ.get("JAXDIFF_ACCELERATOR") == "cpu"
# the platform is only looked at when these tests are selected: asking starts the backend
pytestmark = pytest.mark.accelerator

BATCH, IMAGE = 16, (8, 8, 1)
PATH = jd.process.linear()


@pytest.fixture(scope="module")
def cpu():
    return jax.devices("cpu")[0]


@pytest.fixture(scope="module")
def accelerator():
    if FORCED:
        return jax.devices("cpu")[-1]
    if jax.default_backend() == "cpu":
        pytest.skip("no accelerator here (JAXDIFF_ACCELERATOR=cpu runs these on CPU devices)")
    return jax.devices()[0]


def relative_rms(a, b):
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


def network(**options):
    return jd.network.DiT(width=64, depth=1, heads=2, patch=2, num_classes=10, **options)


def initial(net):
    """Parameters on the CPU; the zero-initialised parts get noise, or the network would be zero."""
    params = net.init(jax.random.key(0), jnp.zeros((1, *IMAGE)), jnp.zeros(()), jnp.zeros((1,), jnp.int32))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([v + 0.05 * jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves)])


def draw(device, table, net, params):
    """A guided batch of samples computed on ``device``."""
    with jax.default_device(device):
        params, key, label = jax.device_put((params, jax.random.key(3), jnp.arange(BATCH) % 10), device)
        d = jd.prediction.denoiser(PATH, net.apply, params, target="velocity")
        d = jd.guidance.cfg(d, 1.5, cond=label, null=jnp.int32(10))
        x = jd.solver.sample(table, d, key, (BATCH, *IMAGE))
    assert x.devices() == {device}
    return np.asarray(x)


@pytest.mark.parametrize("maker", ["dpm_solver_pp", "ancestral"])
def test_samples_equal_the_cpu_s(accelerator, cpu, maker):
    """In full float32 (accelerators round the operands of matrix products by default); the bound is the CPU's own
    between compiled shapes, times ten."""
    net = network()
    params = initial(net)
    table = jd.solver.SOLVERS[maker](PATH, jd.solver.grid.uniform(PATH, 10))
    with jax.default_matmul_precision("highest"):
        found, expected = draw(accelerator, table, net, params), draw(cpu, table, net, params)
    assert np.isfinite(expected).all() and np.std(expected) > 0.1
    assert relative_rms(found, expected) < 1e-4


def test_noise_bits_equal_the_cpu_s(accelerator, cpu):
    bits = []
    for device in (accelerator, cpu):
        with jax.default_device(device):
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(64))
            bits.append(np.asarray(jax.vmap(lambda k: jax.random.bits(k, (32,)))(keys)))
    np.testing.assert_array_equal(*bits)


def test_bfloat16_network_is_finite_and_near_float32(accelerator):
    """States and solver stay float32, so what remains is the rounding of the network: some 2^-8 of it."""
    net = network(dtype=jnp.bfloat16)
    params = initial(net)
    table = jd.solver.dpm_solver_pp(PATH, jd.solver.grid.uniform(PATH, 20))
    rough, fine = draw(accelerator, table, net, params), draw(accelerator, table, network(), params)
    assert rough.dtype == np.float32 and np.isfinite(rough).all()
    assert 1e-6 < relative_rms(rough, fine) < 0.05


def training(device):
    """State, compiled step, batch and key of a small DiT on one device."""
    net = network()
    loss = jd.objective.regression(
        PATH, net.apply, target="velocity", cond_key="label", label_drop=0.1, null_label=10, data_key="x0"
    )
    game = {"model": Player(loss, optimiser("adam", learning_rate=1e-3, clip=1.0), ema=averages(0.99))}
    mesh = make_mesh(data=1, devices=[device])
    generator = np.random.default_rng(0)
    batch = {
        "x0": generator.normal(size=(BATCH, *IMAGE)).astype(np.float32),
        "label": (np.arange(BATCH) % 10).astype(np.int32),
        "index": np.arange(BATCH, dtype=np.uint32),
    }
    key = jax.device_put(jax.random.key(5), device)
    params = jax.tree.map(np.asarray, initial(net))
    state = create_state(game, {"model": params}, key, mesh)
    return state, make_step(game, mesh), put_batch(batch, mesh), key


def test_losses_equal_the_cpu_s(accelerator, cpu):
    losses = []
    for device in (accelerator, cpu):
        with jax.default_matmul_precision("highest"):
            state, step, batch, key = training(device)
            each = []
            for _ in range(5):
                state, metrics = step(state, batch, key)
                each.append(float(metrics["model"]["loss"]))
        losses.append(each)
    assert np.all(np.diff(losses[1]) != 0)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_train_step_donates_its_state(accelerator):
    state, step, batch, key = training(accelerator)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    aliased = step.lower(state, batch, key).compile().memory_analysis().alias_size_in_bytes
    assert aliased > 0.99 * held, (aliased, held)
    before = jax.tree.leaves(state)
    after, _ = step(state, batch, key)
    jax.block_until_ready(after)
    assert all(leaf.is_deleted() for leaf in before)


def test_memory_does_not_grow(accelerator):
    """Bytes alive after thirty steps and samples are those after three."""
    state, step, batch, key = training(accelerator)
    net = network()
    table = jd.solver.device(jd.solver.dpm_solver_pp(PATH, jd.solver.grid.uniform(PATH, 5)))

    def bytes_alive():
        stats = accelerator.memory_stats() or {}
        arrays = sum(a.nbytes for a in jax.live_arrays() if not a.is_deleted() and accelerator in a.devices())
        return np.array([stats.get("bytes_in_use", 0), arrays])

    seen = {}
    for k in range(1, 31):
        state, _ = step(state, batch, key)
        d = jd.prediction.denoiser(PATH, net.apply, state.ema["model"][0], target="velocity", cond=jnp.int32(3))
        x = jd.solver.sample(table, d, key, (BATCH, *IMAGE))
        jax.block_until_ready((state, x))
        seen[k] = bytes_alive()
    assert seen[3][1] > 0
    # a leak of one batch of samples a step would be 27 of them
    assert np.all(seen[30] - seen[3] < 3 * x.nbytes), (seen[3], seen[30])
