"""The feature-network interface: any function from images to features and class logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Features(NamedTuple):
    """What a feature network says about N images."""

    features: Any  # (N, D)
    logits: Any  # (N, C), or None for a network without classes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network whose features a distance is measured in.

    ``apply(params, images) -> Features(features (N, D), logits (N, C) | None)``, pure; images are in the units
    the network was trained on ([-1, 1] for the ones here). ``name`` goes into reports, because a distance means
    nothing without the features it was measured in. A pytree: ``params`` dynamic, the rest static.
    """

    apply: Callable[[Any, Any], Any] = dataclasses.field(metadata={"static": True})
    params: Any
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, images: Any) -> Features:
        """Features and logits of a batch of images, traceable and differentiable."""
        return Features(*self.apply(self.params, images))


def _flatten(params: Any, images: Any) -> Features:
    del params
    return Features(images.reshape(images.shape[0], -1), None)


def pixels() -> FeatureNetwork:
    """The identity: features are the flattened pixels, and there are no logits."""
    return FeatureNetwork(_flatten, None, "pixels")


@jax.jit
def _run(network: FeatureNetwork, images: jax.Array) -> Features:
    return network(images)


def extract(network: FeatureNetwork, images: Any, *, batch: int = 512) -> Features:
    """Host features (N, D) float64 and logits (N, C) float64 of any number of images.

    Batches are padded to one size, so that sets of every length share one compilation.
    Raises ``ValueError`` for no images, a bad batch, or features that are not a finite (N, D).
    """
    images = np.asarray(images, dtype=np.float32)
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images: shape {images.shape}; expected (N, ...) with N >= 1")
    if batch < 1:
        raise ValueError(f"batch: {batch}; allowed >= 1")
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
        found = _run(network, jnp.asarray(padded))
        parts.append([None if f is None else np.asarray(f, np.float64)[: len(part)] for f in found])
    features = np.concatenate([f for f, _ in parts])
    logits = None if parts[0][1] is None else np.concatenate([g for _, g in parts])
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"features: network {network.name!r} gave shape {features.shape}; expected a finite (N, D)")
    return Features(features, logits)
