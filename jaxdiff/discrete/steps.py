"""Steps of the reverse chain of a masked process, as tables of probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.discrete.masked import Masked
from jaxdiff.solver.categorical import CategoricalBlock
from jaxdiff.solver.grid import as_grid
from jaxdiff.solver.table import Table, freeze

__all__ = ["ancestral"]


def ancestral(process: Masked, grid: Any, *, remask: float = 0.0) -> Table:
    """Ancestral sampling of a masked process: a masked position is revealed with probability
    ``u = (alpha_s - alpha_t)/(1 - alpha_t)``, as a token drawn from mu (2107.03006 [140], 2406.04329; extra-5).

    ``remask`` in [0, 1]: the share of the largest possible remasking, ``c = remask min(1, (1 - alpha_s)/alpha_t)`` and
    ``u = (alpha_s - (1 - c) alpha_t)/(1 - alpha_t)``, ReMDM with rescaling (2503.00307): later calls may then correct tokens
    drawn earlier; the expected share of masks is the same. ``grid``: as for every maker; one that ends at t = 0 leaves no
    mask. Exact where a step reveals one position; several at once are drawn independently: order 1 in the number of steps.
    Raises ValueError for ``remask`` outside [0, 1] and for processes without a mask.
    """
    if not isinstance(process, Masked):
        raise ValueError(f"process: {getattr(process, 'name', process)!r} given; ancestral() needs a masked process")
    if not 0 <= remask <= 1:
        raise ValueError(f"remask: {remask} given; ancestral() needs 0 <= remask <= 1")
    chain: Any = process
    points = as_grid(chain, grid)
    alpha, sigma = points.alpha, points.sigma
    # where nothing is revealed yet there is nothing to mask again
    room = np.minimum(1.0, sigma[1:] / np.where(alpha[:-1] > 0, alpha[:-1], np.inf))
    hide = remask * room
    # alpha_s - (1 - c) alpha_t, with its digits kept near data
    reveal = (sigma[:-1] - sigma[1:] + hide * alpha[:-1]) / sigma[:-1]
    count = len(points)
    block = CategoricalBlock(
        B=reveal[:, None],
        remask=hide if remask > 0 else None,
        alpha=alpha,
        sigma=sigma,
        law=process.prior,
        mask_id=process.mask_id,
    )
    return freeze(
        Table(
            blocks=block,
            tau=points.time[:-1],
            time=points.time,
            out=np.ones(count, bool),
            live=np.ones(count, bool),
        )
    )
