"""Optimisers and schedules by name: one update against its formula, and one-line errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.train import OPTIMISERS, SCHEDULES, optimiser, schedule

PARAMS = {"kernel": np.array([[2.0, 0.0], [0.0, -1.0]], np.float32), "bias": np.array([1.0, 2.0], np.float32)}
GRADS = {"kernel": np.array([[3.0, 0.0], [0.0, 4.0]], np.float32), "bias": np.array([0.0, -12.0], np.float32)}


def first_update(name, **options):
    rule = optimiser(name, **options)
    return rule.update(GRADS, rule.init(PARAMS), PARAMS)[0]


def sign(tree):
    return jax.tree.map(np.sign, tree)


# name, options, the first update by formula (bias-corrected Adam's first step is the sign of the gradient)
FIRST = {
    "adam": ({"eps": 0.0, "b1": 0.5}, lambda g, p: -0.1 * np.nan_to_num(np.sign(g))),
    "adamw": ({"weight_decay": 0.5}, lambda g, p: -0.1 * (np.sign(g) + (0.5 * p if p.ndim == 2 else 0))),
    "lion": ({"weight_decay": 0.5}, lambda g, p: -0.1 * (np.sign(g) + (0.5 * p if p.ndim == 2 else 0))),
    "sgd": ({"momentum": 0.9}, lambda g, p: -0.1 * g),
    # Muon's step is the orthogonal factor of the gradient, here diag(1, 1), by Newton-Schulz, whose tuned quintic
    # stops within 0.3 of 1; vectors get Nesterov Adam, 1 + b1 (1-b1)/(1-b1^2) times the sign
    "muon": ({}, lambda g, p: -0.1 * np.sign(g) * (1 if p.ndim == 2 else 1 + 0.09 / 0.19)),
}


@pytest.mark.parametrize("name", sorted(OPTIMISERS))
def test_first_update(name):
    options, formula = FIRST[name]
    update = first_update(name, learning_rate=0.1, **options)
    for leaf in PARAMS:
        wanted = formula(GRADS[leaf], PARAMS[leaf])
        got = np.nan_to_num(np.asarray(update[leaf]))
        tolerance = 0.035 if name == "muon" and leaf == "kernel" else 1e-6
        assert np.abs(got - wanted).max() < tolerance, (leaf, got, wanted)


def test_clip_scales_to_the_global_norm():
    update = first_update("sgd", learning_rate=1.0, clip=1.3)  # |(3, 4, -12)| = 13
    for leaf in GRADS:
        assert np.allclose(update[leaf], -GRADS[leaf] / 10, atol=1e-6)
    update = first_update("sgd", learning_rate=1.0, clip=20.0)
    assert np.allclose(update["bias"], -GRADS["bias"])


def test_schedules_follow_their_formulas():
    count = np.arange(0, 101)
    rise = np.minimum(1, (count + 1) / 10)
    u = np.clip((count - 10) / 90, 0, 1)
    wanted = {
        "constant": rise,
        "cosine": rise * (0.1 + 0.9 * (1 + np.cos(np.pi * u)) / 2),
        "linear": rise * (0.1 + 0.9 * (1 - u)),
        "rsqrt": rise * np.sqrt(10 / np.maximum(count + 1, 10)),
    }
    assert set(wanted) == set(SCHEDULES)
    for name, value in wanted.items():
        rate = schedule(name, peak=0.02, steps=100, warmup=10, final=0.1)
        assert np.allclose(jax.vmap(rate)(jnp.asarray(count)), 0.02 * value, rtol=2e-5), name


def test_schedule_is_applied_by_update_count():
    rule = optimiser("sgd", learning_rate=1.0, schedule="linear", steps=4)
    state, seen = rule.init(PARAMS), []
    for _ in range(4):
        update, state = rule.update(GRADS, state, PARAMS)
        seen.append(float(update["kernel"][0, 0]) / -3.0)
    assert np.allclose(seen, [1.0, 0.75, 0.5, 0.25])
    own = optimiser("sgd", learning_rate=optax.constant_schedule(0.5))
    assert float(own.update(GRADS, own.init(PARAMS), PARAMS)[0]["kernel"][0, 0]) == -1.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "adamx"}, r"optimiser.name='adamx': allowed are .*did you mean 'adam"),
        ({"name": "adam", "beta1": 0.9}, r"optimiser.beta1: adam has no such option; allowed .*'b1'"),
        ({"name": "sgd", "weight_decay": 0.1}, r"optimiser.weight_decay: sgd has no such option"),
        ({"schedule": "cosin", "steps": 10}, r"optimiser.schedule='cosin'.*did you mean 'cosine'"),
        ({"schedule": "cosine"}, r"'cosine' needs steps > warmup, got None and 0"),
        ({"learning_rate": -1.0}, r"optimiser.learning_rate=-1.0"),
        ({"clip": 0.0}, r"optimiser.clip=0.0"),
        ({"warmup": -1}, r"optimiser.warmup=-1"),
        ({"final": 2.0}, r"optimiser.final=2.0"),
    ],
)
def test_bad_settings_name_the_field(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimiser(**arguments)
