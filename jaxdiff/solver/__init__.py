"""A solver is a coefficient table; one scan runs them all.

Makers ``(process, grid, options) -> Table`` are listed in ``SOLVERS``, grids in ``grid.GRIDS``. ``sample`` is the
compiled entry, ``run`` the pure one; ``stack`` puts tables of many solvers into one vmapped call, ``join`` those of
the parts of a state (continuous data, tokens) into one table; ``check`` and ``unroll`` prove things about a table
without a network.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxdiff.solver import grid, weights
from jaxdiff.solver.algebra import Check, Dense, check, unroll
from jaxdiff.solver.categorical import CategoricalBlock
from jaxdiff.solver.conjugate import conjugate
from jaxdiff.solver.deis import deis, f_pndm, ipndm, lms, pndm
from jaxdiff.solver.dpm_solver import dpm_solver, dpm_solver_pp
from jaxdiff.solver.dpm_v3 import Statistics, dpm_solver_v3
from jaxdiff.solver.er_sde import PHIS, er_sde
from jaxdiff.solver.executor import Hooks, Row, State, advance, begin, hooks, rows_of, run
from jaxdiff.solver.exp_rk import exp_rk
from jaxdiff.solver.grid import GRIDS, Grid
from jaxdiff.solver.kernel import row_logprob, row_mean
from jaxdiff.solver.momentum import ghvb, heavy_ball
from jaxdiff.solver.onestep import ancestral, ddim, ddpm, euler
from jaxdiff.solver.order import Order, order
from jaxdiff.solver.renoise import dpm2_ancestral, dpmpp_2s_ancestral, euler_ancestral
from jaxdiff.solver.restart import restart
from jaxdiff.solver.rungekutta import dpm2, edm, heun, rho_rk, rk4
from jaxdiff.solver.sa_solver import sa_solver
from jaxdiff.solver.sampling import sample
from jaxdiff.solver.sde_dpm import dpm_solver_pp_sde
from jaxdiff.solver.simulate import euler_maruyama, predictor_corrector
from jaxdiff.solver.streams import sample_keys
from jaxdiff.solver.table import AffineBlock, Table, device, join, stack
from jaxdiff.solver.teleport import Moments, data_moments, teleport, teleport_sample
from jaxdiff.solver.unipc import Step, dc_solver, unipc, usf
from jaxdiff.solver.velocity_ab import velocity_ab

if TYPE_CHECKING:
    from jaxdiff.solver import learn, search
    from jaxdiff.solver.adaptive import Adapted, adaptive_ode
    from jaxdiff.solver.adaptive_pair import DpmPair, DpmState, adaptive_dpm, dpm12, dpm23
    from jaxdiff.solver.adaptive_reverse import adaptive_sde
    from jaxdiff.solver.adjoint import checkpointed
    from jaxdiff.solver.hooks_project import Affine, Box, Known, affine, box, combine, inpaint, keep, known
    from jaxdiff.solver.hooks_time import matched_time
    from jaxdiff.solver.invert import Encoding, ddim_invert, decode_noise, direct, encode_noise, fixed_point
    from jaxdiff.solver.langevin import corrector, langevin_step
    from jaxdiff.solver.weak import gaussian_law, weak_order

# tools beside the solvers, loaded when first used
_LAZY = {
    **dict.fromkeys(("Adapted", "adaptive_ode"), "adaptive"),
    **dict.fromkeys(("DpmPair", "DpmState", "adaptive_dpm", "dpm12", "dpm23"), "adaptive_pair"),
    **dict.fromkeys(("adaptive_sde",), "adaptive_reverse"),
    **dict.fromkeys(("checkpointed",), "adjoint"),
    **dict.fromkeys(
        ("Affine", "Box", "Known", "affine", "box", "combine", "inpaint", "keep", "known"), "hooks_project"
    ),
    **dict.fromkeys(("matched_time",), "hooks_time"),
    **dict.fromkeys(("Encoding", "ddim_invert", "decode_noise", "direct", "encode_noise", "fixed_point"), "invert"),
    **dict.fromkeys(("corrector", "langevin_step"), "langevin"),
    **dict.fromkeys(("gaussian_law", "weak_order"), "weak"),
}


def __getattr__(name: str) -> Any:
    """Load a tool the first time it is touched."""
    if name in ("learn", "search"):
        return importlib.import_module(f"jaxdiff.solver.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"jaxdiff.solver.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'jaxdiff.solver' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, also those that are not loaded yet."""
    return sorted({*globals(), *__all__})


__all__ = [
    "Adapted",
    "Affine",
    "AffineBlock",
    "Box",
    "CategoricalBlock",
    "Check",
    "Dense",
    "DpmPair",
    "DpmState",
    "Encoding",
    "GRIDS",
    "Grid",
    "Hooks",
    "Known",
    "Moments",
    "Order",
    "PHIS",
    "Row",
    "SOLVERS",
    "State",
    "Statistics",
    "Step",
    "Table",
    "adaptive_dpm",
    "adaptive_ode",
    "adaptive_sde",
    "advance",
    "affine",
    "ancestral",
    "begin",
    "box",
    "check",
    "checkpointed",
    "combine",
    "conjugate",
    "corrector",
    "data_moments",
    "dc_solver",
    "ddim",
    "ddim_invert",
    "ddpm",
    "decode_noise",
    "deis",
    "device",
    "direct",
    "dpm12",
    "dpm2",
    "dpm23",
    "dpm2_ancestral",
    "dpm_solver",
    "dpm_solver_pp",
    "dpm_solver_pp_sde",
    "dpm_solver_v3",
    "dpmpp_2s_ancestral",
    "edm",
    "encode_noise",
    "er_sde",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "exp_rk",
    "f_pndm",
    "fixed_point",
    "gaussian_law",
    "ghvb",
    "grid",
    "heavy_ball",
    "heun",
    "hooks",
    "inpaint",
    "ipndm",
    "join",
    "keep",
    "known",
    "langevin_step",
    "learn",
    "lms",
    "matched_time",
    "order",
    "pndm",
    "predictor_corrector",
    "restart",
    "rho_rk",
    "rk4",
    "row_logprob",
    "row_mean",
    "rows_of",
    "run",
    "sa_solver",
    "sample",
    "sample_keys",
    "search",
    "stack",
    "teleport",
    "teleport_sample",
    "unipc",
    "unroll",
    "usf",
    "velocity_ab",
    "weak_order",
    "weights",
]

SOLVERS = {
    "euler": euler,
    "ddim": ddim,
    "ancestral": ancestral,
    "ddpm": ddpm,
    "heun": heun,
    "edm": edm,
    "dpm_solver": dpm_solver,
    "dpm_solver_pp": dpm_solver_pp,
    "conjugate": conjugate,
    "dc_solver": dc_solver,
    "deis": deis,
    "dpm2": dpm2,
    "dpm_solver_v3": dpm_solver_v3,
    "exp_rk": exp_rk,
    "f_pndm": f_pndm,
    "ghvb": ghvb,
    "heavy_ball": heavy_ball,
    "ipndm": ipndm,
    "lms": lms,
    "pndm": pndm,
    "rho_rk": rho_rk,
    "rk4": rk4,
    "unipc": unipc,
    "usf": usf,
    "velocity_ab": velocity_ab,
    "euler_ancestral": euler_ancestral,
    "dpm2_ancestral": dpm2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpm_solver_pp_sde": dpm_solver_pp_sde,
    "er_sde": er_sde,
    "sa_solver": sa_solver,
    "restart": restart,
    "euler_maruyama": euler_maruyama,
    "predictor_corrector": predictor_corrector,
}
