"""The masked bound: the data's entropy at the exact posterior, by enumeration; and what the objective draws is that bound."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import discrete, exact, process
from jaxdiff.discrete.objective import level
from jaxdiff.objective import Ctx, stratified

PROCESSES = {
    "linear": discrete.masked(3),
    "polynomial": discrete.masked(3, "polynomial", exponent=3.0),
    "cosine": discrete.masked(3, "cosine"),
}
LINEAR = PROCESSES["linear"]
WORLD = exact.enumerable(np.random.default_rng(0).dirichlet(np.ones(27) / 2).reshape(3, 3, 3))
CHANCES = WORLD.probs.ravel()
ENTROPY = -np.sum(CHANCES * np.log(CHANCES))
DATA = np.array(list(itertools.product(range(3), repeat=3)))
HIDDEN = np.array(list(itertools.product([False, True], repeat=3)))
COUNT = HIDDEN.sum(-1)
STATES = np.where(HIDDEN[:, None], 3, DATA)  # (8, 27, 3): every sequence under every set of masks
EXACT = WORLD.predict(STATES).log_probs
# at shown positions neither is read
WRONG = np.log(0.6 * np.exp(EXACT) + 0.4 * np.array([0.5, 0.3, 0.2]))
CTX = Ctx(step=jnp.int32(5))


def cross_entropies(log_mu, xp=np):
    """(8,) expected ``-log mu(x0)`` of all masked positions, for every set of masks."""
    own = xp.take_along_axis(log_mu, np.broadcast_to(DATA, STATES.shape)[..., None], -1)[..., 0]
    return xp.where(HIDDEN[:, None], -own, 0).sum(-1) @ CHANCES


def shares(p, t_min=0.0, t_max=1.0):
    """(8,) weight of every set of masks in the bound: an integral over t by Gauss-Legendre, on both sides of t_min."""
    x, w = np.polynomial.legendre.leggauss(40)
    total = np.zeros(8)
    for low, high in ((0.0, t_min), (t_min, t_max)):
        t, dt = (low + high + (high - low) * x) / 2, (high - low) / 2 * w
        at, slope, sigma = level(p, t, t_min)
        weight = discrete.WEIGHTINGS["elbo"]()(slope, sigma, 1.0)
        chance = sigma[:, None] ** COUNT * p.coefficients(at).alpha[:, None] ** (3 - COUNT)
        total += (dt * weight) @ chance
    return total


@pytest.mark.parametrize("name", PROCESSES)
def test_exact_posterior_reaches_the_entropy(name):
    """Whatever the schedule: the weights are those of a random order of the tokens, ``1/(n binomial(L, n))``."""
    found = shares(PROCESSES[name])
    np.testing.assert_allclose(found[1:], [1 / (n * math.comb(3, n)) for n in COUNT[1:]], rtol=1e-12)
    assert abs(found @ cross_entropies(EXACT) - ENTROPY) < 1e-10


@pytest.mark.parametrize("name", PROCESSES)
def test_wrong_posterior_costs_its_divergence(name):
    ratio = np.where(HIDDEN[:, None, :, None], np.exp(EXACT) * (np.maximum(EXACT, -1e9) - WRONG), 0)
    divergence = ratio.sum((-1, -2)) @ CHANCES
    excess = shares(PROCESSES[name]) @ divergence
    assert abs(shares(PROCESSES[name]) @ cross_entropies(WRONG) - ENTROPY - excess) < 1e-10
    assert excess > 0.1


@pytest.mark.parametrize("name", PROCESSES)
def test_t_min_costs_what_tokens_revealed_together_tell_of_each_other(name):
    p, t_min = PROCESSES[name], 0.4
    shown_entropy = np.zeros(8)
    for k, hidden in enumerate(HIDDEN):
        shown = WORLD.probs.sum(tuple(np.flatnonzero(hidden)))
        shown_entropy[k] = -np.sum(shown * np.log(shown))
    together = cross_entropies(EXACT) - (ENTROPY - shown_entropy)  # sum of entropies less the joint one
    c = p.coefficients(t_min)
    excess = np.sum(c.sigma**COUNT * c.alpha ** (3 - COUNT) * together)
    assert abs(shares(p, t_min) @ cross_entropies(EXACT) - ENTROPY - excess) < 1e-10
    assert excess > 1e-3


def table(log_mu):
    """Logits (64, 3, 3) of a network that looks its state up."""
    logits = np.zeros((64, 3, 3))
    logits[STATES @ [16, 4, 1]] = np.where(np.isfinite(log_mu), log_mu, 0)
    return logits


def look_up(params, x, t, cond):
    return params[x @ jnp.array([16, 4, 1])]


def test_gradient_vanishes_at_the_exact_posterior_alone():
    with jax.enable_x64(True):

        def bound(logits):
            log_mu = discrete.denoiser(LINEAR, look_up, logits)(jnp.asarray(STATES), 0.5).log_probs
            return shares(LINEAR) @ cross_entropies(log_mu, jnp)

        gradient = jax.jit(jax.grad(bound))
        assert np.max(np.abs(gradient(jnp.asarray(table(EXACT))))) < 1e-12
        assert np.max(np.abs(gradient(jnp.asarray(table(WRONG))))) > 1e-3


SIZE = 30_000
INDEX = np.random.default_rng(1).choice(27, SIZE, p=CHANCES)
MANY = {"x0": jnp.asarray(DATA[INDEX], jnp.uint8), "index": jnp.arange(SIZE)}
KEYS = jax.random.split(jax.random.key(2), SIZE)
OPTIONS = {
    "iid": {"draw": "iid"},
    "stratified": {},
    "squares": {"draw": "iid", "time": lambda u, p: u**2, "t_min": 0.4},
    "flat": {"draw": "iid", "weighting": "flat"},
}


@jax.jit
def every_draw(params):
    """For each of OPTIONS, every example's loss in nats of three tokens and its slope from wrong towards exact logits."""
    direction = jnp.asarray(table(EXACT) - table(WRONG), jnp.float32)

    def one(loss, batch, key):
        batch = {name: value[None] for name, value in batch.items()}
        return jax.jvp(lambda v: loss(v, batch, key[None], CTX)[0], (params,), (direction,))

    losses = {n: discrete.masked_elbo(LINEAR, look_up, reduce="sum", **options) for n, options in OPTIONS.items()}
    return {name: jax.vmap(functools.partial(one, loss))(MANY, KEYS) for name, loss in losses.items()}


@functools.cache
def draws(model):
    found = every_draw(jnp.asarray(table({"exact": EXACT, "wrong": WRONG}[model]), jnp.float32))
    return jax.tree.map(lambda v: np.asarray(v, np.float64), found)


def errors(values, wanted):
    """Distance of the mean from ``wanted`` in standard errors, and the standard error."""
    error = np.std(values) / np.sqrt(SIZE)
    return abs(np.mean(values) - wanted) / error, error


@pytest.mark.parametrize("name", ["iid", "stratified", "squares"])
def test_draws_average_to_the_bound(name):
    """Within four standard errors, of about a hundredth, whatever density times are drawn from."""
    losses, slopes = draws("exact")[name]
    wanted = shares(LINEAR, OPTIONS[name].get("t_min", 1e-3)) @ cross_entropies(EXACT)
    off, error = errors(losses, wanted)
    assert off < 4 and error < 0.03 * ENTROPY
    assert errors(slopes, 0)[0] < 4  # no way down


def test_wrong_posteriors_and_missing_weights_are_told_apart():
    """The negative controls of the test above, at the same number of draws."""
    losses, slopes = draws("wrong")["iid"]
    off, _ = errors(losses, shares(LINEAR, 1e-3) @ cross_entropies(WRONG))
    assert off < 4 and errors(losses, ENTROPY)[0] > 4 and errors(slopes, 0)[0] > 10
    plain, _ = draws("exact")["flat"]
    t, w = np.polynomial.legendre.leggauss(20)
    t = (t[:, None] + 1) / 2
    wanted = w / 2 @ (t**COUNT * (1 - t) ** (3 - COUNT)) @ cross_entropies(EXACT)
    assert errors(plain, wanted)[0] < 4 and errors(plain, ENTROPY)[0] > 10


def program_that_shows(p, *settings, **common):
    """For each of ``settings``, the loss, its metrics and what the network was given: tokens, time, condition."""

    def called(batch, keys):
        seen = []

        def apply(params, x, t, cond):
            seen.append((x, t, cond))
            return logits_at(x, jnp)

        losses = [discrete.masked_elbo(p, apply, **options, **common) for options in settings]
        return [(*loss({}, batch, keys, CTX), seen[-1]) for loss in losses]

    return jax.jit(called)


def logits_at(x, xp):
    """Logits of four tokens that depend on state and position."""
    return xp.sin(xp.arange(4.0) * (x[..., None] + 1) + xp.arange(x.size).reshape(x.shape)[..., None] % 7)


def test_the_loss_is_that_of_the_masks_drawn():
    """Recomputed in float64 from what the network saw; in any shape, in nats a token or an example, with its bins."""
    p, size, t_min = discrete.masked(4, "cosine", t_max=0.9), 40, 0.3
    x0 = jax.random.randint(jax.random.key(0), (size, 2, 3), 0, 4)
    batch, keys = {"x0": x0, "index": 7 * jnp.arange(size)}, jax.random.split(jax.random.key(1), size)
    both = program_that_shows(p, {"bins": 4}, {"weighting": "flat", "reduce": "sum"}, t_min=t_min, time="cosmap")
    (value, metrics, (x, t, _)), (flat, other, (y, _, _)) = both(batch, keys)
    u = np.asarray(stratified(5, batch["index"]), np.float64)
    sine, cosine = np.sin(np.pi / 2 * u), np.cos(np.pi / 2 * u)
    drawn = sine / (sine + cosine)
    assert np.any(drawn < t_min) and np.any(drawn > 0.9)
    np.testing.assert_allclose(t, np.clip(drawn, t_min, 0.9), rtol=1e-5)
    density = 2 / np.pi * (sine + cosine) ** 2  # 1/(dt/du)
    at = np.sin(np.pi / 2 * np.maximum(drawn, t_min))
    weight = np.where(drawn < 0.9, np.pi / 2 * np.cos(np.pi / 2 * drawn) / (at * density), 0)
    x, tokens = np.asarray(x), np.asarray(x0)
    logits = logits_at(x, np)
    log_mu = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(log_mu, tokens[..., None], -1)[..., 0]
    assert x.dtype == np.int32 and np.all((x == tokens) | (x == 4))
    wanted = weight * np.where(x == 4, -own, 0).sum((1, 2))
    np.testing.assert_allclose(value, wanted.mean() / 6, rtol=1e-5)
    left = (1 - np.sin(np.pi / 2 * 0.9)) * np.log(4)  # tokens that are not masked at t_max
    np.testing.assert_allclose(metrics["nats_per_token"], wanted.mean() / 6 + left, rtol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_token"] * np.log(2), metrics["nats_per_token"], rtol=1e-6)
    bins = [metrics[f"loss_bin{k}"] for k in range(4)]
    np.testing.assert_allclose(bins, [4 * np.mean(wanted / 6 * (np.floor(4 * u) == k)) for k in range(4)], rtol=1e-5)
    np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(flat, 6 * np.where(x == 4, -own, 0).mean(), rtol=1e-5)
    np.testing.assert_allclose(other["nats_per_token"], metrics["nats_per_token"], rtol=1e-6)  # whatever is trained


def test_draws_do_not_depend_on_the_batch():
    """Bitwise the same masks, times and labels however the batch is cut."""
    size = 12
    batch = {
        "x0": jax.random.randint(jax.random.key(0), (size, 5), 0, 4),
        "label": jnp.arange(size) % 3,
        "index": 900 + jnp.arange(size, dtype=jnp.uint32),
    }
    keys = jax.random.split(jax.random.key(1), size)
    p = discrete.masked(4, "cosine")
    shown = program_that_shows(p, {}, cond_key="label", label_drop=0.5, null_label=3)
    [(_, _, whole)] = shown(batch, keys)
    assert np.any(whole[2] == 3) and np.any(whole[2] != 3) and np.any(whole[0] == 4)
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        [(_, _, seen)] = shown({k: v[part] for k, v in batch.items()}, keys[part])
        for cut, full in zip(seen, whole):
            np.testing.assert_array_equal(cut, full[part])


def test_finite_at_both_ends():
    """Times squeezed against 0 and 1, nothing held back from 0, and logits larger than networks give."""
    batch, keys = {"x0": jnp.zeros((64, 3), jnp.int32), "index": jnp.arange(64)}, KEYS[:64]
    time = lambda u, p: jnp.where(u < 0.5, (2 * u) ** 20 / 2, 1 - (2 - 2 * u) ** 20 / 2)
    losses = [discrete.masked_elbo(p, look_up, time=time, t_min=0.0) for p in PROCESSES.values()]
    both = jax.jit(lambda v: [jax.value_and_grad(lambda v, f=f: f(v, batch, keys, CTX)[0])(v) for f in losses])
    for value, gradient in both(jnp.asarray(1e4 * table(WRONG), jnp.float32)):
        assert float(value) > 0 and bool(jnp.isfinite(value)) and bool(jnp.all(jnp.isfinite(gradient)))


def test_half_precision_logits_give_a_float32_loss():
    logits = jax.random.normal(jax.random.key(4), (64, 3, 3)).astype(jnp.bfloat16)
    batch, loss = {k: v[:64] for k, v in MANY.items()}, discrete.masked_elbo(LINEAR, look_up)
    both = jax.jit(lambda v: [loss(w, batch, KEYS[:64], CTX)[0] for w in (v, v.astype(jnp.float32))])
    half, single = both(logits)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, single, rtol=1e-6)


def test_tokens_of_a_byte_have_a_mask_and_tokens_out_of_range_are_loud():
    p, size = discrete.masked(256), 200
    apply = lambda params, x, t, cond: jnp.where(x == 256, 0, jnp.nan)[..., None] + jnp.zeros(256)
    loss = jax.jit(discrete.masked_elbo(p, apply, draw="iid", weighting="flat"))
    value, metrics = loss({}, {"x0": jnp.full(size, 255, jnp.uint8)}, KEYS[:size], CTX)  # examples of one token
    share = float(value) / np.log(256)  # of examples that were masked
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(size) and bool(jnp.isfinite(metrics["nats_per_token"]))
    for wrong in (256, -1):
        assert bool(jnp.isnan(loss({}, {"x0": jnp.full(size, wrong)}, KEYS[:size], CTX)[0]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"process": process.linear()}, "process: 'linear' given; masked_elbo"),
        ({"time": "unifrom"}, "time: 'unifrom' .*'uniform'"),
        ({"time": 3}, "time: 3 given"),
        ({"time": "discrete"}, "have no density"),
        ({"weighting": "elob"}, "weighting: 'elob' is unknown; allowed: elbo, flat; did you mean 'elbo'"),
        ({"weighting": 2.0}, "weighting: 2.0 given; need a name"),
        ({"draw": "sobol"}, "draw: 'sobol' is unknown"),
        ({"reduce": "max"}, "reduce: 'max' is unknown"),
        ({"t_min": 1.0}, "t_min: 1.0 given"),
        ({"label_drop": 1.5}, "label_drop: 1.5 given"),
        ({"bins": -1}, "bins: -1 given"),
        ({"cond_key": "label"}, "null_label: missing"),
    ],
)
def test_errors_when_built(options, message):
    with pytest.raises(ValueError, match=message) as error:
        discrete.masked_elbo(**{"process": LINEAR, "apply": look_up, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x0": None}, "data_key: the batch has no field 'x0'; it has index"),
        ({"index": None}, "draw='stratified': the batch has no field 'index'"),
        ({"x0": jnp.zeros((4, 3))}, r"batch\['x0'\]: dtype float32 given; need tokens, integers in 0..2"),
        ({"x0": jnp.zeros((5, 3), jnp.int32)}, "keys: shape"),
        ({"x0": jnp.zeros((4, 1, 3), jnp.int32)}, r"the network gives shape \(4, 1, 1, 3\) for tokens \(4, 1, 3\)"),
    ],
)
def test_errors_when_traced(change, message):
    batch = {"x0": jnp.zeros((4, 3), jnp.int32), "index": jnp.arange(4), **change}
    batch = {k: v for k, v in batch.items() if v is not None}
    apply = lambda params, x, t, cond: jnp.zeros((4, 1, 1, 3) if x.ndim == 3 else (*x.shape, 3))
    with pytest.raises((ValueError, TypeError), match=message) as error:
        jax.eval_shape(discrete.masked_elbo(LINEAR, apply), {}, batch, KEYS[:4], CTX)
    assert "\n" not in str(error.value)
