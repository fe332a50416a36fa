"""The interface of LNSP's servers (LVM_COMPAT=lnsp), for their callers: /infer, /infer/batch, /health and /info.

A request goes the way of one to /predict: primary first, then the fallbacks. Every answer is a unit vector, so the only
`temperature` is 1, and `normalize` is true. `confidence` is the mean cosine of the predicted vector to the vectors of
its context: nets give no probability, and of what can be read off an answer this says most about its cosine to the true
next vector (docs/compat.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np
from fastapi import FastAPI

from lvm.errors import Invalid
from models.registry.registry import Registry, UnknownVersion
from models.vectors import Floats
from service.deploy.deployments import Deployments
from service.deploy.shadow import Shadow
from service.engines.engine import EngineInfo
from service.engines.router import FallbackChain, Routed, Router
from service.http import checks, codec, schemas
from service.http.codec import Decoded, Fields, JsonReader
from service.http.gateway import State
from service.http.messages import JSON, Request, Response, media_type_of
from service.http.routes.common import MadeBy, document_route, headers_of, query_options
from service.http.routes.health import check_ready
from service.http.routes.models import summary
from service.overload.fairness import Slicer
from service.settings import Settings

INFER, INFER_BATCH, HEALTH = "/infer", "/infer/batch", "/health"
FIELD = "context_vectors"
# no vector is shorter, so that a zero vector has the cosine 0
LEAST = np.float32(1e-12)


def _temperature(value: Any, pointer: str) -> None:
    """The number 1."""
    if isinstance(value, bool) or value != 1:
        raise Invalid("expected 1: the nets have no temperature", pointer=pointer)


def _normalize(value: Any, pointer: str) -> None:
    """True."""
    if value is not True:
        raise Invalid("expected true: every predicted vector has unit length", pointer=pointer)


OPTIONS: dict[str, checks.Check] = {"temperature": _temperature, "normalize": _normalize}


class Infer:
    """Answers POST /infer, or POST /infer/batch if it takes `many` contexts."""

    def __init__(self, router: Router, shadow: Shadow, settings: Settings, slicer: Slicer, *, many: bool) -> None:
        self._router = router
        self._shadow = shadow
        self._slicer = slicer
        self._many = many
        self._norm_policy = settings.norm_policy
        self._fields = Fields({FIELD: int(many)}, OPTIONS)
        self._json = JsonReader(self._fields, settings.max_rows)

    async def __call__(self, request: Request) -> Response:
        """Return the response; raises `ServiceError`."""
        media_type_of(request.headers.get(b"content-type", JSON), (JSON,))
        options = query_options(request, self._fields)
        decoded = self._json.read_at_once(request.body, self._chain, options)
        if decoded is None:
            work = self._json.read_in_slices(request.body, self._chain, options)
            decoded = await self._slicer.run(request.client, work)
        decoded = codec.normalised(self._norm_policy, decoded)
        request.set_rows(len(decoded.rows))
        decode_s = perf_counter() - request.started
        routed = await self._router.predict(decoded.rows, decoded.target.engines, request.deadline)
        self._shadow.maybe_compare(decoded.rows, routed)
        return self._respond(request, decoded, routed, decode_s)

    def _chain(self, field: str, options: Mapping[str, Any]) -> FallbackChain:
        return self._router.chain(None, "realtime")

    def _respond(self, request: Request, decoded: Decoded[FallbackChain], routed: Routed, decode_s: float) -> Response:
        began = perf_counter()
        prediction = routed.prediction
        (info,) = [engine.info for engine in decoded.target.engines if engine.info.alias == routed.served_by]
        answer = {
            **self._vectors(decoded.rows, prediction.vectors),
            "latency_ms": round((began - request.started) * 1e3, 3),
            "model_type": prediction.model,
            "device": device_of(info),
        }
        body = codec.encode_json(answer)
        stages = {"decode": decode_s, "queue": prediction.queue_s, "infer": prediction.infer_s}
        stages["encode"] = perf_counter() - began
        made_by = MadeBy(prediction.model, prediction.version, routed.served_by, routed.fallback_reason)
        headers = [*headers_of(made_by, prediction.batch_rows, prediction.replica)]
        outcome = "fallback" if routed.fallback_reason else "ok"
        return Response(body, JSON, headers, outcome=outcome, stages=stages, served_by=routed.served_by)

    def _vectors(self, contexts: Floats, vectors: Floats) -> dict[str, Any]:
        confidences = mean_cosines(contexts, vectors)
        if self._many:
            return {"predicted_vectors": vectors, "confidences": confidences}
        return {"predicted_vector": vectors[0], "confidence": confidences[0]}


def mean_cosines(contexts: Floats, vectors: Floats) -> Floats:
    """Return the mean cosine `(B,)` of unit vectors `(B, D)` to the vectors of their contexts `(B, T, D)`."""
    lengths = np.maximum(np.sqrt(np.vecdot(contexts, contexts)), LEAST)
    cosines = np.vecdot(contexts, vectors[:, None]) / lengths
    means: Floats = np.clip(cosines.mean(axis=1), -1, 1)
    return means


def device_of(info: EngineInfo) -> str:
    """Return the device of an engine, by its runtime: torch itself serves on mps only."""
    library = info.runtime.partition("-")[0]
    return {"cuda": "cuda", "torch": "mps"}.get(library, "cpu")


def add_routes(app: FastAPI, router: Router, deployments: Deployments, state: State) -> None:
    """Add /health and /info to `app`, and document the others there."""

    @app.get(HEALTH, response_model=schemas.LnspHealth, responses=schemas.PROBLEMS)
    async def health() -> dict[str, Any]:
        """200 while /readyz answers 200."""
        check_ready(deployments, state)
        return {"status": "healthy", "model_loaded": True}

    @app.get("/info", response_model=schemas.LnspInfo, responses={**schemas.UNAUTHORISED, **schemas.PROBLEMS})
    async def info() -> dict[str, Any]:
        """The net that is asked first."""
        found = router.chain(None, "realtime").engines[0].info
        card = await deployments.card_executor.run(_card, deployments.registry, found)
        return {
            "model_type": found.name,
            "version": found.version,
            "architecture": card.get("architecture"),
            "parameters": card.get("parameters"),
            "dim": found.shape[1],
            "context_length": found.shape[0],
            "encoder": found.encoder,
            "device": device_of(found),
        }

    document_route(app, INFER, schemas.LNSP_INFER)
    document_route(app, INFER_BATCH, schemas.LNSP_INFER_BATCH)


def _card(registry: Registry, info: EngineInfo) -> dict[str, Any]:
    """Return the summary of a version's card, empty if the version was removed."""
    try:
        return summary(registry.find(f"{info.name}/{info.version}"))
    except UnknownVersion:
        return {}
