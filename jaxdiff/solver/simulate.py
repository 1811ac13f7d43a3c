"""Plain simulation of a reverse-time law: Euler-Maruyama, and a predictor with corrections in place (azula's)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.build import NOISE, Rows, first_order, require_gaussian
from jaxdiff.solver.exponential import check_choice, frame
from jaxdiff.solver.grid import as_grid
from jaxdiff.solver.multistep import VARIANTS, allowed_order, check_order, check_tail, taylor_weights
from jaxdiff.solver.renoise import check_noise
from jaxdiff.solver.table import Table

__all__ = ["euler_maruyama", "predictor_corrector"]


def euler_maruyama(
    process: Process,
    grid: Any,
    *,
    order: int = 1,
    variant: str = "midpoint",
    eta: float = 1.0,
    temperature: float = 1.0,
    lower_order_final: str = "auto",
    stochastic: bool | None = None,
) -> Table:
    """Euler-Maruyama on the reverse SDE ``dv = (1 + eta^2)/T E d rho + eta dw(rho^2)`` of ``v = x/alpha``, rho = sigma/alpha.

    ``x_s = (alpha_s/alpha_t) x_t + (1 + eta^2)/T (sigma_s - sigma_t alpha_s/alpha_t) E + eta alpha_s sqrt(rho_t^2 -
    rho_s^2) z``. ``eta`` 0 is DDIM, 1 DDPM's reverse SDE; ``temperature`` T divides the score. ``order`` 2 and 3 replace E
    by the last noise predictions with the weights of multistep :func:`dpm_solver` and its ``variant`` (diffusers'
    sde-dpmsolver at eta 1, the noise-form SDE-DPM-Solver). Weak order ``min(order, 2)``. Unlike :func:`ddim`, its steps
    do not keep the marginals of one point of data, and a long step overshoots. Steps from alpha = 0 and to sigma = 0 are
    DDIM's (the latter without noise). ``lower_order_final`` as in dpm_solver_pp. Raises ValueError for negative eta, T <= 0,
    other orders and names, and non-Gaussian processes.
    """
    grid = as_grid(process, grid)
    check_noise(eta, 1.0, "euler_maruyama")
    check_order(order, (1, 2, 3), "euler_maruyama()")
    check_choice("variant", variant, VARIANTS)
    check_tail(lower_order_final)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: {temperature} given; euler_maruyama() needs 0 < temperature < inf")
    if eta > 0:
        require_gaussian(process, "euler_maruyama")
    rows = Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        if at.alpha == 0 or to.sigma == 0:
            std = to.sigma * min(eta, 1.0)
            rows.add(at, *first_order(at, to, std), C=std)
            continue
        ratio, scale, H = frame(at, to, "noise")
        p = allowed_order(grid, i, order, lower_order_final)
        nodes = np.array([(grid[i - j].lam - at.lam) / (to.lam - at.lam) for j in range(p)])
        gains = (1 + eta**2) / temperature * scale * taylor_weights(H, nodes, variant)
        std = eta * to.alpha * math.sqrt((at.rho - to.rho) * (at.rho + to.rho))
        rows.add(at, [ratio], list(gains), C=std, form=NOISE)
    return rows.table(grid[len(grid)], stochastic=eta > 0 or bool(stochastic))


def predictor_corrector(process: Process, grid: Any, *, corrections: int = 1, delta: float = 0.01) -> Table:
    """DDIM steps, each after ``corrections`` partial redraws of the noise at the level it starts from.

    A correction is ``x <- alpha D + sqrt(1 - delta) (x - alpha D) + sqrt(delta) sigma z``, an Ornstein-Uhlenbeck step of the
    law of x_t given x0 = D; ``delta`` in [0, 1], 0 leaves x as it is and 1 draws it anew. ``corrections + 1`` evaluations a
    step. Exact on one point of data. Langevin steps of a chosen signal-to-noise ratio around any table are the hook
    ``langevin.corrector``. Raises ValueError for other ranges and non-Gaussian processes.
    """
    grid = as_grid(process, grid)
    if isinstance(corrections, bool) or corrections != int(corrections) or corrections < 0:
        raise ValueError(f"corrections: {corrections} given; predictor_corrector() needs a whole number >= 0")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta: {delta} given; predictor_corrector() needs 0 <= delta <= 1")
    require_gaussian(process, "predictor_corrector")
    keep, rows = math.sqrt(1 - delta), Rows(process, grid[0])
    for i in range(len(grid)):
        at, to = grid[i], grid[i + 1]
        for _ in range(int(corrections)):
            rows.add(at, [keep], [at.alpha * (1 - keep)], C=math.sqrt(delta) * at.sigma, out=False)
        rows.add(at, *first_order(at, to))
    return rows.table(grid[len(grid)], stochastic=True)
