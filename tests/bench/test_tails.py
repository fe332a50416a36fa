"""The tail is set beside the median, and a delay beside what happened at that time."""

from time import monotonic

import numpy as np
import pytest

from bench.tails import figures, happenings, to_markdown
from tests.made_samples import make


def test_a_delay_shows_at_the_event_that_it_belongs_to() -> None:
    latency = np.where(np.arange(1000) % 100 < 5, 40.0, 10.0)
    found = figures(make(0, 10, latency_ms=latency), {"scrape": [(0.0, 0.04)], "promotion": [(0.5, 0.6), (2.5, 2.6)]})
    assert found["ratio"] == pytest.approx(4.0)
    assert found["events"]["scrape"] == pytest.approx(1.0)
    assert found["events"]["promotion"] == pytest.approx(0.25)
    assert "| octet | 100 | 10 | 40 | 4 |" in to_markdown([{"wire": "octet", **found}])


def test_a_load_that_was_not_sent_in_time_has_no_ratio() -> None:
    late = make(0, 1, sent=np.r_[np.arange(90) / 100, np.full(10, 3.0)])
    found = figures(late, {"scrape": [(0.0, 1.0)]})
    assert found["ratio"] is found["events"]["scrape"] is None
    assert "| - | - |" in to_markdown([{"wire": "octet", **found}])


def test_events_happen_in_turn_until_the_end() -> None:
    calls: list[tuple[str, int]] = []
    named = {"one": lambda turn: calls.append(("one", turn)), "two": lambda turn: calls.append(("two", turn))}
    assert happenings(named, monotonic()) == {"one": [], "two": []}
    windows = happenings(named, monotonic() + 0.05, every_s=0.0)
    assert calls[:4] == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert len(windows["one"]) + len(windows["two"]) == len(calls)
