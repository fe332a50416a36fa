"""Admission: what is reserved, for whom, and that all of it is given back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lvm.errors import ClientLimit, Overloaded
from service.overload.admission import Admission, Place
from service.overload.limiter import FixedLimit
from service.settings import Settings
from service.telemetry.metrics import Metrics

ROW = 40  # bytes


def admission(limit: int = 4, clock: Callable[[], float] = lambda: 0.0, **settings: float) -> Admission:
    return Admission(FixedLimit(limit), Settings(**settings), Metrics(), clock)  # type: ignore[arg-type]


class Probing(FixedLimit):
    """A limit that was 4 and is lower for a moment."""

    @property
    def lasting(self) -> float:
        return 4.0


def enter(known: Admission, client: str, rows: int = 1) -> Place:
    place = Place(known, client)
    place.check()
    place.grow(rows * ROW)
    place.enter()
    place.settle(rows)
    return place


def test_rows_are_let_in_up_to_the_limit_and_again_when_some_have_left() -> None:
    known = admission(4)
    places = [enter(known, "a") for _ in range(4)]
    with pytest.raises(Overloaded):
        enter(known, "a")
    places[0].leave()
    enter(known, "a")
    assert known.rows == 4


def test_a_large_request_is_let_in_where_a_small_one_is_and_fills_the_room() -> None:
    known = admission(4)
    enter(known, "a", 3)
    large = enter(known, "a", 100)
    with pytest.raises(Overloaded):
        enter(known, "a")
    large.leave()
    assert known.rows == 3


def test_rows_are_corrected_by_what_was_decoded() -> None:
    known = admission(4)
    place = enter(known, "a", 3)
    place.settle(1)
    assert (known.rows, known.clients["a"].rows) == (1, 1)
    place.leave()
    place.settle(7)
    assert known.rows == 0


def test_who_would_not_be_let_in_is_told_so_before_the_body_comes() -> None:
    known = admission(1)
    enter(known, "a")
    with pytest.raises(Overloaded):
        Place(known, "a").check()
    assert known.size == ROW


def test_a_body_that_is_on_its_way_holds_bytes_and_no_rows() -> None:
    known = admission(1)
    Place(known, "a").grow(1000 * ROW)
    enter(known, "a")
    assert (known.rows, known.size) == (1, 1001 * ROW)


def test_bytes_are_let_in_up_to_the_limit_and_a_body_alone_whatever_its_size() -> None:
    known = admission(max_in_flight_mb=0.001)
    first = Place(known, "a")
    first.grow(5000)
    with pytest.raises(Overloaded, match="bytes"):
        Place(known, "a").grow(1)
    first.leave()
    chunked = Place(known, "a")
    other = Place(known, "a")
    other.grow(900)
    chunked.grow(100)
    with pytest.raises(Overloaded, match="bytes"):
        chunked.grow(101)
    chunked.leave()
    other.leave()
    assert (known.size, known.clients) == (0, {})


def test_long_bodies_leave_room_to_short_ones() -> None:
    known = admission(max_in_flight_mb=1)
    Place(known, "a").grow(870_000)
    with pytest.raises(Overloaded, match="bytes"):
        Place(known, "a").grow(70_000)
    Place(known, "a").grow(60_000)
    Place(known, "a").grow(60_000)


def test_of_a_long_body_that_is_declared_only_the_first_bytes_are_held() -> None:
    known = admission(max_in_flight_mb=1)
    place = Place(known, "a")
    place.expect(800_000)
    assert known.size < 100_000
    place.grow(800_000)
    with pytest.raises(Overloaded, match="bytes"):
        Place(known, "a").expect(800_000)


def test_one_client_alone_may_use_all_and_another_gets_its_share_at_once() -> None:
    known = admission(4)
    hog = [enter(known, "hog") for _ in range(4)]
    small = enter(known, "small")
    enter(known, "small")
    for client in ("small", "hog"):
        with pytest.raises(ClientLimit) as refused:
            enter(known, client)
        assert refused.value.retry_after == 1
    for place in hog[:3]:
        place.leave()
    small.leave()
    enter(known, "hog")


def test_a_client_that_asks_for_little_is_let_in_though_it_holds_its_share_for_a_moment() -> None:
    known = admission(4)
    for _ in range(20):
        enter(known, "hog").leave()
    for _ in range(4):
        enter(known, "hog")
    for _ in range(4):  # its share is 2
        enter(known, "small")
    with pytest.raises(ClientLimit):  # but never more than there is
        enter(known, "small")


def test_a_client_that_asks_for_little_is_not_refused_for_a_probe() -> None:
    limit = Probing(4)
    known = Admission(limit, Settings(), Metrics(), lambda: 0.0)
    for _ in range(20):
        enter(known, "hog").leave()
    enter(known, "hog")
    limit.rows = 1
    with pytest.raises(Overloaded):
        enter(known, "hog")
    for _ in range(4):
        enter(known, "small")
    with pytest.raises(ClientLimit):
        enter(known, "small")


def test_what_was_taken_long_ago_makes_nobody_modest() -> None:
    now = 0.0
    known = admission(4, lambda: now)
    for _ in range(20):
        enter(known, "hog").leave()  # and nobody was served
    now = 2.0
    for _ in range(4):
        enter(known, "hog")
    enter(known, "small")
    enter(known, "small")
    with pytest.raises(ClientLimit):
        enter(known, "small")


def test_a_client_with_its_bytes_full_leaves_another_its_share() -> None:
    known = admission(max_in_flight_mb=0.001)
    Place(known, "hog").grow(1000)
    Place(known, "small").grow(500)
    with pytest.raises(ClientLimit):
        Place(known, "hog").grow(1)
    with pytest.raises(ClientLimit):
        Place(known, "small").grow(1)


def test_more_clients_than_the_limit_get_no_more_than_the_limit() -> None:
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


def test_every_refusal_is_counted_by_its_reason() -> None:
    known = admission(1, max_in_flight_mb=0.0001)
    enter(known, "a")
    with pytest.raises(Overloaded, match="rows"):
        Place(known, "a").check()
    with pytest.raises(Overloaded, match="bytes"):
        Place(known, "a").grow(99)
    text = known._metrics.scrape()[0].decode()
    assert [f'lvm_refusals_total{{reason="{r}"}} 1.0' in text for r in ("rows", "bytes")] == [True, True]


def test_retry_after_is_the_backlog_over_the_rate_of_service() -> None:
    now = 0.0
    known = admission(1000, lambda: now)
    assert known.backlog_s() == 1
    places = [enter(known, "a", 10) for _ in range(60)]
    for place in places[:10]:
        now += 0.1
        known.serve("/predict", "primary", 10, 0.1)
        place.leave()
    assert known.backlog_s() == 5  # 500 rows at 100 a second


class Reservations(RuleBasedStateMachine):
    """Requests come, grow, enter, are corrected and leave in any order, some of them twice."""

    @initialize(limit=st.integers(1, 20), size=st.integers(40, 2000))
    def begin(self, limit: int, size: int) -> None:
        self.known = admission(limit, max_in_flight_mb=size / 1e6)
        self.limit, self.most = limit, size
        self.places: list[Place] = []

    @rule(client=st.sampled_from("abcd"), size=st.integers(0, 800))
    def come(self, client: str, size: int) -> None:
        place, before = Place(self.known, client), (self.known.rows, self.known.size)
        try:
            place.check()
            place.grow(size)
        except (Overloaded, ClientLimit):
            assert (self.known.rows, self.known.size) == before
            assert self.known.rows >= self.limit or self.known.size + size > self.most
        self.places.append(place)

    @rule(data=st.data(), more=st.integers(0, 400), step=st.sampled_from(["grow", "enter", "settle", "leave"]))
    def go_on(self, data: st.DataObject, more: int, step: str) -> None:
        if not self.places:
            return
        place = data.draw(st.sampled_from(self.places))
        try:
            if step == "grow":
                place.grow(place.size + more)
            elif step == "enter" and not place.rows:
                place.enter()
            elif step == "settle" and place.rows:
                place.settle(1 + more)
        except (Overloaded, ClientLimit):
            pass
        if step == "leave":
            place.leave()
            place.leave()
            self.places.remove(place)

    @invariant()
    def all_is_accounted_for(self) -> None:
        if not hasattr(self, "known"):
            return
        assert self.known.rows == sum(place.rows for place in self.places)
        assert self.known.size == sum(place.size for place in self.places)
        assert self.known.rows == sum(held.rows for held in self.known.clients.values())
        assert self.known.size == sum(held.size for held in self.known.clients.values())
        assert all(held.requests > 0 for held in self.known.clients.values())

    def teardown(self) -> None:
        for place in getattr(self, "places", ()):
            place.leave()
        if hasattr(self, "known"):
            assert (self.known.rows, self.known.size, self.known.clients) == (0, 0, {})


TestReservations = Reservations.TestCase
TestReservations.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)
