"""The adaptive limit on a simulated server: batches on a clock of their own, arrivals in an open loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from service.overload.limiter import (
    BURST_S,
    MIN_ROWS,
    PERIOD_S,
    PROBE_ROWS,
    PROBE_S,
    AdaptiveLimit,
    FixedLimit,
)

MOST, MAX_BATCH = 512, 128


class Net(NamedTuple):
    """A net whose batches take so many seconds, and more for each row."""

    batch_s: float
    row_s: float

    @property
    def capacity(self) -> float:
        """Rows a second, in whole batches."""
        return MAX_BATCH / self.seconds(MAX_BATCH)

    def seconds(self, rows: int) -> float:
        return self.batch_s + self.row_s * rows


QUICK, SLOW = Net(0.0003, 0.0001), Net(0.004, 0.0013)


class Simulation:
    """One server: what comes while a batch runs forms the next one, if the limit lets it in."""

    def __init__(self, limit: AdaptiveLimit | FixedLimit | None = None) -> None:
        self.now = 0.0
        self.limit = limit or AdaptiveLimit(MOST, 0.0)
        self.in_flight = 0
        self._waiting: deque[float] = deque()

    def run(self, net: Net, rate: float, seconds: float) -> tuple[list[float], int]:
        """Return the seconds that each request of one row took, and how many were refused."""
        end, taken, refused = self.now + seconds, [], 0
        arrivals = self._arrivals(rate)
        next_one = next(arrivals)
        while self.now < end:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
            until = self.now + net.seconds(len(batch)) if batch else next_one
            while next_one <= until:
                self.now = next_one
                if self.in_flight < self.limit.rows:
                    self.in_flight += 1
                    self._waiting.append(next_one)
                else:
                    refused += 1
                    self.limit.record_rejection(self.now)
                next_one = next(arrivals)
            self.now = until
            for since in batch:
                taken.append(until - since)
                self.limit.observe(("/predict", "primary", 1), until - since, self.in_flight, self.now)
                self.in_flight -= 1
        return taken, refused

    def _arrivals(self, rate: float) -> Iterator[float]:
        return count(self.now + 1 / rate, 1 / rate)


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)]


@pytest.mark.parametrize("net", [QUICK, SLOW])
@pytest.mark.parametrize("times", [2, 10])
def test_overload_keeps_most_of_the_throughput_and_little_of_the_delay(net: Net, times: float) -> None:
    server = Simulation()
    calm, refused = server.run(net, 0.5 * net.capacity, 3)
    assert refused == 0
    server.run(net, times * net.capacity, 2)
    taken, _ = server.run(net, times * net.capacity, 5)
    assert len(taken) >= 0.8 * net.capacity * 5
    assert p99(taken) <= 8 * min(calm) + 0.010
    full, _ = Simulation(FixedLimit(MOST)).run(net, times * net.capacity, 3)
    assert p99(taken) < 0.5 * p99(full)


@pytest.mark.parametrize("net", [QUICK, SLOW])
def test_the_limit_recovers_soon_after_an_overload(net: Net) -> None:
    server = Simulation()
    server.run(net, 10 * net.capacity, 5)
    assert server.limit.rows < MOST / 2
    server.run(net, 0.5 * net.capacity, 3)
    assert server.limit.rows >= MOST / 4
    assert server.run(net, 0.5 * net.capacity, 5)[1] == 0


def test_a_delay_without_rejections_does_not_lower_the_limit() -> None:
    server = Simulation()
    server.run(SLOW, 0.5 * SLOW.capacity, 3)
    halved = Net(SLOW.batch_s * 2, SLOW.row_s * 2)
    assert server.run(halved, 0.55 * SLOW.capacity, 0.4)[1] == 0
    assert server.run(SLOW, 0.5 * SLOW.capacity, 3)[1] == 0


@pytest.mark.parametrize("times", [2, 10])
def test_a_sudden_overload_finds_little_unused_room(times: float) -> None:
    server = Simulation()
    server.run(SLOW, 0.5 * SLOW.capacity, 10)
    taken, _ = server.run(SLOW, times * SLOW.capacity, 10)
    assert max(taken) <= 2 * BURST_S
    assert sum(seconds > BURST_S for seconds in taken) <= 0.04 * len(taken)


def test_lulls_in_an_overload_do_not_let_the_queue_fill() -> None:
    server = Simulation()
    server.run(SLOW, 2 * SLOW.capacity, 5)
    steady, _ = server.run(SLOW, 2 * SLOW.capacity, 5)
    for _ in range(10):
        server.run(SLOW, 0.2 * SLOW.capacity, 0.2)
        taken, _ = server.run(SLOW, 2 * SLOW.capacity, 0.5)
        assert max(taken) <= 1.5 * max(steady)


def test_admits_a_short_burst() -> None:
    server = Simulation()
    server.run(QUICK, 1000, 2)
    assert server.run(QUICK, 2 * QUICK.capacity, 0.006)[1] == 0
    assert server.run(QUICK, 1000, 1)[1] == 0


def test_adapts_to_a_slow_phase_and_back() -> None:
    slow = Net(QUICK.batch_s * 20, QUICK.row_s * 20)
    server = Simulation()
    server.run(QUICK, QUICK.capacity * 0.5, 2)
    server.run(slow, slow.capacity * 3, 2 * PERIOD_S + 3)
    taken, _ = server.run(slow, slow.capacity * 3, 5)
    assert len(taken) >= 0.8 * slow.capacity * 5
    server.run(QUICK, QUICK.capacity * 0.5, 2)
    assert server.run(QUICK, QUICK.capacity * 0.5, 2)[1] == 0


def test_probes_the_lowest_latency_under_sustained_load() -> None:
    server = Simulation()
    seen: list[float] = []
    for _ in range(int((PERIOD_S + 2) * 20)):
        server.run(SLOW, 3 * SLOW.capacity, 0.05)
        seen.append(server.limit.rows)
    assert PROBE_ROWS in seen
    assert seen.count(PROBE_ROWS) <= 20 * PROBE_S + 4
    assert seen[-1] >= MIN_ROWS


def test_a_probe_ends_even_if_no_request_is_served() -> None:
    now = 0.0
    limit = AdaptiveLimit(MOST, now)
    while limit.rows != PROBE_ROWS:
        before, now = limit.rows, now + 0.01
        limit.record_rejection(now)
        limit.observe(("/predict", "primary", 1), 0.001, 1, now)
    limit.record_rejection(now)
    assert limit.rows == PROBE_ROWS
    now += PROBE_S * 1.01
    limit.record_rejection(now)
    assert limit.rows == before


def test_compares_a_request_with_its_own_kind() -> None:
    now = 0.0
    limit = AdaptiveLimit(MOST, now)
    for step in range(1000):
        now += 0.01
        slow = step % 2
        limit.observe(("/predict", "fallback" if slow else "primary", 1), 0.2 if slow else 0.0002, 300, now)
        limit.record_rejection(now)
        if limit.sustained == limit.rows:
            assert limit.rows == MOST


@given(
    steps=st.lists(
        st.tuples(st.floats(1e-6, 10), st.floats(0, 1), st.integers(1, 2000), st.booleans()), min_size=50, max_size=300
    ),
    most=st.integers(1, 1000),
)
@hypothesis_settings(max_examples=60)
def test_the_limit_stays_within_its_bounds(steps: list[tuple[float, float, int, bool]], most: int) -> None:
    now = 0.0
    limit = AdaptiveLimit(most, now)
    for seconds, pause, in_flight, refused in steps:
        now += pause
        limit.observe(("/predict", "primary", in_flight.bit_length()), seconds, in_flight, now)
        if refused:
            limit.record_rejection(now)
        assert min(most, PROBE_ROWS) <= limit.rows <= most
        assert limit.rows >= min(MIN_ROWS, most) or limit.sustained != limit.rows
