"""The network-free algebra: the dense form is what the executor does, and the delta test sees every wrong entry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import PROCESSES, middle

from jaxdiff import prediction, process, solver
from jaxdiff.solver import grid, weights
from jaxdiff.solver.table import AffineBlock, Table


def random_table(seed, K=6, S=2, R=3):
    """A table that uses every column, with no meaning."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.uniform(-0.6, 0.6, shape)
    block = AffineBlock(
        p=draw(K), q=draw(K), A=draw(K, S), B=draw(K, R), C=draw(K), E=draw(K),
        alpha=np.linspace(0.2, 1.0, K + 1), sigma=np.linspace(1.0, 0.1, K + 1),
        start_scale=np.float64(1.0), start_noise=np.float64(0.3), law=process.Gaussian(), start_gain=np.float64(1.4),
    )  # fmt: skip
    ones = np.ones(K, bool)
    return Table(block, tau=np.linspace(0.9, 0.1, K), time=np.linspace(0.9, 0.0, K + 1), out=ones, live=ones)


def some_denoiser(x, t, r):
    raise AssertionError("solvers that have alpha and sigma call at()")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Nonlinear:
    """``x0_hat = sin(3 x) + t``, and the noise that goes with it on the row's path."""

    def at(self, x, query):
        data = jnp.sin(3 * x) + query.t
        return prediction.Prediction(data, (x - query.alpha * data) / query.sigma)


def test_dense_form_is_the_executor():
    with jax.enable_x64(True):
        x = jnp.linspace(-2.0, 2.0, 5)[:, None]
        key, drawn = jax.random.key(3), []
        z = jax.random.normal(jax.random.key(9), (6, 5, 1))
        hook = solver.hooks(noise=lambda keys, row, y: z[row.k])
        for seed in range(3):
            table = random_table(seed)
            out, kept = solver.run(table, Nonlinear(), x, key, hooks=hook, record=("states", "predictions"))
            # the draw before row 0, read from a run that starts at 0 and stops at once
            churn = solver.begin(table, Nonlinear(), 0 * x, key, jnp.arange(5, dtype=jnp.uint32)).y[0] / 0.3
            drawn.append(np.asarray(churn))
            noise = np.concatenate([churn[None], z])
            dense = solver.unroll(table, rows=True)
            D = np.asarray(kept["predictions"].data)
            expected = (
                dense.a[:, None, None] * np.asarray(x)
                + np.einsum("kj,jbc->kbc", dense.W, D)
                + np.einsum("kj,jbc->kbc", dense.N, noise)
                + dense.e[:, None, None]
            )
            np.testing.assert_allclose(kept["states"], expected, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(kept["states"][-1], out)
            last = solver.unroll(table)
            for whole, end in zip(dense, last):
                np.testing.assert_array_equal(whole[-1], end)
            assert np.all(np.triu(dense.W, 1) == 0)  # no row sees a later evaluation
        np.testing.assert_array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("path", ["linear", "vp", "edm"])
def test_check_sees_every_wrong_coefficient(path):
    p = PROCESSES[path]
    for table in (
        solver.ddim(p, middle(p, 4), eta=0.7),
        solver.dpm_solver_pp(p, middle(p, 4), lower_order_final="never"),
        solver.edm(p, middle(p, 4), s_churn=1.0),
    ):
        assert solver.check(table).ok()
        block = table.blocks
        for name in ("A", "B", "C", "start_noise", "start_gain"):
            column = getattr(block, name)
            if column is None:
                continue
            for place in np.argwhere(np.asarray(column) != 0):
                wrong = np.array(column, np.float64)
                wrong[tuple(place)] *= 1 + 1e-6
                broken = dataclasses.replace(table, blocks=dataclasses.replace(block, **{name: wrong}))
                assert not solver.check(broken).ok(), (name, place)
    constant = dataclasses.replace(block, E=np.full(table.rows, 1e-6))
    assert not solver.check(dataclasses.replace(table, blocks=constant)).ok()


def test_check_reads_grid_rows_only():
    p = PROCESSES["cosine"]
    table = solver.heun(p, middle(p, 3), clock="rho")
    stages = dataclasses.replace(table, out=np.ones(table.rows, bool))
    assert solver.check(table).ok() and solver.check(stages).ok()  # its stages are DDIM states, exact too
    # but of sigma: moving the stage's label breaks it only where the label is read
    sigma = np.array(table.blocks.sigma)
    sigma[-1] *= 1.01
    moved = dataclasses.replace(table, blocks=dataclasses.replace(table.blocks, sigma=sigma))
    assert not solver.check(moved).ok()


def test_algebra_refuses_what_it_cannot_read():
    p = PROCESSES["linear"]
    table = solver.ddim(p, grid.uniform(p, 3))
    for bad in (
        solver.stack([table, table]),
        dataclasses.replace(table, blocks={"a": table.blocks, "b": table.blocks}),
    ):
        for read in (solver.check, solver.unroll):
            with pytest.raises(ValueError, match=r"^table: needs one affine block with scalar coefficients$"):
                read(bad)


def test_moments_and_weights_against_quadrature():
    u, gauss = np.polynomial.legendre.leggauss(60)
    u, gauss = (u + 1) / 2, gauss / 2
    for H in (1e-8, 1e-3, 0.1, 0.5, 1.0, 2.9, 3.1, 7.0, 20.0):
        kernel = H * np.exp(-(1 - u) * H) * gauss
        expected = np.array([kernel @ u**m for m in range(5)])
        np.testing.assert_allclose(weights.moments(H, 5), expected, rtol=2e-13)
        nodes = np.array([0.0, -0.7, -1.9, 1.0])
        w = weights.exponential(H, nodes)
        for degree in range(4):
            np.testing.assert_allclose(w @ nodes**degree, kernel @ u**degree, rtol=1e-11, atol=1e-13 * H)
        np.testing.assert_allclose(w.sum(), -np.expm1(-H), rtol=1e-11)
    np.testing.assert_array_equal(weights.moments(np.inf, 3), np.ones(3))
