"""What is sent: whole requests in one file, each behind a line with its length, and the answers expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.answers import (
    Kind,
)
from bench.servers import Server
from loadtest.payloads import Exchange, encode
from loadtest.plan import Route, Wire
from models.vectors import Floats


@dataclass(frozen=True)
class Traffic:
    """Requests for one server, how to read the answers, and the right ones, `(N, rows, D)` in a .npy file."""

    requests: Path
    kind: Kind
    expected: Path | None


def prepare(
    directory: Path, server: Server, exchange: Exchange, contexts: Floats, expected: Floats | None = None
) -> Traffic:
    """Write the traffic of one exchange with `server`; `expected` `(N, D)` answers `contexts` `(N, T, D)`."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / f"{server.name}-{exchange.route}-{exchange.wire}-{exchange.rows}"
    requests = encode(exchange, server.base(exchange.wire), (), contexts)
    if exchange.rows > 1:
        requests = requests[:8]  # they are long
    write(stem.with_suffix(".http"), requests)
    if expected is None:
        return Traffic(stem.with_suffix(".http"), "hits", None)
    groups = [[(first + step) % len(contexts) for step in range(exchange.rows)] for first in range(len(requests))]
    np.save(stem.with_suffix(".npy"), expected[groups])
    return Traffic(stem.with_suffix(".http"), exchange.wire, stem.with_suffix(".npy"))


def exchange_of(wire: Wire, dim: int, rows: int = 1, route: Route = "predict") -> Exchange:
    """Return one kind of request."""
    return Exchange(route, wire, rows, dim)


def write(path: Path, requests: Sequence[bytes]) -> None:
    """Write requests so that `read`, and wrk.lua, can tell them apart."""
    path.write_bytes(b"".join(b"%d\n%b" % (len(request), request) for request in requests))


def read(path: Path) -> list[bytes]:
    """Read what `write` wrote."""
    found = []
    with path.open("rb") as file:
        while line := file.readline():
            found.append(file.read(int(line)))
    return found
