"""The servers that the service is compared with; each is a process of its own: `python -m bench.peers.naive`.

The naive app and the echo run in our environment, other model servers in theirs (`make bench-peers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """Another model server: its package, the arguments of `python -m` before the port, its readiness path."""

    package: str
    command: tuple[str, ...]
    ready: str


MOSEC = ("bench.peers.mosec_app", "--address", "127.0.0.1", "--timeout", "30000")

# A name is that of a peer or, after a comma, of a variant: in every figure the best variant of a peer counts.
# mosec's batches wait even if no other request comes, so no one setting is its best: of 1 to 3 workers with
# batches of 1 to 64 and waits of 1 and 2 ms, the first was the best at 32 and 64 connections, the second at one.
PEERS: Mapping[str, Peer] = {
    "mosec": Peer("mosec", (*MOSEC, "--workers", "2", "--batch", "16"), "/"),
    "mosec, unbatched": Peer("mosec", (*MOSEC, "--workers", "1", "--batch", "1"), "/"),
    "litserve": Peer("litserve", ("bench.peers.litserve_app",), "/health"),
    "bentoml": Peer("bentoml", ("bentoml", "serve", "bench.peers.bentoml_app:Amn", "--host", "127.0.0.1"), "/readyz"),
}

LEFT_OUT = {
    "Ray Serve": "brings a cluster's processes to the cores that the others are measured on",
    "MLServer": "holds FastAPI below 0.116 and protobuf below 7, beside which nothing here installs",
    "TorchServe": "needs a Java virtual machine and is no longer maintained",
}
