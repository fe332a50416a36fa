"""The pair store keeps predictions until they are taken, in memory of a fixed size."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from service.engines.pair_store import Bytes, Digests, PairStore

WIDTH = 32
AUTHOR = 7


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def store(clock: Clock | None = None, size: int = 1 << 16, memory: mmap.mmap | None = None) -> PairStore:
    return PairStore(memory or mmap.mmap(-1, size), WIDTH, seconds=60, clock=clock or Clock())


def some(count: int, seed: int = 0) -> tuple[Digests, Bytes]:
    """Return different digests `(count, 2)`, and answers `(count, WIDTH)`."""
    draw = np.random.default_rng(seed)
    digests = draw.integers(1, 2**63, (count, 2), dtype=np.uint64)
    return digests, draw.integers(0, 200, (count, WIDTH), dtype=np.uint8)


def put(pairs: PairStore, digests: Digests, answers: Bytes, author: int = AUTHOR) -> None:
    pairs.put(digests, author, np.ones(len(digests), np.uint64), answers)


def test_returns_what_waits_once() -> None:
    pairs = store()
    digests, answers = some(20)
    put(pairs, digests, answers)
    found = pairs.take(digests[5:])
    np.testing.assert_array_equal(found.rows, np.arange(15))
    np.testing.assert_array_equal(found.answers, answers[5:])
    assert set(found.authors.tolist()) == {AUTHOR}
    assert not len(pairs.take(digests[5:]).rows)
    assert len(pairs.take(digests[:5]).rows) == 5


def test_a_prediction_made_twice_waits_for_two() -> None:
    pairs = store()
    digests, answers = some(1)
    put(pairs, digests, answers)
    put(pairs, digests, answers)
    assert pairs.take(np.repeat(digests, 5, axis=0)).rows.tolist() == [0, 1]


def test_predictions_of_several_authors_wait_side_by_side() -> None:
    pairs = store()
    digests, answers = some(1)
    put(pairs, digests, answers, author=1)
    put(pairs, digests, answers + 1, author=2)
    found = pairs.take(digests)
    assert sorted(found.authors.tolist()) == [1, 2]
    np.testing.assert_array_equal(found.answers[found.authors == 2], answers + 1)


def test_forgets_after_the_time_that_was_set() -> None:
    clock = Clock()
    pairs = store(clock)
    digests, answers = some(3)
    put(pairs, digests[:1], answers[:1])
    clock.now += 59
    put(pairs, digests[1:2], answers[1:2])
    clock.now += 2
    assert pairs.take(digests).rows.tolist() == [1]


def test_a_prediction_that_expired_does_not_wait_again_with_the_next_one() -> None:
    clock = Clock()
    pairs = store(clock)
    digests, answers = some(1)
    put(pairs, digests, answers)
    clock.now += 61
    put(pairs, digests, answers)
    assert len(pairs.take(np.repeat(digests, 3, axis=0)).rows) == 1


def test_the_newest_replace_the_oldest_in_a_full_store() -> None:
    clock = Clock()
    pairs = store(clock)
    digests, answers = some(10 * pairs.capacity)
    for start in range(0, len(digests), 50):
        clock.now += 0.01
        put(pairs, digests[start : start + 50], answers[start : start + 50])
    newest = pairs.capacity // 4
    assert len(pairs.take(digests[-newest:]).rows) >= 0.95 * newest
    assert not len(pairs.take(digests[: 5 * pairs.capacity]).rows)


def test_processes_that_share_memory_take_what_others_keep() -> None:
    memory = mmap.mmap(-1, 1 << 16)
    clock = Clock()
    ours, theirs = store(clock, memory=memory), store(clock, memory=memory)
    digests, answers = some(10)
    put(ours, digests, answers)
    np.testing.assert_array_equal(theirs.take(digests).answers, answers)
    assert not len(ours.take(digests).rows)


@pytest.mark.parametrize("size", [400, 4000, 1 << 20])
def test_uses_no_more_memory_than_it_has(size: int) -> None:
    pairs = store(size=size)
    assert 0 < pairs.capacity * (6 * 8 + WIDTH) <= size


def test_an_entry_that_was_written_in_part_counts_as_lost() -> None:
    memory = mmap.mmap(-1, 1 << 16)
    pairs = store(memory=memory)
    digests, answers = some(20)
    put(pairs, digests, answers)
    for place in range(len(memory) - 20 * WIDTH, len(memory)):
        memory[place] = 0
    found = pairs.take(digests)
    np.testing.assert_array_equal(found.answers, answers[found.rows])
    torn = bytes(memory).find(answers[0].tobytes())
    put(pairs, digests, answers)
    memory[torn : torn + 4] = bytes(4)
    assert 0 not in pairs.take(digests).rows


def test_what_another_width_has_left_takes_no_room() -> None:
    memory = mmap.mmap(-1, 1 << 16)
    memory.write(np.random.default_rng(0).bytes(1 << 16))
    pairs = store(memory=memory)
    digests, answers = some(pairs.capacity // 8)
    put(pairs, digests, answers)
    assert len(pairs.take(digests).rows) == len(digests)
