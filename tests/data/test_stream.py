"""Reading ahead: order, bounds, errors, waiting; and grain's path equal to the one in memory."""

import dataclasses
import gc
import threading
import time

import numpy as np
import pytest

from jaxdiff import data


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Records that are not arrays, so that a pipeline reads them through grain."""

    arrays: dict

    def __len__(self):
        return len(self.arrays["x0"])

    def read(self, rows):
        return {name: array[rows] for name, array in self.arrays.items()}


def images(size=37):
    rng = np.random.default_rng(0)
    return data.arrays({"image": rng.integers(0, 256, (size, 4, 4, 1), np.uint8), "label": rng.integers(0, 3, size)})


def readers():
    return [t for t in threading.enumerate() if t.name == "jaxdiff-data"]


@pytest.mark.parametrize("start", [0, 6])
def test_grain_gives_the_same_bits_as_memory(start):
    ram = images()
    lazy = dataclasses.replace(ram, records=Lazy(ram.records.arrays))
    assert ram.in_memory and not lazy.in_memory
    with (
        data.pipeline(ram, 8, seed=1, flip=True).stream(start, 30) as a,
        data.pipeline(lazy, 8, seed=1, flip=True).stream(start, 30) as b,
    ):
        pairs = list(zip(a, b, strict=True))
    assert len(pairs) == 30 - start
    for left, right in pairs:
        assert sorted(left) == sorted(right) == ["index", "label", "x0"]
        assert all(left[k].tobytes() == right[k].tobytes() and left[k].dtype == right[k].dtype for k in left)
    assert pairs[0][0]["index"][0] == 8 * start


@pytest.mark.slow
def test_grain_worker_processes_give_the_same_bits():
    ram = images()
    lazy = dataclasses.replace(ram, records=Lazy(ram.records.arrays))
    with data.pipeline(lazy, 8, seed=1, workers=2, threads=1).stream(3, 12) as stream:
        batches = list(stream)
    expected = [data.pipeline(ram, 8, seed=1).batch_at(step) for step in range(3, 12)]
    assert len(batches) == 9
    for left, right in zip(batches, expected):
        assert all(left[k].tobytes() == right[k].tobytes() for k in right)


def test_decode_reads_all_once():
    ram = images()
    again = data.decode(dataclasses.replace(ram, records=Lazy(ram.records.arrays)), chunk=10)
    assert again.in_memory and all(np.array_equal(again.records.arrays[k], v) for k, v in ram.records.arrays.items())


class Slow(Lazy):
    """Records that note what is decoded, and wait to be let on after the first rows."""

    def read(self, rows):
        if len(self.log) > 1:
            self.gate.wait(600)
        self.log.append(rows.copy())
        return super().read(rows)


def test_gradual_gives_a_batch_before_all_is_decoded():
    ram = images(2000)
    slow = Slow(ram.records.arrays)
    object.__setattr__(slow, "log", [])
    object.__setattr__(slow, "gate", threading.Event())
    filling = data.gradual(dataclasses.replace(ram, records=slow))
    assert filling.in_memory and data.gradual(filling) is filling
    rows = np.array([1999, 3, 3, 700])
    assert all(np.array_equal(v, ram.records.read(rows)[k]) for k, v in filling.records.read(rows).items())
    assert filling.records.decoded == 3 and slow.log[1].tolist() == [3, 700, 1999]
    slow.gate.set()
    for _ in range(10):
        filling.records.read(rows)
    deadline = time.monotonic() + 600
    while filling.records.decoded < 2000 and time.monotonic() < deadline:
        time.sleep(0.01)
    everything = np.arange(2000)
    for name, values in filling.records.read(everything).items():
        assert np.array_equal(values, ram.records.arrays[name]) and values.dtype == ram.records.arrays[name].dtype
    decoded = np.concatenate(slow.log[1:])
    assert len(decoded) == len(np.unique(decoded)) == 2000  # each once, whoever asked
    with data.pipeline(filling, 8, seed=1).stream(0, 3) as a, data.pipeline(ram, 8, seed=1).stream(0, 3) as b:
        assert all(left["x0"].tobytes() == right["x0"].tobytes() for left, right in zip(a, b, strict=True))


def test_order_bound_and_end():
    taken = []

    def source():
        for k in range(50):
            taken.append(k)
            yield k

    stream = data.Stream(source(), buffer=3)
    deadline = time.monotonic() + 600
    while len(taken) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # as long as it likes: it takes no more
    assert len(taken) == 4  # three in the queue and one in hand: bounded
    assert list(stream) == list(range(50))
    with pytest.raises(StopIteration):
        next(stream)
    assert not stream._thread.is_alive()


def test_an_error_arrives_in_its_place():
    def source():
        yield 1
        yield 2
        raise OSError("record 3 is torn")

    stream = data.Stream(source())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(OSError, match="record 3 is torn"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_wait_fraction_tells_a_slow_reader_from_a_slow_consumer(monkeypatch):
    """By a clock that only the two of them move: no load of the machine counts."""
    now, wanted, came = [7.0], threading.Semaphore(0), threading.Semaphore(0)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow():  # half a second a batch, begun when the consumer already waits
        for k in range(12):
            wanted.acquire()
            now[0] += 0.5
            yield k
        wanted.acquire()

    starved = data.Stream(slow())
    get = starved._queue.get
    monkeypatch.setattr(starved._queue, "get", lambda: (wanted.release(), get())[1])
    assert starved.wait_fraction == 0.0
    assert len(list(starved)) == 12
    assert starved.first_wait_seconds == 0.5 and starved.wait_seconds == 11 * 0.5
    assert starved.wait_fraction == 1.0
    now[0] += 5.5
    assert starved.wait_fraction == 0.5

    def fast():
        yield from range(12)
        came.release()

    fed = data.Stream(fast(), buffer=13)
    came.acquire()  # all is there before the first is taken
    for _ in fed:
        now[0] += 0.02
    assert fed.first_wait_seconds == fed.wait_seconds == fed.wait_fraction == 0.0


def test_close_and_abandonment_end_the_thread():
    pipe = data.pipeline(images(), 8)
    before = set(readers())  # of other tests; they may end at any time
    with pipe.stream() as stream:
        next(stream)
        assert len(set(readers()) - before) == 1
    stream.close()
    assert not set(readers()) - before
    with pytest.raises(StopIteration):
        next(stream)
    lost = pipe.stream()
    next(lost)
    del lost
    gc.collect()
    deadline = time.monotonic() + 600
    while set(readers()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(readers()) - before
