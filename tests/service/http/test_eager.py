"""Eager tasks: handlers are ordinary coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from types import SimpleNamespace
from typing import Any

import pytest

from service.http.auth import Tokens
from service.http.connection import Connection
from service.http.eager import EagerTask
from service.http.gateway import Gateway, Route, State
from service.http.messages import Request, Response
from service.overload.admission import Admission
from service.overload.fairness import Slicer
from service.overload.limiter import FixedLimit
from service.settings import Settings
from service.telemetry.log import AccessLog
from service.telemetry.metrics import Metrics


def run(coroutine: Coroutine[Any, Any, Any], *, cancel: bool = False) -> Any:
    """Return the result of a coroutine that runs in an eager task, which is cancelled in the next turn of the loop."""

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        result = loop.create_future()
        tasks: list[EagerTask[Any]] = []
        loop.call_soon(lambda: tasks.append(EagerTask(coroutine, result.set_result, loop)))
        if cancel:
            loop.call_soon(lambda: tasks[0].cancel())
        return await asyncio.wait_for(result, 30)

    return asyncio.run(main())


def test_runs_the_first_step_at_once() -> None:
    async def main() -> list[str]:
        loop, steps = asyncio.get_running_loop(), []

        async def coroutine() -> None:
            steps.append("first")
            await asyncio.sleep(0)
            steps.append("second")

        def start() -> None:
            EagerTask(coroutine(), lambda result: done.set_result(None), loop)
            steps.append("started")

        done = loop.create_future()
        loop.call_soon(start)
        await done
        return steps

    assert asyncio.run(main()) == ["first", "started", "second"]


def test_yields_to_the_event_loop() -> None:
    async def coroutine() -> int:
        for _ in range(3):
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        return 7

    assert run(coroutine()) == 7


def test_a_timeout_expires_and_the_coroutine_continues() -> None:
    async def coroutine() -> str:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        except TimeoutError:
            await asyncio.sleep(0)
            return "timed out"
        return "done"

    assert run(coroutine()) == "timed out"


def test_a_timeout_that_does_not_expire_changes_nothing() -> None:
    async def coroutine() -> int:
        async with asyncio.timeout(30):
            return await asyncio.wait_for(asyncio.sleep(0, 3), 30)

    assert run(coroutine()) == 3


def test_a_task_group_runs_in_it() -> None:
    async def coroutine() -> list[int]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asyncio.sleep(0, number)) for number in range(3)]
        return [task.result() for task in tasks]

    assert run(coroutine()) == [0, 1, 2]


def test_is_the_current_task_while_it_runs() -> None:
    async def coroutine() -> list[Any]:
        first = asyncio.current_task()
        await asyncio.sleep(0)
        return [type(first), first is asyncio.current_task()]

    assert run(coroutine()) == [EagerTask, True]


@pytest.mark.parametrize("waits", [lambda: asyncio.sleep(0), lambda: asyncio.Event().wait()])
def test_cancel_raises_where_the_coroutine_waits(waits: Any) -> None:
    cleaned = []

    async def coroutine() -> None:
        try:
            await waits()
        finally:
            cleaned.append(True)

    assert run(coroutine(), cancel=True) is None
    assert cleaned == [True]


def test_rejects_what_is_not_a_future_of_asyncio() -> None:
    class Other:
        def __await__(self) -> Generator[int, None, None]:
            yield 1

    async def coroutine() -> str:
        try:
            await Other()
        except RuntimeError as error:
            return str(error)
        return ""

    assert run(coroutine()) == "a handler awaited 1, which is not a future of asyncio"


def test_handlers_at_the_socket_may_sleep_and_time_out() -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        except TimeoutError:
            return Response(b"timed out", b"text/plain", [])
        return Response(b"", b"text/plain", [])

    async def main() -> bytes:
        route = Route("/predict", handler, max_body=100, is_admitted=True)
        gateway = Gateway(
            lambda method, path: route,
            timeout_ms=1000,
            state=State(),
            tokens=Tokens({}),
            admission=Admission(FixedLimit(1), Settings(), Metrics()),
            metrics=Metrics(),
            access=AccessLog(0),
        )
        config = SimpleNamespace(loaded_app=SimpleNamespace(gateway=gateway, slicer=Slicer()))
        state: Any = SimpleNamespace(connections=set(), tasks=set(), default_headers=[])
        server = await asyncio.get_running_loop().create_server(lambda: Connection(config, state), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 1\r\n\r\nx")
            received = await asyncio.wait_for(reader.read(), 30)
            writer.close()
            await writer.wait_closed()
        return received

    received = asyncio.run(main())
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert received.endswith(b"\r\n\r\ntimed out")
