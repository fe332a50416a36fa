"""Batches as large as is quick or saves time, on devices whose times are given."""

from __future__ import annotations

import pytest

from service.engines.batch_sizer import (
    DECAY,
    QUICK_S,
    RETRY_AFTER,
    BatchSizer,
)

MOST = 128


def run(sizer: BatchSizer, fixed_s: float, row_s: float, batches: int = 50, offered: int = MOST) -> None:
    """Run batches of every size up to what is offered and worth it."""
    for n in range(batches):
        rows = min(sizer.rows, offered, 1 << n % 8)
        sizer.learn(rows, fixed_s + row_s * rows)


@pytest.mark.parametrize(
    ("fixed_s", "row_s", "worth"),
    [
        (0.0001, 0.00003, MOST),  # a quick net
        (0.005, 0.00001, MOST),  # a device with room for many rows
        (0.08, 0.00001, MOST),  # slow, and no slower for many
        (0.001, 0.0007, 31),  # arithmetic alone: 32 rows take 23 ms, and a row as long as in 16
        (0.0, 0.03, 1),  # long for one, and no gain by two
    ],
)
def test_a_batch_is_as_large_as_is_quick_or_saves_time(fixed_s: float, row_s: float, worth: int) -> None:
    sizer = BatchSizer(MOST)
    run(sizer, fixed_s, row_s)
    assert sizer.rows == worth


def test_where_only_large_batches_were_seen_they_go_on() -> None:
    sizer = BatchSizer(MOST)
    for _ in range(10):
        sizer.learn(MOST, 0.5)
    assert sizer.rows == MOST


def test_a_stall_of_the_machine_changes_nothing() -> None:
    sizer = BatchSizer(MOST)
    run(sizer, 0.0001, 0.00003)
    sizer.learn(16, 100 * QUICK_S)
    assert sizer.rows == MOST


def test_sizes_that_were_not_worth_it_are_tried_again() -> None:
    sizer = BatchSizer(MOST)
    run(sizer, 0.001, 0.0007)
    assert sizer.rows < MOST
    run(sizer, 0.0001, 0.00003, RETRY_AFTER)
    assert sizer.rows == MOST


def test_a_net_that_grew_slower_is_noticed() -> None:
    sizer = BatchSizer(MOST)
    run(sizer, 0.0001, 0.00003)
    run(sizer, 0.001, 0.0007, 8 * round(1 / (DECAY - 1)) * 4)
    assert sizer.rows == 31


def test_a_request_larger_than_a_batch_is_learned_from_as_the_largest() -> None:
    sizer = BatchSizer(8)
    sizer.learn(1000, 0.001)
    assert sizer.rows == 8
