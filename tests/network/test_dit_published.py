"""DiT is the published DiT: parameter counts of the paper's sizes, outputs of the public code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.network import make_dit, parameter_count

# Counted by instantiating the public PyTorch code; the frozen position table is not a parameter.
COUNTS = {
    "S/2": 32_865_056,
    "S/4": 32_920_448,
    "S/8": 33_142_016,
    "B/2": 130_315_808,
    "B/4": 130_426_496,
    "B/8": 130_869_248,
    "L/2": 457_840_672,
    "L/4": 457_988_224,
    "L/8": 458_578_432,
    "XL/2": 674_834_720,
    "XL/4": 675_000_704,
    "XL/8": 675_664_640,
}
WITHOUT_SIGMA = {"S/2": 32_858_896, "B/2": 130_303_504, "L/2": 457_824_272, "XL/2": 674_816_272}


def count(size, **options):
    net = make_dit(size, num_classes=1000, **options)
    return parameter_count(jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(())))


@pytest.mark.parametrize("size", COUNTS)
def test_published_counts(size):
    assert count(size, learn_sigma=True) == COUNTS[size]


@pytest.mark.parametrize("size", WITHOUT_SIGMA)
def test_published_counts_without_variance_channels(size):
    assert count(size) == WITHOUT_SIGMA[size]


def rule(shape):
    """Deterministic weights in PyTorch layout: sinusoids of the entry's index, float64 then cast."""
    n = int(np.prod(shape))
    i = np.arange(n, dtype=np.float64)
    if len(shape) >= 2:
        return (np.sin(0.9 * (i + 1) + 0.01 * n) * np.sqrt(2 * shape[0] / n)).reshape(shape)
    return 0.1 * np.sin(i + 1)


def torch_weights(path, leaf, patch, channels):
    """The rule's value of one parameter, moved from PyTorch's layout to ours."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("patch_embed/kernel"):  # a convolution there: (D, C, p, q) -> (p q C, D)
        value = rule((leaf.shape[1], channels, patch, patch)).transpose(2, 3, 1, 0).reshape(leaf.shape)
    elif name.endswith("embedding") or leaf.ndim == 1:
        value = rule(leaf.shape)
    else:
        value = rule(leaf.shape[::-1]).T
    return jnp.asarray(value, jnp.float32)


def test_output_of_the_public_code():
    net = make_dit(width=64, depth=2, heads=4, patch=2, num_classes=10)
    x = np.sin(0.3 * np.arange(2 * 64) + 0.1).reshape(2, 1, 8, 8).transpose(0, 2, 3, 1).astype(np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(()))
    variables = jax.tree_util.tree_map_with_path(lambda p, leaf: torch_weights(p, leaf, 2, 1), shapes)
    assert parameter_count(variables) == 179_588
    apply = jax.jit(net.apply)
    raw = np.asarray(apply(variables, x, jnp.array([3.0, 700.0]), jnp.array([1, 7])).raw).transpose(0, 3, 1, 2)
    tolerance = 2e-4 * 0.551474
    assert abs(np.sqrt(np.mean(raw**2)) - 0.551474) < tolerance
    assert abs(raw.mean() + 0.356970) < tolerance
    golden = [-0.476379, -0.955528, -0.351376, -0.889197]
    np.testing.assert_allclose(raw.ravel()[:4], golden, rtol=0, atol=tolerance)
