"""A tiny LVM Serve on a real socket: it counts the requests that it read and responds as a script says."""

import asyncio
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DIM = 384
CONTEXT_BYTES = 5 * DIM * 4

Script = Callable[[int], dict[str, Any]]


@dataclass
class Reply:
    """What to do with one request; `cut` sends that many bytes and closes, `hang` seconds pass before."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    raw: bytes | None = None
    chunked: bool = False
    cut: int | None = None
    hang: float = 0.0


class FakeService:
    """The server's side of the count: `requests` read whole, `connections` accepted, `peak` at a time."""

    def __init__(self, script: Script) -> None:
        """Answer request n as `Reply(**script(n))`."""
        self.script = script
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.methods: set[str] = set()
        self.peers: set[str] = set()
        self.connections = self.open = self.peak = 0
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop serving."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.server.close()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0.01))
        self.loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.peak = max(self.peak, self.open)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
        method, path, _ = head[0].split()
        self.methods.add(method)
        self.peers.add(writer.get_extra_info("peername")[0])
        self.requests.append((path, headers, body))
        reply = Reply(**self.script(len(self.requests) - 1))
        await asyncio.sleep(reply.hang)
        answer = reply.raw or _render(reply, path, headers, body)
        writer.write(answer[: reply.cut])
        await writer.drain()
        return reply.cut is None and reply.headers.get("Connection") != "close"


def _render(reply: Reply, path: str, headers: dict[str, str], body: bytes) -> bytes:
    content = _right_body(path, headers, body) if reply.body is None else reply.body
    lines = {"Content-Type": headers["accept"], **reply.headers}
    if reply.chunked:
        lines["Transfer-Encoding"] = "chunked"
        middle = len(content) // 2
        content = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in (content[:middle], content[middle:], b""))
    else:
        lines["Content-Length"] = str(len(content))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {reply.status} Said So\r\n{head}\r\n".encode() + content


def _right_body(path: str, headers: dict[str, str], body: bytes) -> bytes:
    if path.startswith("/retrieve"):
        return json.dumps({"results": [{"id": 1, "score": 0.5}]}).encode()
    if headers["accept"] == "application/octet-stream":
        return struct.pack("<f", 0.25) * (DIM * (len(body) // CONTEXT_BYTES))
    asked = json.loads(body)
    if "context" in asked:
        return json.dumps({"vector": [0.25] * DIM}).encode()
    return json.dumps({"vectors": [[0.25] * DIM for _ in asked["contexts"]]}).encode()


@contextmanager
def fake_services() -> Iterator[Callable[..., FakeService]]:
    """Yield a function that starts fakes; each responds as its script says, correctly if it says nothing."""
    started: list[FakeService] = []

    def start(script: Script = lambda n: {}) -> FakeService:
        started.append(FakeService(script))
        return started[-1]

    yield start
    for fake in started:
        fake.close()
