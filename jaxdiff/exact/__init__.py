"""Worlds whose answers are known in closed form, the truth every method is proved against.

``Gaussian``, ``GaussianMixture`` and ``Delta`` give posterior means, score, velocity, density and samples at any
(alpha, sigma); ``denoiser`` makes one a perfectly trained network; ``gaussian_flow`` and ``quantile_flow`` are the
probability-flow maps that solvers approximate.
"""

from jaxdiff.exact.delta import Delta
from jaxdiff.exact.denoiser import ExactDenoiser, denoiser
from jaxdiff.exact.gaussian import Gaussian, GaussianFlow, gaussian_flow
from jaxdiff.exact.mixture import GaussianMixture
from jaxdiff.exact.quantile import QuantileFlow, quantile_flow

__all__ = [
    "Delta",
    "ExactDenoiser",
    "Gaussian",
    "GaussianFlow",
    "GaussianMixture",
    "QuantileFlow",
    "denoiser",
    "gaussian_flow",
    "quantile_flow",
]
