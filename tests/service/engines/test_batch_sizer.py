"""The batch sizer, on devices with given times."""

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
    """Run batches of every size up to `offered` and the sizer's limit."""
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
def test_allows_batches_that_are_quick_or_save_time(fixed_s: float, row_s: float, worth: int) -> None:
    sizer = BatchSizer(MOST)
    run(sizer, fixed_s, row_s)
    assert sizer.rows == worth


def test_does_not_limit_batches_if_only_large_ones_ran() -> None:
    sizer = BatchSizer(MOST)
    for _ in range(10):
        sizer.learn(MOST, 0.5)
    assert sizer.rows == MOST


def test_ignores_one_stall_of_the_machine() -> None:
    sizer = BatchSizer(MOST)
    run(sizer, 0.0001, 0.00003)
    sizer.learn(16, 100 * QUICK_S)
    assert sizer.rows == MOST


def test_tries_larger_sizes_again() -> None:
    sizer = BatchSizer(MOST)
    run(sizer, 0.001, 0.0007)
    assert sizer.rows < MOST
    run(sizer, 0.0001, 0.00003, RETRY_AFTER)
    assert sizer.rows == MOST


def test_notices_a_model_that_became_slower() -> None:
    sizer = BatchSizer(MOST)
    run(sizer, 0.0001, 0.00003)
    run(sizer, 0.001, 0.0007, 8 * round(1 / (DECAY - 1)) * 4)
    assert sizer.rows == 31


def test_counts_a_request_larger_than_a_batch_as_the_largest() -> None:
    sizer = BatchSizer(8)
    sizer.learn(1000, 0.001)
    assert sizer.rows == 8
