"""The ceiling of the stack: uvicorn and raw ASGI, read the body, answer a constant of the same size."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import numpy as np
import orjson
import uvicorn
from numpy.typing import NDArray

from bench.options import LENGTH

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Callable[[Message], Awaitable[None]]], Awaitable[None]]
# How uvicorn spends the least on a request.
FASTEST: dict[str, Any] = {
    "loop": "uvloop",
    "http": "httptools",
    "lifespan": "off",
    "proxy_headers": False,
    "access_log": False,
    "log_level": "warning",
}


def constant(dim: int) -> NDArray[np.float32]:
    """Return the unit vector `(dim,)` that is every answer; its JSON is as long as a real one's."""
    vector = np.random.default_rng(0).standard_normal(dim)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def create_app(dim: int) -> App:
    """Return the ASGI application."""
    vector = constant(dim)
    as_json = orjson.dumps({"vector": vector}, option=orjson.OPT_SERIALIZE_NUMPY)
    as_octets = vector.tobytes()

    async def app(scope: Message, receive: Receive, send: Any) -> None:
        assert scope["type"] == "http"
        size = len(await read(receive))
        is_octets = dict(scope["headers"]).get(b"content-type", b"").startswith(b"application/octet-stream")
        body = as_octets * max(1, size // (4 * LENGTH * dim)) if is_octets else as_json
        media_type = b"application/octet-stream" if is_octets else b"application/json"
        await respond(send, media_type, body)

    return app


async def read(receive: Receive) -> bytes:
    """Return the body of a request."""
    body: bytes = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def respond(send: Any, media_type: bytes, body: bytes) -> None:
    """Send a response."""
    headers = [(b"content-type", media_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def run(app: App, port: int) -> None:
    """Serve an application until a signal."""
    uvicorn.run(app, port=port, **FASTEST)


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.echo", description=__doc__)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    run(create_app(options.dim), options.port)


if __name__ == "__main__":
    main()
