"""metric: distances, kernels and the feature-network interface; pure functions, no process, no data.

Everything here computes in numpy float64 when given numpy arrays and in jax (differentiable, jittable)
when given jax arrays, so the same kernel serves a training objective and an evaluation on the host.
"""

from jaxdiff.metric.distance import flat, nearest_distances, pairwise_squared_distances
from jaxdiff.metric.feature import FeatureNetwork, Features, extract, pixels
from jaxdiff.metric.kernel import BANDWIDTH_FACTORS, median_bandwidth, mmd_squared, polynomial, rbf

__all__ = [
    "BANDWIDTH_FACTORS",
    "FeatureNetwork",
    "Features",
    "extract",
    "flat",
    "median_bandwidth",
    "mmd_squared",
    "nearest_distances",
    "pairwise_squared_distances",
    "pixels",
    "polynomial",
    "rbf",
]
