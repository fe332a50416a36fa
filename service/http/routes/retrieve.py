"""POST /retrieve: a query, or a context that becomes one, in; passages out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

from lvm.errors import Invalid, Unavailable
from models.registry.alias import Alias
from models.retrieval.retriever import Hit, Search
from models.vectors import Floats
from service.deploy.deployments import Deployments
from service.engines.engine import Engine
from service.engines.router import Routed, Router
from service.engines.search import SearchAdapter, SearchResult
from service.engines.text import character_cost_rows
from service.http import checks, codec, octets
from service.http.codec import Decoded, Fields, JsonReader
from service.http.messages import JSON, Headers, Request, Response, Stages, media_type_of
from service.http.octets import OCTETS, Shape
from service.http.routes.common import (
    FallbackChain,
    MadeBy,
    embed,
    headers_of,
    mark_as_text,
    milliseconds,
    query_options,
    text_fields,
)
from service.overload.fairness import Slicer
from service.settings import Settings
from service.telemetry.metrics import Metrics


class Answer(NamedTuple):
    """What a plan found, what made its query if that was made, and the prediction if a net made it."""

    found: SearchResult
    made_by: MadeBy | None = None
    routed: Routed | None = None

    @property
    def stages(self) -> Stages:
        """The seconds of its stages."""
        if self.routed is None:
            return ("queue", self.found.queue_s), *self.found.stages
        prediction = self.routed.prediction
        return ("queue", self.found.queue_s + prediction.queue_s), ("infer", prediction.infer_s), *self.found.stages

    @property
    def degraded(self) -> str | None:
        """Why it was not searched in the index store; the reason of the net comes first."""
        return None if self.routed and self.routed.fallback_reason else self.found.degraded


@dataclass(frozen=True, slots=True)
class SearchByQuery:
    """The query is searched as it is."""

    engine: Engine[SearchAdapter]

    @property
    def shape(self) -> Shape:
        """The shape (D,) of a query."""
        return (self.engine.info.shape[1],)

    def check(self, options: Mapping[str, Any], *, is_text: bool) -> None:
        """Raise `Invalid` if an option cannot have the effect that it asks for."""
        if "model" in options:
            raise Invalid("a query is searched as it is: no model makes it", pointer="/model")
        if "exclude_context" in options and not is_text:
            raise Invalid("a query has no context that could be excluded", pointer="/exclude_context")
        _check_rerank(options, self.engine, by_towers=False)

    async def search(self, decoded: Decoded[Any], deadline: float) -> Answer:
        """Return the answer; raises as every engine."""
        return Answer(await self.engine.run(_search(decoded, decoded.rows[0]), deadline))


@dataclass(frozen=True, slots=True)
class SearchByTowers:
    """The query tower of the corpus makes the query of the context."""

    engine: Engine[SearchAdapter]

    @property
    def shape(self) -> Shape:
        """The shape (T, D) of a context."""
        return self.engine.info.shape

    def check(self, options: Mapping[str, Any], *, is_text: bool) -> None:
        """Raise `Invalid` if an option cannot have the effect that it asks for."""
        _check_rerank(options, self.engine, by_towers=True)

    async def search(self, decoded: Decoded[Any], deadline: float) -> Answer:
        """Return the answer; raises as every engine."""
        found = await self.engine.run(_search(decoded, None), deadline)
        model, version = found.searched.query_maker or ("", "")
        return Answer(found, MadeBy(model, version, Alias.RETRIEVER, None))


@dataclass(frozen=True, slots=True)
class SearchByNet:
    """A net predicts the query from the context."""

    engine: Engine[SearchAdapter]
    chain: FallbackChain
    router: Router
    deployments: Deployments

    @property
    def shape(self) -> Shape:
        """The shape (T, D) of a context."""
        return self.chain.shape

    def check(self, options: Mapping[str, Any], *, is_text: bool) -> None:
        """Raise `Invalid` if an option cannot have the effect that it asks for."""
        _check_rerank(options, self.engine, by_towers=False)

    async def search(self, decoded: Decoded[Any], deadline: float) -> Answer:
        """Return the answer; raises as every engine."""
        routed = await self.router.predict(decoded.rows, self.chain.engines, deadline)
        engine = self.deployments.require_retriever_engine()  # it may have been replaced meanwhile
        found = await engine.run(_search(decoded, routed.prediction.vectors[0]), deadline)
        prediction = routed.prediction
        made_by = MadeBy(prediction.model, prediction.version, routed.served_by, routed.fallback_reason)
        return Answer(found, made_by, routed)


QueryPlan = SearchByQuery | SearchByTowers | SearchByNet


class Retrieve:
    """Answers POST /retrieve."""

    def __init__(
        self, router: Router, deployments: Deployments, settings: Settings, metrics: Metrics, slicer: Slicer
    ) -> None:
        self._router = router
        self._deployments = deployments
        self._metrics = metrics
        self._slicer = slicer
        self._norm_policy = settings.norm_policy
        options: dict[str, checks.Check] = {
            "k": checks.whole(1, settings.max_k),
            "exclude": checks.wholes(10_000),
            "exclude_context": checks.flag,
            "rerank": checks.flag,
            "model": checks.text,
        }
        self._fields = Fields({"query": 0, "context": 0}, options, text_fields(settings))
        self._json = JsonReader(self._fields, max_rows=1)

    async def __call__(self, request: Request) -> Response:
        """Return the response; raises `ServiceError`."""
        engine = self._deployments.require_retriever_engine()
        decoded = codec.normalised(self._norm_policy, await self._decode(request, engine))
        request.set_rows(1 + character_cost_rows(decoded.text or ""))
        stages: Stages = (("decode", perf_counter() - request.started),)
        if decoded.text is not None:
            began = perf_counter()
            decoded = await self._embed(request, decoded, engine)
            stages = (*stages, ("embed", perf_counter() - began))
        plan = decoded.target
        plan.check(decoded.options, is_text=decoded.text is not None)
        answer = await plan.search(decoded, request.deadline)
        if answer.found.degraded:
            self._metrics.fallbacks.inc(answer.found.degraded)
        response = _respond(answer, (*stages, *answer.stages), decoded.text_info)
        return response if decoded.text is None else mark_as_text(response, decoded.text_info)

    async def _decode(self, request: Request, engine: Engine[SearchAdapter]) -> Decoded[QueryPlan]:
        def resolve(field: str, options: Mapping[str, Any]) -> QueryPlan:
            return self._plan(field, options, engine)

        header = request.headers.get(b"content-type", JSON)
        options = query_options(request, self._fields)
        if media_type_of(header, (JSON, OCTETS)) == JSON:
            decoded = self._json.read_at_once(request.body, resolve, options)
            if decoded is None:
                work = self._json.read_in_slices(request.body, resolve, options)
                decoded = await self._slicer.run(request.client, work)
            return decoded
        kind = octets.octet_type(header)
        field = "query" if _is_query(kind, len(request.body), engine.info.shape[1]) else "context"
        plan = resolve(field, options)
        rows = octets.read_octets(request.body, kind, plan.shape, 1, many=False)
        return Decoded(rows, field, options, plan)

    def _plan(self, field: str, options: Mapping[str, Any], engine: Engine[SearchAdapter]) -> QueryPlan:
        """Return the plan for a field; the towers make the query of a context, unless a net is named."""
        if field == "query":
            return SearchByQuery(engine)
        if "model" not in options and engine.model.retriever.query_maker is not None:
            return SearchByTowers(engine)
        engines = self._router.chain(options.get("model"), "realtime")
        chain = FallbackChain(engines, engines[0].info.shape)
        return SearchByNet(engine, chain, self._router, self._deployments)

    async def _embed(
        self, request: Request, decoded: Decoded[QueryPlan], engine: Engine[SearchAdapter]
    ) -> Decoded[QueryPlan]:
        """Return a text as vectors, with the plan for how it was read: as a context or a query."""
        encoder = engine.info.encoder
        length = decoded.target.shape[0]
        decoded = await embed(self._deployments, encoder, decoded, length, request, may_be_query=True)
        engine = self._deployments.require_retriever_engine()  # it may have been replaced meanwhile
        if engine.info.encoder != encoder:
            raise Unavailable("the corpus was replaced by one of another encoder")
        return decoded._replace(target=self._plan(decoded.field, decoded.options, engine))


def _search(decoded: Decoded[Any], query: Floats | None) -> Search:
    options = decoded.options
    context = decoded.rows[0] if decoded.field == "context" else None
    return Search(
        query,
        options.get("k", 10),
        options.get("exclude", ()),
        context if options.get("exclude_context", True) else None,
        context,
        options.get("rerank", True),
    )


def _check_rerank(options: Mapping[str, Any], engine: Engine[SearchAdapter], *, by_towers: bool) -> None:
    if not options.get("rerank"):
        return
    if not engine.model.retriever.reranks:
        raise Invalid("the corpus has no reranker", pointer="/rerank")
    if not by_towers:
        raise Invalid("only what the towers find for a context is reranked", pointer="/rerank")


def _is_query(kind: octets.OctetType, length: int, dim: int) -> bool:
    """Return whether octets are a query: by the rank of their shape, or without one by their length."""
    return length == kind.dtype.itemsize * dim if kind.shape is None else len(kind.shape) == 1


def _respond(answer: Answer, stages: Stages, text_info: Mapping[str, Any]) -> Response:
    began = perf_counter()
    body = codec.encode_json(_body(answer, stages, text_info))
    stages = (*stages, ("encode", perf_counter() - began))
    routed, degraded = answer.routed, answer.degraded
    return Response(
        body,
        JSON,
        _headers(answer),
        outcome="fallback" if degraded or (routed and routed.fallback_reason) else "ok",
        stages=stages,
        served_by=routed.served_by if routed else Alias.RETRIEVER,
    )


def _body(answer: Answer, stages: Stages, text_info: Mapping[str, Any]) -> dict[str, Any]:
    searched, degraded = answer.found.searched, answer.degraded
    return {
        "results": [_result(hit) for hit in answer.found.hits],
        **text_info,
        "corpus": searched.name,
        "corpus_version": searched.version,
        "is_exact": searched.is_exact,
        "reranked": any(stage == "rerank" for stage, _ in stages),
        **(answer.made_by._asdict() if answer.made_by else {}),
        **({"fallback_reason": degraded} if degraded else {}),
        "timing_ms": milliseconds(stages),
    }


def _headers(answer: Answer) -> Headers:
    headers: Headers = []
    if answer.routed and answer.made_by:
        prediction = answer.routed.prediction
        headers += headers_of(answer.made_by, prediction.batch_rows, prediction.replica)
    elif answer.made_by:
        headers += headers_of(answer.made_by)
    if answer.found.searched.replica:
        headers.append((b"x-replica", answer.found.searched.replica.encode()))
    if answer.degraded:
        headers.append((b"x-fallback-reason", answer.degraded.encode()))
    return headers


def _result(hit: Hit) -> dict[str, Any]:
    chunk = hit.chunk
    return {
        "id": hit.row,
        "score": hit.score,
        "article": chunk.article,
        "title": chunk.title,
        "position": chunk.position,
        "text": chunk.text,
        **chunk.fields(),
    }
