"""A device worker and its client over a real socket: errors keep their meaning, and no request hangs."""

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
from service.deploy.deployments import Slot
from service.engines.batcher import BatchLimits
from service.engines.engine import Deployed, Engine
from service.engines.pairing import is_declined
from service.engines.predict import PredictAdapter, Prediction
from service.engines.remote import EngineSet, RemoteEngine
from service.processes.device_client import LOST, DeviceClient, frame_name
from service.processes.device_worker import (
    DeviceWorker,
    finishes_before,
    listen,
    max_frame_bytes,
)
from service.processes.frames import (
    HEAD,
    Frame,
    FrameKind,
    encode,
)
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.conftest import PATIENCE_S
from tests.fakes import FakePredictor, Gate, T, card, contexts, mean_of

NO_ENGINES = EngineSet({}, {})


class FakeDeployments:
    """The engines of a device worker; a test replaces them."""

    def __init__(self, **engines: Engine[PredictAdapter]) -> None:
        self.engines = engines
        self.slots = {alias: Slot(engine, Deployed(engine.info.version, "now")) for alias, engine in engines.items()}

    def local_engines(self) -> dict[str, Engine[PredictAdapter]]:
        return self.engines


class Silent(PredictAdapter):
    """Never answers, and counts the calls that were cancelled."""

    cancelled = 0

    async def answer(self, contexts: Floats, deadline: float, batcher: Any) -> Prediction:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            self.cancelled += 1


class House:
    """A device worker with one net behind a socket, a client of it, and the engine sets that the client provided."""

    def __init__(
        self, listener: socket.socket, answer: Callable[[Floats], Floats], kind: type[PredictAdapter], **settings: Any
    ) -> None:
        self.settings, self._listener, self._kind = Settings(**settings), listener, kind
        self.net = FakePredictor(answer=answer)
        self.engine = self.make(self.net)
        self.deployments: Any = FakeDeployments(primary=self.engine)
        self.client = DeviceClient(Path(listener.getsockname()), max_frame_bytes(self.settings))
        self.engine_sets: list[EngineSet] = []

    def make(self, net: FakePredictor) -> Engine[PredictAdapter]:
        limits = BatchLimits(self.settings.max_batch, self.settings.max_queue)
        return Engine(self._kind(net, "primary", limits.max_rows), limits, Metrics(), full_wait_s=1.0)

    async def open(self) -> None:
        """Start a device worker, or another one beside it."""
        self.device = DeviceWorker(self.deployments, self.settings)
        self.device.announce()
        self.server = await listen(self.device, self._listener.dup())

    def kill(self) -> None:
        """Stop the device worker; connections wait at its address."""
        self.server.close()
        for session in tuple(self.device.sessions):
            session.close()

    @property
    def remote(self) -> RemoteEngine:
        return self.engine_sets[-1].engines["primary"]

    def ask(self, seconds: float = PATIENCE_S) -> asyncio.Task[Prediction]:
        return asyncio.create_task(self.remote.run(contexts(), monotonic() + seconds))  # type: ignore[arg-type]

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
    kind: type[PredictAdapter] = PredictAdapter,
    **settings: Any,
) -> None:
    """Run a scenario; nothing in it may hang."""

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place / "socket"))
            listener.listen()
            house = House(listener, answer, kind, **settings)
            await house.open()
            await house.client.open(house.engine_sets.append)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await scenario(house)
            finally:
                await house.client.close()
                house.kill()
                await house.engine.batcher.close(1)

    uvloop.run(run())


@pytest.mark.parametrize("error", [Overloaded("9 rows are waiting", retry_after=7), Expired("late in the queue")])
def test_passes_on_the_error_of_an_engine(tmp_path: Path, error: ServiceError) -> None:
    class Refusing(PredictAdapter):
        async def answer(self, contexts: Floats, deadline: float, batcher: Any) -> Prediction:
            raise error

    async def scenario(house: House) -> None:
        found = await house.fault(house.ask())
        assert (type(found), found.detail, found.retry_after) == (type(error), error.detail, error.retry_after)

    live(tmp_path, scenario, kind=Refusing)


def test_rejects_only_the_request_that_finds_the_queue_full(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(house: House) -> None:
        first = house.ask()
        await until(gate.entered.is_set)
        found = await house.fault(house.ask())
        assert (type(found), found.retry_after) == (Overloaded, 1)
        gate.opened.set()
        np.testing.assert_array_equal((await first).vectors, mean_of(contexts()))

    live(tmp_path, scenario, gate, max_queue=1)


def test_cancels_a_request_at_its_deadline(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        assert type(await house.fault(house.ask(seconds=0.01))) is Expired
        await until(lambda: house.engine.model.cancelled == 1)  # type: ignore[attr-defined]

    live(tmp_path, scenario, kind=Silent)


def test_does_not_run_the_request_of_a_caller_who_left(tmp_path: Path) -> None:
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


def test_an_answer_names_its_version_which_is_announced_before(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        old, asked = house.remote, house.ask()
        house.deployments.engines["primary"] = house.make(FakePredictor(version="20260202-222222222222"))
        made = await asked
        assert (made.model, made.version, made.batch_rows) == ("amn", "20260202-222222222222", 1)
        assert old.info.version != made.version == house.remote.info.version
        await house.deployments.engines["primary"].batcher.close(1)

    live(tmp_path, scenario)


def test_rejects_rows_for_a_model_of_another_encoder(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        asked = house.ask()
        other = FakePredictor(card=card(encoder="another"))
        house.deployments.engines["primary"] = house.make(other)
        found = await house.fault(asked)
        assert (type(found), found.retry_after, other.batches) == (Draining, 1, [])
        await house.deployments.engines["primary"].batcher.close(1)

    live(tmp_path, scenario)


def test_a_request_that_declines_to_be_scored_declines_in_the_device_worker_too(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        seen: list[bool] = []
        house.engine.on_answer = lambda request, answer: seen.append(is_declined.get())
        await house.ask()
        is_declined.set(True)
        await house.ask()
        is_declined.set(False)
        await house.ask()
        assert seen == [False, True, False]

    live(tmp_path, scenario)


def test_fails_at_once_if_the_device_worker_is_lost_and_connects_to_the_next(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(house: House) -> None:
        asked = [house.ask() for _ in range(5)]
        await until(lambda: house.engine.batcher.pending_rows == 5)
        lost = house.remote
        house.kill()
        found = [await house.fault(each) for each in asked]
        assert {(type(each), each.detail, each.retry_after) for each in found} == {(Draining, LOST, 1)}
        assert house.engine_sets[-1] == NO_ENGINES
        with pytest.raises(Draining):
            await lost.run(contexts(), monotonic() + PATIENCE_S)  # type: ignore[arg-type]
        assert not gate.opened.is_set(), "the requests did not wait for the net"
        gate.opened.set()
        await house.open()
        await until(lambda: house.engine_sets[-1] != NO_ENGINES)
        np.testing.assert_array_equal((await house.ask()).vectors, mean_of(contexts()))

    live(tmp_path, scenario, gate)


def test_a_device_worker_that_leaves_answers_its_requests_while_the_next_one_serves(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(house: House) -> None:
        asked, old = house.ask(), house.device
        await until(gate.entered.is_set)
        house.server.close()
        house.deployments = FakeDeployments(primary=house.make(FakePredictor(version="20260202-222222222222")))
        await house.open()
        for session in old.sessions:
            session.send(Frame(FrameKind.LEAVING))
        await until(lambda: len(house.engine_sets) == 2)
        assert (await house.ask()).version == "20260202-222222222222"
        assert old.sessions, "a request waits there"
        gate.opened.set()
        assert (await asked).version == house.net.version
        await until(lambda: not old.sessions)
        assert NO_ENGINES not in house.engine_sets
        await house.deployments.engines["primary"].batcher.close(1)

    live(tmp_path, scenario, gate)


@pytest.mark.parametrize(
    "spoiled",
    [
        b"\xff" * HEAD.size,
        HEAD.pack(1, 0, 0, 0, 0, 0, 99, 0, False, 0.0),
        *(bytes(b"".join(encode(Frame(kind, 1, seconds=0.0)))) for kind in (FrameKind.ANSWER, FrameKind.LEAVING)),
        HEAD.pack(2, 4 * T, 1, T, 1, 0, FrameKind.REQUEST, 0, False, float("nan")) + bytes(4 * T),
    ],
    ids=["too large", "no kind", "an answer", "the owner's", "no time"],
)
def test_closes_only_the_session_of_a_worker_that_sends_bad_frames(tmp_path: Path, spoiled: bytes) -> None:
    gate = Gate()

    async def scenario(house: House) -> None:
        asked = house.ask()
        await until(gate.entered.is_set)
        _, worker = await asyncio.open_unix_connection(tmp_path / "socket")
        request = Frame(
            FrameKind.REQUEST, 1, frame_name(house.remote.info), contexts(), seconds=monotonic() + PATIENCE_S
        )
        worker.writelines(encode(request))
        await until(lambda: house.engine.batcher.pending_rows == 2)
        worker.write(spoiled)
        await until(lambda: len(house.device.sessions) == 1)
        worker.close()
        gate.opened.set()
        await asked
        await house.ask()
        assert house.net.batches == [1, 1], "the closed session's request did not run"
        assert len(house.engine_sets) == 1

    live(tmp_path, scenario, gate)


def test_cancels_a_start_that_hangs() -> None:
    async def scenario() -> None:
        leaving, ended = asyncio.Event(), list[str]()

        async def start() -> None:
            try:
                leaving.set()
                await asyncio.Event().wait()
            finally:
                ended.append("closed")

        assert not await finishes_before(leaving, start())
        assert ended == ["closed"]

    asyncio.run(scenario())


def test_returns_after_a_start_and_passes_on_its_error() -> None:
    async def scenario() -> None:
        assert await finishes_before(asyncio.Event(), asyncio.sleep(0))
        with pytest.raises(OSError, match="no such share"):
            await finishes_before(asyncio.Event(), fail())

    async def fail() -> None:
        raise OSError("no such share")

    asyncio.run(scenario())
