"""How far the end points of one solver are from the truth: end-point RMS, sliced W2, moments, Frechet distance."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxdiff.eval.bench_problem import Problem
from jaxdiff.eval.frechet import Moments, frechet_from_moments, moments
from jaxdiff.eval.transport import directions
from jaxdiff.metric import FeatureNetwork, extract

__all__ = ["METRICS", "Yardstick", "measure", "sliced", "yardstick"]

METRICS = {
    "rms": "RMS distance to the exact end point of the same start, over samples and coordinates",
    "sliced_w2": "sliced Wasserstein-2 distance to draws of the true distribution",
    "mean_error": "distance of the means, in standard deviations of the data",
    "covariance_error": "relative Frobenius error of the covariance",
    "frechet": "Frechet distance of features to held-out images",
}
FLOORS = 4


class Yardstick(NamedTuple):
    """The true distribution, prepared: directions (D, P), block means (N, P) and spread (P,) of its sorted projections,
    mean, covariance, held-out feature moments; ``floor``: sliced W2 of exact draws (mean and standard deviation)."""

    directions: np.ndarray
    quantiles: np.ndarray
    within: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    floor: tuple[float, float]
    network: FeatureNetwork | None
    features: Moments | None


def yardstick(problem: Problem, scale: float | None, samples: int, projections: int, count: int) -> Yardstick:
    """Prepare the truth at a guidance scale: ``count`` draws (a multiple of ``samples``) and four more sets as floor."""
    points = problem.draws(count + FLOORS * samples, scale)
    points = np.asarray(points, np.float64).reshape(len(points), -1)
    truth, rest = points[:count], points[count:].reshape(FLOORS, samples, -1)
    theta = directions(points.shape[1], projections)
    projected = np.sort(truth @ theta, 0).reshape(samples, count // samples, -1)
    mean, covariance = problem.moments if problem.moments is not None else moments(truth)
    features = None
    if problem.network is not None:
        features = moments(extract(problem.network, problem.heldout).features)
    yard = Yardstick(
        theta.astype(np.float32),
        projected.mean(1),
        projected.var(1).mean(0),
        np.asarray(mean, np.float64),
        np.asarray(covariance, np.float64),
        (0.0, 0.0),
        problem.network,
        features,
    )
    own = [sliced(each, yard) for each in rest]
    return yard._replace(floor=(float(np.mean(own)), float(np.std(own, ddof=1))))


def sliced(x: np.ndarray, yard: Yardstick) -> float:
    """Sliced W2 of x (N, D) to the prepared draws, exact: the monotone coupling sends each point to M/N of the M draws,
    whose squared distance is that to their mean plus their spread."""
    ordered = np.sort(x.astype(np.float32) @ yard.directions, 0)
    return float(np.sqrt(np.mean(np.mean((ordered - yard.quantiles) ** 2, 0) + yard.within)))


def measure(ends: np.ndarray, yard: Yardstick, exact: np.ndarray | None) -> dict[str, Any]:
    """Metrics of end points (N, ...); ``exact`` (N, ...) only for deterministic solvers. None where there is no answer.

    ``rms_half_width``: half of the 95 % interval of rms over samples (delta method). Samples that are not finite are no
    samples: then every metric is None and ``finite`` is the share that was.
    """
    x = ends.reshape(len(ends), -1)
    whole = np.isfinite(x).all(1)
    row: dict[str, Any] = dict.fromkeys([*METRICS, "rms_half_width"]) | {"finite": float(whole.mean())}
    # beyond 1e6 data are lost in float32 squares: diverged as well
    if not whole.all() or np.abs(x).max() > 1e6:
        row["finite"] = float((np.abs(np.where(np.isfinite(x), x, np.inf)) <= 1e6).all(1).mean())
        return row
    if exact is not None:
        squares = np.mean((x.astype(np.float64) - exact.reshape(len(x), -1)) ** 2, 1)
        rms = float(np.sqrt(squares.mean()))
        row["rms"] = rms
        row["rms_half_width"] = float(0.98 * squares.std(ddof=1) / (rms * np.sqrt(len(x)))) if rms > 0 else 0.0
    row["sliced_w2"] = sliced(x, yard)
    found = moments(x)
    row["mean_error"] = float(np.linalg.norm(found.mean - yard.mean) / np.sqrt(np.trace(yard.covariance)))
    row["covariance_error"] = float(
        np.linalg.norm(found.covariance - yard.covariance) / np.linalg.norm(yard.covariance)
    )
    if yard.network is not None:
        row["frechet"] = frechet_from_moments(moments(extract(yard.network, ends).features), yard.features)  # type: ignore[arg-type]
    return row
