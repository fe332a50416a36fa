"""A workload counts only right answers, and says which server gave a wrong one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.load import LoadTest, Workload, WrongAnswers, keep
from bench.servers import RunningServer

CONTEXTS = np.arange(3 * 5 * 4, dtype=np.float32).reshape(3, 5, 4)
RIGHT = CONTEXTS[:, 0]


@pytest.fixture
def workload(tmp_path: Path) -> Callable[[str], Workload]:
    def make(url: str) -> Workload:
        contexts, answers = keep(tmp_path, "contexts", CONTEXTS), keep(tmp_path, "answers", RIGHT)
        return Workload(RunningServer("ours", url, 0, 0.0), "octet", contexts, answers)

    return make


def first_chunk(body: bytes) -> bytes:
    return body[:16]


def test_closed_loop_counts_right_answers(scripted: Any, workload: Any) -> None:
    server = scripted(lambda n, body: {"body": first_chunk(body)})
    found = workload(server.url).run(arrivals="closed", connections=3, seconds=0.1)
    assert found["answered"] == found["checked"] == found["sent"] == server.seen > 3
    assert (found["difference"], server.connections) == (0.0, 3)
    figures = workload(server.url).measure(connections=2, seconds=0.1)
    assert figures["per_second"] == pytest.approx(figures["requests"] / figures["seconds"])
    assert 0 < figures["p50_ms"] <= figures["p99_ms"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": 503},
        {"body": b""},
        {"body": b"\0" * 16},
        {"body": np.full(4, np.nan, "<f4").tobytes()},
        {"cut": True},
    ],
)
def test_one_bad_response_fails_the_warm_up(scripted: Any, workload: Any, wrong: dict[str, Any]) -> None:
    server = scripted(lambda n, body: {"body": first_chunk(body)} | (wrong if n == 7 else {}))
    with pytest.raises(WrongAnswers, match="ours, octet x 1"):
        workload(server.url).warm_up(2)


def test_requests_for_wrk_are_each_behind_their_length(scripted: Any, workload: Any) -> None:
    lines = workload("http://host").write_requests().read_bytes()
    size, _, rest = lines.partition(b"\n")
    first, rest = rest[: int(size)], rest[int(size) :]
    assert first.startswith(b"POST /predict HTTP/1.1\r\n")
    assert first.endswith(CONTEXTS[0].tobytes())
    assert rest.partition(b"\n")[0] == size


def test_a_load_test_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="not an http"):
        assert LoadTest("ftp://host", rate=1, seconds=1).summary
