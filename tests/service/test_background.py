"""Background work: no exception ends it, and a failure that lasts is one line of the log."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from service.background import Guarded, guard, repeat


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

        await guard("retire", fails())
        task = asyncio.create_task(guard("retire", asyncio.sleep(60)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with structlog.testing.capture_logs() as lines:
        asyncio.run(run())
    assert [line["task"] for line in lines] == ["retire"]


def test_what_ends_the_process_is_let_through() -> None:
    with pytest.raises(SystemExit), Guarded("tick"):
        raise SystemExit
