"""What training minimises: pure functions ``objective(params, batch, keys, ctx) -> (loss, metrics)``.

``regression`` is (time density) x (weighting in lam) x (target). ``TIMES``, ``WEIGHTINGS`` and ``COUPLINGS`` list the
choices by config name; ``over_lam`` turns a weighting into an integral over lam.
"""

from jaxdiff.objective.context import Ctx
from jaxdiff.objective.coupling import COUPLINGS, independent, minibatch_ot
from jaxdiff.objective.regression import regression
from jaxdiff.objective.time import TIMES, iid, stratified
from jaxdiff.objective.weighting import WEIGHTINGS, Weighting, over_lam, residual_factor, target_weight

__all__ = [
    "COUPLINGS",
    "TIMES",
    "WEIGHTINGS",
    "Ctx",
    "Weighting",
    "iid",
    "independent",
    "minibatch_ot",
    "over_lam",
    "regression",
    "residual_factor",
    "stratified",
    "target_weight",
]
