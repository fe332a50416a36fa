"""mosec: a Rust front end that batches, workers in Python behind it; octets have a route and workers of their own."""

from __future__ import annotations

import argparse
from typing import Any

from mosec import Runtime, Server, Worker

from bench.peers.net import Net, from_json, to_json

# The least that mosec accepts.
WAIT_MS = 1


class Json(Worker):
    """Answers JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def deserialize(self, data: bytes) -> Any:
        """Read a body."""
        return from_json(data)

    def forward(self, data: Any) -> Any:
        """Answer a batch, or one request if mosec does not batch."""
        return self.net.answer(data) if self.max_batch_size > 1 else self.net.answer([data])[0]

    def serialize(self, data: Any) -> bytes:
        """Write an answer."""
        return to_json(data)


class Octets(Json):
    """Answers raw float32."""

    resp_mime_type = "application/octet-stream"

    def deserialize(self, data: bytes) -> Any:
        """Read a body."""
        return self.net.from_octets(data)

    def serialize(self, data: Any) -> bytes:
        """Write an answer."""
        return bytes(data.tobytes())


def main() -> None:
    """Serve until a signal; mosec itself reads --port and its other options."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.mosec_app", description=__doc__)
    parser.add_argument("--workers", type=int, required=True, help="processes of each route")
    parser.add_argument("--batch", type=int, required=True, help="most requests in a batch")
    options, _ = parser.parse_known_args()
    server = Server()
    json, octets = (Runtime(worker, options.workers, options.batch, WAIT_MS) for worker in (Json, Octets))
    server.register_runtime({"/predict": [json], "/octet/predict": [octets]})
    server.run()


if __name__ == "__main__":
    main()
