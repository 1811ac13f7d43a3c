"""The switch: its ends are its parts, each row asks one part, states of the others rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, process, solver
from jaxdiff.guidance.switch import stitch, switch
from jaxdiff.solver import grid

LINEAR = process.linear()
GOOD = exact.denoiser(exact.Gaussian([0.5], 0.3), LINEAR)
BAD = exact.denoiser(exact.Gaussian([-2.0], 1.0), LINEAR)
TABLE = solver.dpm_solver_pp(LINEAR, grid.uniform(LINEAR, 10))
X = jnp.linspace(-2, 2, 5)[:, None]


def test_ends_are_the_parts_and_error_falls_with_the_better_models_share():
    out = [solver.run(stitch(TABLE, f), switch((BAD, GOOD)), X) for f in (0.0, 0.3, 0.6, 1.0)]
    np.testing.assert_allclose(out[0], solver.run(TABLE, GOOD, X), rtol=0, atol=1e-6)
    np.testing.assert_allclose(out[-1], solver.run(TABLE, BAD, X), rtol=0, atol=1e-6)
    errors = [float(jnp.max(jnp.abs(v - out[0]))) for v in out]
    assert errors == sorted(errors) and errors[1] > 1e-4


def test_one_branch_runs_a_row_also_under_vmap_over_tables():
    table = stitch(TABLE, 0.5)
    both = solver.stack([table, table])
    d = switch((BAD, GOOD))
    text = str(jax.make_jaxpr(jax.vmap(lambda tb: solver.run(tb, d, X)))(both))
    assert " cond[" in text


def test_refusals():
    assert stitch(TABLE, 0.25).mode == (0, 0, 0, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="no modes"):
        solver.run(TABLE, switch((BAD, GOOD)), X)
    with pytest.raises(ValueError, match=r"fraction: 1\.5"):
        stitch(TABLE, 1.5)
    with pytest.raises(ValueError, match="none given"):
        switch(())
