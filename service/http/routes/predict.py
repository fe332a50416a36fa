"""POST /predict: contexts in, as vectors or text; the next vectors out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np

from lvm.errors import Invalid
from models.registry.alias import Alias
from models.vectors import Floats
from service.deploy.deployments import Deployments
from service.deploy.shadow import Shadow
from service.engines.router import FallbackChain, Profile, Routed, Router
from service.engines.text import character_cost_rows
from service.http import checks, codec, octets
from service.http.codec import Decoded, Fields, JsonReader
from service.http.messages import JSON, Request, Response, Stages, media_type_of
from service.http.octets import OCTETS
from service.http.routes.common import (
    MadeBy,
    embed,
    headers_of,
    mark_as_text,
    query_options,
    text_fields,
    wanted_octets,
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
        header = request.headers.get(b"content-type", JSON)
        media_type = media_type_of(header, (JSON, OCTETS))
        options = query_options(request, self._fields) if request.query else {}
        decoded: Decoded[FallbackChain] | None
        if media_type == OCTETS:
            chain, kind = self._chain("contexts", options), octets.octet_type(header)
            contexts = octets.read_octets(request.body, kind, chain.shape, self._max_rows, many=True)
            answers_many = kind.shape is not None and kind.shape != chain.shape
            decoded = Decoded(contexts, "octets", options, chain, answers_many)
        else:
            decoded = self._json.read_at_once(request.body, self._chain, options)
            if decoded is None:
                work = self._json.read_in_slices(request.body, self._chain, options)
                decoded = await self._slicer.run(request.client, work)
        if self._norm_policy != "accept":
            decoded = codec.normalised(self._norm_policy, decoded)
        rows = len(decoded.rows) or 1 + character_cost_rows(decoded.text or "")
        if rows > 1:
            request.set_rows(rows)
        stages = {"decode": perf_counter() - request.started}
        if decoded.text is not None:
            return await self._predict_text(request, decoded, stages)
        routed = await self._router.predict(decoded.rows, decoded.target.engines, request.deadline)
        return self._respond(request, decoded, routed, stages)

    async def _predict_text(self, request: Request, decoded: Decoded[FallbackChain], stages: Stages) -> Response:
        began = perf_counter()
        engines = decoded.target.engines
        first = engines[0].info
        decoded = await embed(self._deployments, first.encoder, decoded, first.shape[0], request)
        stages["embed"] = perf_counter() - began
        alike = [engine for engine in engines if engine.info.input_space == first.input_space]
        routed = await self._router.predict(decoded.rows, alike, request.deadline)
        return mark_as_text(self._respond(request, decoded, routed, stages), decoded.text_info)

    def _chain(self, field: str, options: Mapping[str, Any]) -> FallbackChain:
        model: str | None = options.get("model")
        profile: Profile = options.get("profile", "realtime")
        if "profile" in options and model not in (None, "primary"):
            raise Invalid("`profile` works only with `primary`; drop `profile` or `model`", pointer="/profile")
        return self._router.chain(model, profile)

    def _respond(self, request: Request, decoded: Decoded[FallbackChain], routed: Routed, stages: Stages) -> Response:
        began = perf_counter()
        prediction = routed.prediction
        vectors = prediction.vectors
        made_by = MadeBy(prediction.model, prediction.version, routed.served_by, routed.fallback_reason)
        stages["queue"], stages["infer"] = prediction.queue_s, prediction.infer_s
        dtype = wanted_octets(request, decoded.options) if b"accept" in request.headers else None
        if dtype:
            shape = vectors.shape if decoded.answers_many else vectors.shape[1:]
            body, media_type = np.ascontiguousarray(vectors, dtype).tobytes(), octets.octets_of(dtype, shape)
        else:
            body, media_type = encode_answer(decoded, vectors, made_by, stages), JSON
        stages["encode"] = perf_counter() - began
        if Alias.CANDIDATE in self._deployments.slots:
            self._shadow.maybe_compare(decoded.rows, routed)
        headers = [*headers_of(made_by, prediction.batch_rows, prediction.replica)]
        outcome = "fallback" if routed.fallback_reason else "ok"
        return Response(body, media_type, headers, outcome=outcome, stages=stages, served_by=routed.served_by)


def encode_answer(decoded: Decoded[FallbackChain], vectors: Floats, made_by: MadeBy, stages: Stages) -> bytes:
    """Return the body of an answer in JSON: `vectors` `(n, D)`, or the one vector if a list is not asked for."""
    answers: Any = vectors
    if decoded.options.get("encoding") == "base64":
        answers = [octets.encode_base64(vector) for vector in vectors]
    name, answer = ("vectors", answers) if decoded.answers_many else ("vector", answers[0])
    text_info = b"," + codec.encode_json(decoded.text_info)[1:-1] if decoded.text_info else b""
    template = _template(name, made_by, tuple(stages))
    return template % (codec.encode_json(answer), text_info, *[1e3 * seconds for seconds in stages.values()])


@lru_cache(maxsize=1024)
def _template(name: str, made_by: MadeBy, stages: tuple[str, ...]) -> bytes:
    """Return a body with formats in the place of what differs between answers: numbers, text_info, milliseconds."""
    about = codec.encode_json(made_by._asdict())[1:-1].decode().replace("%", "%%")
    times = ",".join(f'"{stage}":%.3f' for stage in stages)
    return f'{{"{name}":%b%b,{about},"timing_ms":{{{times}}}}}'.encode()
