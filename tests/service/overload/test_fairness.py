"""Fair turns: clients take turns, and long work leaves room between its slices."""

from __future__ import annotations

import asyncio
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from queue import Empty

import pytest

from service.overload.fairness import (
    FairQueue,
    RoundRobin,
    Slicer,
    Work,
)


def test_clients_take_turns_however_much_each_has_queued() -> None:
    queue: RoundRobin[str] = RoundRobin()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.put(item[0], item)
    assert len(queue) == 6
    assert [queue.pop()[1] for _ in range(6)] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert not queue


def test_a_fair_queue_serves_clients_in_turn_across_threads() -> None:
    queue: FairQueue[str] = FairQueue(lambda item: item[0])
    for item in ("a1", "a2", "b1"):
        queue.put(item)
    assert (queue.qsize(), queue.empty()) == (3, False)
    with ThreadPoolExecutor(1) as pool:
        assert [pool.submit(queue.get).result() for _ in range(3)] == ["a1", "b1", "a2"]
        waiting = pool.submit(queue.get)
        queue.put("c1")
        assert waiting.result() == "c1"
    assert queue.empty()
    with pytest.raises(Empty):
        queue.get_nowait()
    with pytest.raises(Empty):
        queue.get(timeout=0.01)


def counting(done: list[str], name: str, slices: int) -> Work[str]:
    for _ in range(slices):
        done.append(name)
        yield
    return name


def test_slices_of_clients_alternate_and_others_run_between_them() -> None:
    async def main() -> None:
        slicer, done = Slicer(), list[str]()
        works = [slicer.start(client, counting(done, client, 3)) for client in "aab"]
        while not all(work.done() for work in works):
            done.append("-")
            await asyncio.sleep(0)
        assert [work.result() for work in works] == ["a", "a", "b"]
        assert "".join(done).replace("-", "").startswith("aba")
        assert all(one == "-" or other == "-" for one, other in pairwise(done))

    asyncio.run(main())


def test_an_error_reaches_its_caller_and_the_next_work_runs() -> None:
    def failing() -> Work[str]:
        yield
        raise ValueError("no")

    async def main() -> None:
        slicer = Slicer()
        with pytest.raises(ValueError, match="no"):
            await slicer.run("a", failing())
        assert await slicer.run("a", counting([], "b", 2)) == "b"

    asyncio.run(main())


def test_drops_work_whose_caller_was_cancelled() -> None:
    async def main() -> None:
        slicer, done = Slicer(), list[str]()
        running = asyncio.create_task(slicer.run("a", counting(done, "a", 1000)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        running.cancel()
        assert await slicer.run("a", counting([], "b", 5)) == "b"
        assert len(done) < 10

    asyncio.run(main())


def test_failing_work_leaves_nothing_to_the_garbage_collector() -> None:
    class Body:
        pass

    def failing(body: Body) -> Work[str]:
        yield
        raise ValueError(body)

    async def main() -> None:
        body = Body()
        held = weakref.ref(body)
        work, slicer = failing(body), Slicer()
        del body
        with suppress(ValueError):
            await slicer.run("a", work)
        del work
        await asyncio.sleep(0)
        assert held() is None

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()
