"""Integer levels <-> [-1, 1].

An integer image has ``levels`` possible values k = 0..levels-1. Splitting [-1, 1] into ``levels`` equal bins,
level k becomes the centre of its bin,

    x = 2 (k + 1/2) / levels - 1,        half a bin = 1 / levels,

so uniform dequantisation adds U(-1/levels, 1/levels) and stays inside [-1, 1], and bits per dimension are
``-log2 p(x) / d + log2(levels / 2)``. scikit-learn's digits have 17 levels, 8-bit images 256.
"""

import functools

import numpy as np

__all__ = ["from_levels", "to_levels"]


def _check(levels: int) -> int:
    if isinstance(levels, bool) or not isinstance(levels, int | np.integer) or not 2 <= levels <= 2**16:
        raise ValueError(f"levels={levels!r} is not allowed; give an integer from 2 to 65536")
    return int(levels)


@functools.cache
def _centres(levels: int) -> np.ndarray:
    table = (2.0 * (np.arange(levels) + 0.5) / levels - 1.0).astype(np.float32)
    table.setflags(write=False)
    return table


def from_levels(k: np.ndarray, levels: int) -> np.ndarray:
    """Map integer levels to bin centres, ``x = 2 (k + 1/2)/levels - 1``.

    Args:
        k: integers in 0..levels-1, any shape.
        levels: number of possible values, 2..65536.

    Returns:
        float32 array of k's shape, inside (-1, 1).

    Raises:
        ValueError: k is not an integer array, or a value is outside 0..levels-1.
    """
    levels = _check(levels)
    k = np.asarray(k)
    if k.dtype.kind not in "iu":
        raise ValueError(f"levels={levels} needs an integer array, given dtype {k.dtype}")
    # uint8 with 256 levels cannot be out of range; the check would cost as much as the look-up.
    if k.size and not (k.dtype == np.uint8 and levels >= 256):
        low, high = int(k.min()), int(k.max())
        if low < 0 or high >= levels:
            raise ValueError(f"levels={levels} allows values 0..{levels - 1}, given {low}..{high}")
    return _centres(levels).take(k)


def to_levels(x: np.ndarray, levels: int) -> np.ndarray:
    """Nearest level of each value: ``k = clip(floor((x + 1) levels / 2), 0, levels - 1)``.

    The inverse of :func:`from_levels`; values outside [-1, 1] (a sample that overshoots) go to the end
    levels.

    Args:
        x: floats, any shape, no NaN.
        levels: number of possible values, 2..65536.

    Returns:
        uint8 (levels <= 256) or uint16 array of x's shape.

    Raises:
        ValueError: x holds a NaN.
    """
    levels = _check(levels)
    x = np.asarray(x, dtype=np.float64)
    if np.isnan(x).any():
        raise ValueError(f"x holds {int(np.isnan(x).sum())} NaN values, which have no level")
    k = np.clip(np.floor((x + 1.0) * (levels / 2.0)), 0, levels - 1)
    return k.astype(np.uint8 if levels <= 256 else np.uint16)
