"""The device worker: the one process that loads the models and runs batches of the rows of all HTTP workers.

It runs the deployments without HTTP: it follows the registry, tries promoted versions out, and answers frames. The
supervisor owns its listening socket, so that connections wait for the next device worker if one ends.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import orjson
import uvloop

from lvm.errors import Draining, ServiceError, Unavailable
from models.registry.alias import NET_ALIASES
from models.registry.registry import Registry
from models.registry.remote import local_directory
from models.vectors import Floats
from service.deploy.deployments import Deployments
from service.deploy.loading import ModelLoader
from service.deploy.registry_sync import SyncLoop, deployment_lifespan, sync_loop
from service.deploy.watcher import Watcher
from service.engines.engine import Engine
from service.engines.pairing import is_declined
from service.engines.predict import PredictAdapter, Prediction
from service.processes.device_client import frame_name
from service.processes.frames import BadFrame, Frame, FrameKind, FrameProtocol, encode_error
from service.processes.heartbeat import SIGNALS, on_supervisor_exit, send_heartbeat
from service.processes.server import SWITCH_INTERVAL_S
from service.settings import Settings, read_settings
from service.tasks import CatchAndLog
from service.telemetry.log import configure, log_writer, logger
from service.telemetry.metrics import Metrics
from service.telemetry.shared_memory import SharedMetricValues

TICK_S = 0.1  # between two looks at the engines
HOUR_S = 3600.0  # the longest deadline of a request
Predictor = Engine[PredictAdapter]


class DeviceWorker:
    """Answers the requests of HTTP workers by the engines of `deployments`."""

    def __init__(self, deployments: Deployments, settings: Settings) -> None:
        self.settings = settings
        self.sessions: set[WorkerSession] = set()
        self._deployments = deployments
        self._names: dict[Predictor, bytes] = {}
        self._input_spaces: dict[bytes, tuple[int, int, str]] = {}  # of every engine that ever served, by name
        self._announced = b""

    def announce(self) -> None:
        """Send the engines to every HTTP worker, if they have changed."""
        engines = self._engines()
        self._names = {engine: frame_name(engine.info) for engine in engines.values()}
        self._input_spaces |= {name: engine.info.input_space for engine, name in self._names.items()}
        infos = [engine.describe() for engine in engines.values()]
        deployed = {str(alias): slot.deployed for alias, slot in self._deployments.slots.items()}
        text = orjson.dumps({"engines": infos, "deployed": deployed})
        if text != self._announced:
            self._announced = text
            for session in self.sessions:
                self.greet(session)

    def greet(self, session: WorkerSession) -> None:
        """Send the engines to one HTTP worker."""
        session.send(Frame(FrameKind.ENGINES, text=self._announced))

    async def answer(self, name: bytes, contexts: Floats, deadline: float) -> tuple[bytes, Prediction]:
        """Return the name of the engine that answered for the engine `name`, and its prediction.

        They differ if the alias serves another version by now.

        Raises:
            Draining: the alias serves nothing, or a model with another input space.
            Overloaded, Expired, ModelFailed: as `Engine.run`.
        """
        engine = self._engines().get(name.partition(b" ")[0].decode("latin-1"))
        if (
            engine is None
            or self._input_spaces.get(name) != engine.info.input_space
            or contexts.shape[1:] != engine.info.shape
        ):
            raise Draining("model was replaced by one with a different input shape or encoder")
        if engine not in self._names:
            self.announce()  # before its first answer
        author = self._names[engine]
        return author, await engine.run(contexts, deadline)

    def _engines(self) -> dict[str, Predictor]:
        return self._deployments.local_engines()


class WorkerSession(FrameProtocol):
    """The connection of one HTTP worker: a task for each request, cancelled when the connection is lost."""

    def __init__(self, device: DeviceWorker) -> None:
        super().__init__(max_frame_bytes(device.settings))
        self._device = device
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the engines first."""
        super().connection_made(transport)
        self._device.sessions.add(self)
        self._device.greet(self)

    def on_lost(self, why: Exception | None) -> None:
        """Cancel the requests of the HTTP worker."""
        if why:
            logger().error("worker lost", reason=str(why))
        self._device.sessions.discard(self)
        for task in self._tasks.values():
            task.cancel()

    def on_frame(self, frame: Frame) -> None:
        """Start or cancel a request; raises `BadFrame` if the frame is of another kind, or its deadline is absurd."""
        if frame.kind is FrameKind.CANCEL:
            task = self._tasks.pop(frame.id, None)
            if task:
                task.cancel()
            return
        is_new = frame.kind is FrameKind.REQUEST and frame.id not in self._tasks
        if not (is_new and abs(frame.seconds - monotonic()) <= 2 * HOUR_S):
            raise BadFrame(f"{frame.kind.name} {frame.id} with deadline {frame.seconds}")
        self._tasks[frame.id] = asyncio.create_task(self._answer(frame))

    async def _answer(self, frame: Frame) -> None:
        is_declined.set(frame.is_declined)
        try:
            name, made = await self._device.answer(frame.name, frame.rows, frame.seconds)
            self.send(
                Frame(FrameKind.ANSWER, frame.id, name, made.vectors[:, None], b"", made.batch_rows, made.infer_s)
            )
        except ServiceError as error:
            self.send(Frame(FrameKind.ERROR, frame.id, text=encode_error(error)))
        except Exception as error:
            logger().error("unexpected", exc_info=error)
            self.send(Frame(FrameKind.ERROR, frame.id, text=encode_error(Unavailable("an unexpected error"))))
        finally:
            self._tasks.pop(frame.id, None)


def max_frame_bytes(settings: Settings) -> int:
    """Return the bytes of the largest frame: the rows of a whole body, twice as large in case they were float16."""
    return 2 * round(settings.max_body_mb * 1e6) + 1024


async def listen(device: DeviceWorker, listener: socket.socket) -> asyncio.AbstractServer:
    """Accept HTTP workers on the inherited socket; its path stays when the server closes, on Python 3.13 as well."""
    loop = asyncio.get_running_loop()
    return await loop.create_unix_server(  # type: ignore[call-arg,unused-ignore]  # uvloop's takes it on any Python
        lambda: WorkerSession(device), sock=listener, cleanup_socket=False
    )


def run_device_worker(metric_slot: int, listener: int, heartbeat_fd: int, metrics_directory: Path) -> int:
    """Serve on the socket `listener` until SIGTERM or SIGINT, or until the supervisor exits; as `run_worker`.

    Raises:
        UnknownVersion, BadCheckpoint: the version of an alias cannot be served.
    """
    settings = read_settings()
    configure(settings.log_level, worker="owner", pid=os.getpid())
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    metrics = Metrics(settings.slo_ms, SharedMetricValues(metrics_directory, metric_slot))
    log_writer().on_drop(metrics.log_dropped.inc)
    with socket.socket(fileno=heartbeat_fd) as heartbeats, socket.socket(fileno=listener) as ours:
        uvloop.run(_run(settings, metrics, ours, heartbeats, metrics_directory))
    return 0


async def _run(
    settings: Settings, metrics: Metrics, listener: socket.socket, heartbeats: socket.socket, metrics_directory: Path
) -> None:
    loop = asyncio.get_running_loop()
    leaving = asyncio.Event()
    for number in SIGNALS:
        loop.add_signal_handler(number, leaving.set)
    on_supervisor_exit(heartbeats, metrics_directory, lambda: loop.call_soon_threadsafe(leaving.set), settings.stop_s)
    registry = Registry(local_directory(settings.registry, settings.cache))
    deployments = Deployments(registry, ModelLoader(settings), settings, metrics, aliases=NET_ALIASES)
    watcher = Watcher(deployments, settings.reload_s, metrics)
    sync = sync_loop(deployments, settings, metrics)
    async with AsyncExitStack() as stack:
        if await finishes_before(
            leaving, stack.enter_async_context(deployment_lifespan(watcher, sync, settings.grace_s))
        ):
            device = DeviceWorker(deployments, settings)
            device.announce()
            server = await listen(device, listener)
            await _watch(device, deployments, sync, heartbeats, leaving)
            server.close()
            await _drain(device, settings.drain_s + settings.grace_s)


async def finishes_before(leaving: asyncio.Event, start: Coroutine[Any, Any, object]) -> bool:
    """Return whether `start` finishes before `leaving` is set; cancel it otherwise."""
    starting, left = asyncio.create_task(start), asyncio.create_task(leaving.wait())
    await asyncio.wait({starting, left}, return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    if starting.done():
        starting.result()
        return True
    starting.cancel()
    await asyncio.wait({starting})
    return False


async def _watch(
    device: DeviceWorker,
    deployments: Deployments,
    sync: SyncLoop | None,
    heartbeats: socket.socket,
    leaving: asyncio.Event,
) -> None:
    """Announce changes to the HTTP workers, and beat to the supervisor, until `leaving` is set."""
    guarded = CatchAndLog("announce engines")
    last_beat = 0.0
    while not leaving.is_set():
        with guarded:
            device.announce()
            if monotonic() - last_beat >= 1.0:
                last_beat = monotonic()
                deployments.update_gauges()
                if sync:
                    sync.update_gauges()
                if deployments.stuck_s() <= device.settings.hang_s:
                    send_heartbeat(heartbeats)
        with suppress(TimeoutError):
            await asyncio.wait_for(leaving.wait(), TICK_S)


async def _drain(device: DeviceWorker, max_s: float) -> None:
    """Send the HTTP workers away and answer their requests, for `max_s` seconds at most."""
    until = monotonic() + max_s
    logger().info("draining", seconds=max_s)
    for session in device.sessions:
        session.send(Frame(FrameKind.LEAVING))
    while device.sessions and monotonic() < until:
        await asyncio.sleep(TICK_S)
