"""An owner and a link over a real socket: errors keep their meaning, who left is not run for, and nobody hangs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import uvloop

from lvm.errors import (
    Draining,
    Expired,
    Overloaded,
    ServiceError,
)
from models.vectors import Floats
from service.engines.engine import (
    Engine,
    Live,
    Prediction,
)
from service.engines.remote import Loan, Remote
from service.processes.device_client import GONE, Link, name_of
from service.processes.device_worker import (
    Owner,
    listen,
    most_of,
    unless,
)
from service.processes.frames import (
    HEAD,
    Frame,
    Kind,
    write,
)
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.conftest import PATIENCE_S
from tests.fakes import FakePredictor, Gate, T, card, contexts, mean_of

NOBODY = Loan({}, {})


class FakeLineup:
    """Who serves; a test moves it by hand."""

    candidate = None

    def __init__(self, **engines: Engine) -> None:
        self.engines = engines
        self.live = {alias: Live(engine.version, "now") for alias, engine in engines.items()}


class Silent(Engine):
    """Answers nothing, and counts who left."""

    left = 0

    async def predict(self, contexts: Floats, deadline: float) -> Prediction:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            self.left += 1


class House:
    """An owner of one net behind a socket, a link to it, and all that the link was lent."""

    def __init__(
        self, listener: socket.socket, answer: Callable[[Floats], Floats], kind: type[Engine], **settings: Any
    ) -> None:
        self.settings, self._listener, self._kind = Settings(**settings), listener, kind
        self.net = FakePredictor(answer=answer)
        self.engine = self.make(self.net)
        self.lineup: Any = FakeLineup(primary=self.engine)
        self.link = Link(Path(listener.getsockname()), most_of(self.settings))
        self.loans: list[Loan] = []

    def make(self, net: FakePredictor) -> Engine:
        return self._kind(net, "primary", self.settings, Metrics())

    async def open(self) -> None:
        """Have an owner, or another beside the one that is there."""
        self.owner = Owner(self.lineup, self.settings)
        self.owner.tell()
        self.server = await listen(self.owner, self._listener.dup())

    def kill(self) -> None:
        """Have no owner any more; what waits at its address goes on waiting."""
        self.server.close()
        for desk in tuple(self.owner.desks):
            desk.close()

    @property
    def remote(self) -> Remote:
        return self.loans[-1].engines["primary"]

    def ask(self, seconds: float = PATIENCE_S) -> asyncio.Task[Prediction]:
        return asyncio.create_task(self.remote.predict(contexts(), monotonic() + seconds))  # type: ignore[arg-type]

    async def fault(self, asked: asyncio.Task[Prediction]) -> ServiceError:
        with pytest.raises(ServiceError) as found:
            await asked
        return found.value


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def live(
    place: Path,
    scenario: Callable[[House], Awaitable[None]],
    answer: Callable[[Floats], Floats] = mean_of,
    kind: type[Engine] = Engine,
    **settings: Any,
) -> None:
    """Play a scenario in a house; nothing in it may hang."""

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place / "socket"))
            listener.listen()
            house = House(listener, answer, kind, **settings)
            await house.open()
            await house.link.open(house.loans.append)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await scenario(house)
            finally:
                await house.link.close()
                house.kill()
                await house.engine.batcher.close(1)

    uvloop.run(run())


@pytest.mark.parametrize("error", [Overloaded("9 rows are waiting", retry_after=7), Expired("late in the queue")])
def test_what_an_engine_refuses_with_is_what_the_asker_gets(tmp_path: Path, error: ServiceError) -> None:
    class Refusing(Engine):
        async def predict(self, contexts: Floats, deadline: float) -> Prediction:
            raise error

    async def scenario(house: House) -> None:
        found = await house.fault(house.ask())
        assert (type(found), found.detail, found.retry_after) == (type(error), error.detail, error.retry_after)

    live(tmp_path, scenario, kind=Refusing)


def test_a_full_queue_at_the_owner_is_an_overload_of_the_next_and_of_nobody_else(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(house: House) -> None:
        first = house.ask()
        await until(gate.entered.is_set)
        found = await house.fault(house.ask())
        assert (type(found), found.retry_after) == (Overloaded, 1)
        gate.opened.set()
        np.testing.assert_array_equal((await first).vectors, mean_of(contexts()))

    live(tmp_path, scenario, gate, max_queue=1)


def test_an_owner_that_says_nothing_by_the_deadline_is_late_and_is_told_that_nobody_waits(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        assert type(await house.fault(house.ask(seconds=0.01))) is Expired
        await until(lambda: house.engine.left == 1)  # type: ignore[attr-defined]

    live(tmp_path, scenario, kind=Silent)


def test_nothing_is_run_for_who_left(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(house: House) -> None:
        first = house.ask()
        await until(gate.entered.is_set)
        leaver = house.ask()
        await until(lambda: house.engine.batcher.pending_rows == 2)
        leaver.cancel()
        await until(lambda: house.engine.batcher.pending_rows == 1)
        gate.opened.set()
        await first
        await house.ask()
        assert house.net.batches == [1, 1], "the first and the last"

    live(tmp_path, scenario, gate)


def test_an_answer_names_who_made_it_and_a_new_one_is_known_before_it(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        old, asked = house.remote, house.ask()
        house.lineup.engines["primary"] = house.make(FakePredictor(version="20260202-222222222222"))
        made = await asked
        assert (made.model, made.version, made.batch_rows) == ("amn", "20260202-222222222222", 1)
        assert old.version != made.version == house.remote.version
        await house.lineup.engines["primary"].batcher.close(1)

    live(tmp_path, scenario)


def test_rows_for_a_net_that_reads_otherwise_now_are_to_be_sent_again(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        asked = house.ask()
        other = FakePredictor(card=card(encoder="another"))
        house.lineup.engines["primary"] = house.make(other)
        found = await house.fault(asked)
        assert (type(found), found.retry_after, other.batches) == (Draining, 1, [])
        await house.lineup.engines["primary"].batcher.close(1)

    live(tmp_path, scenario)


def test_a_lost_owner_fails_all_at_once_and_the_next_one_is_borrowed_from(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(house: House) -> None:
        asked = [house.ask() for _ in range(5)]
        await until(lambda: house.engine.batcher.pending_rows == 5)
        lost = house.remote
        house.kill()
        found = [await house.fault(each) for each in asked]
        assert {(type(each), each.detail, each.retry_after) for each in found} == {(Draining, GONE, 1)}
        assert house.loans[-1] == NOBODY
        with pytest.raises(Draining):
            await lost.predict(contexts(), monotonic() + PATIENCE_S)  # type: ignore[arg-type]
        assert not gate.opened.is_set(), "nobody waited for the net"
        gate.opened.set()
        await house.open()
        await until(lambda: house.loans[-1] != NOBODY)
        np.testing.assert_array_equal((await house.ask()).vectors, mean_of(contexts()))

    live(tmp_path, scenario, gate)


def test_an_owner_that_leaves_answers_what_it_was_asked_while_the_next_one_serves(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(house: House) -> None:
        asked, old = house.ask(), house.owner
        await until(gate.entered.is_set)
        house.server.close()
        house.lineup = FakeLineup(primary=house.make(FakePredictor(version="20260202-222222222222")))
        await house.open()
        for desk in old.desks:
            desk.send(Frame(Kind.LEAVING))
        await until(lambda: len(house.loans) == 2)
        assert (await house.ask()).version == "20260202-222222222222"
        assert old.desks, "somebody waits there"
        gate.opened.set()
        assert (await asked).version == house.net.version
        await until(lambda: not old.desks)
        assert NOBODY not in house.loans
        await house.lineup.engines["primary"].batcher.close(1)

    live(tmp_path, scenario, gate)


@pytest.mark.parametrize(
    "spoiled",
    [
        b"\xff" * HEAD.size,
        HEAD.pack(1, 0, 0, 0, 0, 0, 99, 0, 0.0),
        *(bytes(b"".join(write(Frame(kind, 1, seconds=0.0)))) for kind in (Kind.ANSWER, Kind.LEAVING)),
        HEAD.pack(2, 4 * T, 1, T, 1, 0, Kind.ASK, 0, float("nan")) + bytes(4 * T),
    ],
    ids=["too large", "no kind", "an answer", "the owner's", "no time"],
)
def test_a_worker_that_sends_spoiled_bytes_loses_its_desk_and_nobody_else_does(tmp_path: Path, spoiled: bytes) -> None:
    gate = Gate()

    async def scenario(house: House) -> None:
        asked = house.ask()
        await until(gate.entered.is_set)
        _, worker = await asyncio.open_unix_connection(tmp_path / "socket")
        question = Frame(Kind.ASK, 1, name_of(house.remote.facts), contexts(), seconds=monotonic() + PATIENCE_S)
        worker.writelines(write(question))
        await until(lambda: house.engine.batcher.pending_rows == 2)
        worker.write(spoiled)
        await until(lambda: len(house.owner.desks) == 1)
        worker.close()
        gate.opened.set()
        await asked
        await house.ask()
        assert house.net.batches == [1, 1], "nothing was run for the one who was sent away"
        assert len(house.loans) == 1

    live(tmp_path, scenario, gate)


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
