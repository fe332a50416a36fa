"""What people write first: FastAPI, pydantic lists of floats, torch eager per request in the endpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from torch import nn

from models.registry.checkpoint import load_checkpoint
from models.runtimes.torch import build_net

OCTETS = "application/octet-stream"


class PredictRequest(BaseModel):
    """Body of POST /predict: T lists of D floats."""

    context: list[list[float]]


class Answer(BaseModel):
    """D floats."""

    vector: list[float]


def create_app(net: nn.Module, length: int, dim: int, *, is_tuned: bool = False) -> FastAPI:
    """Return the application around `net`, which maps `(B, length, dim)` to `(B, dim)`.

    JSON is answered by a `def`, as people write it, so in a thread of FastAPI's pool; tuned, by an
    `async def`, which saves the threads' quarrel over the interpreter.
    """
    app = FastAPI()

    def predict(request: PredictRequest) -> Answer:
        with torch.inference_mode():
            vector = net(torch.tensor([request.context]))[0]
        return Answer(vector=vector.tolist())

    async def predict_in_loop(request: PredictRequest) -> Answer:
        return predict(request)

    app.post("/predict")(predict_in_loop if is_tuned else predict)

    @app.post("/octet/predict")
    async def predict_octets(request: Request) -> Response:
        contexts = np.frombuffer(await request.body(), "<f4").reshape(-1, length, dim)
        with torch.inference_mode():
            vectors = net(torch.from_numpy(contexts.copy()))
        return Response(vectors.numpy().tobytes(), media_type=OCTETS)

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ready"}

    return app


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.naive", description=__doc__)
    parser.add_argument("--version", type=Path, required=True, help="directory of a version")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tuned", action="store_true", help="one thread of torch, and endpoints in the event loop")
    options = parser.parse_args()
    if options.tuned:
        torch.set_num_threads(1)
    loaded = load_checkpoint(options.version)
    uvicorn.run(
        create_app(build_net(loaded), loaded.card.context_length, loaded.card.dim, is_tuned=options.tuned),
        port=options.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
