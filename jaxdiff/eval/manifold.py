"""Questions to nearest neighbours: precision and recall, and memorisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxdiff.metric import flat, nearest_distances, pairwise_squared_distances


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: samples that look real, and real points that are covered."""

    precision: float
    recall: float


def _covered(points: np.ndarray, centres: np.ndarray, radii: np.ndarray, chunk: int = 2048) -> float:
    """Share of points inside at least one of the balls."""
    inside = 0
    for start in range(0, len(points), chunk):
        block = pairwise_squared_distances(points[start : start + chunk], centres)
        # the matrix product may turn distance 0 into 1e-16 of the cloud's size: a ball of radius 0 (a centre
        # with k copies) must still hold its own centre
        slack = 1e-12 * np.square(centres - centres.mean(axis=0)).sum(axis=1).max()
        inside += int((block <= radii**2 + slack).any(axis=1).sum())
    return inside / len(points)


def precision_recall(samples: Any, reference: Any, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of samples (N, D) against reference features (M, D).

    A set's manifold is the union of balls around its points, each reaching that point's k-th nearest
    neighbour in the set. Precision: share of samples in the reference's manifold. Recall: share of reference
    points in the samples' manifold. Both depend on the counts. Source: Kynkaanniemi et al., arXiv 1904.06991.
    """
    samples, reference = flat(np.asarray(samples)), flat(np.asarray(reference))
    real = nearest_distances(reference, reference, k, same=True)
    fake = nearest_distances(samples, samples, k, same=True)
    return PrecisionRecall(_covered(samples, reference, real), _covered(reference, samples, fake))


class Memorisation(NamedTuple):
    """How close samples lie to the training set, in units of how close held-out data lie.

    ``ratio``: median distance of a sample to its nearest training point, divided by the same for held-out
    points. About 1 is what new data of the same law give; copies push it to 0.
    ``copied``: share of samples nearer to a training point than ``quantile`` of the held-out points are.
    About ``quantile`` for a generator that does not copy, 1 for one that only copies.
    """

    ratio: float
    copied: float
    quantile: float


def memorisation(samples: Any, train: Any, heldout: Any, *, quantile: float = 0.01) -> Memorisation:
    """Nearest-training-neighbour check of samples against training points, with held-out points as the scale.

    All three are (., ...) in one space: run it on pixels and on features, for a generator may copy content
    without copying pixels. The training set must be the whole one the generator saw. Raises ``ValueError`` for a
    quantile outside [0, 1), or when held-out points are copies of training points (no scale).
    """
    if not 0.0 <= quantile < 1.0:
        raise ValueError(f"quantile: {quantile}; allowed [0, 1)")
    new = nearest_distances(heldout, train)
    generated = nearest_distances(samples, train)
    scale = float(np.median(new))
    if scale <= 0.0:
        raise ValueError("heldout: at least half of its points are copies of training points; no scale to judge by")
    threshold = np.quantile(new, quantile)
    return Memorisation(float(np.median(generated)) / scale, float((generated < threshold).mean()), quantile)
