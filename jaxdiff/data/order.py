"""Which example stands at which position: pure functions of (seed, position), so there is no state to save.

Training reads one endless line of positions 0, 1, 2, ... Position p lies in epoch ``p // size``, and inside
an epoch the examples are permuted by a bijection of 0..size-1 keyed by (seed, epoch). Every epoch therefore
holds each example exactly once, whatever the batch size and the number of processes, and any position can be
computed without the ones before it.

The bijection is a Feistel network (Luby and Rackoff 1988) over the smallest power of two that holds
``size``, with cycle walking (Black and Rogaway 2002): values that land outside 0..size-1 are encrypted again
until they come back. It uses 64-bit integer arithmetic only, so it is the same on every platform and numpy
version, and needs no memory, which matters for sets of 10^9 examples; for smaller ones the current epoch is
kept for speed, with the same values.
"""

import functools

import numpy as np

__all__ = ["coin", "permute", "rows"]

CACHE_LIMIT = 2**22  # examples; an epoch's order is 8 bytes each, so at most 32 MiB a cached epoch
ROUNDS = 12
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of 64-bit words whose every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _word(*parts: int) -> np.ndarray:
    """One well-mixed 64-bit word (an array of shape (1,)) from a few integers."""
    word = np.zeros(1, np.uint64)
    for part in parts:
        word = _mix(word ^ np.uint64(part & _MASK)) + np.uint64(_GOLDEN)
    return _mix(word)


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    low = bits // 2
    width = (np.uint64(low), np.uint64(bits - low))
    right, left = x & ((np.uint64(1) << width[0]) - np.uint64(1)), x >> width[0]
    # The two sides may differ by one bit in width; each round changes one side by a function of the other.
    for number, key in enumerate(keys):
        if number % 2:
            right = right ^ (_mix(left + key) >> (np.uint64(64) - width[0]))
        else:
            left = left ^ (_mix(right + key) >> (np.uint64(64) - width[1]))
    return (left << width[0]) | right


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Image of ``index`` under the bijection of 0..size-1 that belongs to (seed, epoch).

    Args:
        index: integers in 0..size-1, any shape.
        size: number of examples, at least 1.
        seed: any integer.
        epoch: integer >= 0.

    Returns:
        int64 array of index's shape; all of 0..size-1 once when index is ``arange(size)``.
    """
    index = np.asarray(index)
    bits = max(2, (size - 1).bit_length())
    keys = _mix(_word(seed, epoch) + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    out = _feistel(index.reshape(-1).astype(np.uint64), bits, keys)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], bits, keys)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64).reshape(index.shape)


@functools.lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    order = permute(np.arange(size), size, seed, epoch)
    order.setflags(write=False)
    return order


def rows(position: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Dataset row at each global position: ``permute(p % size, size, seed, p // size)``.

    Args:
        position: (B,) integers >= 0; they may straddle epochs.
        size: number of examples.
        seed: any integer.

    Returns:
        (B,) int64 rows in 0..size-1.
    """
    position = np.asarray(position, np.int64)
    epoch, within = np.divmod(position, size)
    out = np.empty_like(position)
    for number in np.unique(epoch).tolist():
        here = epoch == number
        if size <= CACHE_LIMIT:
            out[here] = _epoch_order(size, seed, number)[within[here]]
        else:
            out[here] = permute(within[here], size, seed, number)
    return out


def coin(position: np.ndarray, seed: int) -> np.ndarray:
    """A fair coin for each position, ``True`` with probability 1/2, a function of (seed, position) alone.

    Args:
        position: integers >= 0, any shape.
        seed: any integer.

    Returns:
        bool array of position's shape.
    """
    # The constant separates this stream from the permutation's, which is keyed by the same seed.
    word = _mix(_word(seed, 0x666C6970) + np.asarray(position).astype(np.uint64) * np.uint64(_GOLDEN))
    return (word >> np.uint64(63)).astype(bool)
