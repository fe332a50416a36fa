"""The closed loop counts every request once, tells right answers from wrong, and never passes over a lost one."""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from bench.answers import apart, checker, vectors_of
from bench.client import Tally, run
from bench.traffic import read, write

RIGHT = np.arange(12, dtype=np.float32).reshape(3, 1, 4)
BODIES = [vector.tobytes() for vector in RIGHT]


@pytest.fixture
def drive(sent: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    def drive(url: str, connections: int = 2, count: float = 30, seconds: float = math.inf) -> dict[str, Any]:
        tally = Tally(read(sent(*BODIES)), checker("octet", RIGHT), 1, seconds, count)
        return asyncio.run(run(url, tally, connections))

    return drive


def test_right_answers_are_counted_and_nothing_else_is(scripted: Any, drive: Any) -> None:
    server = scripted(lambda n, body: {"body": body})
    figures = drive(server.url, connections=3)
    assert (figures["requests"], figures["checked"], figures["errors"], server.seen) == (30, 30, 0, 30)
    assert (figures["statuses"], figures["apart"], server.connections) == ({"200": 30}, 0.0, 3)
    assert 0 < figures["p50_ms"] <= figures["p99_ms"]


def test_another_status_is_an_error(scripted: Any, drive: Any) -> None:
    figures = drive(scripted(lambda n, body: {"status": 503 if n % 10 == 0 else 200, "body": body}).url)
    assert (figures["errors"], figures["statuses"]) == (3, {"503": 3, "200": 27})


@pytest.mark.parametrize("wrong", [b"", b"\0" * 16, np.full(4, np.nan, "<f4").tobytes()])
def test_a_wrong_vector_is_an_error(scripted: Any, drive: Any, wrong: bytes) -> None:
    figures = drive(scripted(lambda n, body: {"body": wrong if n == 7 else body}).url)
    assert (figures["errors"], figures["mismatched"]) == (1, 1)


def test_a_request_that_is_never_answered_is_an_error(scripted: Any, drive: Any) -> None:
    figures = drive(scripted(lambda n, body: {"cut": n == 5, "body": body}).url)
    assert (figures["lost"], figures["errors"]) == (1, 1)
    assert figures["requests"] == 29


def test_the_loop_ends_in_time(scripted: Any, drive: Any) -> None:
    figures = drive(scripted(lambda n, body: {"body": body}).url, count=math.inf, seconds=0.05)
    assert figures["requests"] > 0
    assert figures["seconds"] >= 0.05


def test_what_is_written_is_what_is_sent(tmp_path: Path) -> None:
    requests = [b"a\n12\n", b"", b"\0\xff"]
    write(tmp_path / "t", requests)
    assert read(tmp_path / "t") == requests


def test_answers_are_read_on_every_wire() -> None:
    rows = RIGHT[:, 0]
    one, many = {"vector": rows[0].tolist()}, {"vectors": rows.tolist()}
    assert apart(vectors_of("json", orjson.dumps(one), 4), rows[:1]) == 0
    assert apart(vectors_of("json", orjson.dumps(many), 4), rows) == 0
    assert apart(vectors_of("octet", rows.tobytes(), 4), rows) == 0
    assert apart(vectors_of("octet", rows.tobytes(), 4), rows + np.float32(0.5)) == pytest.approx(0.5)
    for nonsense in (b"[]", b"{}", b'{"vector": "x"}', b'{"vector": [1]}', b"!"):
        assert apart(vectors_of("json", nonsense, 4), rows[:1]) == math.inf


def test_passages_are_ten_with_scores() -> None:
    check = checker("hits", None)
    assert check(0, orjson.dumps({"results": [{"score": 0.5}] * 10})) == 0
    assert check(0, orjson.dumps({"results": [{"score": 0.5}] * 9})) == math.inf
    assert check(0, b"{}") == math.inf
