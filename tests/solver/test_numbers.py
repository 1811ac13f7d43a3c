"""Numbers: padded stacks equal lone runs, float32 follows float64, every length is finite, narrow dtypes work."""

import dataclasses

import deterministic_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stochastic_cases
from solver_cases import MIXTURE, PROCESSES, SOLVERS, middle, rms

from jaxdiff import exact, solver
from jaxdiff.prediction import Prediction
from jaxdiff.solver import grid

MAKERS = {**SOLVERS, **deterministic_cases.ALL, **stochastic_cases.ALL, **stochastic_cases.DELTA_FAILS}
LINEAR, VP, EDM = PROCESSES["linear"], PROCESSES["vp"], PROCESSES["edm"]
KEY = jax.random.key(7)
MILD = exact.GaussianMixture([0.5, 0.5], [-0.6, 0.7], [0.4, 0.3])


def test_padded_stacks_equal_the_lone_runs():
    steps = (3, 7, 1, 5, 4, 2, 6, 3, 5, 2, 8, 4, 3, 6, 2, 5, 4, 3)
    tables = [maker(EDM, grid.edm_rho(EDM, n)) for maker, n in zip(SOLVERS.values(), steps, strict=True)]
    with jax.enable_x64(True):
        d = exact.denoiser(MIXTURE, EDM)
        x = 80 * jax.random.normal(KEY, (4, 1))
        many = jax.jit(jax.vmap(lambda tb: solver.run(tb, d, x, KEY)))(solver.stack(tables))
        for i in (0, 3, 5, 8, 12, 15, 17):
            np.testing.assert_allclose(many[i], solver.run(tables[i], d, x, KEY), rtol=0, atol=1e-12)


@jax.jit
def _with_noise(tables, d, x, noise):
    hook = solver.hooks(noise=lambda keys, row, y: noise[row.k])
    return jax.vmap(lambda tb: solver.run(tb, d, x, KEY, hooks=hook))(tables)


@pytest.mark.parametrize("path", ["linear", "vp", "edm"])
def test_float32_is_close_to_float64(path):
    # relative RMS over 32 samples, 20 steps on finite and on full grids, the same start and draws in both
    p = PROCESSES[path]
    tables = [maker(p, make(p, 20)) for maker in SOLVERS.values() for make in (middle, grid.logsnr)]
    many = solver.stack(tables)
    many = dataclasses.replace(many, blocks=dataclasses.replace(many.blocks, start_noise=None, start_gain=None))
    x = np.asarray(jax.random.normal(KEY, (32, 1))) * many.blocks.start_scale[0]
    noise = np.asarray(jax.random.normal(jax.random.key(1), (64, 32, 1)))
    low = np.asarray(_with_noise(many, exact.denoiser(MILD, p), jnp.asarray(x), jnp.asarray(noise)))
    with jax.enable_x64(True):
        wide = (jnp.asarray(v, jnp.float64) for v in (x.astype(np.float32), noise))
        high = np.asarray(_with_noise(many, exact.denoiser(MILD, p), *wide))
    assert low.dtype == np.float32 and high.dtype == np.float64
    assert max(rms(a, b) for a, b in zip(low, high)) < 2e-5


def all_finite(path, names):
    """Makers at lengths, ``(name, steps)`` each, as one stack."""
    p = PROCESSES[path]
    # a chain of 1,000 training steps has fewer up to a t_max below 1
    fits = lambda name: name != "discrete" or max(steps for _, steps in names) <= 1000 * p.t_max
    grids = [make for name, make in grid.GRIDS.items() if fits(name)]
    # every grid in turn, differently for every solver
    tables = [MAKERS[name](p, grids[(7 * i + steps) % len(grids)](p, steps)) for i, (name, steps) in enumerate(names)]
    x = jnp.array([[-3.0], [0.0], [0.4]]) * float(tables[0].blocks.start_scale)
    d = exact.denoiser(MIXTURE, p)
    out = np.asarray(jax.jit(jax.vmap(lambda tb: solver.run(tb, d, x, KEY)))(solver.stack(tables)))
    bad = [name for name, o in zip(names, out) if not np.all(np.isfinite(o))]
    assert out.dtype == np.float32 and not bad, bad


@pytest.mark.parametrize("path", PROCESSES)
def test_finite(path):
    all_finite(path, [(name, steps) for name in SOLVERS for steps in (1, 2, 3, 5, 10, 50)])


@pytest.mark.slow
@pytest.mark.parametrize("path", PROCESSES)
def test_finite_for_every_length_to_200(path):
    for low in range(1, 201, 40):
        all_finite(path, [(name, steps) for name in SOLVERS for steps in range(low, low + 40)])


@pytest.mark.slow
@pytest.mark.parametrize("path", PROCESSES)
def test_every_maker_is_finite_at_every_length(path):
    """Every maker and option at every length to 200, each length on a process of its own: over the eleven processes all
    lengths, on each process every eleventh."""
    turn, count = list(PROCESSES).index(path), len(PROCESSES)
    for low, high in ((1, 12), (13, 50), (51, 100), (101, 200)):
        names = [
            (name, steps)
            for i, name in enumerate(MAKERS)
            for steps in range(low, high + 1)
            if (i + steps) % count == turn and (name != "dc" or steps < 25)  # for few steps: carries all its history
        ]
        all_finite(path, names)


def test_the_makers_cover_the_registry():
    """Every registered solver is called by some case, so that the tests above leave none out."""
    called = set()
    for maker in MAKERS.values():
        table_of = maker
        while hasattr(table_of, "func"):
            table_of = table_of.func
        called |= {table_of} | {
            cell.cell_contents for cell in table_of.__closure__ or () if callable(cell.cell_contents)
        }
        called |= {getattr(solver, name, None) for name in table_of.__code__.co_names}
    assert not {name for name, maker in solver.SOLVERS.items() if maker not in called}


@pytest.mark.slow
@pytest.mark.parametrize("path", PROCESSES)
def test_finite_for_1000_steps(path):
    all_finite(path, [(name, 1000) for name in SOLVERS])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """A denoiser with a dynamic scale, as guidance has."""

    inner: object
    scale: object

    def at(self, x, query):
        p = self.inner.at(x, query)
        return Prediction(self.scale * p.data, p.noise)


def test_vmap_over_scales_and_grad_through_a_run():
    inner = exact.denoiser(MIXTURE, LINEAR)
    table = solver.dpm_solver_pp(LINEAR, grid.uniform(LINEAR, 4))
    x = jax.random.normal(KEY, (3, 1))
    scales = jnp.array([0.5, 1.0, 2.0])
    ends = jax.jit(jax.vmap(lambda s: solver.run(table, Scaled(inner, s), x)))(scales)
    for s, end in zip(scales, ends):
        np.testing.assert_allclose(end, solver.run(table, Scaled(inner, s), x), atol=1e-5)
    loss = lambda s: jnp.sum(solver.run(table, Scaled(inner, s), x))
    slope = jax.jit(jax.grad(loss))(jnp.float32(1.0))
    numeric = (loss(jnp.float32(1.01)) - loss(jnp.float32(0.99))) / 0.02
    assert abs(slope - numeric) < 0.02 * abs(numeric)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_states(dtype):
    d = exact.denoiser(MIXTURE, LINEAR)
    for table in (
        solver.dpm_solver_pp(LINEAR, grid.uniform(LINEAR, 8)),
        solver.ancestral(LINEAR, grid.uniform(LINEAR, 6)),
    ):
        out = solver.sample(table, d, KEY, (16, 1), dtype=dtype)
        assert out.dtype == dtype and np.all(np.isfinite(np.asarray(out, np.float32)))


def test_network_may_compute_in_another_dtype():
    low = lambda x, t, r: Prediction((0.5 * x).astype(jnp.bfloat16), (0.5 * x).astype(jnp.bfloat16))
    out = solver.run(solver.dpm_solver_pp(LINEAR, middle(LINEAR, 4)), low, jnp.ones((2, 1)))
    assert out.dtype == jnp.float32
