"""A workload accepts only right answers, and names the server that gave a wrong one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.load import LoadTest, Workload, WrongAnswers, keep
from bench.servers import RunningServer
from tests.fake_service import DIM

CONTEXTS = np.ones((3, 5, DIM), np.float32)
# What the fake service answers.
RIGHT = np.full((3, DIM), 0.25, np.float32)


@pytest.fixture
def workload(tmp_path: Path) -> Callable[[str], Workload]:
    def make(url: str) -> Workload:
        return Workload(RunningServer("ours", url, 0, 0.0), "octet", keep(tmp_path, CONTEXTS, RIGHT))

    return make


def test_closed_loop_counts_right_answers(fake: Any, workload: Any) -> None:
    service = fake()
    found = workload(service.url).run(arrivals="closed", connections=3, seconds=0.1)
    assert found["answered"] == found["checked"] == found["sent"] == len(service.requests) > 3
    assert (found["difference"], service.connections) == (0.0, 3)
    figures = workload(service.url).measure(connections=2, seconds=0.1)
    assert figures["per_second"] == pytest.approx(figures["requests"] / figures["seconds"])
    assert 0 < figures["p50_ms"] <= figures["p99_ms"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": 503},
        {"body": b""},
        {"body": b"\0" * 4 * DIM},
        {"body": np.full(DIM, np.nan, "<f4").tobytes()},
        {"cut": 0},
    ],
)
def test_one_bad_response_fails_the_warm_up(fake: Any, workload: Any, wrong: dict[str, Any]) -> None:
    service = fake(lambda n: wrong if n == 7 else {})
    with pytest.raises(WrongAnswers, match="ours, octet x 1"):
        workload(service.url).warm_up(2)


def test_writes_requests_for_wrk_behind_their_length(workload: Any) -> None:
    lines = workload("http://host").write_requests().read_bytes()
    size, _, rest = lines.partition(b"\n")
    first, rest = rest[: int(size)], rest[int(size) :]
    assert first.startswith(b"POST /predict HTTP/1.1\r\n")
    assert first.endswith(CONTEXTS[0].tobytes())
    assert rest.partition(b"\n")[0] == size


def test_load_test_that_cannot_run_names_the_reason() -> None:
    with pytest.raises(RuntimeError, match="not an http"):
        assert LoadTest("ftp://host", rate=1, seconds=1).summary
