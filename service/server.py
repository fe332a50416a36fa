"""The process: uvicorn with limits at the socket, a drain at SIGTERM and an exit status that means something."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.app import Service, create_app
from service.log import configure, logger
from service.settings import Settings


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which also tells a hot route that its caller has left."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel what runs for a caller that is gone."""
        super().connection_lost(exc)
        scope: Any = self.scope  # None until a first request's headers are in
        departed = scope and scope.get("lvm.departed")
        if departed:
            departed()


class Server(uvicorn.Server):
    """A uvicorn server that drains: at SIGTERM or SIGINT /readyz says 503 at once, then it stops.

    For `drain_s` seconds requests are still answered, with `Connection: close`, so that balancers
    and keep-alive callers move away; then the sockets close and what was accepted is finished.
    """

    def __init__(self, config: uvicorn.Config, app: Service, settings: Settings) -> None:
        super().__init__(config)
        self._process, self._settings = app.state.process, settings

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on a signal; unlike uvicorn's, the signal is not raised again, so a clean stop exits 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        yield
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if self._process.is_draining:
            self.should_exit = True  # asked twice: no more waiting
            return
        self._process.is_draining = True
        logger().info("draining", signal=signal.Signals(number).name, seconds=self._settings.drain_s)
        asyncio.get_running_loop().call_later(self._settings.drain_s, self._stop)

    def _stop(self) -> None:
        self.should_exit = True


def config_of(app: Service, settings: Settings) -> uvicorn.Config:
    """Return how uvicorn runs `app`."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        loop="uvloop",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(settings.grace_s),
        backlog=2048,
    )


def serve(settings: Settings) -> int:
    """Serve until told to stop; return the exit status: 0 after a drain, 1 where start or stop failed."""
    configure(settings.log_level)
    app = create_app(settings)
    server = Server(config_of(app, settings), app, settings)
    server.run()
    return 0 if server.started and not server.force_exit else 1
