"""Solvers learned from a denoiser and a few starts, as tables.

A :class:`Family` is a set of tables around one, ``build(parameters)``; a learner chooses the parameters and returns
:class:`Learned`. Families: :func:`family` (times and coefficients moved freely), :func:`scale_time` (a base solver on a
scaled and re-timed path), :func:`compensated` (DC-Solver's ratios). Criteria: :func:`endpoint` (the end of the run),
:func:`bespoke` (a bound on it, from the errors of single steps), :func:`dc` and :func:`least_squares` (one step after the
other, in closed form), :func:`klub` (a bound on the Kullback-Leibler divergence), or any function of a table in
:func:`fit`. Same seed, same table; :func:`save` and :func:`load` write any of them as arrays and JSON.
:func:`ems` measures the statistics of a model that DPM-Solver-v3 needs.
"""

from jaxdiff.solver.learn.bespoke import bespoke, midpoint, scale_time, step_bound
from jaxdiff.solver.learn.compensation import compensated, dc
from jaxdiff.solver.learn.family import LEAVES, Family, family, one_block
from jaxdiff.solver.learn.files import load, save
from jaxdiff.solver.learn.fit import Learned, endpoint, fit
from jaxdiff.solver.learn.least_squares import least_squares
from jaxdiff.solver.learn.levels import kl_bound, klub
from jaxdiff.solver.learn.statistics import ems
from jaxdiff.solver.learn.trajectory import Trajectory, trajectory

__all__ = [
    "LEAVES",
    "Family",
    "Learned",
    "Trajectory",
    "bespoke",
    "compensated",
    "dc",
    "ems",
    "endpoint",
    "family",
    "fit",
    "kl_bound",
    "klub",
    "least_squares",
    "load",
    "midpoint",
    "one_block",
    "save",
    "scale_time",
    "step_bound",
    "trajectory",
]
