"""POST /predict: contexts in, as vectors or text; the next vectors out."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np

from lvm.errors import Invalid
from service.deploy.deployments import Deployments
from service.deploy.shadow import Shadow
from service.engines.router import Profile, Routed, Router
from service.engines.text import character_cost_rows
from service.http import checks, codec, octets
from service.http.codec import Decoded, Fields, JsonReader
from service.http.headers import chosen
from service.http.messages import JSON, Request, Response, Stages
from service.http.octets import OCTETS
from service.http.routes.common import (
    FallbackChain,
    embed,
    mark_as_text,
    members_of,
    milliseconds,
    outcome_of,
    prediction_headers,
    prediction_stages,
    query_options,
    read_json,
    text_fields,
)
from service.overload.fairness import Slicer
from service.settings import Settings

OPTIONS: dict[str, checks.Check] = {
    "model": checks.text,
    "profile": checks.one_of("realtime", "batch"),
    "encoding": checks.one_of("float", "base64"),
}


class Predict:
    """Answers POST /predict."""

    def __init__(
        self, router: Router, deployments: Deployments, shadow: Shadow, settings: Settings, slicer: Slicer
    ) -> None:
        self._router = router
        self._deployments = deployments
        self._shadow = shadow
        self._slicer = slicer
        self._max_rows = settings.max_rows
        self._norm_policy = settings.norm_policy
        self._fields = Fields({"context": 0, "contexts": 1}, OPTIONS, text_fields(settings))
        self._json = JsonReader(self._fields, settings.max_rows)

    async def __call__(self, request: Request) -> Response:
        """Return the response; raises `ServiceError`."""
        decoded = codec.normalised(self._norm_policy, await self._decode(request))
        request.set_rows(len(decoded.rows) or 1 + character_cost_rows(decoded.text or ""))
        decode_s = perf_counter() - request.started
        if decoded.text is not None:
            return await self._predict_text(request, decoded, decode_s)
        routed = await self._router.predict(decoded.rows, decoded.target.engines, request.deadline)
        return self._respond(request, decoded, routed, prediction_stages(routed, decode_s))

    async def _predict_text(self, request: Request, decoded: Decoded[FallbackChain], decode_s: float) -> Response:
        began = perf_counter()
        engines = decoded.target.engines
        first = engines[0].info
        decoded = await embed(self._deployments, first.encoder, decoded, first.shape[0], request)
        embed_s = perf_counter() - began
        alike = [engine for engine in engines if engine.info.input_space == first.input_space]
        routed = await self._router.predict(decoded.rows, alike, request.deadline)
        stages = (*prediction_stages(routed, decode_s), ("embed", embed_s))
        return mark_as_text(self._respond(request, decoded, routed, stages), decoded.text_info)

    async def _decode(self, request: Request) -> Decoded[FallbackChain]:
        media_type = request.media_type(JSON, OCTETS)
        options = query_options(request, self._fields)
        if media_type == JSON:
            return await read_json(self._json, request, self._chain, options, self._slicer)
        kind = octets.octet_type(request.headers[b"content-type"])
        chain = self._chain("contexts", options)
        rows = octets.read_octets(request.body, kind, chain.shape, self._max_rows, many=True)
        is_many = kind.shape is not None and kind.shape != chain.shape
        return Decoded(rows, "octets", options, chain, octets_of_many=is_many)

    def _chain(self, field: str, options: Mapping[str, Any]) -> FallbackChain:
        model: str | None = options.get("model")
        profile: Profile = options.get("profile", "realtime")
        if "profile" in options and model not in (None, "primary"):
            raise Invalid("`profile` works only with `primary`; drop `profile` or `model`", pointer="/profile")
        return FallbackChain(self._router.chain(model, profile))

    def _respond(self, request: Request, decoded: Decoded[FallbackChain], routed: Routed, stages: Stages) -> Response:
        began = perf_counter()
        if dtype := _wanted_octets(request, decoded.options):
            vectors = routed.prediction.vectors
            shape = vectors.shape if decoded.answers_many else vectors.shape[1:]
            body, media_type = octets.encode_octets(vectors, dtype), octets.octets_of(dtype, shape)
        else:
            body, media_type = codec.encode_json(_body(decoded, routed, stages)), JSON
        stages = (*stages, ("encode", perf_counter() - began))
        self._shadow.maybe_compare(decoded.rows, routed)
        return Response(
            body,
            media_type,
            prediction_headers(routed, stages),
            outcome=outcome_of(routed),
            stages=stages,
            served_by=routed.served_by,
        )


def _wanted_octets(request: Request, options: Mapping[str, Any]) -> np.dtype[Any] | None:
    """Return the type of number in which Accept asks for octets, None if it prefers JSON."""
    accept = request.headers.get(b"accept")
    if accept is None or options.get("encoding"):
        return None
    if accept == OCTETS:
        return octets.FLOAT32
    wanted = chosen(accept, OCTETS, JSON)
    return None if wanted is None else octets.dtype_of(wanted)


def _body(decoded: Decoded[FallbackChain], routed: Routed, stages: Stages) -> dict[str, Any]:
    vectors: Any = routed.prediction.vectors
    if decoded.options.get("encoding") == "base64":
        vectors = [octets.encode_base64(vector) for vector in vectors]
    answer = {"vectors": vectors} if decoded.answers_many else {"vector": vectors[0]}
    return {**answer, **decoded.text_info, **members_of(routed), "timing_ms": milliseconds(stages)}
