"""Nets that raise, hang, lie or die in a real process: somebody answers in time, and the process says how it is."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import until
from tests.fakes import D, contexts
from tests.faults.conftest import Injected, Target
from tests.faults.runner import POISON
from tests.faults.versions import tiny_registry

Start = Callable[..., Target]
BODY: dict[str, Any] = {"context": contexts()[0].tolist()}
OCTETS = {"content-type": "application/octet-stream"}


def predict(server: Target, **options: Any) -> httpx.Response:
    return server.http.post("/predict", json={**BODY, **options})


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("hangs", "expired"),
        pytest.param("raises", "model_failed", marks=pytest.mark.faults),
        pytest.param("answers_nan", "model_failed", marks=pytest.mark.faults),
        pytest.param("answers_wrong_shape", "model_failed", marks=pytest.mark.faults),
        pytest.param("dies", "expired", marks=pytest.mark.faults),
    ],
)
def test_a_primary_that_fails_is_stood_in_for_before_the_deadline(
    fake: str, reason: str, target: Start, injected: Injected
) -> None:
    """The breaker opens after five; whoever pins the primary learns that it is away; and both away are 503."""
    patience = {"LVM_TIMEOUT_MS": "4000" if reason == "expired" else "60000", "LVM_PRIMARY_SHARE": "0.1"}
    server = target(answers={"amn": fake, "gru": "mean_of"}, environment={**patience, "LVM_BREAKER_HOLD_S": "600"})
    found = [predict(server) for _ in range(30)]
    assert {answer.status_code for answer in found} == {200}
    assert {answer.json()["served_by"] for answer in found} == {"fallback"}
    reasons = [answer.json()["fallback_reason"] for answer in found]
    first = len(reasons) - len([each for each in reasons if each in ("breaker_open", "draining")])
    assert set(reasons[:first]) == {reason}
    assert len(reasons[:first]) == (1 if fake == "dies" else 5)
    assert all(len(answer.json()["vector"]) == D for answer in found)
    pinned = predict(server, model="amn")
    assert (pinned.status_code, "retry-after" in pinned.headers) == (503, True)
    assert server.counted()["/predict", "fallback"] == 30
    injected(f"a primary that {fake.replace('_', ' ')}", "the fallback answers, the breaker opens", 31)


@pytest.mark.faults
@pytest.mark.parametrize("fake", ["raises", "answers_nan", "answers_wrong_shape"])
def test_two_that_fail_are_503_and_never_a_nan(fake: str, target: Start, injected: Injected) -> None:
    server = target(answers={"amn": fake, "gru": fake})
    for _ in range(30):
        answer = predict(server)
        assert (answer.status_code, answer.headers["retry-after"].isdigit()) == (503, True)
        assert "NaN" not in answer.text
        injected("both nets fail", "503 with Retry-After")
    assert server.http.get("/readyz").status_code == 200


def test_a_poisonous_row_fails_alone(target: Start, injected: Injected) -> None:
    """Rows wait together while the net runs: all but the poisonous one are answered by the net that choked on it."""
    server = target(answers={"amn": "poisoned", "gru": "poisoned"}, environment={"LVM_TIMEOUT_MS": "60000"})
    rows = contexts(40)
    rows[::10] = POISON
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda row: server.http.post("/predict", content=row.tobytes(), headers=OCTETS), rows))
    statuses = [answer.status_code for answer in answers]
    assert statuses == [503 if number % 10 == 0 else 200 for number in range(40)]
    assert {answer.json()["served_by"] for answer in answers if answer.status_code == 200} == {"primary"}
    assert max(int(answer.headers.get("x-batch-size", 0)) for answer in answers) > 1
    injected("a poisonous row in a batch", "fails alone", 4)


@pytest.mark.faults
def test_an_inference_thread_that_dies_shows_in_livez(target: Start, injected: Injected) -> None:
    server = target(answers={"amn": "mean_of", "gru": "dies"}, environment={"LVM_TIMEOUT_MS": "200"})
    assert server.http.get("/livez").status_code == 200
    assert predict(server, model="gru").status_code == 504
    gone = server.http.get("/livez")
    assert (gone.status_code, gone.json()["status"]) == (503, 503)
    assert server.http.get("/v2/health/live").status_code == 503
    assert predict(server).json()["served_by"] == "primary"
    injected("an inference thread that died", "/livez 503, the other net answers")


@pytest.mark.faults
def test_an_inference_thread_that_hangs_shows_in_livez(target: Start, injected: Injected) -> None:
    server = target(
        answers={"amn": "mean_of", "gru": "hangs"}, environment={"LVM_TIMEOUT_MS": "200", "LVM_HANG_S": "1"}
    )
    assert predict(server, model="gru").status_code == 504
    until(lambda: server.http.get("/livez").status_code == 503, "/livez to tell of the hang")
    assert predict(server).json()["served_by"] == "primary"
    injected("an inference thread that hangs", "/livez 503, the other net answers")


@pytest.mark.faults
def test_a_process_that_was_stopped_goes_on_where_it_was(target: Start, injected: Injected) -> None:
    server = target(environment={"LVM_TIMEOUT_MS": "60000"})
    for _ in range(5):
        server.popen.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(20) as pool:
            waiting = [pool.submit(predict, server) for _ in range(20)]
            until(lambda: server.sent >= 20, "the requests to be sent")
            server.popen.send_signal(signal.SIGCONT)
            assert {each.result().status_code for each in waiting} == {200}
        assert server.http.get("/livez").status_code == 200
        injected("SIGSTOP under 20 requests, then SIGCONT", "all answered")


@pytest.mark.faults
def test_clocks_that_jump_change_nothing(shim: Path, tmp_path: Path, target: Start, injected: Injected) -> None:
    """The wall clock leaps eleven days, to and fro, at every look: deadlines, breaker, timeouts go by another."""
    jumps = {"LD_PRELOAD": str(shim), "FAULT_CLOCK": "1000000", "LVM_BREAKER_HOLD_S": "600"}
    server = target(
        tiny_registry(tmp_path / "registry"), answers={"amn": "raises", "gru": "mean_of"}, environment=jumps
    )
    for number in range(100):
        answer = predict(server)
        assert (answer.status_code, answer.json()["served_by"]) == (200, "fallback")
        assert answer.json()["fallback_reason"] == ("model_failed" if number < 5 else "breaker_open")
        injected("a wall clock that leaps eleven days", "nothing is late, nothing is early")
    assert server.http.get("/readyz").status_code == 200
    assert wall(server.popen.pid), "the clock of the server stands still"


def wall(pid: int) -> bool:
    """Whether the shim is in the process."""
    return "shim.so" in Path(f"/proc/{pid}/maps").read_text()


def test_no_deadline_goes_by_the_wall_clock() -> None:
    """`now` in deployments.py stamps what people read; all else in the service counts on the monotonic clock."""
    source = {path.name: path.read_text() for path in Path("service").rglob("*.py")}
    assert [name for name, text in source.items() if "time.time" in text or "import time\n" in text] == []
    assert [name for name, text in source.items() if "datetime." in text or "today" in text] == ["deployments.py"]
