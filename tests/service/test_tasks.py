"""Background tasks survive exceptions. A call that hangs in a thread does not delay the exit of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
import structlog

from service.tasks import CatchAndLog, SerialExecutor, SingleFlight, catch_and_log, repeat
from tests.conftest import PATIENCE_S, ROOT

HANGS = """
import asyncio, threading
from service.tasks import SerialExecutor

async def main():
    hung = asyncio.create_task(SerialExecutor().run(threading.Event().wait))
    await asyncio.sleep(0.05)
    hung.cancel()

asyncio.run(main())
"""


def test_repeats_a_step_that_raises_and_logs_the_first_failure_in_a_row() -> None:
    outcomes: list[Exception | None] = [ValueError("a"), ValueError("b"), None, KeyError("c"), None]

    async def step() -> None:
        if not outcomes:
            raise asyncio.CancelledError
        if error := outcomes.pop(0):
            raise error

    with structlog.testing.capture_logs() as lines, pytest.raises(asyncio.CancelledError):
        asyncio.run(repeat("follow", step, 0))
    assert [(line["event"], line["task"], str(line["exc_info"])) for line in lines] == [
        ("background task failed", "follow", "a"),
        ("background task failed", "follow", "'c'"),
    ]


def test_catches_exceptions_of_work_and_lets_a_cancellation_through() -> None:
    async def run() -> None:
        async def fails() -> None:
            raise OSError("disk full")

        await catch_and_log("retire", fails())
        task = asyncio.create_task(catch_and_log("retire", asyncio.sleep(60)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with structlog.testing.capture_logs() as lines:
        asyncio.run(run())
    assert [line["task"] for line in lines] == ["retire"]


def test_lets_a_system_exit_through() -> None:
    with pytest.raises(SystemExit), CatchAndLog("tick"):
        raise SystemExit


def test_runs_calls_in_one_thread_that_ends_when_the_executor_closes() -> None:
    async def scenario() -> None:
        executor, before = SerialExecutor(), threading.active_count()
        names = await asyncio.gather(*(executor.run(lambda: threading.current_thread().name) for _ in range(5)))
        assert len(set(names)) == 1
        assert threading.active_count() == before + 1
        with pytest.raises(ZeroDivisionError):
            await executor.run(divmod, 1, 0)
        assert await executor.run(divmod, 7, 2) == (3, 1)
        executor.close()
        while threading.active_count() > before:
            await asyncio.sleep(0.001)

    asyncio.run(scenario())


def test_a_cancelled_call_does_not_affect_the_next() -> None:
    async def scenario() -> None:
        executor, gate = SerialExecutor(), threading.Event()
        first = asyncio.create_task(executor.run(gate.wait))
        await asyncio.sleep(0)
        first.cancel()
        gate.set()
        assert await executor.run(lambda: "mine") == "mine"
        executor.close()

    asyncio.run(scenario())


def test_does_not_run_a_call_that_was_cancelled_while_queued() -> None:
    async def scenario() -> None:
        executor, gate, made = SerialExecutor(), threading.Event(), list[str]()
        first, second = (asyncio.create_task(executor.run(call)) for call in (gate.wait, lambda: made.append("second")))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        gate.set()
        await first
        await executor.run(made.append, "third")
        assert made == ["third"]
        executor.close()

    asyncio.run(scenario())


def test_shutdown_waits_for_the_running_call_up_to_its_timeout() -> None:
    async def scenario() -> None:
        executor, gate, made = SerialExecutor(), threading.Event(), list[str]()
        running = asyncio.create_task(executor.run(lambda: gate.wait(PATIENCE_S) and made.append("net")))
        await asyncio.sleep(0)
        await SerialExecutor().shutdown(PATIENCE_S)
        ending = asyncio.create_task(executor.shutdown(PATIENCE_S))
        await asyncio.sleep(0.02)
        assert not ending.done()
        running.cancel()
        gate.set()
        await ending
        assert made == ["net"]
        hung = asyncio.create_task(executor.run(threading.Event().wait))
        await asyncio.sleep(0)
        await executor.shutdown(0.02)
        hung.cancel()

    asyncio.run(scenario())


def test_callers_of_a_single_flight_share_one_call_and_a_cancelled_one_does_not_end_it() -> None:
    async def scenario() -> None:
        executor, gate, calls = SerialExecutor(), threading.Event(), list[int]()

        def read() -> int:
            gate.wait(PATIENCE_S)
            calls.append(len(calls))
            return calls[-1]

        flight = SingleFlight(executor, read)
        first, second, third = (asyncio.create_task(flight()) for _ in range(3))
        await asyncio.sleep(0)
        first.cancel()
        gate.set()
        assert [await second, await third] == [0, 0]
        assert await flight() == 1
        executor.close()

    asyncio.run(scenario())


def test_a_call_that_hangs_does_not_delay_the_exit_of_the_process() -> None:
    subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, timeout=PATIENCE_S, check=True)
