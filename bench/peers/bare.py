"""The least that serves the same net on the same wire: raw ASGI on uvicorn, and nothing that the service adds.

It has no limits, deadlines, admission, counters, traces or fallback, and does not check what arrives. Rows that arrive
in one turn of the event loop run as one batch.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import simdjson

from bench.peers.echo import Message, Receive, read, respond, run
from models.registry.checkpoint import Checkpoint, load_checkpoint
from models.runtimes.onnx import open_session
from models.vectors import Floats

OCTETS, JSON = b"application/octet-stream", b"application/json"


class Bare:
    """The ASGI application around one version of a net."""

    def __init__(self, version: Checkpoint) -> None:
        self._shape = (-1, version.card.context_length, version.card.dim)
        self._session = open_session(version.graph, version.weights)
        self._parser: Any = simdjson.Parser()
        self._waiting: list[tuple[Floats, asyncio.Future[Floats]]] = []

    async def __call__(self, scope: Message, receive: Receive, send: Any) -> None:
        """Answer one request; an empty one shows that the server is ready."""
        body = await read(receive)
        if not body:
            await respond(send, JSON, b"{}")
        elif dict(scope["headers"])[b"content-type"].startswith(OCTETS):
            vectors = await self._predict(np.frombuffer(body, np.float32))
            await respond(send, OCTETS, vectors.tobytes())
        else:
            vectors = await self._predict(self._read_json(body))
            await respond(send, JSON, orjson.dumps({"vector": vectors[0]}, option=orjson.OPT_SERIALIZE_NUMPY))

    def _read_json(self, body: bytes) -> Floats:
        numbers = self._parser.parse(body)["context"].as_buffer(of_type="d")
        return np.frombuffer(numbers).astype(np.float32)

    def _predict(self, numbers: Floats) -> asyncio.Future[Floats]:
        """Return the future of the next vectors `(n, D)` of contexts."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._run)
        future: asyncio.Future[Floats] = loop.create_future()
        self._waiting.append((numbers.reshape(self._shape), future))
        return future

    def _run(self) -> None:
        batch, self._waiting = self._waiting, []
        contexts = batch[0][0] if len(batch) == 1 else np.concatenate([rows for rows, _ in batch])
        (vectors,) = self._session.run(["vector"], {"context": contexts})
        start = 0
        for rows, future in batch:
            end = start + len(rows)
            future.set_result(vectors[start:end])
            start = end


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.bare", description=__doc__)
    parser.add_argument("--version", type=Path, required=True, help="directory of a version")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    run(Bare(load_checkpoint(options.version)), options.port)


if __name__ == "__main__":
    main()
