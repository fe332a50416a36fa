"""LitServe: FastAPI, a queue, one process with the net; octets have a route and a process of their own."""

import argparse
from typing import Annotated, Any

import numpy as np
from fastapi import Body, Response
from litserve import LitAPI, LitServer

from bench.peers.net import Net, to_json


class Amn(LitAPI):
    """Answers one request at a time: batches of 32 were no faster."""

    def setup(self, device: str) -> None:
        """Load the net."""
        self.net = Net()

    def predict(self, x: Any) -> Any:
        """Answer one request."""
        return self.net.answer([x])[0]


class Json(Amn):
    """JSON, which LitServe itself reads."""

    def decode_request(self, request: dict[str, Any]) -> Any:
        """Read the one context of a body."""
        return np.array([request["context"]], np.float32)

    def encode_response(self, output: Any) -> Response:
        """Write an answer."""
        return Response(to_json(output), media_type="application/json")


class Octets(Amn):
    """Raw float32."""

    def decode_request(self, request: Annotated[bytes, Body()]) -> Any:
        """Read a body."""
        return self.net.from_octets(request)

    def encode_response(self, output: Any) -> Response:
        """Write an answer."""
        return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.litserve_app", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    routes = [Json(api_path="/predict"), Octets(api_path="/octet/predict")]
    server = LitServer(routes, accelerator="cpu", fast_queue=True)
    server.run("127.0.0.1", options.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
