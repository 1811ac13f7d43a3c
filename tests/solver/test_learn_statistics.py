"""DPM-Solver-v3's model statistics: closed forms on Gaussian data, where one step on them is exact; refusals."""

import jax
import numpy as np
import pytest

from jaxdiff import exact, process, solver
from jaxdiff.solver import grid
from jaxdiff.solver.learn import ems

VP = process.vp()
MEAN, STD = 0.7, 0.4


def test_gaussian_data_in_closed_form_and_one_exact_step():
    with jax.enable_x64(True):
        world = exact.Gaussian([MEAN], STD**2)
        d = exact.denoiser(world, VP)
        x0 = world.sample(jax.random.key(0), 8, np.float64)
        found = ems(d, x0, process=VP, count=400, lam_min=-3.5, lam_max=3.0)
        rho2 = np.exp(-2 * found.lam)
        linear = rho2 / (STD**2 + rho2)
        np.testing.assert_allclose(found.l, linear, atol=1e-12)
        np.testing.assert_allclose(found.s, 0, atol=1e-6)
        # b = df/dlam of f = -l mean; l' is a difference of second order
        np.testing.assert_allclose(found.b, 2 * MEAN * linear * (1 - linear), atol=2e-4)
        g = grid.from_times(VP, VP.time(np.array([-3.0, 2.5])))
        table = solver.dpm_solver_v3(VP, g, order=1, **found._asdict())
        x = np.linspace(-2, 2, 5)[:, None]
        (a0, a1), (s0, s1) = g.alpha, g.sigma
        ends = a1 * MEAN + np.sqrt((a1**2 * STD**2 + s1**2) / (a0**2 * STD**2 + s0**2)) * (x - a0 * MEAN)
        np.testing.assert_allclose(solver.run(table, d, x), ends, atol=1e-3)
        assert np.max(np.abs(solver.run(solver.ddim(VP, g), d, x) - ends)) > 0.1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"count": 2}, "count: 2 given"),
        ({"ridge": -1.0}, "ridge: -1.0 given"),
        ({"lam_min": 2.0, "lam_max": 1.0}, "lam_min, lam_max: 2.0, 1.0 given"),
        ({"process": process.linear(noise=process.student_t(5.0))}, "needs Gaussian noise"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        ems(exact.denoiser(exact.Gaussian([MEAN], STD**2), VP), np.zeros((2, 1)), **{"process": VP, **settings})
