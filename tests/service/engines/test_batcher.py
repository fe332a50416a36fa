"""The micro-batcher: batches without delay, in order, within limits; an item fails alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from time import monotonic, sleep
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.errors import (
    Draining,
    Expired,
    ModelFailed,
    Overloaded,
)
from service.engines.batch_sizer import QUICK_S
from service.engines.batcher import ALONE, Batch, BatchLimits, MicroBatcher

Run = Callable[[list[Any]], Sequence[Any]]


def doubled(items: list[int]) -> list[int]:
    return [2 * item for item in items]


class Held:
    """A run that waits until a test lets it go on, and remembers its batches."""

    def __init__(self) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.entered.set()
        assert self.go.wait(30)
        return doubled(items)


class Seen:
    """A run that remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        if any(isinstance(item, str) for item in items):
            raise TypeError("not a number")
        return doubled(items)


def batcher(
    run: Run, *, max_rows: int = 8, max_queue: int = 100, max_wait_s: float = 0.0, **options: Any
) -> MicroBatcher[Any, Any]:
    return MicroBatcher(run, name="test", limits=BatchLimits(max_rows, max_queue, max_wait_s), **options)


def soon(seconds: float = 30) -> float:
    return monotonic() + seconds


async def answers(batch: MicroBatcher[Any, Any], items: Sequence[Any]) -> list[Any]:
    tickets = await asyncio.gather(*(batch.submit([(item, 1)], soon()) for item in items))
    return [ticket[0].answer for ticket in tickets]


async def entered(held: Held) -> None:
    await asyncio.to_thread(held.entered.wait, 30)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 9), st.booleans())
def test_returns_to_each_item_its_own_answer(items: list[int], max_rows: int, inline: bool) -> None:
    async def scenario() -> None:
        made = batcher(doubled, max_rows=max_rows, runs_inline=inline)
        assert await answers(made, items) == doubled(items)
        await made.close(1)

    asyncio.run(scenario())


def test_rows_that_queue_while_the_model_runs_form_the_next_batch() -> None:
    async def scenario() -> None:
        held, seen = Held(), []
        made = batcher(held, on_batch=seen.append)
        first = asyncio.create_task(answers(made, [0]))
        await entered(held)
        others = asyncio.create_task(answers(made, range(1, 12)))
        while made.pending_rows < 12:
            await asyncio.sleep(0)
        held.go.set()
        await asyncio.gather(first, others)
        assert held.batches == [[0], list(range(1, 9)), [9, 10, 11]]
        assert [(batch.rows, batch.reason) for batch in seen] == [(1, "free"), (8, "full"), (3, "free")]

    asyncio.run(scenario())


def test_limits_rows_not_items() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held)
        tasks = [asyncio.create_task(made.submit([(0, 1)], soon()))]
        await entered(held)
        tasks += [asyncio.create_task(made.submit([(item, 3)], soon())) for item in (1, 2, 3)]
        while made.pending_rows < 10:
            await asyncio.sleep(0)
        held.go.set()
        await asyncio.gather(*tasks)
        assert held.batches == [[0], [1, 2], [3]]

    asyncio.run(scenario())


def test_inline_runs_one_batch_per_loop_iteration_without_a_thread() -> None:
    async def scenario() -> None:
        seen, released = Seen(), list[Batch]()
        threads = threading.active_count()
        made = batcher(seen, runs_inline=True, on_batch=released.append)
        assert threading.active_count() == threads
        waiting = asyncio.gather(*(made.submit([(item, 3)], soon()) for item in range(5)))
        turns = []
        while not waiting.done():
            await asyncio.sleep(0)
            turns.append(len(seen.batches))
        assert seen.batches == [[0, 1], [2, 3], [4]]
        assert {1, 2, 3} <= set(turns), "the loop turned between batches"
        assert [(batch.rows, batch.reason) for batch in released] == [(6, "full"), (6, "full"), (3, "free")]
        assert made.pending_rows == 0
        assert made.stuck_s() == 0

    asyncio.run(scenario())


def test_inline_runs_at_once_what_comes_alone_and_batches_again_with_company() -> None:
    async def scenario() -> None:
        seen = Seen()
        made = batcher(seen, runs_inline=True)
        for item in range(ALONE):
            await made.submit([(item, 1)], soon())
        alone = made.submit([(20, 1)], soon())
        with pytest.raises(StopIteration) as end:
            alone.send(None)
        assert end.value.value[0].answer == 40
        assert await answers(made, [21, 22, 23]) == [42, 44, 46]
        assert await answers(made, [24, 25]) == [48, 50]
        assert seen.batches == [*([item] for item in range(ALONE)), [20], [21], [22, 23], [24, 25]]
        assert made.pending_rows == 0

    asyncio.run(scenario())


def test_inline_runs_no_expired_item_at_once_and_raises_its_error() -> None:
    async def scenario() -> None:
        seen = Seen()
        made = batcher(seen, runs_inline=True)
        for item in range(ALONE):
            await made.submit([(item, 1)], soon())
        with pytest.raises(Expired):
            await made.submit([(20, 1)], soon(-1))
        assert len(seen.batches) == ALONE
        with pytest.raises(ModelFailed):
            await made.submit([("not a number", 1)], soon())
        assert await answers(made, [21]) == [42]

    asyncio.run(scenario())


def test_inline_runs_small_requests_between_parts_and_rejects_after_close() -> None:
    async def scenario() -> None:
        seen = Seen()
        made = batcher(seen, runs_inline=True)
        large = asyncio.create_task(made.submit([(part, 8) for part in range(4)], soon()))
        small = asyncio.create_task(made.submit([(9, 1)], soon()))
        await asyncio.sleep(0)
        await made.close(30)
        await asyncio.gather(large, small)
        assert seen.batches == [[0], [1], [9], [2], [3]]
        with pytest.raises(Draining):
            await made.submit([(1, 1)], soon())

    asyncio.run(scenario())


def test_inline_skips_cancelled_and_expired_items() -> None:
    async def scenario() -> None:
        seen = Seen()
        made = batcher(seen, runs_inline=True)
        left = asyncio.create_task(made.submit([(1, 1)], soon()))
        late = asyncio.create_task(made.submit([(2, 1)], soon(-1)))
        stayed = asyncio.create_task(made.submit([(3, 1)], soon()))
        asyncio.get_running_loop().call_soon(left.cancel)
        assert [ticket.answer for ticket in await stayed] == [6]
        with pytest.raises(Expired):
            await late
        assert seen.batches == [[3]]

    asyncio.run(scenario())


def test_runs_small_requests_between_the_parts_of_a_large_one() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held)
        large = asyncio.create_task(made.submit([(part, 8) for part in range(4)], soon()))
        await entered(held)
        small = asyncio.create_task(made.submit([(9, 1)], soon()))
        await asyncio.sleep(0)
        assert made.pending_rows == 33
        held.go.set()
        await asyncio.gather(large, small)
        assert held.batches == [[0], [1], [9], [2], [3]]
        assert made.pending_rows == 0

    asyncio.run(scenario())


def test_a_full_queue_accepts_all_of_a_request_or_nothing() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held, max_queue=4)
        waiting = asyncio.create_task(made.submit([(1, 2), (2, 1)], soon()))
        await entered(held)
        with pytest.raises(Overloaded) as refusal:
            await made.submit([(3, 1), (4, 1)], soon())
        assert refusal.value.retry_after == 1
        assert made.pending_rows == 3
        held.go.set()
        assert [ticket.answer for ticket in await waiting] == [2, 4]
        assert made.pending_rows == 0

    asyncio.run(scenario())


def test_a_large_request_that_fills_the_queue_leaves_room_for_a_small_one_but_for_no_other_large_one() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held, max_queue=32)
        large = asyncio.create_task(made.submit([(part, 8) for part in range(4)], soon()))
        await entered(held)
        with pytest.raises(Overloaded):
            await made.submit([(part, 1) for part in range(3)], soon())
        small = [asyncio.create_task(made.submit([(9, 8)], soon())) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await made.submit([(9, 1)], soon())
        held.go.set()
        await asyncio.gather(large, *small)
        assert made.pending_rows == 0

    asyncio.run(scenario())


def test_rejects_an_expired_item_in_time_and_never_runs_it() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held)
        first = asyncio.create_task(answers(made, [1]))
        await entered(held)
        with pytest.raises(Expired):
            await made.submit([(2, 1)], soon(0.05))
        held.go.set()
        await first
        assert await answers(made, [3]) == [6]
        assert held.batches == [[1], [3]]

    asyncio.run(scenario())


def test_keeps_an_earlier_deadline_behind_a_later_one() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held)
        far = asyncio.create_task(answers(made, [1]))
        await entered(held)
        for seconds in (0.1, 0.05, 0.1):
            with pytest.raises(Expired):
                await made.submit([(2, 1)], soon(seconds))
        assert not far.done()
        held.go.set()
        assert await far == [2]

    asyncio.run(scenario())


def test_does_not_run_a_cancelled_item() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held)
        first = asyncio.create_task(answers(made, [1]))
        await entered(held)
        leaver = asyncio.create_task(answers(made, [2]))
        await asyncio.sleep(0)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert made.pending_rows == 1
        held.go.set()
        await first
        await answers(made, [3])
        assert held.batches == [[1], [3]]

    asyncio.run(scenario())


@pytest.mark.parametrize("inline", [False, True])
def test_fails_only_the_item_that_breaks_its_batch(inline: bool) -> None:
    def picky(items: list[int]) -> list[int]:
        if 3 in items:
            raise RuntimeError
        return doubled(items)

    async def scenario() -> None:
        made = batcher(picky, runs_inline=inline)
        results = await asyncio.gather(*(made.submit([(item, 1)], soon()) for item in range(6)), return_exceptions=True)
        kinds = [type(result) for result in results]
        assert kinds == [list, list, list, ModelFailed, list, list]

    asyncio.run(scenario())


def test_an_exception_among_the_answers_fails_its_item_alone() -> None:
    async def scenario() -> None:
        made = batcher(lambda items: [ModelFailed("no") if item == 1 else item for item in items])
        results = await asyncio.gather(*(made.submit([(i, 1)], soon()) for i in range(3)), return_exceptions=True)
        assert [isinstance(result, ModelFailed) for result in results] == [False, True, False]

    asyncio.run(scenario())


def test_fails_a_batch_with_fewer_answers_than_items() -> None:
    async def scenario() -> None:
        with pytest.raises(ModelFailed, match="returned 0 answers to 1"):
            await batcher(lambda items: []).submit([(1, 1)], soon())

    asyncio.run(scenario())


def test_close_answers_accepted_items_and_rejects_new_ones() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held)
        taken = asyncio.create_task(answers(made, range(10)))
        await entered(held)
        closing = asyncio.create_task(made.close(30))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await made.submit([(1, 1)], soon())
        held.go.set()
        assert await taken == doubled(list(range(10)))
        await closing

    asyncio.run(scenario())


def test_a_batch_fills_up_during_its_wait() -> None:
    async def scenario() -> None:
        seen: list[Batch] = []
        made = batcher(doubled, max_rows=4, max_wait_s=30, on_batch=seen.append)
        assert await answers(made, range(4)) == [0, 2, 4, 6]
        assert [(batch.rows, batch.reason) for batch in seen] == [(4, "full")]

    asyncio.run(scenario())


def test_runs_a_partial_batch_after_its_wait() -> None:
    async def scenario() -> None:
        seen: list[Batch] = []
        made = batcher(doubled, max_rows=4, max_wait_s=0.02, on_batch=seen.append)
        assert await answers(made, range(3)) == [0, 2, 4]
        assert [(batch.rows, batch.reason) for batch in seen] == [(3, "waited")]

    asyncio.run(scenario())


def test_reports_for_how_long_a_batch_has_run() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held)
        assert made.stuck_s() == 0
        task = asyncio.create_task(answers(made, [1]))
        await entered(held)
        assert made.stuck_s() > 0
        held.go.set()
        await task
        assert made.stuck_s() == 0

    asyncio.run(scenario())


def test_tickets_have_the_times_and_the_size_of_their_batch() -> None:
    async def scenario() -> None:
        (ticket,) = await batcher(doubled).submit([(1, 5)], soon())
        assert ticket.batch_rows == 5
        assert ticket.queue_s > 0
        assert ticket.run_s > 0

    asyncio.run(scenario())


def test_a_hung_thread_keeps_no_items_and_accepts_no_more_than_the_queue() -> None:
    async def scenario() -> None:
        held = Held()
        made = batcher(held, max_queue=10)
        first = asyncio.create_task(answers(made, [1]))
        await entered(held)
        refused = 0
        for _ in range(20):
            with pytest.raises((Expired, Overloaded)) as error:
                await made.submit([("item", 1)], soon(0.001))
            refused += isinstance(error.value, Overloaded)
        assert refused == 9
        assert made.pending_rows == 1
        held.go.set()
        await first

    asyncio.run(scenario())


def test_does_not_rerun_items_that_expired_while_their_batch_failed() -> None:
    seen: list[list[int]] = []
    go = threading.Event()

    def fails(items: list[int]) -> list[int]:
        seen.append(items)
        assert go.wait(30)
        raise RuntimeError

    async def scenario() -> None:
        made = batcher(fails)
        tasks = [asyncio.create_task(made.submit([(0, 1)], soon()))]
        while not seen:
            await asyncio.sleep(0)
        tasks += [asyncio.create_task(made.submit([(item, 1)], soon(0.05))) for item in (1, 2, 3)]
        await asyncio.gather(*tasks[1:], return_exceptions=True)
        go.set()
        (first, *others) = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(first, ModelFailed)
        assert all(isinstance(other, Expired) for other in others)
        await made.close(5)
        assert seen == [[0]]

    asyncio.run(scenario())


def test_stops_rerunning_items_after_failures_in_a_row() -> None:
    seen: list[list[int]] = []
    held = Held()

    def fails(items: list[int]) -> list[int]:
        seen.append(items)
        if items == [99]:
            return held(items)
        raise RuntimeError

    async def scenario() -> None:
        made = batcher(fails)
        first = asyncio.create_task(answers(made, [99]))
        await entered(held)
        rest = asyncio.gather(*(made.submit([(i, 1)], soon()) for i in range(8)), return_exceptions=True)
        while made.pending_rows < 9:
            await asyncio.sleep(0)
        held.go.set()
        results = await rest
        await first
        assert all(isinstance(result, ModelFailed) and not result.alone for result in results)
        assert seen[1:] == [list(range(8)), [0], [1], [2]]

    asyncio.run(scenario())


def test_the_time_of_a_failure_does_not_limit_batches() -> None:
    """Otherwise a failure would make single rows look so quick that no batch gains anything."""
    batches: list[list[int]] = []

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        if 0 in items:
            raise RuntimeError("at once")
        sleep(1.5 * QUICK_S)
        return doubled(items)

    async def scenario() -> None:
        made = batcher(run, runs_inline=True)
        with pytest.raises(ModelFailed):
            await answers(made, [0])
        await made.submit([(1, 2)], soon())
        await answers(made, [2, 3])
        assert batches == [[0], [1], [2, 3]]

    asyncio.run(scenario())


def test_marks_a_failure_among_answers_as_its_items_own() -> None:
    async def scenario() -> None:
        held = Held()

        def picky(items: list[int]) -> list[int]:
            if items == [99]:
                return held(items)
            if 3 in items:
                raise RuntimeError
            return doubled(items)

        made = batcher(picky)
        first = asyncio.create_task(answers(made, [99]))
        await entered(held)
        rest = asyncio.gather(*(made.submit([(i, 1)], soon()) for i in range(6)), return_exceptions=True)
        while made.pending_rows < 7:
            await asyncio.sleep(0)
        held.go.set()
        failures = [result for result in await rest if isinstance(result, ModelFailed)]
        await first
        assert [failure.alone for failure in failures] == [True]

    asyncio.run(scenario())
