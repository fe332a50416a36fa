"""The routes: /predict and /retrieve hot, /models, /metrics and the probes through FastAPI."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute

from lvm.errors import (
    Draining,
    Invalid,
    Malformed,
    Unavailable,
)
from models.registry.alias import Alias
from models.retrieval.retriever import Hit, Search
from models.vectors import Floats
from service.deploy.deployments import Deployments
from service.deploy.registry_sync import SyncLoop
from service.deploy.shadow import Shadow
from service.engines.engine import Engine
from service.engines.remote import PredictEngine
from service.engines.router import (
    Profile,
    Routed,
    Router,
)
from service.engines.search import Found, SearchModel
from service.engines.text import (
    ENCODER,
    Encoded,
    TextInput,
    extra_rows,
)
from service.http import codec, schemas
from service.http.auth import PROBES
from service.http.codec import (
    JSON,
    OCTETS,
    Decoded,
    Fields,
    JsonReader,
)
from service.http.gateway import (
    Call,
    Door,
    Headers,
    HotRoute,
    Reply,
    State,
    want_media_type,
)
from service.http.headers import chosen, exposition_format
from service.http.routes import articles, console
from service.http.routes.models import (
    Inventory,
    card_text,
    describe,
    ledger,
)
from service.overload.fairness import Slicer
from service.settings import Settings
from service.tasks import SingleFlight
from service.telemetry.metrics import TOTAL_TEXT

T = TypeVar("T")
READ_S = 2.0  # for what the registry says; a share may hang
MADE_BY = ("model", "version", "served_by", "fallback_reason")
Stages = tuple[tuple[str, float], ...]
PREDICT_OPTIONS: dict[str, codec.Check] = {
    "model": codec.text,
    "profile": codec.one_of("realtime", "batch"),
    "encoding": codec.one_of("float", "base64"),
}


def _texts(settings: Settings) -> dict[str, codec.Check]:
    return {"text": codec.passage(settings.max_text), "texts": codec.passages(settings.max_text)}


async def _heard(
    lineup: Deployments, encoder: str, asked: Decoded, length: int, call: Call, *, may_be_query: bool = False
) -> Decoded:
    """Return what was asked in words as vectors of `encoder`: a context of `length` chunks, or a query."""
    assert asked.words is not None
    engine = lineup.encoder.require(encoder, f"/{asked.field}")
    read = await engine.run(TextInput(asked.words, length, may_be_query, call.place.client), call.deadline)
    rows = read.vectors if read.read_as == "query" else read.vectors[None]
    chunks = {"chunks": read.chunks} if asked.field == "text" else {}
    heard = {"read_as": read.read_as, **chunks, **_read_in_part(read)}
    return asked._replace(rows=rows, field=read.read_as, heard=heard)


def _read_in_part(read: Encoded) -> dict[str, list[dict[str, Any]]]:
    """Return which chunks were not read to their end, and which hold unknown words; neither member if there is none."""
    truncated = [
        {"index": at, "word_pieces": info.word_pieces, "read": info.read}
        for at, info in enumerate(read.infos)
        if info.truncated
    ]
    unread = [{"index": at, "share": round(info.unread, 3)} for at, info in enumerate(read.infos) if info.unread]
    return {name: found for name, found in (("truncated", truncated), ("unread", unread)) if found}


def _of_text(reply: Reply, heard: Mapping[str, Any]) -> Reply:
    """Return the answer to a text: timed apart from those to vectors, its headers naming chunks read in part."""
    parts = [(name, ", ".join(str(each["index"]) for each in heard.get(name, ()))) for name in ("truncated", "unread")]
    headers = [(f"x-{name}".encode(), indices.encode()) for name, indices in parts if indices]
    return reply._replace(total=TOTAL_TEXT, made_by=ENCODER, headers=[*reply.headers, *headers])


class Predict:
    """POST /predict: contexts in, in vectors or in words, next vectors out."""

    def __init__(self, router: Router, lineup: Deployments, door: Door, shadow: Shadow) -> None:
        settings = door.settings
        self._lineup, self._shadow, self._slicer = lineup, shadow, door.slicer
        self._router, self._max_rows, self._norms = router, settings.max_rows, settings.norm_policy
        self._fields = Fields({"context": 0, "contexts": 1}, PREDICT_OPTIONS, _texts(settings))
        self._json = JsonReader(self._fields, settings.max_rows)

    async def __call__(self, call: Call) -> Reply:
        """Answer one call; errors leave as `ServiceError`."""
        asked = codec.held_to(self._norms, await self._decode(call))
        call.place.settle(len(asked.rows) or 1 + extra_rows(asked.words or ""))
        decoded_s = perf_counter() - call.started
        if asked.words is not None:
            return await self._of_words(call, asked, decoded_s)
        routed = await self._router.predict(asked.rows, self._chain(asked.options), call.deadline)
        return self._reply(call, asked, routed, stages_of(routed, decoded_s))

    async def _of_words(self, call: Call, asked: Decoded, decoded_s: float) -> Reply:
        chain, began = self._chain(asked.options), perf_counter()
        first = chain[0].info
        asked = await _heard(self._lineup, first.encoder, asked, first.shape[0], call)
        embedded_s = perf_counter() - began
        alike = [engine for engine in chain if engine.info.input_space == first.input_space]
        routed = await self._router.predict(asked.rows, alike, call.deadline)
        stages = (*stages_of(routed, decoded_s), ("embed", embedded_s))
        return _of_text(self._reply(call, asked, routed, stages), asked.heard or {})

    def _reply(self, call: Call, asked: Decoded, routed: Routed, stages: Stages) -> Reply:
        began = perf_counter()
        if dtype := _octets_wanted(call, asked):
            vectors = routed.prediction.vectors
            shape = vectors.shape if asked.is_many else vectors.shape[1:]
            body, media_type = codec.encode_octets(vectors, dtype), codec.octets_of(dtype, shape)
        else:
            body, media_type = codec.encode_json(self._body(asked, routed, stages)), JSON
        stages = (*stages, ("encode", perf_counter() - began))
        self._shadow.consider(asked.rows, routed)
        return Reply(body, media_type, headers_of(routed, stages), outcome_of(routed), stages, made_by=routed.served_by)

    async def _decode(self, call: Call) -> Decoded:
        media_type = want_media_type(call, JSON, OCTETS)
        options = _query(call, self._fields)
        if media_type == JSON:
            return await read_json(self._json, call, self._shape_of, options, self._slicer)
        kind = codec.octet_type(call.headers[b"content-type"])
        item = self._shape_of("contexts", options)
        rows = codec.read_octets(call.body, kind, item, self._max_rows, many=True)
        return Decoded(rows, "octets", options, octets_of_many=kind.shape is not None and kind.shape != item)

    def _chain(self, options: Mapping[str, Any]) -> list[PredictEngine]:
        model: str | None = options.get("model")
        profile: Profile = options.get("profile", "realtime")
        if "profile" in options and model not in (None, "primary"):
            raise Invalid("a profile has no effect beside this model, which is the only one asked", pointer="/profile")
        return self._router.chain(model, profile)

    def _shape_of(self, field: str, options: dict[str, Any]) -> codec.Shape:
        return self._chain(options)[0].info.shape

    @staticmethod
    def _body(asked: Decoded, routed: Routed, stages: Stages) -> dict[str, Any]:
        vectors: Any = routed.prediction.vectors
        if asked.options.get("encoding") == "base64":
            vectors = [codec.encode_base64(vector) for vector in vectors]
        answer = {"vectors": vectors} if asked.is_many else {"vector": vectors[0]}
        return {**answer, **(asked.heard or {}), **_made_by(routed), "timing_ms": _milliseconds(stages)}


class Retrieve:
    """POST /retrieve: a query, or a context that becomes one, in; passages out."""

    def __init__(self, router: Router, lineup: Deployments, door: Door) -> None:
        settings = door.settings
        self._router, self._lineup, self._norms, self._metrics = router, lineup, settings.norm_policy, door.metrics
        self._slicer = door.slicer
        self._fields = Fields(
            {"query": 0, "context": 0},
            {
                "k": codec.whole(1, settings.max_k),
                "exclude": codec.wholes(10_000),
                "exclude_context": codec.flag,
                "rerank": codec.flag,
                "model": codec.text,
            },
            _texts(settings),
        )
        self._json = JsonReader(self._fields, max_rows=1)

    async def __call__(self, call: Call) -> Reply:
        """Answer one call; errors leave as `ServiceError`."""
        engine = self._lineup.search_engine()
        asked = codec.held_to(self._norms, await self._decode(call, engine))
        call.place.settle(1 + extra_rows(asked.words or ""))
        stages: Stages = (("decode", perf_counter() - call.started),)
        if asked.words is not None:
            asked, engine, stages = await self._of_words(call, asked, engine, stages)
        by_towers = self._is_for_towers(asked.field, asked.options, engine)
        _check_effect(asked, engine, by_towers)
        if by_towers or asked.field == "query":
            return await self._answer(engine, asked, call, by_towers, None, stages)
        chain = self._router.chain(asked.options.get("model"), "realtime")
        routed = await self._router.predict(asked.rows, chain, call.deadline)
        engine = self._lineup.search_engine()  # it may have been swapped meanwhile
        return await self._answer(engine, asked, call, False, routed, stages)

    async def _of_words(
        self, call: Call, asked: Decoded, engine: Engine[SearchModel], stages: Stages
    ) -> tuple[Decoded, Engine[SearchModel], Stages]:
        began, encoder = perf_counter(), engine.info.encoder
        length, *_ = self._shape("context", asked.options, engine)
        asked = await _heard(self._lineup, encoder, asked, length, call, may_be_query=True)
        engine = self._lineup.search_engine()  # it may have been swapped meanwhile
        if engine.info.encoder != encoder:
            raise Unavailable("the corpus was exchanged for one of another encoder")
        return asked, engine, (*stages, ("embed", perf_counter() - began))

    async def _answer(
        self,
        engine: Engine[SearchModel],
        asked: Decoded,
        call: Call,
        by_towers: bool,
        routed: Routed | None,
        stages: Stages,
    ) -> Reply:
        query = None if by_towers else routed.prediction.vectors[0] if routed else asked.rows[0]
        found = await engine.run(_search(asked, query), call.deadline)
        if found.degraded:
            self._metrics.fallbacks.inc(found.degraded)
        queue_s = found.queue_s + (routed.prediction.queue_s if routed else 0.0)
        infer: Stages = (("infer", routed.prediction.infer_s),) if routed else ()
        stages = (*stages, ("queue", queue_s), *infer, *found.stages)
        reply = self._reply(found, by_towers, routed, stages, asked.heard or {})
        return _of_text(reply, asked.heard) if asked.heard else reply

    @staticmethod
    def _is_for_towers(field: str, options: Mapping[str, Any], engine: Engine[SearchModel]) -> bool:
        """Say whether the towers make the query: of a context, unless a net is named to do it."""
        return field == "context" and "model" not in options and engine.model.retriever.query_maker is not None

    def _shape(self, field: str, options: Mapping[str, Any], engine: Engine[SearchModel]) -> codec.Shape:
        if self._is_for_towers(field, options, engine):
            return engine.info.shape
        if field == "query":
            return (engine.info.shape[1],)
        return self._router.chain(options.get("model"), "realtime")[0].info.shape

    async def _decode(self, call: Call, engine: Engine[SearchModel]) -> Decoded:
        def shape_of(field: str, options: dict[str, Any]) -> codec.Shape:
            return self._shape(field, options, engine)

        media_type = want_media_type(call, JSON, OCTETS)
        options = _query(call, self._fields)
        if media_type == JSON:
            return await read_json(self._json, call, shape_of, options, self._slicer)
        kind = codec.octet_type(call.headers[b"content-type"])
        field = "query" if _is_query(kind, len(call.body), engine.info.shape[1]) else "context"
        rows = codec.read_octets(call.body, kind, shape_of(field, options), 1, many=False)
        return Decoded(rows, field, options)

    @staticmethod
    def _reply(
        found: Found,
        by_towers: bool,
        routed: Routed | None,
        stages: Stages,
        heard: Mapping[str, Any],
    ) -> Reply:
        began, searched = perf_counter(), found.searched
        degraded = None if routed and routed.fallback_reason else found.degraded  # the net's reason comes first
        author = (*(searched.query_maker or ("", "")), Alias.RETRIEVER) if by_towers else None
        body = {
            "results": [_result(hit) for hit in found.hits],
            **heard,
            "corpus": searched.name,
            "corpus_version": searched.version,
            "is_exact": searched.is_exact,
            "reranked": any(stage == "rerank" for stage, _ in stages),
            **(_made_by(routed) if author is None else dict(zip(MADE_BY, (*author, None), strict=True))),
            **({"fallback_reason": degraded} if degraded else {}),
            "timing_ms": _milliseconds(stages),
        }
        encoded = codec.encode_json(body)
        stages = (*stages, ("encode", perf_counter() - began))
        headers = headers_of(routed, stages) + (_maker(*author) if author else [])
        if searched.replica:
            headers.append((b"x-replica", searched.replica.encode()))
        if degraded:
            headers.append((b"x-fallback-reason", degraded.encode()))
        outcome = "fallback" if degraded else outcome_of(routed)
        made_by = routed.served_by if routed else Alias.RETRIEVER
        return Reply(encoded, JSON, headers, outcome, stages, made_by=made_by)


async def read_json(
    reader: JsonReader, call: Call, shape_of: codec.ShapeOf, query: Mapping[str, Any], slicer: Slicer
) -> Decoded:
    """Return what the JSON body of a call says, with the options of its `query`; a long one is read in slices."""
    asked = reader.read_at_once(call.body, shape_of, query)
    if asked is None:
        return await slicer.run(call.place.client, reader.read_in_slices(call.body, shape_of, query))
    return asked


def _search(asked: Decoded, query: Floats | None) -> Search:
    options = asked.options
    context = asked.rows[0] if asked.field == "context" else None
    own = context if options.get("exclude_context", True) else None
    k, exclude, rerank = options.get("k", 10), options.get("exclude", ()), options.get("rerank", True)
    return Search(query, k, exclude, own, context, rerank)


def _query(call: Call, fields: Fields) -> dict[str, Any]:
    """Return the options of the query string; raises `Malformed` or `Invalid`."""
    return codec.query_options(call.options(), fields) if call.query else {}


async def refuse_unknown_query(request: Request) -> None:
    """Raise `Malformed` or `Invalid` if a query string says a thing twice, or what the route does not understand.

    A probe has no options, and balancers may add what they like to its address: it says yes or no.
    """
    if request.scope["path"] in PROBES:
        return
    names = [name for name, _ in request.query_params.multi_items()]
    if len(set(names)) < len(names):
        raise Malformed("an option stands twice in the query string")
    codec.refuse_unknown(names, {field.alias for field in request.scope["route"].dependant.query_params}, "option")


def _check_effect(asked: Decoded, engine: Engine[SearchModel], by_towers: bool) -> None:
    """Raise `Invalid` if an option cannot have the effect that it asks for."""
    options = asked.options
    if asked.field == "query" and "model" in options:
        raise Invalid("a query is searched as it is: no model makes it", pointer="/model")
    if asked.field == "query" and "exclude_context" in options and asked.words is None:
        raise Invalid("a query has no context that could be left out", pointer="/exclude_context")
    if options.get("rerank") and not engine.model.retriever.reranks:
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
    accept = call.headers.get(b"accept")
    if accept is None or asked.options.get("encoding"):
        return None
    if accept == OCTETS:
        return codec.FLOAT32
    wanted = chosen(accept, OCTETS, JSON)
    return None if wanted is None else codec.dtype_of(wanted)


def _is_query(kind: codec.OctetType, length: int, dim: int) -> bool:
    """Say whether octets are a query: by the rank of their shape, or without one by their length."""
    return length == kind.dtype.itemsize * dim if kind.shape is None else len(kind.shape) == 1


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
        if routed.prediction.replica:
            headers.append((b"x-replica", routed.prediction.replica.encode()))
    return headers


class DocumentedHotRoute(APIRoute):
    """A hot route among FastAPI's: documented like any other, run as the plain ASGI it is."""

    def __init__(self, hot: HotRoute, path: str = "", **documentation: Any) -> None:
        async def documented() -> None: ...

        super().__init__(path or hot.path, documented, methods=["POST"], **documentation)
        self.app = hot
        self.hot = hot


def check_live(lineup: Deployments, settings: Settings) -> None:
    """Raise `Unavailable` where an inference thread is dead or hangs."""
    if lineup.stuck_s() > settings.hang_s:
        raise Unavailable("an inference thread is dead or hangs")


def check_ready(lineup: Deployments, state: State) -> None:
    """Raise `Draining` or `Unavailable` where no request should come here."""
    if state.is_draining:
        raise Draining("on its way out")
    if not lineup.is_ready:
        raise Unavailable("no net is loaded")


async def _in_time(reading: Awaitable[T]) -> T:
    """Return what is read of a registry; raises `Unavailable` if it cannot be read, or is on a share that hangs."""
    try:
        return await asyncio.wait_for(reading, READ_S)
    except TimeoutError as error:
        raise Unavailable("the registry does not answer") from error
    except OSError as error:
        raise Unavailable(f"the registry cannot be read: {error.filename} {error.strerror}") from error


def add_routes(
    app: FastAPI, router: Router, lineup: Deployments, door: Door, follower: SyncLoop | None = None
) -> Callable[[], None]:
    """Add every route of the service to `app`; return what brings the gauges up to date."""
    settings, metrics, state = door.settings, door.metrics, door.state
    shadow = Shadow(lineup.slots, settings.shadow_share, metrics)
    hot = (
        (Predict(router, lineup, door, shadow), "/predict", schemas.PREDICT),
        (Retrieve(router, lineup, door), "/retrieve", schemas.RETRIEVE),
    )
    for handler, path, documentation in hot:
        route = HotRoute(path, handler, door)
        app.routes.append(DocumentedHotRoute(route, **documentation))

    def observe() -> None:
        lineup.observe()
        router.observe()
        if follower:
            follower.observe()
        door.admission.observe()
        metrics.ready.set(float(lineup.is_ready and not state.is_draining))

    _add_registry_routes(app, router, lineup, follower)
    articles.add_routes(app, lineup)
    console.add_routes(app)

    @app.get("/metrics", response_class=Response, responses=schemas.METRICS)
    async def scrape(request: Request) -> Response:
        """Prometheus text, or OpenMetrics when asked for."""
        observe()
        text, media_type = metrics.scrape(exposition_format(request.headers.get("accept", "")))
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

    return observe


def _add_registry_routes(app: FastAPI, router: Router, lineup: Deployments, follower: SyncLoop | None) -> None:
    inventory = Inventory(lineup.registry)
    refresh = SingleFlight(lineup.inventory_executor, inventory.refresh)

    @app.get("/models", response_model=schemas.Models, responses=schemas.UNAUTHORISED)
    async def models() -> Response:
        """Versions, aliases, cards, what is live since when, the breakers."""
        with suppress(Unavailable):  # what is known meanwhile, or from before, will do
            await _in_time(refresh())
        body = describe(router, lineup, follower, inventory.summaries())
        return Response(codec.encode_json(body), media_type="application/json")

    @app.get("/models/{name}/{version}/card", response_class=Response, responses=schemas.CARD)
    async def card(name: str, version: str) -> Response:
        """The model card of a version, in Markdown."""
        text = await _in_time(lineup.executor.run(card_text, lineup.registry, name, version))
        return Response(text, media_type="text/markdown; charset=utf-8")

    @app.get("/ledger", response_model=schemas.Ledger, responses=schemas.PAGED)
    async def moves(offset: articles.Offset = 0, limit: articles.Limit = 100) -> Response:
        """Who moved which alias, when and why, newest first."""
        body = await _in_time(lineup.executor.run(ledger, lineup.registry, offset, limit))
        return Response(codec.encode_json(body), media_type="application/json")
