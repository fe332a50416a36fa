"""Tiny servers on real sockets: the peers themselves, and one that answers as a script says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from time import sleep
from typing import Any

import pytest
import torch
import uvicorn

from bench.servers import RunningServer
from models.nets import build
from service.processes.sockets import bind

DIM = 16

Script = Callable[[int, bytes], dict[str, Any]]


class Scripted:
    """Answers request n as `script(n, body)`: status, body, or `cut`; counts what it read whole."""

    def __init__(self, script: Script) -> None:
        self.script, self.seen, self.connections = script, 0, 0
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.server.close()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0.01))
        self.loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        asked = await reader.readexactly(int(headers["content-length"]))
        reply = self.script(self.seen, asked)
        self.seen += 1
        if reply.get("cut"):
            return False
        body = reply.get("body", b"")
        writer.write(b"HTTP/1.1 %d So\r\nContent-Length: %d\r\n\r\n%b" % (reply.get("status", 200), len(body), body))
        await writer.drain()
        return True


@pytest.fixture
def scripted() -> Iterator[Callable[[Script], Scripted]]:
    """Start servers that answer as a script says."""
    started: list[Scripted] = []

    def start(script: Script) -> Scripted:
        started.append(Scripted(script))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def peer() -> Iterator[Callable[..., RunningServer]]:
    """Serve an ASGI application as the peers do, in a thread."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def serve(app: Any, name: str, octets: str = "") -> RunningServer:
        listener = bind("127.0.0.1", 0)
        config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            sleep(0.005)
        return RunningServer(name, f"http://127.0.0.1:{listener.getsockname()[1]}", 0, 0.0, octets)

    yield serve
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
        for listener in server.servers:
            listener.close()


@pytest.fixture
def tiny_net() -> torch.nn.Module:
    """An AMN whose every weight says something, D = 16."""
    torch.manual_seed(0)
    net = build("amn", {"dim": DIM, "key_dim": 8, "hidden_dim": 16})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()
