"""How many calls an `AsyncClient` has on their way, whose turn it is, and what cancellation leaves; threads, forks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from typing import Any

import httpx
import numpy as np
import pytest

from lvm import errors
from lvm.client import AsyncClient
from tests.conftest import PATIENCE_S, ROOT
from tests.fakes import D, T, contexts, mean_of
from tests.lvm.client.test_calls import Serve

ONE = contexts()[0]


class Network(httpx.AsyncBaseTransport):
    """A network that answers when it is released; it counts the requests that it has, and in which order they came."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.now = self.most = 0
        self.order: list[int] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer with the first number of the context."""
        body = await request.aread()
        rows = np.frombuffer(body or bytes(4), "<f4")
        self.order.append(int(rows[0]))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0)
            await self.released.wait()
        finally:
            self.now -= 1
        return httpx.Response(200, content=np.full(D, rows[0], "<f4").tobytes())


def numbered(count: int) -> np.ndarray:
    """Return contexts `(n, T, D)` filled with their numbers."""
    return np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None], (count, T, D))


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(50):
        await asyncio.sleep(0)


def with_client(scenario: Callable[[AsyncClient, Network], Awaitable[None]], **policy: Any) -> None:
    """Run a scenario with a client of two calls at a time."""

    async def run() -> None:
        network = Network()
        given = {"concurrency": 2, "timeout": 60, **policy}
        async with asyncio.timeout(PATIENCE_S), AsyncClient("http://x", transport=network, **given) as client:
            await scenario(client, network)

    asyncio.run(run())


def test_runs_as_many_calls_at_a_time_as_it_may_in_order() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        calls = [asyncio.create_task(client.predict(context)) for context in numbered(7)]
        await settle()
        assert network.order == [0, 1]
        network.released.set()
        await asyncio.gather(*calls)
        assert network.order == list(range(7))
        assert network.most == 2

    with_client(scenario)


def test_a_call_of_many_requests_has_one_turn() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        long = asyncio.create_task(client.predict(numbered(3)))
        short = [asyncio.create_task(client.predict(context)) for context in numbered(2)]
        await settle()
        assert len(network.order) == 2
        network.released.set()
        await asyncio.gather(long, *short)

    with_client(scenario, rows=1)


def test_a_cancelled_call_gives_its_turn_back() -> None:
    """Both calls on their way and calls that wait, in any order."""

    async def scenario(client: AsyncClient, network: Network) -> None:
        calls = [asyncio.create_task(client.predict(context)) for context in numbered(6)]
        await settle()
        for at in (0, 3):
            calls[at].cancel()
        await settle()
        assert network.order == [0, 1, 2]
        assert network.now == 2
        network.released.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [
            True,
            False,
            False,
            True,
            False,
            False,
        ]
        assert network.now == 0
        await client.predict(ONE)

    with_client(scenario)


def test_a_call_that_fails_gives_its_turn_back() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        for _ in range(5):
            with pytest.raises(ValueError, match="contexts"):
                await client.predict(None)  # type: ignore[arg-type]
        network.released.set()
        await client.predict(ONE)

    with_client(scenario, concurrency=1)


def test_the_deadline_counts_the_wait_for_a_turn() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        first = asyncio.create_task(client.predict(ONE))
        await settle()
        with pytest.raises(errors.Expired, match="waited for one of 1 turns"):
            await client.predict(ONE, timeout=0.05)
        assert len(network.order) == 1
        network.released.set()
        await first

    with_client(scenario, concurrency=1)


def test_probes_do_not_wait_for_a_turn() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        tasks = [asyncio.create_task(call) for call in (client.predict(ONE), client.health(), client.wait_ready())]
        await settle()
        assert network.now == 3
        for task in tasks:
            task.cancel()

    with_client(scenario, concurrency=1)


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, True, None, "2"])
def test_rejects_an_invalid_concurrency(concurrency: Any) -> None:
    with pytest.raises(ValueError, match="concurrency"):
        AsyncClient("http://x", concurrency=concurrency)


# ---- map


def test_map_yields_in_order_and_takes_items_only_if_there_is_room() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        taken: list[int] = []

        def items() -> Iterator[np.ndarray]:
            for at, context in enumerate(numbered(6)):
                taken.append(at)
                yield context

        network.released.set()
        found = []
        async for predicted in client.map(client.predict, items()):
            found.append(int(predicted.vectors[0]))
            assert len(taken) - len(found) <= 1
        assert found == taken == list(range(6))
        assert network.most == 2

    with_client(scenario)


def test_calls_of_map_do_not_spend_their_time_waiting(serve: Serve) -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        mapped = client.map(client.predict, numbered(40))
        network.released.set()
        assert len([predicted async for predicted in mapped]) == 40

    with_client(scenario, concurrency=1, timeout=1)


def test_map_cancels_the_others_if_a_call_fails_or_the_loop_ends() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        async def fail_first(context: np.ndarray) -> None:
            if context[0, 0] == 0:
                raise KeyError("first")
            await client.predict(context)

        with pytest.raises(KeyError, match="first"):
            _ = [each async for each in client.map(fail_first, numbered(5))]
        assert network.now == 0

        network.released.set()
        async with aclosing(client.map(client.predict, numbered(5))) as predictions:
            async for _ in predictions:
                network.released.clear()
                break
        assert network.now == 0
        network.released.set()
        await client.predict(ONE)

    with_client(scenario)


def test_a_cancelled_map_leaves_no_call() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        async def collect() -> None:
            _ = [each async for each in client.map(client.predict, numbered(5))]

        task = asyncio.create_task(collect())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert network.now == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with_client(scenario)


def test_map_of_nothing_yields_nothing() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        assert [each async for each in client.map(client.predict, [])] == []

    with_client(scenario)


def test_map_runs_calls_on_a_real_service(serve: Serve) -> None:
    rows, url = contexts(50), serve().url

    async def scenario() -> list[np.ndarray]:
        async with AsyncClient(url, timeout=PATIENCE_S) as client:
            return [predicted.vectors async for predicted in client.map(client.predict, rows)]

    np.testing.assert_allclose(asyncio.run(scenario()), mean_of(rows), atol=1e-6)


# ---- loops, threads, processes


def test_rejects_a_second_event_loop() -> None:
    network = Network()
    network.released.set()
    client = AsyncClient("http://x", transport=network)

    async def use(ask: Callable[[], Awaitable[object]]) -> None:
        with suppress(errors.ServiceError):
            await ask()

    asyncio.run(use(client.health))
    for ask in (client.health, client.wait_ready, client.models, client.close):
        with pytest.raises(ValueError, match="one event loop"):
            asyncio.run(use(ask))


def test_a_closed_client_rejects_the_calls_that_wait() -> None:
    async def scenario(client: AsyncClient, network: Network) -> None:
        calls = [asyncio.create_task(client.predict(context)) for context in numbered(3)]
        await settle()
        await client.close()
        network.released.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(results[-1], ValueError)

    with_client(scenario)


FORKS = """
import os, sys
import numpy as np
from lvm import Client

client = Client(sys.argv[1], timeout=float(sys.argv[2]))
rows = np.random.default_rng(0).standard_normal((400, 5, 8)).astype("f4")
expected = client.predict(rows).vectors
child = os.fork()
mine = slice(0, 200) if child else slice(200, 400)
same = np.allclose([client.predict(row).vectors for row in rows[mine]], expected[mine], atol=1e-6)
client.close()
if not child:
    os._exit(not same)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
"""


def test_a_forked_process_has_connections_of_its_own(serve: Serve) -> None:
    """On those of its parent, each would read responses to the other."""
    command = [sys.executable, "-c", FORKS, serve().url, str(PATIENCE_S)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_client_that_was_closed_stays_closed_after_a_fork() -> None:
    code = "import os, lvm; c = lvm.Client('http://x'); c.close(); os.fork() and os.wait(); c.models()"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.stderr.count("ValueError: the client is closed") == 2
