"""Tokens in the one scan: the law of a run, noise that knows its sample, rare events, history, stacks, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from jaxdiff import discrete, exact, process, solver
from jaxdiff.prediction import DiscretePrediction, Prediction
from jaxdiff.solver import grid
from jaxdiff.solver.categorical import happens, pick

KEY = jax.random.key(7)
MASKED = discrete.masked(3)
WORLD = exact.enumerable(np.random.default_rng(0).dirichlet(np.ones(27) / 2).reshape(3, 3, 3))
EXACT = exact.denoiser(WORLD, MASKED)


def steps(count, **options):
    return discrete.ancestral(MASKED, grid.uniform(MASKED, count), **options)


def misfit(counts, law):
    """Chi-square of counts against a law, as a share of what only one in 10^6 exceeds; infinite for the impossible."""
    counts, expected = np.ravel(counts), np.ravel(law) * np.sum(counts)
    seen = expected > 0
    if counts[~seen].sum():
        return np.inf
    return np.sum((counts - expected)[seen] ** 2 / expected[seen]) / chi2.ppf(1 - 1e-6, seen.sum() - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Told:
    """Says ``probs`` (V,), or its first row at t > 0.5 and its second after, whatever the state."""

    probs: jax.Array

    def at(self, x, query):
        probs = self.probs if self.probs.ndim == 1 else self.probs[jnp.where(query.t > 0.5, 0, 1)]
        return DiscretePrediction(jnp.broadcast_to(jnp.log(probs), (*x.shape, probs.shape[-1])))


EVEN = Told(jnp.full(3, 1 / 3))


@pytest.mark.parametrize("remask", [0.0, 0.7])
def test_runs_have_the_enumerated_law(remask):
    table = steps(4, remask=remask)
    x = np.asarray(solver.sample(table, EXACT, KEY, (40000, 3)))
    assert x.dtype == np.int32 and x.min() == 0 and x.max() == 2
    counts = np.bincount(np.ravel_multi_index(x.T, (4, 4, 4)), minlength=64)
    law = lambda table: WORLD.output_law(table.blocks.B, table.blocks.remask)
    assert misfit(counts, law(table)) < 1
    # and neither that of more steps nor that of the data
    assert misfit(counts, law(steps(8, remask=remask))) > 1.5
    assert misfit(counts, np.pad(WORLD.probs, (0, 1))) > 1.5


def test_noise_is_a_function_of_seed_index_and_row():
    table = steps(4, remask=1.0)
    listen = lambda batch, **options: np.asarray(
        solver.sample(table, EVEN, KEY, (batch, 5), record="states", **options)[1]["states"]
    )
    whole = listen(64)
    assert whole.shape == (4, 64, 5) and len(np.unique(whole.transpose(1, 0, 2).reshape(64, -1), axis=0)) == 64
    np.testing.assert_array_equal(listen(1), whole[:, :1])
    np.testing.assert_array_equal(listen(16), whole[:, :16])
    np.testing.assert_array_equal(listen(16, index=32), whole[:, 32:48])
    chosen = np.array([3, 60, 17, 5] * 4)
    np.testing.assert_array_equal(listen(16, index=jnp.asarray(chosen)), whole[:, chosen])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    np.testing.assert_array_equal(listen(64, sharding=layout), whole)
    other = solver.sample(table, EVEN, jax.random.key(8), (64, 5), record="states")[1]["states"]
    assert 0.2 < np.mean(np.asarray(other)[-1] != whole[-1]) < 0.95  # two thirds of independent draws differ


def made(B, remask=None, tokens=3):
    """A table of given rows on the grid that is uniform in time."""
    process = discrete.masked(tokens)
    table = discrete.ancestral(process, grid.uniform(process, len(B)))
    block = dataclasses.replace(table.blocks, B=np.array(B), remask=None if remask is None else np.array(remask))
    return dataclasses.replace(table, blocks=block)


def test_certain_rows_are_certain():
    x = jnp.tile(jnp.array([[0, 1, 2, 3]]), (50, 1))
    states = lambda *rows: np.asarray(solver.run(made(*rows), EVEN, x, KEY, record="states")[1]["states"])
    kept, filled, hidden = states([[0.0], [1.0], [0.0]], [0.0, 0.0, 1.0])
    np.testing.assert_array_equal(kept, x)
    np.testing.assert_array_equal(filled[:, :3], x[:, :3])
    assert set(filled[:, 3].tolist()) == {0, 1, 2}
    assert np.all(hidden == 3)


def test_bits_decide_exactly():
    bits = np.array([0, 1, 428, 429, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1], np.uint32)
    p = np.array([0.0, 1e-7, 0.5, 1 - 2.0**-24, 1.0], np.float32)
    got = np.asarray(happens(jnp.asarray(bits), jnp.asarray(p)[:, None]))
    np.testing.assert_array_equal(got, bits < np.floor(p.astype(np.float64) * 2.0**32)[:, None])


@pytest.mark.parametrize("share", [1e-3, 1e-6, 1e-9])
def test_races_are_fair_down_to_rare_tokens(share):
    """The share of winning bits of a token of weight ``share`` against one of 1: midpoints of both words, all that matter."""
    span = min(40 * share, 1.0)  # beyond, a win is less likely than e^-40
    first = ((np.arange(256) + 0.5) / 256 * span * 2.0**32).astype(np.uint32)
    if span * 2.0**32 < 256:
        first = np.arange(int(span * 2.0**32), dtype=np.uint32)
    second = ((np.arange(4096) + 0.5) / 4096 * 2.0**32).astype(np.uint32)
    bits = jnp.stack(jnp.broadcast_arrays(first[:, None], second[None]), -1)
    wins = np.mean(np.asarray(pick(bits, jnp.array([share, 1.0]))) == 0) * span
    np.testing.assert_allclose(wins, share / (1 + share), rtol=0.03)


def test_what_has_no_weight_never_wins():
    for word in (0, 1, 2**31, 2**32 - 1):
        bits = jnp.array([word, 2**32 - 1, word], jnp.uint32)
        assert pick(bits, jnp.array([0.0, 1.0, -0.5])) == 1 == pick(bits, jnp.array([0.0, 1e-30, 0.0]))


RARE = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.015, 0.005])


def test_rare_reveals_draw_every_token():
    """At u = 1e-7 the tokens of the few positions that are revealed have the law mu. The bits that decide where are set here
    so that all are revealed; they share nothing with those that decide what."""
    table, d = made([[1e-7]], tokens=8), Told(jnp.asarray(RARE, jnp.float32))
    all_revealed = solver.hooks(
        noise=lambda keys, row, y: dataclasses.replace(
            table.blocks.noise(keys, y), place=jnp.zeros(y.shape, jnp.uint32)
        )
    )
    x = np.asarray(solver.run(table, d, jnp.full((500, 200), 8), KEY, hooks=all_revealed))
    assert misfit(np.bincount(x.ravel(), minlength=9), np.append(RARE, 0)) < 1
    # one draw from [u mu, 1 - u] by jax.random.categorical's float32 Gumbel numbers, whose uniforms are multiples of 2^-23,
    # sum over the largest 2^16 (any other would need the rest to be below -11): nearly only the likeliest token is left
    top = -np.log(-np.log1p(-np.arange(1, 2**16) * 2.0**-23))
    np.testing.assert_allclose(top[0], 15.94, atol=0.01)
    joint = np.array([np.mean(np.exp(-np.exp(-(top + np.log(1e-7 * mu))))) for mu in RARE])
    joint /= joint.sum()
    assert joint[0] > 0.95 and misfit(1e5 * np.append(joint, 0), np.append(RARE, 0)) > 100


def test_history_extrapolates_and_keeps_the_row_sum():
    told = np.array([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1]])
    # row 0 reveals nothing; row 1, at t = 1/2, reveals a half by 2 mu_1 - 1.5 mu_0, of which a negative part is cut off
    table = made([[0.0, 0.0], [2.0, -1.5]])
    x = np.asarray(solver.sample(table, Told(jnp.asarray(told, jnp.float32)), KEY, (400, 50)))
    weights = np.maximum(2 * told[1] - 1.5 * told[0], 0)
    assert weights[0] == 0 == weights[2]
    assert misfit(np.bincount(x.ravel(), minlength=4), [0, 0.5, 0, 0.5]) < 1
    table = made([[0.0, 0.0], [1.5, -0.5]])
    x = np.asarray(solver.sample(table, Told(jnp.asarray(told, jnp.float32)), KEY, (400, 50)))
    weights = np.maximum(1.5 * told[1] - 0.5 * told[0], 0)
    assert misfit(np.bincount(x.ravel(), minlength=4), [*weights / weights.sum(), 0]) < 1


def test_coefficients_per_position():
    table = made(np.eye(3)[[2, 0, 1]][:, None, None, :])
    _, kept = solver.sample(table, EXACT, KEY, (8, 3), record="states")
    revealed = np.asarray(kept["states"]) < 3
    np.testing.assert_array_equal(revealed, np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1]], bool)[:, None].repeat(8, 1))


def test_start_from_data():
    table = discrete.ancestral(MASKED, [0.3, 0.1])
    still = dataclasses.replace(table, blocks=dataclasses.replace(table.blocks, B=np.zeros((1, 1))))
    clean = np.arange(3000).reshape(1000, 3) % 3
    x = np.asarray(solver.sample(still, EVEN, KEY, (1000, 3), init=clean))
    kept = x < 3
    np.testing.assert_array_equal(x[kept], clean[kept])
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.21 / 3000)


def test_known_tokens_are_kept_by_a_hook():
    known = jnp.array([3, 1, 3])
    hook = solver.hooks(project=lambda y, row: jnp.where(known < 3, known, y))
    x = solver.sample(steps(3), EXACT, KEY, (16, 3), hooks=hook)
    assert np.all(x[:, 1] == 1)


def test_stacked_tables_run_as_they_do_alone():
    tables = [steps(2), steps(4, remask=0.5), made([[0.3, 0.0], [0.9, -0.2], [1.0, 0.0]])]
    many = solver.stack(tables)
    assert many.blocks.B.shape == (3, 4, 2) and many.blocks.remask.shape == (3, 4) and many.nfe.tolist() == [2, 4, 3]
    x = jnp.full((64, 3), 3)
    out = jax.jit(jax.vmap(lambda table: solver.run(table, EVEN, x, KEY)))(many)
    for i, table in enumerate(tables):
        np.testing.assert_array_equal(out[i], solver.run(table, EVEN, x, KEY))
    assert solver.stack(tables[:1]).blocks.remask is None


def test_other_values_do_not_retrace():
    traces = []

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, eq=False)
    class Counted(Told):
        def at(self, x, query):
            traces.append(None)
            return Told.at(self, x, query)

    cosine = discrete.masked(3, "cosine")
    for table, probs, seed in (
        (steps(4), [0.2, 0.3, 0.5], 0),
        (discrete.ancestral(cosine, grid.cosine(cosine, 4)), [0.5, 0.5, 0.0], 1),
    ):
        solver.sample(table, Counted(jnp.array(probs)), jax.random.key(seed), (4, 3))
        count = len(traces)
    assert count == len(traces) > 0
    solver.sample(steps(5), Counted(jnp.full(3, 1 / 3)), KEY, (4, 3))
    assert len(traces) > count  # the counter is awake


def test_float64_programs():
    with jax.enable_x64(True):
        x = solver.sample(made([[0.5, 0.1], [1.0, 0.0]]), EXACT, jax.random.key(0), (4, 3))
    assert x.dtype == jnp.int32 and x.max() < 3


def test_refusals_are_one_line_errors():
    table, x = steps(2), jnp.full((2, 3), 3)
    wide = Told(jnp.full(4, 0.25))
    gaussian = process.linear()
    normal = lambda x, t, r: Prediction(x, x)
    ddim = solver.ddim(gaussian, grid.uniform(gaussian, 2))
    cases = {
        "key: missing; this table draws noise": lambda: solver.run(table, EVEN, x),
        "x: dtype float32 given for a block of tokens; need integers in 0..3, 3 for masked": lambda: solver.run(
            table, EVEN, jnp.zeros((2, 3)), KEY
        ),
        "init: dtype float32 given for a block of tokens": lambda: solver.sample(
            table, EVEN, KEY, (2, 3), init=jnp.zeros((2, 3))
        ),
        "d: returned log_probs (2, 3, 4) for tokens (2, 3); need (2, 3, 3)": lambda: solver.run(table, wide, x, KEY),
        "d: returned Prediction for a block of tokens; need DiscretePrediction": lambda: solver.run(
            table, normal, x, KEY
        ),
        "d: returned DiscretePrediction; a denoiser returns Prediction": lambda: solver.run(
            ddim, EVEN, jnp.zeros((2, 3))
        ),
        "table: made for mask noise, but the denoiser's process has gaussian": lambda: solver.sample(
            table, exact.denoiser(exact.Gaussian(0.0, 1.0), gaussian), KEY, (2, 3)
        ),
        "tables: table 0 has mask_id 3, table 1 4": lambda: solver.stack(
            [table, discrete.ancestral(discrete.masked(4), [0.9, 0.1])]
        ),
        "tables: table 0 has a CategoricalBlock, table 1 a AffineBlock": lambda: solver.stack([table, ddim]),
        "table: row_mean() takes tables of affine blocks": lambda: solver.row_mean(
            table, EVEN, solver.begin(table, EVEN, x), solver.rows_of(solver.device(table))
        ),
    }
    for message, build in cases.items():
        with pytest.raises(ValueError) as error:
            build()
        assert str(error.value).startswith(message) and "\n" not in str(error.value), str(error.value)
