"""The switch: its ends are its parts, each row asks one part, states of the others rest."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import exact, prediction, process, solver
from jaxdiff.guidance import cfg, compose, linear_mix
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blind:
    """The same denoiser, which cannot see all rows at once."""

    inner: Any

    def start(self, x):
        return prediction.start(self.inner, x)

    def step(self, state, x, query):
        return prediction.evaluate(self.inner, state, x, query)


def net(params, x, t, cond):
    return jnp.tanh(x * params + t)


VP = process.vp(t_max=0.99)
ONE = prediction.denoiser(VP, net, jnp.float32(0.5), target="noise", clock="half_log_snr")
TWO = prediction.denoiser(VP, net, jnp.float32(0.1), target="velocity", clock="half_log_snr")
EXACT = exact.denoiser(exact.Gaussian([0.5], 0.3), VP)
SEVERAL = {
    "switch": switch((ONE, TWO)),
    "switch with an exact part": switch((EXACT, ONE)),
    "mix": linear_mix((ONE, TWO), (None, 0.3)),
    "mix with an exact part": linear_mix((TWO, EXACT), (0.7, 0.3)),
    "compose": compose(ONE, (jnp.int32(1), jnp.int32(2)), (0.5, 0.2), null=jnp.int32(0)),
    "guided switch": cfg(switch((ONE, TWO)), 2.0, cond=jnp.int32(1), null=jnp.int32(0)),
    "no networks": switch((EXACT, EXACT)),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_noise_levels_are_worked_out_before_the_loop_for_every_part(name):
    """The networks are told log-SNR, a logarithm: none is left in the loop's body, and the samples are the same."""
    d = SEVERAL[name]
    table = stitch(solver.ddim(VP, grid.uniform(VP, 8)), 0.5)

    def body(d):
        eqns = jax.make_jaxpr(lambda: solver.run(table, d, X))().eqns
        return str([e for e in eqns if e.primitive.name == "scan"][-1].params["jaxpr"])

    if not name.startswith("no"):
        assert " log " not in body(d) and " log " in body(Blind(d))
    go = jax.jit(lambda d: solver.run(table, d, X))
    np.testing.assert_allclose(go(d), go(Blind(d)), rtol=5e-6, atol=5e-6)


def test_refusals():
    assert stitch(TABLE, 0.25).mode == (0, 0, 0, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="no modes"):
        solver.run(TABLE, switch((BAD, GOOD)), X)
    with pytest.raises(ValueError, match=r"fraction: 1\.5"):
        stitch(TABLE, 1.5)
    with pytest.raises(ValueError, match="none given"):
        switch(())
    elsewhere = exact.denoiser(exact.Gaussian([0.0], 1.0), process.vp())
    for of in (switch, lambda parts: linear_mix(parts, (0.5, 0.5))):
        with pytest.raises(
            ValueError, match=r"parts: processes '\w+' and '\w+' given; need one \(prediction.on_path"
        ):
            of((GOOD, elsewhere))
