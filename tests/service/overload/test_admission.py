"""Admission: what is reserved, for whom, and that all of it is given back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lvm.errors import ClientLimit, Overloaded
from service.overload.admission import Admission, Permit
from service.overload.limiter import FixedLimit
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.scraping import scrape

ROW = 40  # bytes


def admission(limit: int = 4, clock: Callable[[], float] = lambda: 0.0, **settings: float) -> Admission:
    return Admission(FixedLimit(limit), Settings(**settings), Metrics(), clock)  # type: ignore[arg-type]


class Probing(FixedLimit):
    """A limit that was 4 and is lower for a moment."""

    @property
    def sustained(self) -> float:
        return 4.0


def enter(known: Admission, client: str, rows: int = 1) -> Permit:
    permit = Permit(known, client)
    known.check_row(client)
    permit.reserve(rows * ROW)
    permit.set_rows(1)
    permit.set_rows(rows)
    return permit


def test_admits_rows_up_to_the_limit_and_again_once_some_are_released() -> None:
    known = admission(4)
    permits = [enter(known, "a") for _ in range(4)]
    with pytest.raises(Overloaded):
        enter(known, "a")
    permits[0].release()
    enter(known, "a")
    assert known.rows == 4


def test_admits_a_large_request_if_there_is_room_for_one_row() -> None:
    known = admission(4)
    enter(known, "a", 3)
    large = enter(known, "a", 100)
    with pytest.raises(Overloaded):
        enter(known, "a")
    large.release()
    assert known.rows == 3


def test_sets_rows_to_what_was_decoded_unless_released() -> None:
    known = admission(4)
    permit = enter(known, "a", 3)
    permit.set_rows(1)
    assert (known.rows, known.clients["a"].rows) == (1, 1)
    permit.release()
    permit.set_rows(7)
    assert known.rows == 0


def test_rejects_on_the_head_if_there_is_no_room_for_a_row() -> None:
    known = admission(1)
    enter(known, "a")
    with pytest.raises(Overloaded):
        known.check_row("a")
    assert known.size == ROW


def test_an_incomplete_body_holds_bytes_and_no_rows() -> None:
    known = admission(1)
    Permit(known, "a").reserve(1000 * ROW)
    enter(known, "a")
    assert (known.rows, known.size) == (1, 1001 * ROW)


def test_admits_bytes_up_to_the_limit_and_a_single_body_of_any_size() -> None:
    known = admission(max_in_flight_mb=0.001)
    first = Permit(known, "a")
    first.reserve(5000)
    with pytest.raises(Overloaded, match="bytes"):
        Permit(known, "a").reserve(1)
    first.release()
    chunked = Permit(known, "a")
    other = Permit(known, "a")
    other.reserve(900)
    chunked.reserve(100)
    with pytest.raises(Overloaded, match="bytes"):
        chunked.reserve(101)
    chunked.release()
    other.release()
    assert (known.size, known.clients) == (0, {})


def test_long_bodies_leave_room_for_short_ones() -> None:
    known = admission(max_in_flight_mb=1)
    Permit(known, "a").reserve(870_000)
    with pytest.raises(Overloaded, match="bytes"):
        Permit(known, "a").reserve(70_000)
    Permit(known, "a").reserve(60_000)
    Permit(known, "a").reserve(60_000)


def test_reserves_only_the_first_bytes_of_a_declared_length() -> None:
    known = admission(max_in_flight_mb=1)
    permit = Permit(known, "a")
    permit.reserve(0, declared=800_000)
    assert known.size < 100_000
    permit.reserve(800_000)
    with pytest.raises(Overloaded, match="bytes"):
        Permit(known, "a").reserve(0, declared=800_000)


def test_a_single_client_may_use_all_and_another_gets_its_share_at_once() -> None:
    known = admission(4)
    hog = [enter(known, "hog") for _ in range(4)]
    small = enter(known, "small")
    enter(known, "small")
    for client in ("small", "hog"):
        with pytest.raises(ClientLimit) as refused:
            enter(known, client)
        assert refused.value.retry_after == 1
    for permit in hog[:3]:
        permit.release()
    small.release()
    enter(known, "hog")


def test_admits_a_light_client_that_holds_its_share_for_a_moment() -> None:
    known = admission(4)
    for _ in range(20):
        enter(known, "hog").release()
    for _ in range(4):
        enter(known, "hog")
    for _ in range(4):  # its share is 2
        enter(known, "small")
    with pytest.raises(ClientLimit):  # but never more than there is
        enter(known, "small")


def test_does_not_reject_a_light_client_because_of_a_probe() -> None:
    limit = Probing(4)
    known = Admission(limit, Settings(), Metrics(), lambda: 0.0)
    for _ in range(20):
        enter(known, "hog").release()
    enter(known, "hog")
    limit.rows = 1
    with pytest.raises(Overloaded):
        enter(known, "hog")
    for _ in range(4):
        enter(known, "small")
    with pytest.raises(ClientLimit):
        enter(known, "small")


def test_rows_admitted_long_ago_make_no_client_light() -> None:
    now = 0.0
    known = admission(4, lambda: now)
    for _ in range(20):
        enter(known, "hog").release()  # and nobody was served
    now = 2.0
    for _ in range(4):
        enter(known, "hog")
    enter(known, "small")
    enter(known, "small")
    with pytest.raises(ClientLimit):
        enter(known, "small")


def test_a_client_that_fills_the_bytes_leaves_another_its_share() -> None:
    known = admission(max_in_flight_mb=0.001)
    Permit(known, "hog").reserve(1000)
    Permit(known, "small").reserve(500)
    with pytest.raises(ClientLimit):
        Permit(known, "hog").reserve(1)
    with pytest.raises(ClientLimit):
        Permit(known, "small").reserve(1)


def test_many_clients_get_no_more_than_the_limit() -> None:
    known = admission(4)
    inside = 0
    for n in range(100):
        try:
            enter(known, str(n))
        except Overloaded:
            continue
        inside += 1
    assert inside == 4
    assert len(known.clients) == 4


def test_counts_rejections_by_reason() -> None:
    metrics = Metrics()
    known = Admission(FixedLimit(1), Settings(max_in_flight_mb=0.0001), metrics)
    enter(known, "a")
    with pytest.raises(Overloaded, match="rows"):
        known.check_row("a")
    with pytest.raises(Overloaded, match="bytes"):
        Permit(known, "a").reserve(99)
    text = scrape(metrics)[0].decode()
    assert [f'lvm_refusals_total{{reason="{r}"}} 1.0' in text for r in ("rows", "bytes")] == [True, True]


def test_retry_after_is_the_backlog_divided_by_the_service_rate() -> None:
    now = 0.0
    known = admission(1000, lambda: now)
    assert known.retry_after_s() == 1
    permits = [enter(known, "a", 10) for _ in range(60)]
    for permit in permits[:10]:
        now += 0.1
        known.record_served("/predict", "primary", 10, 0.1)
        permit.release()
    assert known.retry_after_s() == 5  # 500 rows at 100 a second


class Reservations(RuleBasedStateMachine):
    """Requests reserve bytes, set their rows and release in any order, some of them twice."""

    @initialize(limit=st.integers(1, 20), size=st.integers(40, 2000))
    def begin(self, limit: int, size: int) -> None:
        self.known = admission(limit, max_in_flight_mb=size / 1e6)
        self.limit, self.most = limit, size
        self.permits: list[Permit] = []

    @rule(client=st.sampled_from("abcd"), size=st.integers(0, 800))
    def arrive(self, client: str, size: int) -> None:
        permit, before = Permit(self.known, client), (self.known.rows, self.known.size)
        try:
            self.known.check_row(client)
            permit.reserve(size)
        except (Overloaded, ClientLimit):
            assert (self.known.rows, self.known.size) == before
            assert self.known.rows >= self.limit or self.known.size + size > self.most
        self.permits.append(permit)

    @rule(data=st.data(), more=st.integers(0, 400), name=st.sampled_from(["reserve", "set rows", "release"]))
    def step(self, data: st.DataObject, more: int, name: str) -> None:
        if not self.permits:
            return
        permit = data.draw(st.sampled_from(self.permits))
        try:
            if name == "reserve":
                permit.reserve(permit.size + more)
            elif name == "set rows":
                permit.set_rows(1 + more if permit.rows else 1)
        except (Overloaded, ClientLimit):
            pass
        if name == "release":
            permit.release()
            permit.release()
            self.permits.remove(permit)

    @invariant()
    def sums_agree(self) -> None:
        if not hasattr(self, "known"):
            return
        assert self.known.rows == sum(permit.rows for permit in self.permits)
        assert self.known.size == sum(permit.size for permit in self.permits)
        assert self.known.rows == sum(usage.rows for usage in self.known.clients.values())
        assert self.known.size == sum(usage.size for usage in self.known.clients.values())
        assert all(usage.requests > 0 for usage in self.known.clients.values())

    def teardown(self) -> None:
        for permit in getattr(self, "permits", ()):
            permit.release()
        if hasattr(self, "known"):
            assert (self.known.rows, self.known.size, self.known.clients) == (0, 0, {})


TestReservations = Reservations.TestCase
TestReservations.settings = hypothesis_settings(max_examples=60, stateful_step_count=30)
