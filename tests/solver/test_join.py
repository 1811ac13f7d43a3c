"""Tables of a state's parts as one: each part runs as it does alone, in one scan with one prediction a row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import discrete, exact, guidance, process, solver
from jaxdiff.solver import grid

KEY = jax.random.key(5)
LINEAR, MASKED = process.linear(), discrete.masked(3)
JOINT = process.per_leaf({"image": LINEAR, "label": MASKED})
IMAGE = exact.GaussianMixture([0.4, 0.6], [-1.0, 0.8], [0.2, 0.1])
LABEL = exact.enumerable(np.random.default_rng(0).dirichlet(np.ones(27) / 2).reshape(3, 3, 3))
BOTH = exact.denoiser(exact.Independent({"image": IMAGE, "label": LABEL}), JOINT)
TOKENS = discrete.ancestral(MASKED, grid.uniform(MASKED, 4))
SHAPES = {"image": (64, 2), "label": (64, 3)}


def own_noise(table, leaf):
    """Hooks that give a table alone the noise it gets as leaf ``leaf`` of a joint state."""
    block = solver.device(table).blocks
    fold = lambda keys: jax.vmap(jax.random.fold_in, (0, None))(keys, leaf)
    return solver.hooks(noise=lambda keys, row, y: block.noise(fold(keys), y))


@pytest.mark.parametrize("maker", [solver.dpm_solver_pp, solver.ancestral])
def test_every_part_runs_as_it_does_alone(maker):
    continuous = maker(LINEAR, grid.uniform(LINEAR, 4))
    table = solver.join({"image": continuous, "label": TOKENS})
    assert table.rows == table.nfe == 4 and table.law_name == {"image": "gaussian", "label": "mask"}
    x, kept = solver.sample(table, BOTH, KEY, SHAPES, record="states")
    assert jax.tree.map(np.shape, x) == SHAPES and x["label"].dtype == jnp.int32
    # the starts: leaf i draws with its sample's key folded with i, as the processes' joint prior does
    keys = solver.sample_keys(KEY, jnp.arange(64))
    shape, dtype = {"image": (2,), "label": (3,)}, {"image": jnp.float32, "label": jnp.int32}
    start = jax.vmap(lambda key: JOINT.prior.sample(key, shape, dtype))(keys)
    for i, (name, alone, world, path) in enumerate(
        [("image", continuous, IMAGE, LINEAR), ("label", TOKENS, LABEL, MASKED)]
    ):
        hook = own_noise(alone, i) if alone.blocks.draws else None
        d = exact.denoiser(world, path)
        out, states = solver.run(alone, d, start[name], KEY, hooks=hook, record="states")
        if name == "label":
            np.testing.assert_array_equal(kept["states"][name], states["states"])
            np.testing.assert_array_equal(x[name], out)
        else:  # two programs may fuse products differently
            np.testing.assert_allclose(kept["states"][name], states["states"], rtol=0, atol=2e-6)


def test_deterministic_parts_draw_nothing():
    count = lambda table: str(
        jax.make_jaxpr(lambda x: solver.run(table, BOTH, x, KEY))(
            {"image": jnp.zeros((4, 2)), "label": jnp.full((4, 3), 3)}
        )
    ).count("erf_inv")  # of normal draws
    ddim = lambda eta: solver.ddim(LINEAR, grid.uniform(LINEAR, 4), eta=eta)
    join = lambda eta: solver.join({"image": ddim(eta), "label": TOKENS})
    assert count(join(0.0)) == 0 < count(join(1.0))


def test_batches_and_offsets_agree_to_the_bit_in_tokens():
    table = solver.join({"image": solver.ddim(LINEAR, grid.uniform(LINEAR, 4)), "label": TOKENS})
    whole = solver.sample(table, BOTH, KEY, SHAPES)
    part = solver.sample(table, BOTH, KEY, {"image": (16, 2), "label": (16, 3)}, index=32)
    np.testing.assert_array_equal(part["label"], whole["label"][32:48])
    np.testing.assert_allclose(part["image"], whole["image"][32:48], rtol=0, atol=2e-6)
    # and stacks of joined tables run in one call
    remasked = discrete.ancestral(MASKED, grid.uniform(MASKED, 4), remask=1.0)
    other = solver.join({"image": solver.dpm_solver_pp(LINEAR, grid.uniform(LINEAR, 4)), "label": remasked})
    tables = solver.stack([table, other])
    start = {"image": jnp.zeros((3, 2)), "label": jnp.full((3, 3), 3)}
    out = jax.vmap(lambda table: solver.run(table, BOTH, start, KEY))(tables)
    np.testing.assert_array_equal(out["label"][1], solver.run(other, BOTH, start, KEY)["label"])


def test_wrappers_see_trees_of_levels():
    """A mix of joint denoisers, asked directly at a time and by a table's row, mixes every part in its own way."""
    other = exact.Independent({"image": exact.Gaussian(1.0, 0.5), "label": exact.enumerable(np.ones((3, 3, 3)))})
    mixed = guidance.linear_mix([BOTH, exact.denoiser(other, JOINT)], [None, 0.25])
    x = {"image": jnp.array([[0.3], [-1.0]]), "label": jnp.array([[0, 3, 3], [3, 3, 1]])}
    got = mixed(x, 0.6)
    means = [world.worlds["image"].predict(x["image"], 0.4, 0.6).data for world in (BOTH.world, other)]
    np.testing.assert_allclose(got["image"].data, 0.75 * means[0] + 0.25 * means[1], rtol=1e-5, atol=1e-6)
    mu = np.exp(LABEL.predict(x["label"]).log_probs) ** 0.75
    hidden = np.asarray(x["label"]) == 3
    np.testing.assert_allclose(
        np.exp(got["label"].log_probs)[hidden], (mu / mu.sum(-1, keepdims=True))[hidden], rtol=1e-4, atol=1e-6
    )
    table = solver.join({"image": solver.ddim(LINEAR, [0.6, 0.1]), "label": discrete.ancestral(MASKED, [0.6, 0.1])})
    _, kept = solver.run(table, mixed, x, KEY, record="predictions")
    for a, b in zip(jax.tree.leaves(kept["predictions"]), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_named():
    image = solver.ddim(LINEAR, grid.uniform(LINEAR, 4))
    table = solver.join({"image": image, "label": TOKENS})
    late = discrete.ancestral(MASKED, [1.0, 0.7, 0.5, 0.25, 0.0])
    join = lambda other: solver.join({"image": image, "label": other})
    lone = exact.denoiser(IMAGE, LINEAR)
    cases = {
        "tables: ['image'] has 4 rows, ['label'] 3; joined tables share their rows": lambda: join(
            discrete.ancestral(MASKED, grid.uniform(MASKED, 3))
        ),
        "tables: tau of row 1 is 0.75 in ['image'], 0.7 in ['label']; joined tables share it": lambda: join(late),
        "tables: time of row 4 is 0 in ['image'], 0.1 in ['label']": lambda: join(
            discrete.ancestral(MASKED, [1.0, 0.75, 0.5, 0.25, 0.1])
        ),
        "tables: mode is None in ['image'], (0, 0, 1, 1) in ['label']": lambda: join(
            dataclasses.replace(TOKENS, mode=(0, 0, 1, 1))
        ),
        "tables: PyTreeDef": lambda: join(3),
        "table: made for {'image': 'gaussian', 'label': 'mask'} noise, but the denoiser's process has gaussian": lambda: (
            solver.sample(table, lone, KEY, SHAPES)
        ),
        "table: made for gaussian noise, but the denoiser's process has {'image': 'gaussian', 'label': 'mask'}": lambda: (
            solver.sample(image, BOTH, KEY, (4, 2))
        ),
        "shape: a tree PyTreeDef": lambda: solver.sample(table, BOTH, KEY, {"image": (4, 2)}),
        "tables: table 0 has a AffineBlock, table 1 a CategoricalBlock": lambda: solver.stack(
            [solver.join({"a": image}), solver.join({"a": TOKENS})]
        ),
    }
    for message, build in cases.items():
        with pytest.raises(ValueError) as error:
            build()
        assert str(error.value).startswith(message) and "\n" not in str(error.value), str(error.value)
    assert solver.join(image).rows == 4  # a lone table is its own join
