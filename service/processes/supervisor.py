"""The supervisor: keeps several workers running behind one port, and serves nothing itself.

It owns a listening socket for each worker. So the connections that wait at the socket of a worker that died are
answered by its successor. Each process sends heartbeats to the supervisor, and drains when the supervisor exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from models.cores import cores, pool_limits
from models.devices import is_accelerated
from service.http.auth import read_tokens
from service.processes.heartbeat import SIGNALS
from service.processes.sockets import (
    DEVICE_SOCKET,
    bind,
    check_exposure,
    lock_address,
    reserve_port,
    stop_accepting,
    urls,
)
from service.settings import Settings
from service.tasks import CatchAndLog, repeat
from service.telemetry.log import configure, log_writer, logger, warn_of_unknown_settings
from service.telemetry.metrics import OWNER, WORKER, Metrics
from service.telemetry.shared_memory import SharedMetricValues, metrics_directory

# Seconds before a process that did not start is started again, at first and at most.
BACK_OFF_S = 0.1, 5.0
OBSERVE_S = 1.0
# The hidden commands of the command line.
COMMANDS = {WORKER: "work", OWNER: "own"}


class WorkerProcess:
    """A worker or the device worker, from its start to its exit."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        heartbeats: asyncio.StreamReader,
        settings: Settings,
        role: str,
        slot: int,
    ) -> None:
        self.role = role
        self.slot = slot
        self._process = process
        self._heartbeats = heartbeats
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self.is_ready: asyncio.Future[bool] = self._loop.create_future()
        self.is_stopping = False
        # Its result is the exit status.
        self.exited = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Make it drain. A second call makes it stop at once. A process that does not exit is killed."""
        if not self.is_stopping:
            self._loop.call_later(self._settings.stop_s, self._kill)
        self.is_stopping = True
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def log_fields(self) -> dict[str, Any]:
        """Return the fields that identify it in the log."""
        return {"worker": self.slot if self.role == WORKER else self.role, "pid": self._process.pid}

    def _kill(self) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                logger().error("worker hangs", **self.log_fields())
                self._process.kill()

    async def _watch(self) -> int:
        """Read heartbeats until the process exits; return its status, for a signal as shells report it."""
        with contextlib.suppress(ConnectionResetError):
            while await self._heartbeat():
                if not self.is_ready.done():
                    self.is_ready.set_result(True)
        status = await self._process.wait()
        if not self.is_ready.done():
            self.is_ready.set_result(False)
            # It was stopped before it could handle signals, so it has accepted no request.
            if self.is_stopping and status == -signal.SIGTERM:
                return 0
        return status if status >= 0 else 128 - status

    async def _heartbeat(self) -> bytes:
        """Wait for a heartbeat. Kill a ready process that sends none for `hang_s` seconds."""
        may_be_silent = self.is_stopping or not self.is_ready.done()
        try:
            return await asyncio.wait_for(self._heartbeats.read(64), None if may_be_silent else self._settings.hang_s)
        except TimeoutError:
            if self.is_stopping:
                return await self._heartbeats.read(64)
            self._kill()
            return b""


class Supervisor:
    """Keeps a worker running at each listening socket.

    It replaces workers that die or hang, restarts all one by one at SIGHUP, and drains at SIGTERM. The device worker,
    if there is a socket for it, is the first to start and the last to stop. The processes count in `directory`, which
    has `slots_for(sockets)` metric files.
    """

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[socket.socket],
        directory: Path,
        device_socket: socket.socket | None = None,
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._directory = directory
        self._device_sockets = [device_socket] if device_socket else []
        sockets = [*self._device_sockets, *listeners]
        *self._free_slots, own_slot = range(slots_for(len(sockets)))
        self._metrics = Metrics(settings.slo_ms, SharedMetricValues(directory, own_slot))
        self._processes: set[WorkerProcess] = set()
        self._restart_requests = {each: asyncio.Event() for each in sockets}
        self._one_restart = asyncio.Semaphore()
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Keep the processes running until a signal comes; return 0 if all of them drained cleanly."""
        log_writer().on_drop(self._metrics.log_dropped.inc)
        self._handle_signals()
        observing = asyncio.create_task(repeat("observe", self._observe, OBSERVE_S))
        device_tasks = await self._start_all(self._device_sockets)
        worker_tasks = await self._start_all(self._listeners)
        if not self._stopping.is_set():
            host, port = self._listeners[0].getsockname()[:2]
            calls = {} if self._settings.grpc_port is None else {"grpc": f"{host}:{self._settings.grpc_port}"}
            logger().info("listening", **urls(host, port), workers=len(self._listeners), **calls)
        await asyncio.gather(*worker_tasks)
        await self._all_exited(WORKER)
        # Only the device worker is left, and no worker needs it.
        for process in self._processes:
            process.stop()
        await asyncio.gather(*device_tasks)
        await self._all_exited(OWNER)
        observing.cancel()
        return self._status

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._request_restarts)
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stop)

    async def _observe(self) -> None:
        self._metrics.observe_process()

    async def _all_exited(self, role: str) -> None:
        """Wait until every process of a role has exited and `_on_exit` has run."""
        while processes := [process for process in self._processes if process.role == role]:
            await asyncio.wait({process.exited for process in processes})
            await asyncio.sleep(0)

    async def _start_all(self, sockets: Sequence[socket.socket]) -> list[asyncio.Task[None]]:
        """Start a process at each socket; return the tasks that keep them running. Stop if one does not start."""
        if self._stopping.is_set():
            return []
        processes = await asyncio.gather(*map(self._start, sockets))
        if not all([await process.is_ready for process in processes]) and not self._stopping.is_set():
            self._status = max([await process.exited for process in processes if not process.is_ready.result()])
            self._stop()
        return [asyncio.create_task(self._keep_running(*pair)) for pair in zip(sockets, processes, strict=True)]

    def _request_restarts(self) -> None:
        for request in self._restart_requests.values():
            request.set()

    def _stop(self) -> None:
        if not self._stopping.is_set():
            logger().info("draining", seconds=self._settings.drain_s)
            asyncio.get_running_loop().call_later(self._settings.drain_s, self._stop_accepting)
        self._stopping.set()
        workers = [process for process in self._processes if process.role == WORKER]
        # Without workers, the device worker is still starting.
        for process in workers or list(self._processes):
            process.stop()

    def _stop_accepting(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                stop_accepting(listener)

    async def _keep_running(self, listener: socket.socket, process: WorkerProcess) -> None:
        """Keep a process running at a socket until shutdown, whatever fails meanwhile."""
        catch = CatchAndLog("keep a worker running")
        pauses = _back_off()
        while not self._stopping.is_set():
            await self._exit_or_request(listener, process)
            if self._stopping.is_set():
                break
            with catch:
                process = await (self._replace(listener) if process.exited.done() else self._restart(listener, process))
                pauses = _back_off()
                continue
            await self._pause(next(pauses))
        await process.exited

    async def _exit_or_request(self, listener: socket.socket, process: WorkerProcess) -> None:
        """Wait until a process has exited, or is to be restarted."""
        request = asyncio.create_task(self._restart_requests[listener].wait())
        await asyncio.wait({process.exited, request}, return_when=asyncio.FIRST_COMPLETED)
        request.cancel()

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not after shutdown has begun."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _replace(self, listener: socket.socket) -> WorkerProcess:
        """Start a process in place of one that has exited, again and again if it does not become ready."""
        pauses = _back_off()
        while not await (process := await self._start(listener)).is_ready and not self._stopping.is_set():
            await self._pause(next(pauses))
        return process

    async def _restart(self, listener: socket.socket, old: WorkerProcess) -> WorkerProcess:
        """Start a successor beside a process, then stop the process. It stays if the successor does not start."""
        self._restart_requests[listener].clear()
        async with self._one_restart:
            if self._stopping.is_set():
                return old
            new = await self._start(listener)
            if not await new.is_ready:
                if not self._stopping.is_set():
                    logger().error("successor did not start", **new.log_fields())
                return old
            # If shutdown has begun, both are stopping, and a second call would not let them drain.
            if not self._stopping.is_set():
                old.stop()
            await old.exited
            return new

    async def _start(self, listener: socket.socket) -> WorkerProcess:
        """Start a process at a socket. If shutdown has begun meanwhile, stop it.

        Raises:
            OSError: There are too few processes, descriptors or too little memory.
        """
        ours, theirs = socket.socketpair()
        role = OWNER if listener in self._device_sockets else WORKER
        slot = self._free_slots.pop(0)
        try:
            with theirs:
                process = await self._spawn(role, slot, listener, theirs)
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            self._free_slots.append(slot)
            raise
        started = WorkerProcess(process, reader, self._settings, role, slot)
        self._processes.add(started)
        started.exited.add_done_callback(lambda _: self._on_exit(started, writer))
        if self._stopping.is_set():
            started.stop()
        return started

    async def _spawn(
        self, role: str, slot: int, listener: socket.socket, heartbeats: socket.socket
    ) -> asyncio.subprocess.Process:
        descriptors = [listener.fileno(), heartbeats.fileno()]
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lvm.cli", COMMANDS[role], str(slot), *map(str, descriptors), str(self._directory)),
            pass_fds=descriptors,
            env={
                **os.environ,
                **(pool_limits(self._settings.threads) if role == OWNER else self._worker_environment()),
            },
            # Ctrl-C reaches the supervisor only, which stops the others.
            start_new_session=True,
        )

    def _worker_environment(self) -> dict[str, str]:
        """Return what is special to a worker: a share of the cores by default, and no device if another has it."""
        share = max(1, cores() // len(self._listeners))
        threads = self._settings.threads if "threads" in self._settings.model_fields_set else share
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self._device_sockets else {}
        # The port that was found for 0.
        calls = {} if self._settings.grpc_port is None else {"LVM_GRPC_PORT": str(self._settings.grpc_port)}
        return {"LVM_THREADS": str(threads), **pool_limits(threads), **hidden, **calls}

    def _on_exit(self, process: WorkerProcess, writer: asyncio.StreamWriter) -> None:
        """Release the slot of a process, and log and count its death unless it was stopped and exited cleanly."""
        writer.close()
        self._processes.discard(process)
        self._free_slots.append(process.slot)
        status = process.exited.result()
        if self._stopping.is_set():
            self._status = max(self._status, status)
        is_death = not process.is_stopping or status != 0
        if is_death and process.role == OWNER:
            logger().error("owner died", **process.log_fields(), status=status)
        elif is_death:
            logger().error("worker died", **process.log_fields(), status=status)
        with CatchAndLog("finalize metrics"):
            metrics = Metrics(self._settings.slo_ms, SharedMetricValues(self._directory, process.slot))
            metrics.finalize()
            if is_death:
                metrics.worker_deaths.inc(process.role)


def _back_off() -> Iterator[float]:
    """Yield the seconds to wait after each failure."""
    pause, most = BACK_OFF_S
    while True:
        yield pause
        pause = min(2 * pause, most)


def supervise(settings: Settings) -> int:
    """Serve with `settings.workers` processes until a signal comes; return the exit status.

    Raises:
        BadSettings: The tokens cannot be read.
        CannotListen: The address is in use, or exposed without a token.
        OSError: There is no room for the metric files.
    """
    configure(settings.log_level)
    warn_of_unknown_settings()
    with ExitStack() as stack:
        # Fails if any process listens there, also one that shares its port with workers.
        with bind(settings.host, settings.port) as unshared:
            host, port = unshared.getsockname()[:2]
            stack.enter_context(lock_address(unshared))
        check_exposure(host, read_tokens(settings), insecure=settings.insecure)
        if settings.grpc_port is not None:
            grpc_port = stack.enter_context(reserve_port(settings.host, settings.grpc_port))
            settings = settings.model_copy(update={"grpc_port": grpc_port})
        listeners = [stack.enter_context(bind(settings.host, port, shared=True)) for _ in range(settings.workers)]
        has_device_worker = needs_device_worker(settings)
        directory = stack.enter_context(metrics_directory(slots_for(settings.workers + has_device_worker)))
        device_socket = stack.enter_context(_listen_at(directory / DEVICE_SOCKET)) if has_device_worker else None
        return asyncio.run(Supervisor(settings, listeners, directory, device_socket).run())


def slots_for(sockets: int) -> int:
    """Return the number of metric files for so many sockets.

    During a restart the old and the new process of a socket both count. The supervisor counts in the last file.
    """
    return 2 * sockets + 1


def needs_device_worker(settings: Settings) -> bool:
    """Return whether one process runs the nets for all workers."""
    if settings.owner == "auto":
        return settings.workers > 1 and is_accelerated(settings.device)
    return settings.owner == "on"


def _listen_at(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener
