"""A solver is a coefficient table; one scan runs them all.

Makers ``(process, grid, options) -> Table`` are listed in ``SOLVERS``, grids in ``grid.GRIDS``. ``sample`` is the compiled
entry, ``run`` the pure one; ``stack`` puts tables of many solvers into one vmapped call; ``check`` and ``unroll`` prove
things about a table without a network.
"""

from jaxdiff.solver import grid, weights
from jaxdiff.solver.algebra import Check, Dense, check, unroll
from jaxdiff.solver.executor import Hooks, Row, State, advance, begin, hooks, rows_of, run, sample, sample_keys
from jaxdiff.solver.grid import GRIDS, Grid
from jaxdiff.solver.kernel import row_logprob, row_mean
from jaxdiff.solver.multistep import dpm_solver_pp
from jaxdiff.solver.onestep import ancestral, ddim, euler
from jaxdiff.solver.rungekutta import edm, heun
from jaxdiff.solver.table import AffineBlock, Table, device, stack

__all__ = [
    "GRIDS",
    "SOLVERS",
    "AffineBlock",
    "Check",
    "Dense",
    "Grid",
    "Hooks",
    "Row",
    "State",
    "Table",
    "advance",
    "ancestral",
    "begin",
    "check",
    "ddim",
    "device",
    "dpm_solver_pp",
    "edm",
    "euler",
    "grid",
    "heun",
    "hooks",
    "row_logprob",
    "row_mean",
    "rows_of",
    "run",
    "sample",
    "sample_keys",
    "stack",
    "unroll",
    "weights",
]

SOLVERS = {
    "euler": euler,
    "ddim": ddim,
    "ancestral": ancestral,
    "heun": heun,
    "edm": edm,
    "dpm_solver_pp": dpm_solver_pp,
}
