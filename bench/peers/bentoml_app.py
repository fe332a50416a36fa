"""BentoML: JSON by an annotated API, octets by a mounted ASGI application, which its manual has for raw bodies."""

from typing import Any

import bentoml
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bench.peers.net import Net


async def octets(request: Request) -> Response:
    """Answer raw float32."""
    net = bentoml.get_current_service().net
    (vectors,) = net.answer([net.from_octets(await request.body())])
    return Response(vectors.tobytes(), media_type="application/octet-stream")


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
@bentoml.asgi_app(Starlette(routes=[Route("/predict", octets, methods=["POST"])]), path="/octet")
class Amn:
    """Answers one by one: a batchable API takes whole batches, or callers from another process."""

    def __init__(self) -> None:
        self.net = Net()

    @bentoml.api(route="/predict")
    async def predict(self, context: np.ndarray) -> dict[str, Any]:
        """Answer JSON."""
        (vectors,) = self.net.answer([context[None].astype(np.float32)])
        return {"vector": vectors[0].tolist()}
