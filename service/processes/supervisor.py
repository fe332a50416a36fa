"""Workers: several serving processes behind one port, and the one that keeps them there.

The supervisor owns a listening socket for each worker, so what waits to be accepted outlives a worker and is
answered by the next. It serves nothing itself. Between the two runs a line: the worker sends a byte a second
while it is well, and drains when the supervisor's end closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvicorn

from models.runtimes import is_accelerated
from service.app import Service, create_app
from service.http.auth import read_tokens
from service.processes.device_client import Link
from service.processes.device_worker import SOCKET, most_of
from service.processes.heartbeat import on_supervisor_exit, send_heartbeat
from service.processes.server import (
    SIGNALS,
    Server,
    bind,
    check_exposure,
    exit_before_start,
    lock_address,
    run,
    stop_accepting,
    uvicorn_config,
    warn_of_unknown_settings,
)
from service.settings import Settings, cores, read_settings
from service.tasks import CatchAndLog, repeat
from service.telemetry.log import configure, log_writer, logger
from service.telemetry.metrics import OWNER, WORKER, Metrics
from service.telemetry.shared_memory import SharedMetricValues, metrics_directory

BACK_OFF_S = 0.1, 5.0  # before a worker that did not start is started again: at first, at most
OBSERVE_S = 1.0
GONE = "the supervisor is gone"


class Worker(Server):
    """A server beside others on its port: says that it is well, and leaves the listening socket to its successor."""

    _loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, config: uvicorn.Config, app: Service, settings: Settings, line: socket.socket) -> None:
        super().__init__(config, app, settings)
        self._app, self._line = app, line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; from now on there is an event loop that can be told that the supervisor is gone."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def announce(self) -> None:
        """Say that it is ready."""
        send_heartbeat(self._line)

    def each_second(self) -> None:
        """Say that all is well, if it is, and bring the shared levels up to date."""
        if self._app.state.lineup.stuck_s() <= self._settings.hang_s:
            send_heartbeat(self._line)
        self._app.state.observe()
        super().each_second()

    def abandon(self) -> None:
        """Drain, for the supervisor is gone; called by another thread."""
        if self._loop is None:
            exit_before_start(GONE)
        with contextlib.suppress(RuntimeError):  # the loop is closed: it is on its way out
            self._loop.call_soon_threadsafe(self._drain_once)

    def _drain_once(self) -> None:
        if not self._process.is_draining:
            self.drain(GONE)

    def stop_accepting(self) -> None:
        """Leave it to the supervisor, who knows whether somebody else listens."""


class Life:
    """One worker process, or the owner of the device, from its start to its end."""

    def __init__(
        self, process: asyncio.subprocess.Process, line: asyncio.StreamReader, settings: Settings, role: str, slot: int
    ) -> None:
        self.role, self.slot = role, slot
        self.process, self._line, self._settings = process, line, settings
        self.is_ready = asyncio.get_running_loop().create_future()
        self.is_leaving = False
        self.ended = asyncio.create_task(self._watch())

    def leave(self) -> None:
        """Have it drain; asked twice, it does not wait. One that does not end is killed."""
        if not self.is_leaving:
            asyncio.get_running_loop().call_later(self._settings.stop_s, self._kill)
        self.is_leaving = True
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def _kill(self) -> None:
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                logger().error("worker hangs", **self.marks())
                self.process.kill()

    def marks(self) -> dict[str, Any]:
        """Return what a line of the log says of it."""
        return {"worker": self.slot if self.role == WORKER else self.role, "pid": self.process.pid}

    async def _watch(self) -> int:
        """Follow the line to its end, and end what falls silent; return the exit status, of a signal as shells do."""
        with contextlib.suppress(ConnectionResetError):
            while await self._says():
                if not self.is_ready.done():
                    self.is_ready.set_result(True)
        status = await self.process.wait()
        if not self.is_ready.done():
            self.is_ready.set_result(False)
            if self.is_leaving and status == -signal.SIGTERM:
                return 0  # told to leave before it could listen to signals: it had accepted nothing
        return status if status >= 0 else 128 - status

    async def _says(self) -> bytes:
        may_be_silent = self.is_leaving or not self.is_ready.done()
        try:
            return await asyncio.wait_for(self._line.read(64), None if may_be_silent else self._settings.hang_s)
        except TimeoutError:
            if self.is_leaving:
                return await self._line.read(64)
            self._kill()
            return b""


class Supervisor:
    """Keeps a worker at every listener: replaces the dead and the hung, renews all at SIGHUP, drains at SIGTERM.

    At `owner`, where that is a socket, it keeps the owner of the device in the same way: there first, and gone last.
    """

    def __init__(
        self, settings: Settings, listeners: Sequence[socket.socket], home: Path, owner: socket.socket | None = None
    ) -> None:
        self._settings, self._listeners, self._home, self._owner = settings, listeners, home, owner
        posts = [*([owner] if owner else []), *listeners]
        *self._free, own = range(rows(len(posts)))
        self._metrics = Metrics(settings.slo_ms, SharedMetricValues(home, own))
        self._lives: set[Life] = set()
        self._renewals = {listener: asyncio.Event() for listener in posts}
        self._one_at_a_time = asyncio.Semaphore()
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Keep the workers until told to stop; return the exit status: 0 where every worker drained cleanly."""
        log_writer().on_drop(self._metrics.log_dropped.inc)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._renew)
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stop)
        observing = asyncio.create_task(repeat("observe", self._observe, OBSERVE_S))
        owners = [self._owner] if self._owner else []
        keepers = [*await self._fill(owners), *await self._fill(self._listeners)]
        if not self._stopping.is_set():
            host, port = self._listeners[0].getsockname()[:2]
            logger().info("listening", url=f"http://{host}:{port}", workers=len(self._listeners))
        await asyncio.gather(*keepers[len(owners) :])
        await self._ends(WORKER)
        for life in self._lives:
            life.leave()  # the owner, now that nobody asks any more
        await asyncio.gather(*keepers)
        await self._ends(OWNER)
        observing.cancel()
        return self._status

    async def _observe(self) -> None:
        self._metrics.observe_process()

    async def _ends(self, role: str) -> None:
        """Wait until every process of a role has ended, and has been counted."""
        while lives := [life for life in self._lives if life.role == role]:
            await asyncio.wait({life.ended for life in lives})
            await asyncio.sleep(0)

    async def _fill(self, posts: Sequence[socket.socket]) -> list[asyncio.Task[None]]:
        """Start somebody at each post; return the tasks that keep somebody there. Stop where one does not start."""
        if self._stopping.is_set():
            return []
        first = await asyncio.gather(*map(self._start, posts))
        if not all([await life.is_ready for life in first]) and not self._stopping.is_set():
            self._status = max([await life.ended for life in first if not life.is_ready.result()])
            self._stop()
        return [asyncio.create_task(self._keep(*pair)) for pair in zip(posts, first, strict=True)]

    def _renew(self) -> None:
        for renewal in self._renewals.values():
            renewal.set()

    def _stop(self) -> None:
        if not self._stopping.is_set():
            logger().info("draining", seconds=self._settings.drain_s)
            asyncio.get_running_loop().call_later(self._settings.drain_s, self._turn_away)
        self._stopping.set()
        workers = [life for life in self._lives if life.role == WORKER]
        for life in workers or list(self._lives):  # the owner, where it is still starting
            life.leave()

    def _turn_away(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                stop_accepting(listener)

    async def _keep(self, listener: socket.socket, life: Life) -> None:
        """Keep one worker running for a listener until shutdown, whatever goes wrong meanwhile."""
        guarded = CatchAndLog("keep a worker")
        pause, most = BACK_OFF_S
        while not self._stopping.is_set():
            renewal = asyncio.create_task(self._renewals[listener].wait())
            await asyncio.wait({life.ended, renewal}, return_when=asyncio.FIRST_COMPLETED)
            renewal.cancel()
            if self._stopping.is_set():
                break
            with guarded:
                life = await (self._replace(listener) if life.ended.done() else self._relieve(listener, life))
                pause = BACK_OFF_S[0]
                continue
            await self._rest(pause)
            pause = min(2 * pause, most)
        await life.ended

    async def _rest(self, seconds: float) -> None:
        """Wait, but not beyond the time to stop."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _replace(self, listener: socket.socket) -> Life:
        """Start a worker in place of a dead one, again and again where it does not start."""
        pause, most = BACK_OFF_S
        while not await (life := await self._start(listener)).is_ready and not self._stopping.is_set():
            await self._rest(pause)
            pause = min(2 * pause, most)
        return life

    async def _relieve(self, listener: socket.socket, old: Life) -> Life:
        """Start a successor beside a worker, then have that one drain; the old goes on where the new cannot start."""
        self._renewals[listener].clear()
        async with self._one_at_a_time:
            if self._stopping.is_set():
                return old
            new = await self._start(listener)
            if not await new.is_ready:
                if not self._stopping.is_set():
                    logger().error("successor did not start", **new.marks())
                return old
            if not self._stopping.is_set():  # else both have been told
                old.leave()
            await old.ended
            return new

    async def _start(self, listener: socket.socket) -> Life:
        """Start a process at a listener; one that comes when it is time to stop is told so at once.

        Raises:
            OSError: for want of processes, memory or descriptors.
        """
        ours, theirs = socket.socketpair()
        role = OWNER if listener is self._owner else WORKER
        slot = self._free.pop(0)
        try:
            with theirs:
                process = await self._spawn(role, slot, listener, theirs)
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            self._free.append(slot)
            raise
        life = Life(process, reader, self._settings, role, slot)
        self._lives.add(life)
        life.ended.add_done_callback(lambda _: self._bury(life, writer))
        if self._stopping.is_set():
            life.leave()
        return life

    async def _spawn(
        self, role: str, slot: int, listener: socket.socket, line: socket.socket
    ) -> asyncio.subprocess.Process:
        fds = [listener.fileno(), line.fileno()]
        verb = "own" if role == OWNER else "work"
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lvm.cli", verb, str(slot), *map(str, fds), str(self._home)),
            pass_fds=fds,
            env=dict(os.environ) if role == OWNER else self._environment(),
            start_new_session=True,  # Ctrl-C is the supervisor's to pass on
        )

    def _bury(self, life: Life, writer: asyncio.StreamWriter) -> None:
        writer.close()
        self._lives.discard(life)
        self._free.append(life.slot)
        status = life.ended.result()
        if self._stopping.is_set():
            self._status = max(self._status, status)
        is_death = not life.is_leaving or status != 0
        if is_death:
            if life.role == OWNER:
                logger().error("owner died", **life.marks(), status=status)
            else:
                logger().error("worker died", **life.marks(), status=status)
        with CatchAndLog("close the books"):
            metrics = Metrics(self._settings.slo_ms, SharedMetricValues(self._home, life.slot))
            metrics.finalize()
            if is_death:
                metrics.worker_deaths.inc(life.role)

    def _environment(self) -> dict[str, str]:
        """Return the environment of a worker: the cores are divided where nobody said how many each has."""
        share = {} if "threads" in self._settings.model_fields_set else {"LVM_THREADS": str(self._share())}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self._owner else {}  # nobody but the owner takes memory of a device
        return {**os.environ, **share, **hidden}

    def _share(self) -> int:
        return max(1, cores() // len(self._listeners))


def supervise(settings: Settings) -> int:
    """Serve with `settings.workers` processes until told to stop; return the exit status.

    Raises:
        BadSettings: the tokens cannot be read.
        CannotListen: the address cannot be bound, or is not to be.
        OSError: nowhere is room for what the workers count.
    """
    configure(settings.log_level)
    warn_of_unknown_settings()
    with ExitStack() as stack:
        with bind(settings.host, settings.port) as lone:  # refused where somebody listens, workers of others too
            host, port = lone.getsockname()[:2]
            stack.enter_context(lock_address(lone))
        check_exposure(host, read_tokens(settings), insecure=settings.insecure)
        listeners = [stack.enter_context(bind(settings.host, port, shared=True)) for _ in range(settings.workers)]
        is_owned = has_owner(settings)
        home = stack.enter_context(metrics_directory(rows(settings.workers + is_owned)))
        owner = stack.enter_context(_owner_at(home / SOCKET)) if is_owned else None
        return asyncio.run(_supervise(settings, listeners, home, owner))


def rows(posts: int) -> int:
    """Return how many rows of cells there are for so many posts.

    A successor counts beside the process that it relieves, and the supervisor in the last.
    """
    return 2 * posts + 1


def has_owner(settings: Settings) -> bool:
    """Return whether one process owns the device, and the workers have their nets from it."""
    if settings.owner == "auto":
        return settings.workers > 1 and is_accelerated(settings.device)
    return settings.owner == "on"


def _owner_at(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


async def _supervise(
    settings: Settings, listeners: Sequence[socket.socket], home: Path, owner: socket.socket | None
) -> int:
    return await Supervisor(settings, listeners, home, owner).run()


def work(slot: int, listener: int, line: int, home: Path) -> int:
    """Be a worker: count in row `slot` below `home`, serve on the socket `listener`, report on the socket `line`."""
    settings = read_settings()
    configure(settings.log_level, worker=slot, pid=os.getpid())
    lender = Link(home / SOCKET, most_of(settings)) if (home / SOCKET).exists() else None
    app = create_app(settings, metric_values=SharedMetricValues(home, slot), lender=lender)
    app.state.process.headers = [(b"x-worker", b"%d" % slot)]
    with socket.socket(fileno=line) as reports, socket.socket(fileno=listener) as ours:
        worker = Worker(uvicorn_config(app, settings), app, settings, reports)
        on_supervisor_exit(reports, home, worker.abandon, settings.stop_s)
        return run(worker, app, ours)
