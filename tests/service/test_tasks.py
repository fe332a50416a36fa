"""Background tasks survive exceptions; a call that hangs in its thread does not delay the end of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
import structlog

from service.tasks import CatchAndLog, SerialExecutor, catch_and_log, repeat
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


def test_a_step_that_raises_is_repeated_and_logged_once_until_one_succeeds() -> None:
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


def test_work_that_raises_ends_no_task_but_a_cancellation_does() -> None:
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


def test_what_ends_the_process_is_let_through() -> None:
    with pytest.raises(SystemExit), CatchAndLog("tick"):
        raise SystemExit


def test_calls_come_back_in_turn_in_one_thread_that_goes_when_it_is_closed() -> None:
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


def test_who_was_cancelled_gets_nothing_and_the_next_call_its_own() -> None:
    async def scenario() -> None:
        executor, gate = SerialExecutor(), threading.Event()
        first = asyncio.create_task(executor.run(gate.wait))
        await asyncio.sleep(0)
        first.cancel()
        gate.set()
        assert await executor.run(lambda: "mine") == "mine"
        executor.close()

    asyncio.run(scenario())


def test_a_call_that_nobody_waits_for_any_more_is_not_made() -> None:
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


def test_an_end_waits_for_the_call_that_runs_and_for_no_longer_than_it_may() -> None:
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


def test_the_end_of_the_process_does_not_wait_for_a_call_that_hangs() -> None:
    subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, timeout=PATIENCE_S, check=True)
