"""The one scan: determinism, noise that knows its sample, hooks, starts, conditions, carried states, trees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import MIXTURE, PROCESSES, middle, rms

from jaxdiff import exact, guidance, prediction, process, solver
from jaxdiff.prediction import Prediction, denoiser
from jaxdiff.solver import grid
from jaxdiff.solver.executor import rows_for
from jaxdiff.solver.sampling import programs

LINEAR, VP, EDM = PROCESSES["linear"], PROCESSES["vp"], PROCESSES["edm"]
KEY = jax.random.key(7)
WORLD2 = exact.GaussianMixture(
    [0.4, 0.6], [[-1.0, 0.5], [0.8, -0.3]], [[[0.2, 0.05], [0.05, 0.1]], [[0.1, 0.0], [0.0, 0.3]]], labels=[0, 1]
)
ANCESTRAL = solver.ancestral(LINEAR, grid.uniform(LINEAR, 6))
CHURN = solver.edm(EDM, grid.edm_rho(EDM, 5), s_churn=4.0)


def drawn(d, key, batch, **options):
    """Every fresh draw of a run: the noise hook's default, recorded in the hook state."""
    unit = lambda keys: jax.vmap(lambda k: jax.random.normal(k, (2,)))(keys)
    hook = solver.hooks(
        start=lambda x: jnp.zeros((x.shape[0], 6, 2)),
        correct=lambda keys, row, y, pred, y_next, s: (y_next + s.sum() * 0, s.at[:, row.k].set(unit(keys))),
        noise=lambda keys, row, y: unit(keys),
    )
    return solver.sample(ANCESTRAL, d, key, (batch, 2), hooks=hook, **options)


def test_same_call_twice_is_identical():
    d = exact.denoiser(WORLD2, LINEAR)
    first, second = (np.asarray(solver.sample(ANCESTRAL, d, KEY, (4, 2))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    other = np.asarray(solver.sample(ANCESTRAL, d, jax.random.key(8), (4, 2)))
    assert rms(first, other) > 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Silent:
    """Predicts nothing, so that a run is its own noise: with A = 0 and C = 1 the states are the draws."""

    def at(self, x, query):
        return Prediction(jnp.zeros_like(x), jnp.zeros_like(x))


def listening(table):
    """The table with every row replaced by ``y = z``."""
    block = table.blocks
    zero = np.zeros_like
    heard = dataclasses.replace(block, A=zero(block.A), B=zero(block.B), C=np.ones(table.rows))
    return dataclasses.replace(table, blocks=heard)


def test_noise_is_a_function_of_seed_index_and_row():
    table = listening(CHURN)
    listen = lambda batch, **options: jax.tree_util.tree_map(
        np.asarray, solver.sample(table, Silent(), KEY, (batch, 2), record=("states",), **options)[1]["states"]
    )
    whole = listen(64)
    assert whole.shape == (9, 64, 2)
    np.testing.assert_array_equal(listen(1), whole[:, :1])
    np.testing.assert_array_equal(listen(16), whole[:, :16])
    for offset in (16, 32, 48):
        np.testing.assert_array_equal(listen(16, index=offset), whole[:, offset : offset + 16])
    chosen = np.array([3, 60, 17, 5] * 4)
    np.testing.assert_array_equal(listen(16, index=jnp.asarray(chosen)), whole[:, chosen])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    out, kept = solver.sample(table, Silent(), KEY, (64, 2), record=("states",), sharding=layout)
    np.testing.assert_array_equal(np.asarray(kept["states"]), whole)
    assert len(out.sharding.device_set) == 8 and out.addressable_shards[0].data.shape == (8, 2)
    # independent over rows, samples and coordinates: 1152 numbers, standard deviation of a correlation 0.03
    flat = whole.reshape(9, -1)
    assert np.max(np.abs(np.corrcoef(flat) - np.eye(9))) < 4.5 / np.sqrt(128)
    # (two float32 draws may coincide, two samples may not)
    assert len(np.unique(whole.reshape(-1, 2), axis=0)) == 9 * 64
    # and from the start and the churn before row 0
    index = jnp.arange(64, dtype=jnp.uint32)
    churn = (
        solver.begin(solver.device(CHURN), Silent(), jnp.zeros((64, 2)), KEY, index).y[0] / CHURN.blocks.start_noise
    )
    assert not np.isclose(np.asarray(churn).reshape(-1, 1), whole.reshape(1, -1), rtol=1e-6, atol=0).any()


def test_samples_agree_over_batches_chunks_and_devices():
    table, d = CHURN, exact.denoiser(WORLD2, EDM)
    whole = np.asarray(solver.sample(table, d, KEY, (64, 2)))
    chunks = np.concatenate([solver.sample(table, d, KEY, (16, 2), index=i) for i in range(0, 64, 16)])
    assert rms(chunks, whole) < 1e-5
    assert rms(solver.sample(table, d, KEY, (1, 2)), whole[:1]) < 1e-5
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    out = solver.sample(table, d, KEY, (64, 2), sharding=layout)
    assert len(out.sharding.device_set) == 8
    assert rms(out, whole) < 1e-5


def test_drawn_noise_reaches_the_hooks():
    # the noise hook with the documented keys reproduces the default draws, and correct sees those keys too
    d = exact.denoiser(WORLD2, LINEAR)
    np.testing.assert_array_equal(np.asarray(drawn(d, KEY, 4)), np.asarray(solver.sample(ANCESTRAL, d, KEY, (4, 2))))


def test_deterministic_tables_take_no_key():
    table, d = solver.heun(LINEAR, grid.uniform(LINEAR, 3)), exact.denoiser(WORLD2, LINEAR)
    x = jax.random.normal(KEY, (4, 2))
    np.testing.assert_array_equal(solver.run(table, d, x), solver.run(table, d, x, KEY))
    text = str(jax.make_jaxpr(lambda x: solver.run(table, d, x, KEY))(x))
    assert "random_bits" not in text and "threefry" not in text
    noisy = str(jax.make_jaxpr(lambda x: solver.run(ANCESTRAL, d, x, KEY))(x))
    assert "random_bits" in noisy or "threefry" in noisy


def test_record_states_and_predictions():
    table, d = solver.heun(VP, grid.uniform(VP, 4)), exact.denoiser(WORLD2, VP)
    plain = np.asarray(solver.sample(table, d, KEY, (3, 2)))
    out, kept = solver.sample(table, d, KEY, (3, 2), record=("states", "predictions"))
    np.testing.assert_allclose(out, plain, rtol=1e-6)
    assert set(kept) == {"states", "predictions"} and kept["states"].shape == (7, 3, 2)
    np.testing.assert_array_equal(kept["states"][-1], out)
    # what was recorded is what the denoiser says at the recorded states
    for k in range(6):
        said = d.at(
            kept["states"][k], prediction.Query(None, None, table.blocks.alpha[k + 1], table.blocks.sigma[k + 1])
        )
        np.testing.assert_allclose(kept["predictions"].data[k + 1], said.data, atol=2e-6)
        np.testing.assert_allclose(kept["predictions"].noise[k + 1], said.noise, atol=2e-5)
    out, kept = solver.sample(table, d, KEY, (3, 2), record=["states"])
    assert set(kept) == {"states"}


def test_hooks_act_on_grid_rows_only():
    table, d = solver.heun(LINEAR, grid.uniform(LINEAR, 4)), exact.denoiser(WORLD2, LINEAR)
    x = jax.random.normal(KEY, (3, 2))
    hook = solver.hooks(
        start=lambda x: jnp.zeros(x.shape[0]),
        correct=lambda keys, row, y, pred, y_next, s: (y_next, s + 1 + 0 * pred.data.sum()),
        project=lambda y, row: jnp.clip(y, -0.3, 0.3),
    )
    out, kept = solver.run(table, d, x, hooks=hook, record=("states",))
    inside = np.max(np.abs(kept["states"]), (1, 2)) <= 0.3
    assert np.all(inside[table.out]) and not np.all(inside[~table.out])
    counted = jax.eval_shape(lambda: solver.begin(table, d, x, hook=hook).hook)
    assert counted.shape == (3,)
    rows, table_on_device = solver.rows_of(solver.device(table)), solver.device(table)
    state = solver.begin(table, d, x, hook=hook)
    for k in range(table.rows):
        row = jax.tree_util.tree_map(lambda leaf, k=k: leaf[k], rows)
        state, _ = solver.advance(table_on_device, d, hook, state, row)
    np.testing.assert_array_equal(state.hook, np.full(3, 4.0))  # once a step, not once a row
    np.testing.assert_allclose(state.y[0], out, atol=1e-6)  # the stepped and the scanned run are one


def test_correct_comes_before_project_and_retime_is_heard():
    table = solver.ddim(LINEAR, grid.uniform(LINEAR, 3))
    told = lambda x, t, r: Prediction(0 * x + t, 0 * x)
    x = jnp.ones((2, 1))
    late = solver.hooks(retime=lambda y, row: row.tau / 2)
    _, plain = solver.run(table, told, x, record=("predictions",))
    _, retimed = solver.run(table, told, x, hooks=late, record=("predictions",))
    np.testing.assert_allclose(plain["predictions"].data[:, 0, 0], [1, 2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(retimed["predictions"].data, plain["predictions"].data / 2, rtol=1e-6)
    both = solver.hooks(correct=lambda keys, row, y, p, y_next, s: (y_next + 10, s), project=lambda y, row: y * 2)
    _, kept = solver.run(solver.ddim(LINEAR, [0.9, 0.5]), Silent(), x, hooks=both, record=("states",))
    a = 0.5 / 0.9
    np.testing.assert_allclose(kept["states"][0], (a + 10) * 2 * np.ones((2, 1)), rtol=1e-6)


def test_hooks_of_plain_functions_and_arguments_in_order():
    """``Hooks(project=f)`` is ``hooks(project=f)``, and run takes its arguments by position."""
    half, d, index = lambda y, row: y / 2, Silent(), jnp.arange(4)
    made, plain = solver.hooks(project=half), solver.Hooks(project=half)
    want = solver.sample(ANCESTRAL, d, KEY, (4, 2), hooks=made)
    np.testing.assert_array_equal(solver.sample(ANCESTRAL, d, KEY, (4, 2), hooks=plain), want)
    x = jnp.ones((4, 2))
    got, kept = solver.run(ANCESTRAL, d, x, KEY, index, plain, ("states",))
    np.testing.assert_array_equal(got, solver.run(ANCESTRAL, d, x, KEY, index=index, hooks=made))
    assert kept["states"].shape == (ANCESTRAL.rows, 4, 2)


def test_hooks_may_return_other_dtypes_than_are_carried():
    wide = solver.hooks(
        correct=lambda keys, row, y, p, y_next, s: (y_next.astype(jnp.float32) * 1.5, s + 1.0),
        project=lambda y, row: y.astype(jnp.float32) - 0.25,
        start=lambda x: jnp.zeros((), jnp.int32),
    )
    got = solver.run(solver.ddim(LINEAR, [0.9, 0.5]), Silent(), jnp.ones((2, 1), jnp.bfloat16), hooks=wide)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), 0.5 / 0.9 * 1.5 - 0.25, rtol=1e-2)


def test_noise_hook_needs_no_key_and_hooks_get_keys():
    x = jnp.zeros((3, 2))
    d = exact.denoiser(WORLD2, LINEAR)
    quiet = solver.hooks(noise=lambda keys, row, y: jnp.zeros_like(y))
    silent = dataclasses.replace(ANCESTRAL, blocks=dataclasses.replace(ANCESTRAL.blocks, C=None))
    np.testing.assert_allclose(solver.run(ANCESTRAL, d, x, hooks=quiet), solver.run(silent, d, x), atol=1e-6)
    seen = []

    def look(keys, row, y, p, y_next, s):
        seen.append(None if keys is None else (keys.shape, keys.dtype))
        return y_next, s

    table = solver.ddim(LINEAR, [0.9, 0.1])
    solver.run(table, d, x, KEY, hooks=solver.hooks(correct=look))
    solver.run(table, d, x, hooks=solver.hooks(correct=look))
    assert seen[0] == ((3,), solver.sample_keys(KEY, jnp.arange(3)).dtype) and seen[-1] is None


def still(table, **columns):
    """The table with every row replaced by ``y = y``, so that a run returns its start."""
    block, rows = table.blocks, table.rows
    columns = {"A": np.ones((rows, 1)), "B": np.zeros((rows, 1)), **columns}
    return dataclasses.replace(table, blocks=dataclasses.replace(block, **columns))


@pytest.mark.parametrize("table", [solver.ddim(VP, middle(VP, 3)), solver.ddim(EDM, grid.edm_rho(EDM, 3))])
def test_start_from_the_prior_and_from_data(table):
    start = lambda t, **options: np.asarray(solver.sample(t, Silent(), KEY, (5, 2), **options), np.float64)
    z = start(still(table, start_scale=np.float64(1.0)))
    alpha, sigma = table.blocks.alpha[0], table.blocks.sigma[0]
    np.testing.assert_allclose(start(still(table)), sigma * z, rtol=1e-6)
    clean = np.arange(10.0).reshape(5, 2)
    np.testing.assert_allclose(start(still(table), init=clean), alpha * clean + sigma * z, rtol=1e-5, atol=1e-5)


def test_student_t_start():
    p = process.linear(noise=process.student_t(3.0))
    table = solver.ddim(p, grid.uniform(p, 2))
    tail = lambda t: np.mean(np.abs(np.asarray(solver.sample(t, Silent(), KEY, (4000, 1)))) > 3)
    # 0.0577 for t with 3 degrees of freedom (within 4.5 standard errors), 0.0027 for the normal law
    assert abs(tail(still(table)) - 0.0577) < 4.5 * np.sqrt(0.0577 / 4000)
    assert tail(still(table, law=process.Gaussian())) < 0.01


def test_conditions_are_per_sample():
    d = exact.denoiser(WORLD2, LINEAR)
    table = solver.ddim(LINEAR, grid.uniform(LINEAR, 20))
    cond = jnp.array([0, 1, 0, 1])
    mixed = np.asarray(solver.sample(table, d, KEY, (4, 2), cond=cond))
    for label in (0, 1):
        one = np.asarray(solver.sample(table, d, KEY, (4, 2), cond=jnp.full(4, label)))
        np.testing.assert_allclose(mixed[label::2], one[label::2], atol=1e-5)
    assert np.all(np.linalg.norm(mixed[::2] - mixed[1::2], axis=1) > 0.1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Counting:
    """A stateful denoiser: predicts the number of calls so far plus the first state it saw."""

    def start(self, x):
        return {"calls": jnp.zeros(x.shape[0]), "first": x}

    def step(self, state, x, query):
        calls = state["calls"][:, None]
        return Prediction(calls + state["first"], 0 * x), {"calls": state["calls"] + 1, "first": state["first"]}


def test_denoiser_state_is_carried():
    x = jnp.array([[1.0], [20.0]])
    table = solver.heun(LINEAR, middle(LINEAR, 3), clock="rho")
    _, kept = solver.run(table, Counting(), x, record=("predictions",))
    np.testing.assert_allclose(kept["predictions"].data[..., 0], x[:, 0] + np.arange(6)[:, None])


def test_two_time_networks_are_told_the_jump():
    table = solver.ddim(LINEAR, grid.uniform(LINEAR, 4))
    jumps = dataclasses.replace(table, r=table.time[1:].copy())
    net = lambda params, x, t, cond, c_noise_r: 0 * x + jnp.stack([t, c_noise_r])
    d = denoiser(LINEAR, net, target="data", two_time=True)
    x = jnp.zeros((1, 2))
    _, plain = solver.run(table, d, x, record=("predictions",))
    _, told = solver.run(jumps, d, x, record=("predictions",))
    np.testing.assert_allclose(plain["predictions"].data[:, 0], np.stack([table.tau, table.tau], 1), atol=1e-6)
    np.testing.assert_allclose(told["predictions"].data[:, 0], np.stack([table.tau, table.time[1:]], 1), atol=1e-6)


def test_tree_states_run_each_block_by_its_own_columns():
    steps = 5
    one = solver.ddim(LINEAR, grid.uniform(LINEAR, steps))
    two = solver.dpm_solver_pp(VP, grid.uniform(VP, steps))
    table = dataclasses.replace(one, blocks={"a": one.blocks, "b": two.blocks})
    first, second = exact.denoiser(WORLD2, LINEAR), exact.denoiser(MIXTURE, VP)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, eq=False)
    class Both:
        def at(self, x, q):
            ask = lambda d, name: d.at(x[name], prediction.Query(q.t, None, q.alpha[name], q.sigma[name]))
            return {"a": ask(first, "a"), "b": ask(second, "b")}

    x = {"a": jax.random.normal(KEY, (3, 2)), "b": jax.random.normal(KEY, (3, 1))}
    out = solver.run(table, Both(), x)
    np.testing.assert_allclose(out["a"], solver.run(one, first, x["a"]), atol=1e-6)
    np.testing.assert_allclose(out["b"], solver.run(two, second, x["b"]), atol=1e-6)
    shapes = {"a": (3, 2), "b": (3, 1)}
    drawn = solver.sample(table, Both(), KEY, shapes)
    assert jax.tree_util.tree_map(np.shape, drawn) == shapes
    lone = solver.sample(one, first, KEY, (3, 2))
    assert rms(drawn["a"], lone) > 1e-2  # leaves have streams of their own
    # one block over a tree of leaves with the same path: the prediction is then a pair of trees
    fill = lambda x, value: jax.tree_util.tree_map(lambda v: 0 * v + value, x)
    whole = lambda x, t, r: Prediction(fill(x, 2.0), fill(x, 0.0))
    same = solver.sample(solver.ancestral(LINEAR, grid.uniform(LINEAR, 3)), whole, KEY, shapes)
    np.testing.assert_allclose(same["b"], np.full((3, 1), 2.0))


def test_rows_made_without_a_key_are_stepped_with_the_run_s():
    table = solver.device(solver.ancestral(LINEAR, grid.uniform(LINEAR, 3)))
    x, index = jax.random.normal(KEY, (3, 2)), jnp.arange(3, dtype=jnp.uint32) + 5
    rows, state = solver.rows_of(table), solver.begin(table, Silent(), x)
    for k in range(table.rows):
        row = jax.tree_util.tree_map(lambda leaf, k=k: leaf[k], rows)
        state, _ = solver.advance(table, Silent(), None, state, row, KEY, index)
    np.testing.assert_allclose(state.y[0], solver.run(table, Silent(), x, KEY, index), rtol=1e-6, atol=1e-6)


def test_a_name_is_a_record_and_a_list_a_shape():
    table = solver.ddim(LINEAR, grid.uniform(LINEAR, 3))
    known = programs.cache_info().currsize
    out, kept = solver.sample(table, Silent(), KEY, (3, 4), record="states")
    again, _ = solver.sample(table, Silent(), KEY, [3, 4], record=["states"])
    assert kept["states"].shape == (3, 3, 4) and programs.cache_info().currsize == known + 1
    np.testing.assert_array_equal(out, again)
    with pytest.raises(ValueError, match="record: 'state' is unknown"):
        solver.run(table, Silent(), out, record="state")


@pytest.mark.parametrize("target", prediction.TARGETS)
def test_rows_multiplied_out_beforehand_are_the_same_rows(target):
    """A linear denoiser's records are folded into its rows; the same denoiser as a plain function keeps them apart."""
    net = lambda p, x, t, cond: jnp.tanh(x * p + t) + 0.1 * cond[:, None]
    with jax.enable_x64(True):
        d = denoiser(VP, net, jnp.asarray(0.7), target=target, sigma_data=0.6)
        d = guidance.cfg(d, 1.7, cond=jnp.arange(3.0), null=-jnp.arange(3.0))
        plain = prediction.lift(lambda x, t, r: d(x, t, r))
        x, cells = jax.random.normal(KEY, (3, 2)), grid.uniform(VP, 4, t_min=0.1)
        groups = (
            (solver.euler, solver.ancestral, solver.ddim),
            (solver.heun, solver.dpm_solver_pp, functools.partial(solver.unipc, order=3), solver.ipndm),
        )
        for makers, weights in zip(groups, (0, 2)):
            tables = solver.device(solver.stack([make(VP, cells) for make in makers]))
            one = jax.tree.map(lambda v: v[0], tables)
            assert len(rows_for(one, d, KEY, None).fold) == weights and rows_for(one, plain, KEY, None).fold is None
            go = lambda tb, d: solver.run(tb, d, x, KEY, record="predictions")
            folded, apart = (jax.jit(jax.vmap(go, (0, None)))(tables, form) for form in (d, plain))
            for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(apart)):
                np.testing.assert_allclose(a, b, rtol=0, atol=2e-12)


def test_only_linear_denoisers_without_hooks_are_multiplied_out():
    d = denoiser(LINEAR, lambda p, x, t, cond: x, target="velocity")
    table = solver.device(solver.euler(LINEAR, grid.uniform(LINEAR, 4)))
    assert rows_for(table, d, None, None).fold == ()
    for other, hooks in (
        (d, solver.hooks(project=lambda y, row: y)),
        (guidance.cfg_pp(d, 0.5, cond=0, null=0), None),
        (guidance.cfg_rescale(d, 2.0, cond=0, null=0), None),
        (exact.denoiser(WORLD2, LINEAR), None),
    ):
        rows = rows_for(table, other, None, hooks)
        assert rows.fold is None
        np.testing.assert_array_equal(rows.blocks.A, table.blocks.A)
