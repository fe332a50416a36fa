"""A worker: a server beside others on one port, started and watched by a supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import uvicorn

from service.app import Service, create_app
from service.processes.device_client import DeviceClient
from service.processes.device_worker import max_frame_bytes
from service.processes.heartbeat import on_supervisor_exit, send_heartbeat
from service.processes.server import Server, exit_before_start, run, uvicorn_config
from service.processes.sockets import DEVICE_SOCKET
from service.settings import Settings, read_settings
from service.telemetry.log import configure
from service.telemetry.shared_memory import SharedMetricValues, shared_block

# The file of predictions that wait for their true next vectors.
PAIRS = "pairs"
SUPERVISOR_EXITED = "the supervisor is gone"


class Worker(Server):
    """A server that sends heartbeats, and leaves the listening socket to its successor."""

    _loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, config: uvicorn.Config, app: Service, settings: Settings, heartbeats: socket.socket) -> None:
        super().__init__(config, app, settings)
        self._app = app
        self._heartbeats = heartbeats

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start. From now on `abandon` finds an event loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def announce(self) -> None:
        """Report to the supervisor that the worker is ready."""
        send_heartbeat(self._heartbeats)

    def each_second(self) -> None:
        """Send a heartbeat unless a batch hangs, and update the gauges that a scrape of another worker reads."""
        if self._app.state.deployments.stuck_s() <= self._settings.hang_s:
            send_heartbeat(self._heartbeats)
        self._app.state.update_gauges()
        super().each_second()

    def abandon(self) -> None:
        """Drain because the supervisor has exited. Another thread calls this."""
        if self._loop is None:
            exit_before_start(SUPERVISOR_EXITED)
        # RuntimeError: the loop is closed, so the process is exiting.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._drain_once)

    def _drain_once(self) -> None:
        if not self._process.is_draining:
            self.drain(SUPERVISOR_EXITED)

    def stop_accepting(self) -> None:
        """Do nothing: the supervisor decides, because a successor may be listening."""


def run_worker(metric_slot: int, listener: int, heartbeat_fd: int, metrics_directory: Path) -> int:
    """Serve on the socket `listener` until a signal or until the supervisor exits; return the exit status.

    Args:
        metric_slot: The number of the worker's metric file.
        listener: File descriptor of the listening socket.
        heartbeat_fd: File descriptor of the socket for heartbeats to the supervisor.
        metrics_directory: The supervisor's, with the metric files and, if there is a device worker, its socket.
    """
    settings = read_settings()
    configure(settings.log_level, worker=metric_slot, pid=os.getpid())
    has_device_worker = (metrics_directory / DEVICE_SOCKET).exists()
    provider = DeviceClient(metrics_directory / DEVICE_SOCKET, max_frame_bytes(settings)) if has_device_worker else None
    pair_memory = (
        shared_block(metrics_directory / PAIRS, round(settings.truth_mb * 1e6)) if settings.truth_share else None
    )
    app = create_app(
        settings,
        metric_values=SharedMetricValues(metrics_directory, metric_slot),
        provider=provider,
        pair_memory=pair_memory,
    )
    app.state.process.headers = [(b"x-worker", b"%d" % metric_slot)]
    with socket.socket(fileno=heartbeat_fd) as heartbeats, socket.socket(fileno=listener) as ours:
        worker = Worker(uvicorn_config(app, settings), app, settings, heartbeats)
        on_supervisor_exit(heartbeats, metrics_directory, worker.abandon, settings.stop_s)
        return run(worker, app, ours)
