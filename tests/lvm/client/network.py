"""Networks and servers that answer as a test says, and a client called from a thread or an event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import sleep
from typing import Any

import httpx
import numpy as np
import pytest

from lvm.client import AsyncClient, Client, Prediction


def answering(*replies: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """Return a network that returns `replies` in turn, and the requests that it received."""
    sent: list[httpx.Request] = []

    def reply(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        answer = replies[min(len(sent), len(replies)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return httpx.MockTransport(reply), sent


def busy(retry_after: int = 0) -> httpx.Response:
    """Return a rejection as the service sends it."""
    body = {"type": "urn:lvm:problem:overloaded", "detail": "the queue is full"}
    return httpx.Response(503, json=body, headers={"retry-after": str(retry_after), "x-request-id": "abc"})


def done(rows: int = 1, dim: int = 8) -> httpx.Response:
    """Return next vectors of zeros."""
    headers = {"x-model": "amn", "x-model-version": "1", "x-served-by": "primary"}
    return httpx.Response(200, content=np.zeros((rows, dim), "<f4").tobytes(), headers=headers)


@contextmanager
def speaking(speak: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server that reads the head of a request and then calls `speak`; yield its URL."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)

        def serve() -> None:
            while not ended.is_set():
                with suppress(OSError):
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        connection.settimeout(1)
                        connection.recv(65536)
                        speak(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


def drips(said: bytes) -> Callable[[socket.socket], None]:
    """Send bytes one at a time."""

    def speak(connection: socket.socket) -> None:
        for at in range(len(said)):
            connection.sendall(said[at : at + 1])
            sleep(0.05)

    return speak


def says(said: bytes) -> Callable[[socket.socket], None]:
    """Send bytes at once."""
    return lambda connection: connection.sendall(said)


def reads_slowly(connection: socket.socket) -> None:
    for _ in range(80):
        connection.recv(100)
        sleep(0.05)


def predict(url: str, rows: np.ndarray, **policy: Any) -> Prediction:
    """Call the client from a thread."""
    with Client(url, **policy) as client:
        return client.predict(rows)


def predict_in_loop(url: str, rows: np.ndarray, **policy: Any) -> Prediction:
    """Call the client from an event loop."""

    async def ask() -> Prediction:
        async with AsyncClient(url, **policy) as client:
            return await client.predict(rows)

    return asyncio.run(ask())


def passages(*results: Any, **members: Any) -> httpx.Response:
    """Return a response of /retrieve."""
    return httpx.Response(200, json={"results": list(results), **SEARCHED, **members})


SEARCHED = {"corpus": "wiki", "corpus_version": "1", "is_exact": True, "reranked": False}
PASSAGE = {"id": 3, "score": 0.5, "article": 1, "title": "Rabbit", "position": 9, "text": None}
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 32\r\n\r\n" + bytes(32)
BOTH_WAYS = pytest.mark.parametrize("ask", [predict, predict_in_loop])
