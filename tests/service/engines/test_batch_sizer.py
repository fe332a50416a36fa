"""Batches as large as is quick or saves time, on devices whose times are given."""

from __future__ import annotations

import pytest

from service.engines.batch_sizer import (
    CREEP,
    LAPS,
    QUICK_S,
    Sizing,
)

MOST = 128


def run(sizing: Sizing, fixed_s: float, row_s: float, batches: int = 50, offered: int = MOST) -> None:
    """Run batches of every size up to what is offered and worth it."""
    for n in range(batches):
        rows = min(sizing.rows, offered, 1 << n % 8)
        sizing.learn(rows, fixed_s + row_s * rows)


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
    sizing = Sizing(MOST)
    run(sizing, fixed_s, row_s)
    assert sizing.rows == worth


def test_where_only_large_batches_were_seen_they_go_on() -> None:
    sizing = Sizing(MOST)
    for _ in range(10):
        sizing.learn(MOST, 0.5)
    assert sizing.rows == MOST


def test_a_stall_of_the_machine_changes_nothing() -> None:
    sizing = Sizing(MOST)
    run(sizing, 0.0001, 0.00003)
    sizing.learn(16, 100 * QUICK_S)
    assert sizing.rows == MOST


def test_sizes_that_were_not_worth_it_are_tried_again() -> None:
    sizing = Sizing(MOST)
    run(sizing, 0.001, 0.0007)
    assert sizing.rows < MOST
    run(sizing, 0.0001, 0.00003, LAPS)
    assert sizing.rows == MOST


def test_a_net_that_grew_slower_is_noticed() -> None:
    sizing = Sizing(MOST)
    run(sizing, 0.0001, 0.00003)
    run(sizing, 0.001, 0.0007, 8 * round(1 / (CREEP - 1)) * 4)
    assert sizing.rows == 31


def test_a_request_larger_than_a_batch_is_learned_from_as_the_largest() -> None:
    sizing = Sizing(8)
    sizing.learn(1000, 0.001)
    assert sizing.rows == 8
