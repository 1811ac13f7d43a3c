"""The digits classifier: a small convolutional network whose penultimate layer is the default feature space.

Trained by ``experiments/digits_classifier/run.py``; its weights and what is known about them (held-out accuracy,
seed, split) ship beside this file as safetensors.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.eval.whole_file import write_whole
from jaxdiff.metric import FeatureNetwork, Features

WEIGHTS = pathlib.Path(__file__).with_name("digits_classifier.safetensors")
IMAGE_SHAPE = (8, 8, 1)
CLASSES = 10
SHAPES: dict[str, tuple[int, ...]] = {
    "conv1/kernel": (3, 3, 1, 24),
    "conv1/bias": (24,),
    "conv2/kernel": (3, 3, 24, 48),
    "conv2/bias": (48,),
    "hidden/kernel": (4 * 4 * 48, 64),
    "hidden/bias": (64,),
    "logits/kernel": (64, CLASSES),
    "logits/bias": (CLASSES,),
}


def init(key: jax.Array) -> dict[str, jax.Array]:
    """He-scaled normal kernels and zero biases, float32, named and shaped as ``SHAPES``."""
    params = {}
    for one, (name, shape) in zip(jax.random.split(key, len(SHAPES)), SHAPES.items()):
        scale = np.sqrt(2.0 / np.prod(shape[:-1])) if name.endswith("kernel") else 0.0
        params[name] = jnp.float32(scale) * jax.random.normal(one, shape)
    return params


def apply(params: Mapping[str, Any], images: Any, *, keep: Any = None) -> Features:
    """Features (N, 64) and logits (N, 10) of images (N, 8, 8, 1) in [-1, 1].

    conv 3x3 - silu - conv 3x3 stride 2 - silu - dense 64 - silu (the features) - dense 10. ``keep`` is a dropout
    mask on the features, already divided by its mean; None when not training. Matrix products run at full float32
    precision on every device, so that distances do not depend on the machine.
    """
    if images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"images: shape {tuple(images.shape)}; the digits classifier takes (N, 8, 8, 1)")

    def conv(x: Any, name: str, stride: int) -> Any:
        out = jax.lax.conv_general_dilated(
            x,
            params[f"{name}/kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jax.nn.silu(out + params[f"{name}/bias"])

    def dense(x: Any, name: str) -> Any:
        product = jnp.matmul(x, params[f"{name}/kernel"], precision=jax.lax.Precision.HIGHEST)
        return product + params[f"{name}/bias"]

    x = conv(conv(images, "conv1", 1), "conv2", 2)
    features = jax.nn.silu(dense(x.reshape(len(x), -1), "hidden"))
    return Features(features, dense(features if keep is None else features * keep, "logits"))


def save(path: str | pathlib.Path, params: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write weights as float16 with JSON metadata: whole or not at all, equal bytes for equal input."""
    from safetensors.numpy import save as encode

    tensors = {name: np.asarray(params[name], np.float16) for name in SHAPES}
    # one entry: safetensors writes several in no fixed order
    blob = encode(tensors, metadata={"about": json.dumps(dict(metadata), sort_keys=True)})
    write_whole(path, blob)


def load(path: str | pathlib.Path = WEIGHTS) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Float32 parameters and metadata of a weights file.

    Raises ``FileNotFoundError`` when it is missing and ``ValueError`` when it is truncated or of another network.
    """
    from safetensors import SafetensorError, safe_open

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"weights: {path} does not exist; experiments/digits_classifier/run.py makes it")
    try:
        with safe_open(str(path), framework="numpy") as file:
            params = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
            metadata = json.loads((file.metadata() or {}).get("about", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"weights: {path} is not a readable safetensors file ({error})") from error
    found = {name: value.shape for name, value in params.items()}
    if found != SHAPES:
        wrong = sorted(name for name in found.keys() | SHAPES if found.get(name) != SHAPES.get(name))
        raise ValueError(f"weights: {path} holds another network; differing tensors: {', '.join(wrong)}")
    return params, metadata


def digits_network(path: str | pathlib.Path = WEIGHTS) -> FeatureNetwork:
    """The shipped classifier as a feature network, ``digits_classifier``: 64 features and 10 logits."""
    params, _ = load(path)
    return FeatureNetwork(apply, {name: jnp.asarray(value) for name, value in params.items()}, "digits_classifier")
