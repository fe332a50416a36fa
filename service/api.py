"""The routes: /predict and /retrieve hot, /models, /metrics and the probes through FastAPI."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute

from models.retriever import Hit, Search
from service import articles, pages, schemas, wire
from service.door import Call, Headers, HotRoute, Reply, State, want_media_type
from service.engine import Floats
from service.errors import Draining, Invalid, Unavailable
from service.inventory import card_text, describe, ledger
from service.lineup import Lineup
from service.metrics import Metrics
from service.routing import EngineLike, Profile, Routed, Router
from service.search import SearchEngine
from service.settings import Settings
from service.shadow import Shadow
from service.wire import JSON, OCTETS, Decoded, Fields, JsonReader

MADE_BY = ("model", "version", "served_by", "fallback_reason")
Stages = tuple[tuple[str, float], ...]
PREDICT = Fields(
    {"context": 0, "contexts": 1},
    {
        "model": wire.text,
        "profile": wire.one_of("realtime", "batch"),
        "encoding": wire.one_of("float", "base64"),
    },
)


class Predict:
    """POST /predict: contexts in, next vectors out."""

    def __init__(self, router: Router, settings: Settings, shadow: Shadow) -> None:
        self._shadow = shadow
        self._router, self._max_rows, self._norms = router, settings.max_rows, settings.norm_policy
        self._json = JsonReader(PREDICT, settings.max_rows)

    async def __call__(self, call: Call) -> Reply:
        """Answer one call; errors leave as `ServiceError`."""
        asked = wire.held_to(self._norms, self._decode(call))
        decoded_s = perf_counter() - call.started
        routed = await self._router.predict(asked.rows, self._chain(asked.options), call.deadline)
        stages = stages_of(routed, decoded_s)
        began = perf_counter()
        if dtype := _octets_wanted(call, asked):
            body, media_type = wire.encode_octets(routed.prediction.vectors, dtype), wire.OCTET_TYPES[dtype]
        else:
            body, media_type = wire.encode_json(self._body(asked, routed, stages)), JSON
        stages = (*stages, ("encode", perf_counter() - began))
        self._shadow.consider(asked.rows, routed)
        return Reply(body, media_type, headers_of(routed, stages), outcome_of(routed), stages)

    def _decode(self, call: Call) -> Decoded:
        if want_media_type(call, JSON, OCTETS) == JSON:
            return self._json.read(call.body, self._shape_of)
        options = wire.query_options(call.options(), PREDICT)
        dtype = wire.octet_type(call.headers[b"content-type"])
        rows = wire.decode_octets(call.body, self._shape_of("contexts", options), self._max_rows, dtype)
        return Decoded(rows, "octets", options)

    def _chain(self, options: Mapping[str, Any]) -> list[EngineLike]:
        profile: Profile = options.get("profile", "realtime")
        return self._router.chain(options.get("model"), profile)

    def _shape_of(self, field: str, options: dict[str, Any]) -> wire.Shape:
        return self._chain(options)[0].shape

    @staticmethod
    def _body(asked: Decoded, routed: Routed, stages: Stages) -> dict[str, Any]:
        vectors: Any = routed.prediction.vectors
        if asked.options.get("encoding") == "base64":
            vectors = [wire.encode_base64(vector) for vector in vectors]
        many = asked.field == "contexts" or len(vectors) > 1
        answer = {"vectors": vectors} if many else {"vector": vectors[0]}
        return {**answer, **_made_by(routed), "timing_ms": _milliseconds(stages)}


class Retrieve:
    """POST /retrieve: a query, or a context that becomes one, in; passages out."""

    def __init__(self, router: Router, lineup: Lineup, settings: Settings) -> None:
        self._router, self._lineup, self._norms = router, lineup, settings.norm_policy
        self._fields = Fields(
            {"query": 0, "context": 0},
            {
                "k": wire.whole(1, settings.max_k),
                "exclude": wire.wholes(10_000),
                "exclude_context": wire.flag,
                "rerank": wire.flag,
                "model": wire.text,
            },
        )
        self._json = JsonReader(self._fields, max_rows=1)

    async def __call__(self, call: Call) -> Reply:
        """Answer one call; errors leave as `ServiceError`."""
        engine = self._lineup.search_engine()
        asked = wire.held_to(self._norms, self._decode(call, engine))
        by_towers = self._is_for_towers(asked.field, asked.options, engine)
        _check_rerank(asked.options, engine, by_towers)
        stages: Stages = (("decode", perf_counter() - call.started),)
        if by_towers or asked.field == "query":
            return await self._answer(engine, asked, call, by_towers, None, stages)
        chain = self._router.chain(asked.options.get("model"), "realtime")
        routed = await self._router.predict(asked.rows, chain, call.deadline)
        engine = self._lineup.search_engine()  # it may have been swapped meanwhile
        return await self._answer(engine, asked, call, False, routed, stages)

    async def _answer(
        self, engine: SearchEngine, asked: Decoded, call: Call, by_towers: bool, routed: Routed | None, stages: Stages
    ) -> Reply:
        query = None if by_towers else routed.prediction.vectors[0] if routed else asked.rows[0]
        ticket = await engine.search(_search(asked, query), call.deadline)
        queue_s = ticket.queue_s + (routed.prediction.queue_s if routed else 0.0)
        infer: Stages = (("infer", routed.prediction.infer_s),) if routed else ()
        stages = (*stages, ("queue", queue_s), *infer, *ticket.answer.stages)
        return self._reply(engine, ticket.answer.hits, by_towers, routed, stages)

    @staticmethod
    def _is_for_towers(field: str, options: Mapping[str, Any], engine: SearchEngine) -> bool:
        """Say whether the towers make the query: of a context, unless a net is named to do it."""
        return field == "context" and "model" not in options and engine.retriever.query_maker is not None

    def _decode(self, call: Call, engine: SearchEngine) -> Decoded:
        def shape_of(field: str, options: dict[str, Any]) -> wire.Shape:
            if self._is_for_towers(field, options, engine):
                return engine.shape
            chain = self._router.chain(options.get("model"), "realtime")
            return (engine.retriever.dim,) if field == "query" else chain[0].shape

        if want_media_type(call, JSON, OCTETS) == JSON:
            return self._json.read(call.body, shape_of)
        options = wire.query_options(call.options(), self._fields)
        dtype = wire.octet_type(call.headers[b"content-type"])
        field = "query" if len(call.body) == dtype.itemsize * engine.retriever.dim else "context"
        return Decoded(wire.decode_octets(call.body, shape_of(field, options), 1, dtype), field, options)

    @staticmethod
    def _reply(engine: SearchEngine, hits: list[Hit], by_towers: bool, routed: Routed | None, stages: Stages) -> Reply:
        began = perf_counter()
        author = (*(engine.retriever.query_maker or ("", "")), engine.alias) if by_towers else None
        body = {
            "results": [_result(hit) for hit in hits],
            "corpus": engine.retriever.name,
            "corpus_version": engine.retriever.version,
            "is_exact": engine.retriever.is_exact,
            "reranked": any(stage == "rerank" for stage, _ in stages),
            **(_made_by(routed) if author is None else dict(zip(MADE_BY, (*author, None), strict=True))),
            "timing_ms": _milliseconds(stages),
        }
        encoded = wire.encode_json(body)
        stages = (*stages, ("encode", perf_counter() - began))
        headers = headers_of(routed, stages) + (_maker(*author) if author else [])
        return Reply(encoded, JSON, headers, outcome_of(routed), stages)


def _search(asked: Decoded, query: Floats | None) -> Search:
    options = asked.options
    context = asked.rows[0] if asked.field == "context" else None
    own = context if options.get("exclude_context", True) else None
    k, exclude, rerank = options.get("k", 10), options.get("exclude", ()), options.get("rerank", True)
    return Search(query, k, exclude, own, context, rerank)


def _check_rerank(options: Mapping[str, Any], engine: SearchEngine, by_towers: bool) -> None:
    """Refuse to rerank where that is asked for and cannot be."""
    if options.get("rerank") and not engine.retriever.reranks:
        raise Invalid("the corpus has no reranker", pointer="/rerank")
    if options.get("rerank") and not by_towers:
        raise Invalid("only what the towers find for a context is reranked", pointer="/rerank")


def _result(hit: Hit) -> dict[str, Any]:
    chunk = hit.chunk
    return {
        "id": hit.row,
        "score": hit.score,
        "article": chunk.article,
        "title": chunk.title,
        "position": chunk.position,
        "text": chunk.text,
    }


def _octets_wanted(call: Call, asked: Decoded) -> np.dtype[Any] | None:
    accept = call.headers.get(b"accept", b"")
    if OCTETS not in accept or asked.options.get("encoding"):
        return None
    return wire.octet_type(accept)


def stages_of(routed: Routed, decoded_s: float) -> Stages:
    """Return the seconds of the stages that every prediction goes through."""
    prediction = routed.prediction
    return ("decode", decoded_s), ("queue", prediction.queue_s), ("infer", prediction.infer_s)


def outcome_of(routed: Routed | None) -> str:
    """Return how an answer counts."""
    return "fallback" if routed and routed.fallback_reason else "ok"


def _made_by(routed: Routed | None) -> dict[str, Any]:
    if routed is None:
        return {}
    made = routed.prediction.model, routed.prediction.version, routed.served_by, routed.fallback_reason
    return dict(zip(MADE_BY, made, strict=True))


def _milliseconds(stages: Stages) -> dict[str, float]:
    return {stage: round(seconds * 1e3, 3) for stage, seconds in stages}


@lru_cache(maxsize=64)
def _maker(model: str, version: str, served_by: str) -> Headers:
    return [
        (b"x-model", model.encode()),
        (b"x-model-version", version.encode()),
        (b"x-served-by", served_by.encode()),
    ]


def headers_of(routed: Routed | None, stages: Stages) -> Headers:
    """Return the headers that say who made an answer and where the time went."""
    timing = ", ".join([f"{stage};dur={seconds * 1e3:.3f}" for stage, seconds in stages])
    headers = [(b"server-timing", timing.encode())]
    if routed:
        headers += _maker(routed.prediction.model, routed.prediction.version, routed.served_by)
        headers.append((b"x-batch-size", b"%d" % routed.prediction.batch_rows))
        if routed.fallback_reason:
            headers.append((b"x-fallback-reason", routed.fallback_reason.encode()))
    return headers


class DocumentedHotRoute(APIRoute):
    """A hot route among FastAPI's: documented like any other, run as the plain ASGI it is."""

    def __init__(self, hot: HotRoute, **documentation: Any) -> None:
        async def documented() -> None: ...

        super().__init__(hot.path, documented, methods=["POST"], **documentation)
        self.app = hot
        self.hot = hot


def check_live(lineup: Lineup, settings: Settings) -> None:
    """Raise `Unavailable` where an inference thread is dead or hangs."""
    if lineup.stuck_s() > settings.hang_s:
        raise Unavailable("an inference thread is dead or hangs")


def check_ready(lineup: Lineup, state: State) -> None:
    """Raise `Draining` or `Unavailable` where no request should come here."""
    if state.is_draining:
        raise Draining("on its way out")
    if not lineup.is_ready:
        raise Unavailable("no net is loaded")


def add_routes(
    app: FastAPI, router: Router, lineup: Lineup, settings: Settings, metrics: Metrics, state: State
) -> None:
    """Add every route of the service to `app`."""
    shadow = Shadow(lambda: lineup.candidate, lambda: lineup.search, settings, metrics)
    hot = (
        (Predict(router, settings, shadow), "/predict", schemas.PREDICT),
        (Retrieve(router, lineup, settings), "/retrieve", schemas.RETRIEVE),
    )
    for handler, path, documentation in hot:
        route = HotRoute(path, handler, settings, metrics, state)
        app.routes.append(DocumentedHotRoute(route, **documentation))

    @app.get("/models", response_model=schemas.Models)
    async def models() -> Response:
        """Versions, aliases, cards, what is live since when, the breakers."""
        return Response(wire.encode_json(describe(router, lineup)), media_type="application/json")

    @app.get("/models/{name}/{version}/card", response_class=Response, responses=schemas.CARD)
    def card(name: str, version: str) -> Response:
        """The model card of a version, in Markdown."""
        return Response(card_text(lineup.registry, name, version), media_type="text/markdown; charset=utf-8")

    @app.get("/ledger", response_model=schemas.Ledger)
    def moves(offset: articles.Offset = 0, limit: articles.Limit = 100) -> Response:
        """Who moved which alias, when and why, newest first."""
        return Response(wire.encode_json(ledger(lineup.registry, offset, limit)), media_type="application/json")

    articles.add_routes(app, lineup)
    pages.add_routes(app)

    @app.get("/metrics", response_class=Response)
    async def scrape(request: Request) -> Response:
        """Prometheus text, or OpenMetrics when asked for."""
        lineup.observe()
        router.observe()
        metrics.ready.set(float(lineup.is_ready and not state.is_draining))
        text, media_type = metrics.scrape(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": media_type})

    @app.get("/livez", responses=schemas.PROBLEMS)
    async def livez() -> dict[str, str]:
        """200 while the process and every inference thread beat."""
        check_live(lineup, settings)
        return {"status": "live"}

    @app.get("/readyz", responses=schemas.PROBLEMS)
    @app.get("/healthz", responses=schemas.PROBLEMS)
    async def readyz() -> dict[str, str]:
        """200 while a net is loaded, warm, and the process is not draining."""
        check_ready(lineup, state)
        return {"status": "ready"}
