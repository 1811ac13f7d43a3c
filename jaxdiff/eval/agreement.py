"""Do class-conditional samples look like the class they were asked for?"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxdiff.metric import FeatureNetwork, extract


def agreement_of_logits(logits: Any, labels: Any) -> float:
    """Share of rows whose largest logit is the label: logits (N, C), integer labels (N,) in 0..C-1."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"labels: shape {labels.shape} for logits {logits.shape}; expected ({len(logits)},)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: type {labels.dtype}; expected integers")
    if labels.size and not (0 <= labels.min() and labels.max() < logits.shape[1]):
        raise ValueError(f"labels: {labels.min()}..{labels.max()}; allowed 0..{logits.shape[1] - 1}")
    return float((logits.argmax(axis=1) == labels).mean())


def class_agreement(network: FeatureNetwork, samples: Any, labels: Any) -> float:
    """Share in [0, 1] of samples (N, ...) that the network assigns to the label (N,) they were conditioned on.

    On real held-out images this is the classifier's accuracy: the number to hold it against. Raises ValueError for networks
    without logits.
    """
    logits = extract(network, samples).logits
    if logits is None:
        raise ValueError(f"network: {network.name!r} has no logits; class agreement needs a classifier")
    return agreement_of_logits(logits, labels)
