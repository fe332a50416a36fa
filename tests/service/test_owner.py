"""The owner's start: it ends when the owner is told to leave, whatever it hangs in, and its faults are its own."""

from __future__ import annotations

import asyncio

import pytest

from service.owner import unless


def test_a_start_that_hangs_is_left_when_it_is_time_to_leave() -> None:
    async def scenario() -> None:
        leaving, ended = asyncio.Event(), list[str]()

        async def start() -> None:
            try:
                leaving.set()
                await asyncio.Event().wait()
            finally:
                ended.append("closed")

        assert not await unless(leaving, start())
        assert ended == ["closed"]

    asyncio.run(scenario())


def test_a_start_that_succeeds_goes_on_and_one_that_fails_says_why() -> None:
    async def scenario() -> None:
        assert await unless(asyncio.Event(), asyncio.sleep(0))
        with pytest.raises(OSError, match="no such share"):
            await unless(asyncio.Event(), fail())

    async def fail() -> None:
        raise OSError("no such share")

    asyncio.run(scenario())
