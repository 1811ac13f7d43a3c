"""One report of everything, each distance beside the floor that real data reach at the same counts.

**The floor.** A distance between two finite sets is not zero even when both come from one law (a Frechet distance
is biased upwards by about c (1/N + 1/M)), and a classifier's features differ a little between images it was trained
on and new ones. So "distance <= 2x the floor" is read as a ratio of two numbers made in exactly the same way:

    ratio = mean_s d(G_s, H_s) / mean_s d(T_s, H_s)

- H: the held-out images, never seen by the generator or by the feature network. H_s is all of H when ``count`` is
  its size (the default whenever the other sets are large enough), else a seeded subset of ``count``.
- G_s, T_s: seeded subsets of ``count`` generated and of ``count`` training images, drawn without replacement. A
  subset so drawn from a pool of independent images is ``count`` independent images whatever the size of the pool:
  pools may differ in size, and a larger pool only lowers the variance of the mean.
- With labels for all three sets, each G_s and T_s has the class counts of H_s. Otherwise neither has: an
  unstratified training subset beside stratified samples would raise the floor by its class noise and flatter the
  generator.
- The means run over ``subsets`` draws s; the spread beside them is the standard deviation of one draw. Draws from
  one pool overlap, so the spread is not the error of the mean.
- Equal class counts are not independent draws: kid and mmd, unbiased for those, then lie slightly below zero for
  equal laws, on both sides alike. Their floor is the value to compare with, not zero.

A generator that copies the training set reaches ratio 1: the memorisation rows are there to tell that apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxdiff.eval.agreement import agreement_of_logits
from jaxdiff.eval.classifier import IMAGE_SHAPE, digits_network
from jaxdiff.eval.frechet import frechet_distance
from jaxdiff.eval.manifold import memorisation, precision_recall
from jaxdiff.eval.table import format_table
from jaxdiff.eval.transport import sliced_wasserstein
from jaxdiff.metric import (
    BANDWIDTH_FACTORS,
    FeatureNetwork,
    extract,
    flat,
    median_bandwidth,
    mmd_squared,
    pixels,
    polynomial,
    rbf,
)

FEATURES: dict[str, Callable[[], FeatureNetwork]] = {"digits_classifier": digits_network, "pixels": pixels}
"""Names of feature networks, for configs."""


def default_network(image_shape: tuple[int, ...]) -> FeatureNetwork:
    """The digits classifier for 8x8x1 images; pixels for every other shape."""
    return digits_network() if tuple(image_shape) == IMAGE_SHAPE else pixels()


def quotas(labels: np.ndarray, count: int) -> np.ndarray:
    """``count`` split over the classes in the proportions of ``labels``, by largest remainder."""
    share = np.bincount(labels) * (count / len(labels))
    quotas = np.floor(share + 1e-9).astype(int)
    order = np.argsort(quotas - share, kind="stable")
    quotas[order[: count - quotas.sum()]] += 1
    return quotas


def _draw(generator: np.random.Generator, size: int, count: int, labels: Any, quotas: Any) -> np.ndarray:
    """Indices of ``count`` of ``size`` points without replacement, with the class quotas when there are labels."""
    if labels is None:
        return generator.choice(size, count, replace=False)
    members = [np.flatnonzero(labels == label) for label in range(len(quotas))]
    return np.concatenate([generator.choice(own, q, replace=False) for own, q in zip(members, quotas) if q])


def _label_array(labels: Any, size: int, name: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (size,) or not np.issubdtype(labels.dtype, np.integer) or (size and labels.min() < 0):
        raise ValueError(f"{name}: shape {labels.shape} of {labels.dtype}; expected {size} integers >= 0")
    return labels


def _feasible(heldout: np.ndarray, pools: tuple[np.ndarray, np.ndarray], count: int) -> int:
    """The largest count, at most the one given, whose class quotas both pools can fill."""
    have = [np.bincount(pool, minlength=heldout.max() + 1)[: heldout.max() + 1] for pool in pools]
    while count and (quotas(heldout, count) > np.minimum(*have)).any():
        count -= 1
    return count


def report(
    samples: Any,
    heldout: Any,
    train: Any,
    *,
    sample_labels: Any = None,
    heldout_labels: Any = None,
    train_labels: Any = None,
    network: FeatureNetwork | None = None,
    count: int | None = None,
    subsets: int = 10,
    seed: int = 0,
    k: int = 3,
    pairwise_limit: int = 2000,
) -> dict[str, Any]:
    """Everything about generated ``samples`` (N, ...) against held-out and training data of the same shape and units.

    The module docstring says what the floor is. ``count`` is the number of points a side (None: the most that the
    three sets and their labels allow); distances whose cost is quadratic use at most ``pairwise_limit`` of them, as
    does the memorisation check of its samples and held-out points. ``network`` gives features (None:
    ``default_network``). The result is JSON-ready and a function of the inputs and the seed:

    - ``metrics``: ``{name: {samples, floor, samples_spread, floor_spread, ratio, count}}``: ``frechet``, ``kid``,
      ``precision``, ``recall`` on features; ``sliced_w2``, ``mmd`` on pixels. ``ratio`` is None where the floor is
      zero in expectation (kid, mmd) or the number is a share.
    - ``memorisation``: ``{pixels, features: {ratio, copied, quantile, count}}``, of ``count`` samples.
    - ``class_agreement``: ``{samples, heldout, difference}`` when the network has logits and the samples labels;
      ``heldout`` (the classifier's own accuracy) and ``difference = samples - heldout`` need held-out labels.
    - ``count``, ``subsets``, ``seed``, ``stratified``, ``features``, ``sizes``.

    Raises ``ValueError`` for sets of different shapes, too few points, or labels that do not fit.
    """
    sets = _finite_sets({"samples": samples, "heldout": heldout, "train": train}, k + 2)
    given = {"samples": sample_labels, "heldout": heldout_labels, "train": train_labels}
    labels = {n: _label_array(v, len(sets[n]), f"{n} labels") for n, v in given.items() if v is not None}
    strata = labels if len(labels) == len(sets) else None

    most = min(len(points) for points in sets.values())
    if strata is not None:
        most = _feasible(strata["heldout"], (strata["samples"], strata["train"]), most)
    if count is None:
        count = most
    if not k + 2 <= count <= most:
        raise ValueError(
            f"count: {count}; allowed {k + 2}..{most} for sets of {[len(s) for s in sets.values()]} points"
        )
    if subsets < 1:
        raise ValueError(f"subsets: {subsets}; allowed >= 1")

    network = default_network(sets["heldout"].shape[1:]) if network is None else network
    found = {name: extract(network, points) for name, points in sets.items()}
    points = {name: flat(value) for name, value in sets.items()}
    features = {name: value.features for name, value in found.items()}

    kernel = partial(rbf, bandwidths=[factor * median_bandwidth(points["heldout"]) for factor in BANDWIDTH_FACTORS])
    limited = min(count, pairwise_limit)
    rows = []
    for index in range(subsets):
        drawn = _subsets(np.random.default_rng((seed, index)), sets, strata, count)
        ours, floor = (_distances(points, features, drawn, name, limited, k, kernel) for name in ("samples", "train"))
        rows.append((ours, floor))

    # the training set is searched whole, for a few of the samples and of the held-out points that give the scale:
    # a random few, as either may come in order of class
    generator = np.random.default_rng((seed, subsets))
    scale, checked = (generator.permutation(len(sets[name]))[:pairwise_limit] for name in ("heldout", "samples"))
    spaces = {"pixels": points} if network.name == "pixels" else {"pixels": points, "features": features}
    copies = {
        where: memorisation(space["samples"][checked], space["train"], space["heldout"][scale])._asdict()
        | {"count": len(checked)}
        for where, space in spaces.items()
    }
    return {
        "metrics": _summary(rows, count, limited),
        "memorisation": copies,
        "class_agreement": _agreement(found, labels),
        "features": network.name,
        "count": count,
        "subsets": subsets,
        "seed": seed,
        "stratified": strata is not None,
        "sizes": {name: len(value) for name, value in sets.items()},
    }


def _finite_sets(given: dict[str, Any], least: int) -> dict[str, np.ndarray]:
    """The sets as float32, all finite, of one shape and of at least ``least`` points."""
    sets = {name: np.asarray(points, np.float32) for name, points in given.items()}
    shape = sets["heldout"].shape[1:]
    for name, points in sets.items():
        if points.ndim < 2 or points.shape[1:] != shape or len(points) < least:
            raise ValueError(f"{name}: shape {points.shape}; expected (N, {str(shape)[1:-1]}) with N >= {least}")
        bad = int((~np.isfinite(points.reshape(len(points), -1)).all(axis=1)).sum())
        if bad:
            raise ValueError(f"{name}: {bad} of {len(points)} hold NaN or infinity; every value must be finite")
    return sets


def _subsets(
    generator: np.random.Generator, sets: dict[str, np.ndarray], strata: dict[str, np.ndarray] | None, count: int
) -> dict[str, np.ndarray]:
    """Indices of ``count`` points of every set; with labels in the held-out set's proportions."""
    wanted = None if strata is None else quotas(strata["heldout"], count)
    drawn = {}
    for name in sets:
        own = None if strata is None else strata[name]
        drawn[name] = generator.permutation(_draw(generator, len(sets[name]), count, own, wanted))
    return drawn


def _distances(
    points: dict[str, np.ndarray],
    features: dict[str, np.ndarray],
    drawn: dict[str, np.ndarray],
    name: str,
    limited: int,
    k: int,
    kernel: Callable,
) -> dict[str, float]:
    """Every metric between the subsets of the set ``name`` and of the held-out one; quadratic ones on ``limited`` of each."""
    x, reference = drawn[name], drawn["heldout"]
    x_few, few = x[:limited], reference[:limited]
    shares = precision_recall(features[name][x_few], features["heldout"][few], k=k)
    return {
        "frechet": frechet_distance(features[name][x], features["heldout"][reference]),
        "kid": float(mmd_squared(features[name][x_few], features["heldout"][few], polynomial)),
        "precision": shares.precision,
        "recall": shares.recall,
        "sliced_w2": float(sliced_wasserstein(points[name][x], points["heldout"][reference])),
        "mmd": float(mmd_squared(points[name][x_few], points["heldout"][few], kernel)),
    }


def _summary(rows: list[tuple[dict[str, float], dict[str, float]]], count: int, limited: int) -> dict[str, Any]:
    """Mean and spread of each metric over the draws, ``rows`` of (samples, floor), and their ratio."""
    metrics = {}
    for metric in rows[0][0]:
        ours, floor = ([row[side][metric] for row in rows] for side in (0, 1))
        mean, least = float(np.mean(ours)), float(np.mean(floor))
        whole = metric in ("frechet", "sliced_w2")
        metrics[metric] = {
            "samples": mean,
            "floor": least,
            "samples_spread": float(np.std(ours)),
            "floor_spread": float(np.std(floor)),
            "ratio": mean / least if whole and least > 0 else None,
            "count": count if whole else limited,
        }
    return metrics


def _agreement(found: dict[str, Any], labels: dict[str, np.ndarray]) -> dict[str, float | None] | None:
    """How often the network's class is the label, for samples and held-out points; None without logits or labels."""
    if "samples" not in labels or found["samples"].logits is None:
        return None
    ours = agreement_of_logits(found["samples"].logits, labels["samples"])
    real = labels.get("heldout")
    accuracy = None if real is None else agreement_of_logits(found["heldout"].logits, real)
    return {"samples": ours, "heldout": accuracy, "difference": None if accuracy is None else ours - accuracy}


def report_table(result: dict[str, Any], *, digits: int = 3) -> str:
    """The report as an aligned table: the samples' value, what real data reach, their ratio, the count."""
    space = {"sliced_w2": "pixels", "mmd": "pixels"}
    rows: list[list[Any]] = []
    for name, row in result["metrics"].items():
        where = space.get(name, result["features"])
        rows.append([name, where, row["samples"], row["floor"], row["ratio"], row["count"]])
    for where, row in result["memorisation"].items():
        where = result["features"] if where == "features" else where
        rows.append(["nearest train ratio", where, row["ratio"], 1.0, row["ratio"], row["count"]])
        rows.append(["copied share", where, row["copied"], row["quantile"], None, row["count"]])
    agreement = result["class_agreement"]
    if agreement is not None:
        count = result["sizes"]["samples"]
        rows.append(["class agreement", result["features"], agreement["samples"], agreement["heldout"], None, count])
    return format_table(rows, ["metric", "on", "samples", "real data", "ratio", "count"], digits=digits)
