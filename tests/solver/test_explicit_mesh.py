"""Sampling on a mesh of Explicit axes: what a mesh of Auto axes gives, laid out as asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdiff as jd

PATH = jd.process.linear()
WEIGHT = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)


def draw(kind, weight, placed, record=()):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(kind,) * 2)
    batch, key, labels = NamedSharding(mesh, P(("data", "fsdp"))), jax.random.key(3), np.arange(8, dtype=np.float32)
    if placed:
        weight, key = jax.device_put((weight, key), NamedSharding(mesh, P()))
        labels = jax.device_put(labels, batch)
    net = lambda w, x, t, cond: jnp.tanh(x @ w) + 0.1 * cond[:, None] * jnp.sign(jnp.abs(w).sum())
    d = jd.prediction.denoiser(PATH, net, weight, target="velocity", cond=labels)
    table = jd.solver.dpm_solver_pp_sde(PATH, jd.solver.grid.uniform(PATH, 4))
    return jd.solver.sample(table, d, key, (8, 6), sharding=batch, record=record), batch


@pytest.mark.parametrize("placed", [True, False])
def test_the_same_samples(placed):
    """Bitwise where the network gives zero, so that samples are sums of noise; to 1e-5 where it does not."""
    for weight, tolerance in ((np.zeros_like(WEIGHT), 0), (WEIGHT, 1e-5)):
        wanted, _ = draw(AxisType.Auto, weight, True)
        found, batch = draw(AxisType.Explicit, weight, placed)
        assert found.sharding.is_equivalent_to(batch, found.ndim)
        assert np.ptp(found) > 1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


def test_records_are_laid_out_alike():
    (found, history), batch = draw(AxisType.Explicit, WEIGHT, True, ("states",))
    wanted, _ = draw(AxisType.Explicit, WEIGHT, True)
    states = history["states"]
    assert states.sharding.is_equivalent_to(NamedSharding(batch.mesh, P(None, *batch.spec)), 3)
    assert np.array_equal(states[-1], found) and np.array_equal(found, wanted)
