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
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import uvicorn

from models.runtimes import is_accelerated
from service.app import Service, create_app
from service.auth import read_tokens
from service.cells import SharedCells
from service.line import beat, when_lost
from service.link import Link
from service.log import configure, logger
from service.metrics import ROLES, Metrics
from service.owner import SOCKET, most_of
from service.server import Server, bind, check_exposure, config_of, run, turn_away
from service.settings import Settings, cores, read_settings

BACK_OFF_S = 0.1, 5.0  # before a worker that did not start is started again: at first, at most
SHM = Path("/dev/shm")  # memory, where there is such a place


class Worker(Server):
    """A server beside others on its port: says that it is well, and leaves the listening socket to its successor."""

    def __init__(self, config: uvicorn.Config, app: Service, settings: Settings, line: socket.socket) -> None:
        super().__init__(config, app, settings)
        self._app, self._line = app, line

    def announce(self) -> None:
        """Say that it is ready, and listen to the line from now on."""
        beat(self._line)
        when_lost(self._line, lambda: self.drain("the supervisor is gone"))

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; once a second, say that all is well and bring the shared levels up to date."""
        if counter % 10 == 0:
            self._app.state.observe()
            if self._app.state.lineup.stuck_s() <= self._settings.hang_s:
                beat(self._line)
        return await super().on_tick(counter)

    def turn_away(self) -> None:
        """Leave it to the supervisor, who knows whether somebody else listens."""


class Life:
    """One worker process, or the owner of the device, from its start to its end."""

    def __init__(
        self, process: asyncio.subprocess.Process, line: asyncio.StreamReader, hang_s: float, *, is_owner: bool
    ) -> None:
        self.is_owner = is_owner
        self.process, self._line, self._hang_s = process, line, hang_s
        self.is_ready = asyncio.get_running_loop().create_future()
        self.is_leaving = False
        self.ended = asyncio.create_task(self._watch())

    def leave(self) -> None:
        """Have it drain; asked twice, it does not wait."""
        self.is_leaving = True
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    async def _watch(self) -> int:
        """Follow the line to its end, and end what falls silent; return the exit status, of a signal as shells do."""
        with contextlib.suppress(ConnectionResetError):
            while await self._says():
                if not self.is_ready.done():
                    self.is_ready.set_result(True)
        status = await self.process.wait()
        if not self.is_ready.done():
            self.is_ready.set_result(False)
        return status if status >= 0 else 128 - status

    async def _says(self) -> bytes:
        may_be_silent = self.is_leaving or not self.is_ready.done()
        try:
            return await asyncio.wait_for(self._line.read(64), None if may_be_silent else self._hang_s)
        except TimeoutError:
            if self.is_leaving:
                return await self._line.read(64)
            logger().error("worker hangs", pid=self.process.pid, seconds=self._hang_s)
            self.process.kill()
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
        self._free = list(range(2 * len(posts)))  # a successor counts beside the one that it relieves
        self._lives: set[Life] = set()
        self._renewals = {listener: asyncio.Event() for listener in posts}
        self._one_at_a_time = asyncio.Semaphore()
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Keep the workers until told to stop; return the exit status: 0 where every worker drained cleanly."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._renew)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        owners = [self._owner] if self._owner else []
        keepers = [*await self._fill(owners), *await self._fill(self._listeners)]
        if not self._stopping.is_set():
            host, port = self._listeners[0].getsockname()[:2]
            logger().info("listening", url=f"http://{host}:{port}", workers=len(self._listeners))
        await asyncio.gather(*keepers[len(owners) :])
        for life in self._lives:
            life.leave()  # the owner, now that nobody asks any more
        await asyncio.gather(*keepers, *[life.ended for life in self._lives])
        return self._status

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
        workers = [life for life in self._lives if not life.is_owner]
        for life in workers or list(self._lives):  # the owner, where it is still starting
            life.leave()

    def _turn_away(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                turn_away(listener)

    async def _keep(self, listener: socket.socket, life: Life) -> None:
        """Have somebody at the listener until it is time to stop."""
        while not self._stopping.is_set():
            renewal = asyncio.create_task(self._renewals[listener].wait())
            await asyncio.wait({life.ended, renewal}, return_when=asyncio.FIRST_COMPLETED)
            renewal.cancel()
            if self._stopping.is_set():
                break
            life = await (self._replace(listener) if life.ended.done() else self._relieve(listener, life))
        await life.ended

    async def _replace(self, listener: socket.socket) -> Life:
        """Start a worker in place of a dead one, again and again where it does not start."""
        pause, most = BACK_OFF_S
        while not await (life := await self._start(listener)).is_ready and not self._stopping.is_set():
            await asyncio.sleep(pause)
            pause = min(2 * pause, most)
        return life

    async def _relieve(self, listener: socket.socket, old: Life) -> Life:
        """Start a successor beside a worker, then have that one drain; the old goes on where the new cannot start."""
        self._renewals[listener].clear()
        async with self._one_at_a_time:
            new = await self._start(listener)
            if not await new.is_ready:
                logger().error("successor did not start", pid=new.process.pid)
                return old
            old.leave()
            await old.ended
            return new

    async def _start(self, listener: socket.socket) -> Life:
        slot, (ours, theirs), is_owner = self._free.pop(0), socket.socketpair(), listener is self._owner
        with theirs:
            fds = [str(fd.fileno()) for fd in (listener, theirs)]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "service.cli", "own" if is_owner else "work", str(slot), *fds, str(self._home)),
                pass_fds=[listener.fileno(), theirs.fileno()],
                env=dict(os.environ) if is_owner else self._environment(),
                start_new_session=True,  # Ctrl-C is the supervisor's to pass on
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        life = Life(process, reader, self._settings.hang_s, is_owner=is_owner)
        self._lives.add(life)
        life.ended.add_done_callback(lambda _: self._bury(life, slot, writer))
        return life

    def _bury(self, life: Life, slot: int, writer: asyncio.StreamWriter) -> None:
        writer.close()
        self._lives.discard(life)
        metrics = Metrics(self._settings.slo_ms, SharedCells(self._home, slot))
        metrics.close_books()
        self._free.append(slot)
        status = life.ended.result()
        if not life.is_leaving or status:
            metrics.worker_deaths.add(ROLES[life.is_owner])
            if life.is_owner:
                logger().error("owner died", pid=life.process.pid, status=status)
            else:
                logger().error("worker died", pid=life.process.pid, status=status)
        if self._stopping.is_set():
            self._status = max(self._status, status)

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
    """
    configure(settings.log_level)
    with ExitStack() as stack:
        first = stack.enter_context(bind(settings.host, settings.port, shared=True))
        address, port = first.getsockname()[:2]
        check_exposure(address, read_tokens(settings), insecure=settings.insecure)
        others = [bind(settings.host, port, shared=True) for _ in range(settings.workers - 1)]
        listeners = [first, *map(stack.enter_context, others)]
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="lvm-", dir=SHM if SHM.is_dir() else None))
        owner = stack.enter_context(_owner_at(Path(home) / SOCKET)) if has_owner(settings) else None
        return asyncio.run(_supervise(settings, listeners, Path(home), owner))


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
    configure(settings.log_level)
    lender = Link(home / SOCKET, most_of(settings)) if (home / SOCKET).exists() else None
    app = create_app(settings, cells=SharedCells(home, slot), lender=lender)
    app.state.process.headers = [(b"x-worker", b"%d" % slot)]
    with socket.socket(fileno=line) as reports, socket.socket(fileno=listener) as ours:
        return run(Worker(config_of(app, settings), app, settings, reports), app, ours)
