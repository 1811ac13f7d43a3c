"""Moving averages against the recursion written in numpy float64, and post-hoc reconstruction."""

import jax
import numpy as np
import pytest
from tiny_training import devices, host, init, player, run

from jaxdiff.train import averages, create_state, decay, make_step, posthoc_weights, power
from jaxdiff.train.ema import gamma_of_std, std_of_gamma


def test_averages_follow_their_recursions_and_refused_updates_do_not_count():
    profiles = averages((0.9, decay(0.5, warmup=False), power(gamma=2.0)))
    game = {"net": player(ema=profiles)}
    mesh = devices(1)
    state = create_state(game, init, jax.random.key(0), mesh)
    step = make_step(game, mesh)
    wanted = [host(state.params["net"])["outer"]["kernel"].astype(np.float64)] * 3
    poison = lambda s, batch: {**batch, "x0": batch["x0"] * np.float32(np.nan if s == 2 else 1)}
    t = 0
    for s in range(6):
        _, state, _ = run(step, state, mesh, 1, start=s, change=poison)
        if s == 2:
            continue
        t += 1
        now = host(state.params["net"])["outer"]["kernel"].astype(np.float64)
        betas = (min(0.9, (1 + t) / (10 + t)), 0.5, (1 - 1 / t) ** 3.0)
        wanted = [beta * old + (1 - beta) * now for beta, old in zip(betas, wanted)]
    for tree, value in zip(state.ema["net"], wanted, strict=True):
        assert np.abs(host(tree)["outer"]["kernel"] - value).max() < 1e-6
    # negative control: the three averages really differ
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-3 and np.abs(wanted[1] - wanted[2]).max() > 1e-3


def test_first_power_update_forgets_the_start():
    assert float(power(gamma=3.0).beta(1)) == 0.0


@pytest.mark.parametrize("profile", [power(std=0.05), power(gamma=2.0), decay(0.9999), decay(0.9999, warmup=False)])
def test_weights_are_accurate_however_long_the_run(profile):
    """In float32 1 - 1/t is 1 from t = 3e7 on, where a power average would have stood still."""
    for t in (1, 2, 10, 1000, 10**5, 10**6, 10**7, 10**9):
        if profile.kind == "power":
            exact = -np.expm1((profile.value + 1) * np.log1p(-1 / t)) if t > 1 else 1.0
        else:
            exact = max(1 - profile.value, 9 / (10 + t) if profile.warmup else 0)
        assert float(profile.weight(np.int32(t))) == pytest.approx(exact, rel=1e-6), t


def test_width_and_exponent_are_inverse():
    for gamma in (0.0, 1.0, 6.94, 16.97, 100.0):
        assert gamma_of_std(std_of_gamma(gamma)) == pytest.approx(gamma, abs=1e-6)
    # the two widths of EDM2 and their exponents, arXiv 2312.02696 section 3.1
    assert gamma_of_std(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of_std(0.10) == pytest.approx(6.94, abs=0.01)
    # width of the density (g+1) tau^g on [0,1], by quadrature
    tau = (np.arange(100_000) + 0.5) / 100_000
    weight = 4.0 * tau**3 / 100_000
    mean = (weight * tau).sum()
    assert std_of_gamma(3.0) == pytest.approx(np.sqrt((weight * (tau - mean) ** 2).sum()), rel=1e-6)


def test_posthoc_weights_rebuild_other_averages():
    """Saved averages of a random walk rebuild one with a width that was never kept."""
    steps, gammas, saved = 2000, (gamma_of_std(0.05), gamma_of_std(0.10)), {}
    walk = np.cumsum(np.random.default_rng(0).normal(size=steps))

    def trace(gamma):
        value = np.empty(steps)
        for t in range(1, steps + 1):
            beta = (1 - 1 / t) ** (gamma + 1)
            value[t - 1] = walk[t - 1] if t == 1 else beta * value[t - 2] + (1 - beta) * walk[t - 1]
        return value

    times, exponents, snapshots = [], [], []
    for gamma in gammas:
        saved = trace(gamma)
        for t in range(100, steps + 1, 100):
            times.append(t), exponents.append(gamma), snapshots.append(saved[t - 1])
    for gamma in (gamma_of_std(0.07), gamma_of_std(0.15)):
        weights = posthoc_weights(times, exponents, steps, gamma)
        error = abs(weights @ np.array(snapshots) - trace(gamma)[-1])
        assert error < 0.01 * walk.std(), (gamma, error)
        assert abs(trace(gamma)[-1] - snapshots[-1]) > 10 * error  # the nearest kept one is far worse
    exact = posthoc_weights(times, exponents, 1500, gammas[0])
    assert abs(exact @ np.array(snapshots) - trace(gammas[0])[1499]) < 1e-6 * walk.std()


def test_bad_settings_name_the_field():
    with pytest.raises(ValueError, match=r"ema.decay=1.0: allowed are 0 <= decay < 1"):
        decay(1.0)
    with pytest.raises(ValueError, match=r"ema.power: std=0.5: allowed are 0 < std"):
        power(std=0.5)
    with pytest.raises(ValueError, match="gamma or std"):
        power()
    with pytest.raises(ValueError, match="time=30"):
        posthoc_weights([10, 20], [1.0, 2.0], 30, 1.5)
    assert averages(None) == () and averages(0.9) == (decay(0.9),)
