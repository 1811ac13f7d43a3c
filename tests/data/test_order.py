"""Positions, epochs, shards, flips: everything is a function of (seed, step)."""

import itertools
import math

import numpy as np
import pytest

from jaxdiff import data
from jaxdiff.data import order

PINNED_ORDER = [9, 8, 3, 4, 6, 1, 0, 2, 5, 7]
PINNED_COIN = [1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0]


def numbered(size=10, **options):
    """A set whose x0 says which row it is."""
    x0 = np.arange(size, dtype=np.float32)[:, None]
    return data.pipeline(data.arrays({"x0": x0, "label": np.arange(size) % 3}), **options)


def test_permute_is_a_bijection_for_every_small_size_and_some_large():
    for size in [*range(1, 130), 1437, 4096, 4097]:
        image = order.permute(np.arange(size), size, 3, 1)
        assert np.array_equal(np.sort(image), np.arange(size)), size


def test_permute_is_uniform_over_all_permutations_of_five():
    """Chi-square over the 120 permutations; passes unless the statistic is beyond 4.5 sigma (p ~ 1e-5)."""
    draws = 6_000
    seen = [tuple(order.permute(np.arange(5), 5, seed, 0)) for seed in range(draws)]
    cells = dict.fromkeys(itertools.permutations(range(5)), 0)
    for p in seen:
        cells[p] += 1
    expected = draws / math.factorial(5)
    chi = sum((n - expected) ** 2 / expected for n in cells.values())
    assert abs(chi - 119) < 4.5 * math.sqrt(2 * 119)


def test_permute_needs_no_memory_of_the_set():
    size = 10**12
    near = order.permute(np.arange(1000), size, 0, 0)
    assert len(np.unique(near)) == 1000 and near.min() >= 0 and near.max() < size
    assert abs(near.mean() / size - 0.5) < 4.5 / math.sqrt(12 * 1000)


def test_cached_and_direct_orders_agree(monkeypatch):
    position = np.arange(95, 310)
    cached = order.rows(position, 100, 7)
    monkeypatch.setattr(order, "CACHE_LIMIT", 0)
    assert np.array_equal(cached, order.rows(position, 100, 7))


def test_order_is_pinned():
    """Runs resume across versions of this library only while these numbers stand."""
    assert order.permute(np.arange(10), 10, 0, 0).tolist() == PINNED_ORDER
    assert order.coin(np.arange(16), 0).astype(int).tolist() == PINNED_COIN


def test_epochs_and_seeds_differ():
    rows = [tuple(order.permute(np.arange(50), 50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(rows)) == 9


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10])
def test_each_example_once_an_epoch_even_when_the_batch_does_not_divide(batch_size):
    size = 10
    pipe = numbered(size, batch_size=batch_size, seed=5)
    steps = math.lcm(size, batch_size) // batch_size
    line = np.concatenate([pipe.batch_at(s)["x0"][:, 0] for s in range(steps)])
    epochs = line.reshape(-1, size)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1)))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_together_are_the_global_batch_whatever_their_number(count):
    whole = numbered(22, batch_size=8, seed=1)
    parts = [numbered(22, batch_size=8, seed=1, process_index=p, process_count=count) for p in range(count)]
    for step in range(12):
        batches = [part.batch_at(step) for part in parts]
        expected = whole.batch_at(step)
        for name, value in expected.items():
            assert np.array_equal(np.concatenate([b[name] for b in batches]), value), (step, name)
            assert all(len(b[name]) == 8 // count for b in batches)
    assert np.array_equal(whole.batch_at(3)["index"], np.arange(24, 32, dtype=np.uint32))


def test_a_batch_is_the_same_iterated_or_jumped_to():
    pipe = numbered(10, batch_size=4, seed=2)
    with pipe.stream() as stream:
        walked = [next(stream) for _ in range(9)]
    jumped = numbered(10, batch_size=4, seed=2).batch_at(8)
    with numbered(10, batch_size=4, seed=2).stream(8) as stream:
        resumed = next(stream)
    for name in jumped:
        assert walked[8][name].tobytes() == jumped[name].tobytes() == resumed[name].tobytes()


def test_label_stays_with_its_example():
    batch = numbered(30, batch_size=30, seed=4).batch_at(2)
    assert np.array_equal(batch["label"], batch["x0"][:, 0].astype(int) % 3) and batch["label"].dtype == np.int32


def test_index_wraps_at_two_to_the_32():
    pipe = numbered(10, batch_size=4)
    assert pipe.batch_at(2**29)["index"].tolist() == [2**31 + i for i in range(4)]
    batch = pipe.batch_at(2**30)
    assert batch["index"].tolist() == [0, 1, 2, 3] and batch["index"].dtype == np.uint32


def test_flip_depends_on_seed_and_position_only():
    image = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 2), np.uint8)
    made = lambda **kw: data.pipeline(data.arrays({"image": image}), seed=kw.pop("seed", 0), **kw)
    plain = np.concatenate([made(batch_size=8).batch_at(s)["x0"] for s in range(10)])
    a = np.concatenate([made(batch_size=8, flip=True).batch_at(s)["x0"] for s in reversed(range(10))][::-1])
    b = np.concatenate([made(batch_size=20, flip=True).batch_at(s)["x0"] for s in range(4)])
    assert a.tobytes() == b.tobytes()
    halves = [made(batch_size=20, flip=True, process_index=p, process_count=2).batch_at(1)["x0"] for p in (0, 1)]
    assert np.concatenate(halves).tobytes() == b[20:40].tobytes()
    turned = np.array([not np.array_equal(p, q) for p, q in zip(plain, a)])
    assert np.array_equal(turned, order.coin(np.arange(80), 0)) and turned.any() and not turned.all()
    assert np.array_equal(a[turned], plain[turned][:, :, ::-1])


def test_coin_is_fair_and_independent_of_its_neighbour():
    """10^5 tosses; each statistic within 4.5 standard errors."""
    toss = order.coin(np.arange(100_000), 3).astype(float)
    assert abs(toss.mean() - 0.5) < 4.5 * 0.5 / math.sqrt(1e5)
    assert abs(np.mean((toss[1:] - 0.5) * (toss[:-1] - 0.5))) < 4.5 * 0.25 / math.sqrt(1e5)
    assert not np.array_equal(toss, order.coin(np.arange(100_000), 4))
