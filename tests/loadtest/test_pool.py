"""The client's count of every outcome matches what the server saw."""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest import contexts, driver
from loadtest.plan import Plan

DIM = 384
NOWHERE = {"refused": 0, "lost": 0, "timeout": 0, "invalid": 0}


@pytest.mark.parametrize(
    ("wire", "route", "rows"),
    [
        ("json", "predict", 1),
        ("json", "predict", 3),
        ("octet", "predict", 1),
        ("octet", "predict", 3),
        ("json", "retrieve", 1),
        ("octet", "retrieve", 1),
    ],
)
def test_sends_every_request_once(serve: Any, drive: Any, wire: str, route: str, rows: int) -> None:
    fake = serve()
    summary = drive(fake.url, wire=wire, route=route, rows=rows)
    assert len(fake.requests) == summary.sent == summary.answered == summary.arrivals == 30
    assert summary.statuses == {"200": 30}
    assert summary.failures == NOWHERE
    assert summary.ok


def test_octet_body_is_the_context_itself(serve: Any, drive: Any) -> None:
    fake = serve()
    drive(fake.url, connections=1)
    expected = [context.tobytes() for context in contexts.load()]
    assert [body for _, _, body in fake.requests] == expected[:30]
    assert {path for path, _, _ in fake.requests} == {"/predict"}


def test_sends_extra_headers_and_a_base_path(serve: Any, drive: Any) -> None:
    fake = serve()
    drive(fake.url + "/v1/", headers=(("X-Tenant", "a"), ("accept", "application/json")), route="retrieve")
    path, headers, _ = fake.requests[0]
    assert path == "/v1/retrieve?k=10"
    assert headers["x-tenant"] == "a"
    assert headers["accept"] == "application/json"


def test_rejection_is_an_answer_but_not_a_good_one(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"status": 503} if n % 3 == 0 else {})
    summary = drive(fake.url)
    assert summary.statuses == {"200": 20, "503": 10}
    assert summary.answered == 30
    assert summary.error_rate == pytest.approx(1 / 3)
    assert summary.rejected_ms["p50"] is not None
    assert not summary.ok


def test_refused_connection_sends_nothing(closed_url: str, drive: Any) -> None:
    summary = drive(closed_url)
    assert summary.failures == NOWHERE | {"refused": 30}
    assert (summary.sent, summary.answered) == (0, 0)
    assert summary.causes
    assert summary.latency_ms["p99"] is None


@pytest.mark.parametrize("cut", [20, 200])
def test_close_in_the_middle_of_the_answer_is_lost(serve: Any, drive: Any, cut: int) -> None:
    fake = serve(lambda n: {"cut": cut} if n < 10 else {})
    summary = drive(fake.url)
    assert summary.failures == NOWHERE | {"lost": 10}
    assert summary.lost_kinds == {"reused": 0, "fresh": 0, "partial": 10}
    assert summary.sent == len(fake.requests) == 30
    assert summary.statuses == {"200": 20}


def test_close_before_the_first_byte_counts_by_new_or_used_connection(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"cut": 0} if n in (0, 5) else {})
    summary = drive(fake.url, connections=1)
    assert summary.lost_kinds == {"reused": 1, "fresh": 1, "partial": 0}
    assert summary.failures["lost"] == 2


def test_answer_that_is_not_http_is_lost(serve: Any, drive: Any) -> None:
    summary = drive(serve(lambda n: {"raw": b"SSH-2.0-nope\r\n"}).url)
    assert summary.failures == NOWHERE | {"lost": 30}


def test_late_answer_is_a_timeout_and_closes_the_connection(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"hang": 30.0} if n == 0 else {})
    summary = drive(fake.url, timeout=1.0)
    assert summary.failures == NOWHERE | {"timeout": 1}
    assert summary.statuses == {"200": 29}
    assert summary.sent == 30


def test_waiting_too_long_for_a_connection_is_a_timeout_that_was_never_sent(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"hang": 30.0})
    summary = drive(fake.url, rate=30_000.0, seconds=0.001, timeout=0.3, connections=2)
    assert summary.failures == NOWHERE | {"timeout": 30}
    assert summary.sent <= 4
    assert len(fake.requests) <= summary.sent


@pytest.mark.parametrize(
    ("wire", "body"),
    [
        ("octet", b"\0" * (DIM * 4 - 4)),
        ("octet", struct.pack("<f", float("nan")) * DIM),
        ("json", b'{"vector": [1.0]}'),
        ("json", b"not json"),
        ("json", b'{"vector": [' + b"NaN," * (DIM - 1) + b"1]}"),
    ],
)
def test_200_of_the_wrong_shape_or_not_finite_is_invalid(serve: Any, drive: Any, wire: str, body: bytes) -> None:
    summary = drive(serve(lambda n: {"body": body}).url, wire=wire)
    assert summary.statuses == {"200": 30}
    assert summary.failures == NOWHERE | {"invalid": 30}
    assert summary.goodput == 0.0


def test_honours_connection_close(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"headers": {"Connection": "close"}})
    summary = drive(fake.url, connections=2)
    assert summary.statuses == {"200": 30}
    assert fake.connections == summary.connections["opened"] == 30
    assert summary.failures == NOWHERE


def test_keeps_the_limit_of_connections_and_drops_nothing(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"hang": 0.01})
    summary = drive(fake.url, connections=2)
    assert fake.peak <= 2
    assert summary.connections == {"opened": 2, "peak": 2}
    assert summary.statuses == {"200": 30}


def test_reads_chunked_answers(serve: Any, drive: Any) -> None:
    assert drive(serve(lambda n: {"chunked": True}).url).ok


def test_counts_answers_by_version_and_server(serve: Any, drive: Any) -> None:
    primary = {"X-Model-Version": "2026-a", "X-Served-By": "primary"}
    fallback = {"x-model-version": "2026-b", "x-served-by": "fallback"}
    summary = drive(serve(lambda n: {"headers": primary if n < 12 else fallback}).url)
    assert summary.versions == {"2026-a": 12, "2026-b": 18}
    assert summary.served_by == {"primary": 12, "fallback": 18}


def test_uses_the_source_address_and_the_query(serve: Any, drive: Any) -> None:
    fake = serve()
    assert drive(fake.url, source="127.0.0.1", query="model=fallback").ok
    drive(fake.url, route="retrieve", query="exclude=1")
    assert fake.peers == {"127.0.0.1"}
    assert {path for path, _, _ in fake.requests} == {"/predict?model=fallback", "/retrieve?k=10&exclude=1"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere loopback is one address")
def test_clients_can_come_from_two_addresses(serve: Any, drive: Any) -> None:
    fake = serve()
    for source in ("127.0.0.1", "127.0.0.2"):
        assert drive(fake.url, source=source).ok
    assert fake.peers == {"127.0.0.1", "127.0.0.2"}


def test_probe_is_a_get_without_a_body_and_any_200_is_valid(serve: Any, drive: Any) -> None:
    fake = serve(lambda n: {"body": b"{}"})
    assert drive(fake.url, route="readyz", wire="json").ok
    assert fake.methods == {"GET"}
    assert {(path, body) for path, _, body in fake.requests} == {("/readyz", b"")}


def test_row_that_differs_from_its_versions_answer_is_invalid(serve: Any, drive: Any, tmp_path: Path) -> None:
    count = len(contexts.load())
    right = {"a": np.full((count, DIM), 0.25, np.float32), "b": np.full((count, DIM), 0.5, np.float32)}
    right["a"][2] = 0.75
    np.savez(tmp_path / "answers.npz", **right)
    fake = serve(lambda n: {"headers": {"X-Model-Version": "ab"[n >= 20] if n < 25 else "unknown"}})
    summary = drive(fake.url, rows=2, connections=1, answers=str(tmp_path / "answers.npz"))
    # Requests 1 and 2 carry context 2, whose answer is another; from 20 on the answers are a's, the version is not.
    assert summary.failures == NOWHERE | {"invalid": 2 + 10}


def test_compares_answers_of_any_version_on_every_wire(serve: Any, drive: Any, tmp_path: Path) -> None:
    right = np.full((len(contexts.load()), DIM), 0.25, np.float32)
    right[3] += 1e-3
    np.save(tmp_path / "answers.npy", right)
    for wire, rows in (("json", 1), ("json", 2), ("octet", 1)):
        summary = drive(serve().url, wire=wire, rows=rows, answers=str(tmp_path / "answers.npy"))
        assert (summary.checked, summary.failures["invalid"]) == (30, rows)
        assert summary.difference == pytest.approx(1e-3, rel=1e-3)
        assert drive(serve().url, wire=wire, rows=rows, answers=str(tmp_path / "answers.npy"), tolerance=0.01).ok


def test_checks_one_of_several_responses(serve: Any, drive: Any) -> None:
    summary = drive(serve(lambda n: {"body": b""}).url, check_every=10, connections=1)
    assert (summary.checked, summary.failures["invalid"]) == (3, 3)


def test_record_marks_rejections_with_a_valid_retry_after(serve: Any, tmp_path: Path) -> None:
    fake = serve(lambda n: {"status": 503, "headers": {"Retry-After": "2"} if n % 2 else {"Retry-After": "soon"}})
    plan = Plan(url=fake.url, rate=100.0, seconds=0.1, wire="octet", connections=1)
    driver.run(plan).save(tmp_path / "record.npz")
    with np.load(tmp_path / "record.npz", allow_pickle=False) as file:
        assert file["outcome"].tolist() == [503] * 10
        assert file["retry_after"].tolist() == [0, 1] * 5
