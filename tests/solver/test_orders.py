"""Convergence orders as slopes, in float64, against the exact 1-D flow of a mixture, through the executor.

The slope is log2 of the RMS-error ratio between 64 and 128 steps, 17 starting points.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import DETERMINISTIC, MIXTURE, PATHS, PROCESSES, middle

from jaxdiff import exact, solver
from jaxdiff.solver import grid

ORDER = {
    name: 2 if name.startswith(("heun", "dpm_pp_2")) or name == "edm" else 1 for name in DETERMINISTIC
}  # dpm_pp_2: a first-order first step costs O(h^2) once, so no exact start is needed


def slopes(p, make_grid, names, steps=(64, 128)):
    """{solver: slope} from one compiled call for all solvers and lengths."""
    many = solver.stack([DETERMINISTIC[name](p, make_grid(p, n)) for name in names for n in steps])
    ends = make_grid(p, steps[0])
    first, last = ends[0], ends[len(ends)]
    with jax.enable_x64(True):
        d, flow = exact.denoiser(MIXTURE, p), exact.quantile_flow(MIXTURE, p)
        x = jnp.asarray(first.alpha * 0.3 + first.sigma * np.linspace(-2, 2, 17))[:, None]

        @jax.jit
        def errors(many, x):
            truth = flow.between(x, first.alpha, first.sigma, last.alpha, last.sigma)
            out = jax.vmap(lambda tb: solver.run(tb, d, x))(many)
            return jnp.sqrt(jnp.mean((out - truth) ** 2, (1, 2)))

        error = np.asarray(errors(many, x)).reshape(len(names), len(steps))
    assert np.all(error[:, -1] > 1e-9)  # far from rounding, else a slope says nothing
    return dict(zip(names, np.log2(error[:, 0] / error[:, -1])))


@pytest.mark.parametrize("path", PATHS)
def test_orders_between_finite_ends(path):
    # t=.9 to .1: smooth, lam finite at both ends. Left out there: Heun in time on ddpm, whose beta jumps between
    # indices, so that the velocity is not smooth in t (1.3 measured); in rho the same path is smooth.
    names = [name for name in DETERMINISTIC if (path, name) != ("ddpm", "heun")]
    measured = slopes(PROCESSES[path], middle, names)
    for name, slope in measured.items():
        # ve in raw time is stiff (sigma falls by e^0.85 in .1): 1.19 at 128 steps, 1.0 in the limit
        band = 0.25 if (path, name) == ("ve", "euler") else 0.12
        assert abs(slope - ORDER[name]) < band, (name, slope)


FULL = {
    # grids to the exact ends, where lam is infinite: (path, grid, {solver: (low, high)})
    "edm": ("edm", grid.edm_rho, {"ddim": (0.9, 1.1), "heun": (1.9, 2.2), "edm": (1.9, 2.2), "dpm_pp_2": (1.9, 2.2)}),
    "linear": (
        "linear",
        grid.cosine,
        {"euler": (0.9, 1.1), "heun": (1.85, 2.1), "heun_rho": (1.9, 2.2), "dpm_pp_2_never": (1.9, 2.3)},
    ),
    "cosine": (
        "cosine",
        grid.cosine,
        {
            "euler": (0.9, 1.1),
            "ddim": (0.9, 1.1),
            "heun": (1.85, 2.1),
            "heun_rho": (1.9, 2.2),
            "dpm_pp_2": (1.9, 2.4),
        },
    ),
    # equal steps in t: Heun in time keeps order 2 (its last, first-order step costs O(h^2)); solvers in rho and lam, whose
    # first and last steps are infinite in that clock, do not
    "linear_uniform": (
        "linear",
        grid.uniform,
        {"ddim": (0.9, 1.1), "heun": (1.9, 2.15), "heun_rho": (1.6, 2.0), "dpm_pp_2": (1.2, 1.7)},
    ),
}


@pytest.mark.parametrize("case", FULL)
def test_orders_of_full_grids(case):
    path, make, expected = FULL[case]
    measured = slopes(PROCESSES[path], make, list(expected))
    for name, slope in measured.items():
        low, high = expected[name]
        assert low < slope < high, (name, slope)


@pytest.mark.parametrize("path", ["linear", "vp", "edm"])
def test_exact_in_one_step_where_the_flow_is_straight(path):
    # one point of data: x moves on a straight line in (alpha, sigma); every solver but Runge-Kutta in raw time is exact
    p = PROCESSES[path]
    tables = solver.stack([DETERMINISTIC[n](p, [0.9, 0.3]) for n in DETERMINISTIC if n not in ("euler", "heun")])
    start, end = p.coefficients(np.float64(0.9)), p.coefficients(np.float64(0.3))
    with jax.enable_x64(True):
        x = jnp.array([[-3.0], [0.2], [5.0]])
        d = exact.denoiser(exact.Delta(0.7), p)
        out = jax.jit(jax.vmap(lambda tb: solver.run(tb, d, x)))(tables)
        truth = end.alpha * 0.7 + end.sigma * (x - start.alpha * 0.7) / start.sigma
        np.testing.assert_allclose(out, np.broadcast_to(truth, out.shape), rtol=0, atol=1e-12)
