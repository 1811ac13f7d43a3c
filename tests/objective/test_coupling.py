"""Pairings: permutations inside groups, optimal ones, and the law of noise given the condition."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxdiff.objective import minibatch_ot
from jaxdiff.objective.coupling import COUPLINGS, pairing_cost, sinkhorn_plan

KEYS = jax.random.split(jax.random.key(0), 64)
X0 = jax.random.normal(jax.random.key(1), (64, 2, 3)) * 1.5 + 0.4
NOISE = jax.random.normal(jax.random.key(2), (64, 2, 3))
needs_ott = pytest.mark.skipif(importlib.util.find_spec("ott") is None, reason="needs ott-jax: the extra `ot`")
energy = lambda a, b: float(jnp.mean(jnp.sum((a - b) ** 2, (1, 2)) if a.ndim > 2 else (a - b) ** 2))


def test_group_of_one_is_independent_bitwise():
    assert minibatch_ot(1)(KEYS, X0, NOISE, None) is NOISE
    assert COUPLINGS["independent"]()(KEYS, X0, NOISE, None) is NOISE


def test_exact_pairing_is_an_optimal_permutation_of_each_group():
    paired = jax.jit(minibatch_ot(16))(KEYS, X0, NOISE, None)
    for g in range(4):
        rows = slice(16 * g, 16 * g + 16)
        x, n, p = (np.asarray(v[rows], np.float64).reshape(16, -1) for v in (X0, NOISE, paired))
        cost = ((x[:, None] - n[None]) ** 2).sum(-1)
        i, j = scipy.optimize.linear_sum_assignment(cost)
        used = [int(np.flatnonzero((n == row).all(1))[0]) for row in p]
        assert sorted(used) == list(range(16))
        np.testing.assert_allclose(cost[np.arange(16), used].sum(), cost[i, j].sum(), rtol=1e-6)
    alone = minibatch_ot(16)(KEYS[16:32], X0[16:32], NOISE[16:32], None)  # a group does not see the others
    np.testing.assert_array_equal(alone, paired[16:32])


def test_energy_falls_as_the_order_statistics_say():
    """x0 ~ N(0, 4), n ~ N(0, 1) in 1-D: pairing sorts both, so ``E x0 n = 2 mean_i m_i^2``, m the expected order
    statistics of a group of standard normals; from 0 for one row towards 2, the transport plan's, for many."""
    size = 8192
    x0 = 2 * jax.random.normal(jax.random.key(3), (size, 1))
    noise = jax.random.normal(jax.random.key(4), (size, 1))
    keys = jax.random.split(jax.random.key(5), size)
    found = {}
    for g in (2, 32):
        order = np.sort(np.random.default_rng(0).normal(size=(40_000, g)), 1).mean(0)
        found[g] = float(jnp.mean(x0 * minibatch_ot(g)(keys, x0, noise, None)))
        np.testing.assert_allclose(found[g], 2 * np.mean(order**2), atol=4 * np.sqrt(8 / size))
    assert abs(found[2] - 2 / np.pi) < 0.13 and found[32] > 1.8
    assert float(jnp.mean(x0 * minibatch_ot(32, method="sinkhorn")(keys, x0, noise, None))) > 0.95 * found[32]


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
def test_pairing_by_class_keeps_noise_independent_of_the_condition(method):
    """Clusters at -2 and 2, class = cluster: pairing across classes gives E[n | c] = c mu, by class 0."""
    count = 2048
    cond = jax.random.bernoulli(jax.random.key(6), 0.5, (count,)).astype(int)
    x0 = (4.0 * cond - 2)[:, None] + 0.3 * jax.random.normal(jax.random.key(7), (count, 1))
    noise = jax.random.normal(jax.random.key(8), (count, 1))
    keys = jax.random.split(jax.random.key(9), count)
    mean = lambda n: np.array([float(jnp.mean(n[cond == k])) for k in (0, 1)])
    across = minibatch_ot(16, method=method, per_class=False)(keys, x0, noise, cond)
    within = minibatch_ot(16, method=method)(keys, x0, noise, cond)
    assert mean(across)[0] < -0.5 and mean(across)[1] > 0.5  # negative control
    assert np.all(np.abs(mean(within)) < 4 * np.sqrt(2 / count)), mean(within)
    assert energy(x0, within) < energy(x0, noise) - 0.1
    origin = jnp.argmin(jnp.abs(within - noise[:, 0]), 1)  # each noise came from an example of the same class
    np.testing.assert_array_equal(cond[origin], cond)
    if method == "sinkhorn":  # a plan this blurred gives every noise to every example, but for the class
        blurred = minibatch_ot(16, method=method, epsilon=1e4)(keys, x0, noise, cond)
        origin = jnp.argmin(jnp.abs(blurred - noise[:, 0]), 1)
        np.testing.assert_array_equal(cond[origin], cond)


def test_sinkhorn_plan_has_uniform_marginals_and_the_entropic_optimum():
    cost = pairing_cost(X0[:8], NOISE[:8])
    plan = jnp.exp(sinkhorn_plan(cost, 0.5, 400))
    np.testing.assert_allclose(plan.sum(1), np.full(8, 1 / 8), rtol=1e-5)
    np.testing.assert_allclose(plan.sum(0), np.full(8, 1 / 8), rtol=1e-4)
    # optimality: log P + cost/eps is a sum of a row and a column function
    residue = np.log(np.asarray(plan, np.float64)) + np.asarray(cost) / 0.5
    residue = residue - residue.mean(0) - residue.mean(1, keepdims=True) + residue.mean()
    assert np.max(np.abs(residue)) < 1e-3
    wide = jnp.exp(sinkhorn_plan(cost, 1e6, 10))
    np.testing.assert_allclose(wide, np.full((8, 8), 1 / 64), rtol=1e-4)


def test_without_ott_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ott", None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxdiff\[ot\]") as caught:
        minibatch_ot(8, method="ott")
    assert "\n" not in str(caught.value)


@needs_ott
def test_ott_plan_is_the_sinkhorn_plan_and_tends_to_the_assignment():
    from jaxdiff.objective.coupling import _ott_plan

    cost = pairing_cost(X0[:16], NOISE[:16])
    i, j = scipy.optimize.linear_sum_assignment(cost)
    best = np.asarray(cost, np.float64)[i, j].mean()
    plans = jax.jit(lambda eps: (_ott_plan(cost, eps, 4000), sinkhorn_plan(cost, eps, 4000)))
    found = {}
    for fraction in (0.5, 0.02):
        ours, theirs = (np.exp(np.asarray(p, np.float64)) for p in plans(fraction * jnp.std(cost)))
        np.testing.assert_allclose(theirs, ours, atol=1e-5 / 16)
        np.testing.assert_allclose(theirs.sum(0), np.full(16, 1 / 16), rtol=1e-3)
        found[fraction] = (theirs * np.asarray(cost, np.float64)).sum() / best
    assert abs(found[0.02] - 1) < 0.01 and abs(found[0.5] - 1) > 0.1  # the regularised plan is another one
    np.testing.assert_array_equal(np.argmax(theirs, 1), j)


@needs_ott
def test_ott_coupling_pairs_inside_classes():
    """With labels that split each group in two, every row takes a noise of its own class, near the assignment's cost."""
    cond = jnp.arange(64) % 2
    paired = jax.jit(minibatch_ot(16, method="ott", epsilon=0.02, iterations=1000))(KEYS, X0, NOISE, cond)
    exact = minibatch_ot(16)(KEYS, X0, NOISE, cond)
    origin = [int(np.flatnonzero((np.asarray(NOISE) == row).all((1, 2)))[0]) for row in np.asarray(paired)]
    np.testing.assert_array_equal(cond[np.array(origin)], cond)
    np.testing.assert_array_equal(np.array(origin) // 16, np.arange(64) // 16)
    # rows are drawn one by one and may share noise, so the cost agrees up to that
    assert abs(energy(X0, paired) / energy(X0, exact) - 1) < 0.03 < energy(X0, NOISE) / energy(X0, exact) - 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: minibatch_ot(0), "group: 0 given"),
        (lambda: minibatch_ot(4, method="sinkhron"), "method: 'sinkhron' .*'sinkhorn'"),
        (lambda: minibatch_ot(4, method="sinkhorn", epsilon=0), "epsilon, iterations: 0, 100"),
        (lambda: minibatch_ot(5)(KEYS, X0, NOISE, None), r"group: 5 given; it must divide the batch \(here 64"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
