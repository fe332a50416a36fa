"""A closed loop in its own process: each connection sends its next request when the last was answered."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, cast, get_args
from urllib.parse import urlsplit

import numpy as np
import uvloop
from httptools import HttpParserError, HttpResponseParser

from bench.answers import TOLERANCE, Check, Kind, checker
from bench.figures import times_ms
from bench.traffic import read

PATIENCE_S = 30.0  # past the end, for the last answers


class Tally:
    """What was sent and what came of it, for all connections; stops after `seconds` or `count` requests."""

    def __init__(self, requests: Sequence[bytes], check: Check, every: int, seconds: float, count: float) -> None:
        self.requests, self.check, self.every = requests, check, every
        self.seconds, self.count = seconds, count
        self.latencies = array("d")
        self.statuses: Counter[int] = Counter()
        self.sent = self.checked = self.mismatched = self.lost = 0
        self.apart = 0.0
        self.began = self.ended = perf_counter()

    def take(self) -> int | None:
        """Return which request to send next, None where enough were sent."""
        if self.sent >= self.count or perf_counter() - self.began >= self.seconds:
            return None
        self.sent += 1
        return (self.sent - 1) % len(self.requests)

    def answered(self, index: int, seconds: float, status: int, parts: list[bytes]) -> None:
        """Count an answer to request `index`; every so often, look whether it is right."""
        self.latencies.append(seconds)
        self.statuses[status] += 1
        if status == 200 and len(self.latencies) % self.every == 0:
            distance = self.check(index, b"".join(parts))
            self.checked += 1
            self.apart = max(self.apart, distance)
            self.mismatched += not distance <= TOLERANCE

    def summary(self) -> dict[str, Any]:
        """Return the figures: counts, seconds, milliseconds; `errors` counts all that was no right answer."""
        not_200 = sum(count for status, count in self.statuses.items() if status != 200)
        return {
            "requests": len(self.latencies),
            "seconds": self.ended - self.began,
            "errors": not_200 + self.mismatched + self.lost,
            "statuses": {str(status): count for status, count in self.statuses.items()},
            "checked": self.checked,
            "mismatched": self.mismatched,
            "lost": self.lost,
            "apart": self.apart if math.isfinite(self.apart) else None,
            **times_ms(self.latencies),
        }


class Connection(asyncio.Protocol):
    """One connection and the request that is under way on it."""

    transport: asyncio.Transport

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.index: int | None = None
        self.began = 0.0
        self.parts: list[bytes] = []
        self.on_body = self.parts.append
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.parser = HttpResponseParser(self)  # last: it looks its callbacks up now

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; `send` starts."""
        self.transport = cast(asyncio.Transport, transport)

    def send(self) -> None:
        """Send the next request, or close where there is none."""
        self.index = self.tally.take()
        if self.index is None:
            self.transport.close()
            return
        self.parts.clear()
        self.began = perf_counter()
        self.transport.write(self.tally.requests[self.index])

    def data_received(self, data: bytes) -> None:
        """Parse what came; what is no HTTP ends the connection."""
        try:
            self.parser.feed_data(data)
        except HttpParserError:
            self.transport.abort()

    def on_message_complete(self) -> None:
        """Count the answer and go on."""
        if self.index is not None:
            self.tally.answered(self.index, perf_counter() - self.began, self.parser.get_status_code(), self.parts)
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a request that was never answered."""
        self.tally.lost += self.index is not None
        if not self.gone.done():
            self.gone.set_result(None)


async def run(url: str, tally: Tally, connections: int) -> dict[str, Any]:
    """Drive `connections` connections to the host of `url` until the tally has enough."""
    loop, address = asyncio.get_running_loop(), urlsplit(url)
    host, port = address.hostname or "", address.port or 80
    opened = [await loop.create_connection(lambda: Connection(tally), host, port) for _ in range(connections)]
    tally.began = perf_counter()
    for _, connection in opened:
        connection.send()
    limit = None if math.isinf(tally.seconds) else tally.seconds + PATIENCE_S
    _, late = await asyncio.wait([connection.gone for _, connection in opened], timeout=limit)
    tally.ended = perf_counter()
    for transport, _ in opened if late else ():
        transport.abort()
    await asyncio.sleep(0.01 if late else 0)
    return tally.summary()


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.client", description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--traffic", type=Path, required=True, help="requests, as bench.traffic writes them")
    parser.add_argument("--kind", choices=get_args(Kind), required=True, help="how to read an answer")
    parser.add_argument("--expected", type=Path, help="right answers, (N, rows, D) .npy")
    parser.add_argument("--every", type=int, default=1, help="look at the content of every n-th answer")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--count", type=float, default=math.inf, help="requests in all")
    options = parser.parse_args()
    check = checker(options.kind, np.load(options.expected) if options.expected else None)
    tally = Tally(read(options.traffic), check, options.every, options.seconds, options.count)
    print(json.dumps(uvloop.run(run(options.url, tally, options.connections))))


if __name__ == "__main__":
    main()
