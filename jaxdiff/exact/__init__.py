"""Worlds whose answers are known in closed form, the truth every method is proved against.

``Gaussian``, ``GaussianMixture`` and ``Delta`` give posterior means, score, velocity, density and samples at any
(alpha, sigma), ``Enumerable`` the posteriors of short token sequences, ``Independent`` those of data with several parts;
``denoiser`` makes one a perfectly trained network; ``gaussian_flow`` and ``quantile_flow`` are the
probability-flow maps that solvers approximate.
"""

from jaxdiff.exact.delta import Delta
from jaxdiff.exact.denoiser import ExactDenoiser, denoiser
from jaxdiff.exact.discrete import Enumerable, enumerable
from jaxdiff.exact.gaussian import Gaussian, GaussianFlow, gaussian_flow
from jaxdiff.exact.independent import Independent
from jaxdiff.exact.mixture import GaussianMixture
from jaxdiff.exact.quantile import QuantileFlow, quantile_flow

__all__ = [
    "Delta",
    "Enumerable",
    "ExactDenoiser",
    "Gaussian",
    "GaussianFlow",
    "GaussianMixture",
    "Independent",
    "QuantileFlow",
    "denoiser",
    "enumerable",
    "gaussian_flow",
    "quantile_flow",
]
