"""POST /retrieve: queries, or contexts that become queries, in; passages out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

from lvm.errors import Invalid, TooLarge, Unavailable
from models.registry.alias import Alias
from models.retrieval.retriever import Hit, Search
from models.vectors import Floats
from service.deploy.deployments import Deployments
from service.deploy.live import Live
from service.engines.authors import Author
from service.engines.engine import Engine
from service.engines.pairing import Pairing
from service.engines.router import FallbackChain, Routed, Router
from service.engines.search import SearchAdapter, SearchResult
from service.engines.text import EmbedInput, character_cost_rows
from service.http import checks, codec, octets
from service.http.codec import Decoded, Fields, JsonReader
from service.http.messages import JSON, Headers, Request, Response, Stages, media_type_of
from service.http.octets import OCTETS, Shape
from service.http.routes.common import (
    MadeBy,
    embed,
    headers_of,
    mark_as_text,
    milliseconds,
    not_fully_read,
    query_options,
    text_fields,
)
from service.http.routes.embed import encode
from service.overload.fairness import Slicer, Work
from service.settings import Settings
from service.telemetry.metrics import Metrics

# Searches with these options alone, and with so many results at least, are scored later.
PLAIN = {"k", "model", "rerank"}
MIN_K = 5
DEFAULT_K = 10
# hits and rows to exclude of all queries of a request together
MAX_FOUND = 50_000
# hits that are encoded in one go, in a fraction of a millisecond
SLICE_HITS = 200


class Answer(NamedTuple):
    """What a plan found, what made its query if that was made, and the prediction if a net made it."""

    found: SearchResult
    made_by: MadeBy | None = None
    routed: Routed | None = None

    @property
    def stages(self) -> Stages:
        """The seconds of its stages."""
        if self.routed is None:
            return {"queue": self.found.queue_s, **dict(self.found.stages)}
        prediction = self.routed.prediction
        queue_s = self.found.queue_s + prediction.queue_s
        return {"queue": queue_s, "infer": prediction.infer_s, **dict(self.found.stages)}

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
        return Answer(await self.engine.run(_searches(decoded, decoded.rows), deadline))


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
        found = await self.engine.run(_searches(decoded, None), deadline)
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
        found = await engine.run(_searches(decoded, routed.prediction.vectors), deadline)
        prediction = routed.prediction
        made_by = MadeBy(prediction.model, prediction.version, routed.served_by, routed.fallback_reason)
        return Answer(found, made_by, routed)


QueryPlan = SearchByQuery | SearchByTowers | SearchByNet


class Retrieve:
    """Answers POST /retrieve."""

    def __init__(
        self,
        router: Router,
        deployments: Deployments,
        settings: Settings,
        metrics: Metrics,
        slicer: Slicer,
        live: Live | None = None,
    ) -> None:
        self._router = router
        self._live = live
        self._deployments = deployments
        self._metrics = metrics
        self._slicer = slicer
        self._norm_policy = settings.norm_policy
        options: dict[str, checks.Check] = {
            "k": checks.whole(1, settings.max_k),
            "exclude": checks.wholes(10_000),
            "exclude_context": checks.flag,
            "filter": checks.search_filter,
            "mmr": checks.share,
            "rerank": checks.flag,
            "model": checks.text,
            "read_as": checks.one_of("query"),
        }
        vectors = {"query": 0, "context": 0, "queries": 1, "contexts": 1}
        self._fields = Fields(vectors, options, text_fields(settings))
        self._max_rows = settings.max_rows
        self._json = JsonReader(self._fields, settings.max_rows)

    async def __call__(self, request: Request) -> Response:
        """Return the response; raises `ServiceError`."""
        engine = self._deployments.require_retriever_engine()
        decoded = codec.normalised(self._norm_policy, await self._decode(request, engine))
        request.set_rows(len(decoded.rows) or 1 + character_cost_rows(decoded.text or ""))
        self._check_counts(decoded)
        stages = {"decode": perf_counter() - request.started}
        if decoded.text is not None:
            began = perf_counter()
            decoded = await self._embed(request, decoded, engine)
            stages["embed"] = perf_counter() - began
        plan = decoded.target
        plan.check(decoded.options, is_text=decoded.text is not None and "read_as" not in decoded.options)
        answer = await plan.search(decoded, request.deadline)
        if self._live and answer.made_by:
            _score_later(self._live.searches, decoded, answer, answer.made_by)
        if answer.found.degraded:
            self._metrics.fallbacks.inc(answer.found.degraded)
        response = await self._respond(request, decoded, answer, stages | answer.stages)
        return response if decoded.text is None else mark_as_text(response, decoded.text_info)

    def _check_counts(self, decoded: Decoded[Any]) -> None:
        """Raise `TooLarge` for too many texts, or if many queries search for too many rows together."""
        texts = decoded.text if "read_as" in decoded.options and isinstance(decoded.text, list) else []
        if len(texts) > self._max_rows:
            raise TooLarge(f"{len(texts)} texts; expected at most {self._max_rows}", pointer="/texts")
        count = len(texts) or len(decoded.rows)
        rows = count * (decoded.options.get("k", DEFAULT_K) + len(decoded.options.get("exclude", ())))
        if (texts or decoded.answers_many) and rows > MAX_FOUND:
            detail = f"{count} times k and the ids to exclude are {rows}; expected at most {MAX_FOUND}"
            raise TooLarge(detail, pointer="/k")

    async def _respond(self, request: Request, decoded: Decoded[QueryPlan], answer: Answer, stages: Stages) -> Response:
        began = perf_counter()
        hits = answer.found.hits
        results: Any = [_result(hit) for hit in hits[0]]
        if decoded.answers_many:
            results = await self._slicer.run(request.client, _encode_each(hits))
        body = codec.encode_json({"results": results, **_members(answer, stages, decoded.text_info)})
        stages["encode"] = perf_counter() - began
        routed, degraded = answer.routed, answer.degraded
        return Response(
            body,
            JSON,
            _headers(answer),
            outcome="fallback" if degraded or (routed and routed.fallback_reason) else "ok",
            stages=stages,
            served_by=routed.served_by if routed else Alias.RETRIEVER,
        )

    async def _decode(self, request: Request, engine: Engine[SearchAdapter]) -> Decoded[QueryPlan]:
        def resolve(field: str, options: Mapping[str, Any]) -> QueryPlan:
            if "read_as" not in options:
                return self._plan(field, options, engine)
            if field in self._fields.vectors:
                raise Invalid("only text can be read as a query: vectors are what their field says", pointer="/read_as")
            return SearchByQuery(engine)

        header = request.headers.get(b"content-type", JSON)
        media_type = media_type_of(header, (JSON, OCTETS))
        options = query_options(request, self._fields)
        if media_type == JSON:
            decoded = self._json.read_at_once(request.body, resolve, options)
            if decoded is None:
                work = self._json.read_in_slices(request.body, resolve, options)
                decoded = await self._slicer.run(request.client, work)
            return decoded
        kind = octets.octet_type(header)
        field = _octet_field(kind, len(request.body), engine.info.shape[1])
        plan = resolve(field, options)
        item = (1, *plan.shape) if field == "queries" else plan.shape
        rows = octets.read_octets(request.body, kind, item, self._max_rows, many=field != "query")
        is_many = kind.shape is not None and len(kind.shape) == 3
        return Decoded(rows.reshape(-1, *plan.shape), field, options, plan, is_many)

    def _plan(self, field: str, options: Mapping[str, Any], engine: Engine[SearchAdapter]) -> QueryPlan:
        """Return the plan for a field; the towers make the query of a context, unless a net is named."""
        if field in ("query", "queries"):
            return SearchByQuery(engine)
        if "model" not in options and engine.model.retriever.query_maker is not None:
            return SearchByTowers(engine)
        chain = self._router.chain(options.get("model"), "realtime")
        return SearchByNet(engine, chain, self._router, self._deployments)

    async def _embed(
        self, request: Request, decoded: Decoded[QueryPlan], engine: Engine[SearchAdapter]
    ) -> Decoded[QueryPlan]:
        """Return a text as vectors, with the plan for how it was read: as a context or a query."""
        encoder = engine.info.encoder
        if "read_as" in decoded.options:
            decoded = await self._embed_queries(request, decoded, encoder)
        else:
            length = decoded.target.shape[0]
            decoded = await embed(self._deployments, encoder, decoded, length, request, may_be_query=True)
        engine = self._deployments.require_retriever_engine()  # it may have been replaced meanwhile
        if engine.info.encoder != encoder:
            raise Unavailable("the corpus was replaced by one of another encoder")
        return decoded._replace(target=self._plan(decoded.field, decoded.options, engine))

    async def _embed_queries(self, request: Request, decoded: Decoded[QueryPlan], encoder: str) -> Decoded[QueryPlan]:
        """Return a text, or each of many, as the vector of a query `(n, D)`."""
        text = decoded.text
        assert text is not None
        is_many = isinstance(text, list)
        texts = text if isinstance(text, list) else [text]
        pointers = [f"/texts/{at}" for at in range(len(texts))] if is_many else ["/text"]
        target = self._deployments.encoder.require_engine(encoder, f"/{decoded.field}")
        read = await encode(target, EmbedInput(texts, pointers, request.client), request)
        info = {"read_as": "query", **({} if is_many else {"chunks": read.chunks}), **not_fully_read(read)}
        field = "queries" if is_many else "query"
        return decoded._replace(rows=read.vectors, field=field, answers_many=is_many, text_info=info)


def _score_later(searches: Pairing, decoded: Decoded[QueryPlan], answer: Answer, made_by: MadeBy) -> None:
    """Keep the rows that were found for contexts until later ones show what came next.

    Rows that the caller chose by a filter, or too few of them, say nothing about the search.
    """
    contexts = decoded.rows
    if decoded.options.get("k", DEFAULT_K) < MIN_K or not PLAIN.issuperset(decoded.options):
        searches.arrive(contexts)
        return
    searched = answer.found.searched
    author = Author(Alias.RETRIEVER, f"{searched.name}/{searched.version}", f"{made_by.model}/{made_by.version}")
    searches.add(contexts, answer.found.hits, author)


def _searches(decoded: Decoded[Any], queries: Floats | None) -> list[Search]:
    """Return the search of each query `(n, D)`, or of each context if the towers make its query."""
    options = decoded.options
    contexts: list[Floats | None] = [None] * len(decoded.rows)
    if decoded.field in ("context", "contexts"):
        contexts = list(decoded.rows)
    return [
        Search(
            query,
            options.get("k", DEFAULT_K),
            options.get("exclude", ()),
            context if options.get("exclude_context", True) else None,
            context,
            options.get("rerank", True),
            options.get("filter") or None,
            options.get("mmr"),
        )
        for query, context in zip([None] * len(contexts) if queries is None else queries, contexts, strict=True)
    ]


def _check_rerank(options: Mapping[str, Any], engine: Engine[SearchAdapter], *, by_towers: bool) -> None:
    if not options.get("rerank"):
        return
    if not engine.model.retriever.reranks:
        raise Invalid("the corpus has no reranker", pointer="/rerank")
    if not by_towers:
        raise Invalid("only what the towers find for a context is reranked", pointer="/rerank")


def _octet_field(kind: octets.OctetType, length: int, dim: int) -> str:
    """Return the field of JSON that octets stand for: by their shape, or without one by their length."""
    if kind.shape is None:
        return "query" if length == kind.dtype.itemsize * dim else "context"
    if len(kind.shape) == 3:
        return "queries" if kind.shape[1] == 1 else "contexts"
    return "query" if len(kind.shape) == 1 else "context"


def _encode_each(found: list[list[Hit]]) -> Work[list[Any]]:
    """Return the results of each query as JSON; yield after some hundred hits."""
    parts = []
    count = 0
    for hits in found:
        parts.append(codec.encode_part([_result(hit) for hit in hits]))
        count += len(hits)
        if count > SLICE_HITS:
            count = 0
            yield
    return parts


def _members(answer: Answer, stages: Stages, text_info: Mapping[str, Any]) -> dict[str, Any]:
    searched, degraded = answer.found.searched, answer.degraded
    return {
        **text_info,
        "corpus": searched.name,
        "corpus_version": searched.version,
        "is_exact": searched.is_exact,
        "reranked": answer.found.reranked,
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
        **({} if hit.rerank_score is None else {"rerank_score": hit.rerank_score}),
        "article": chunk.article,
        "title": chunk.title,
        "position": chunk.position,
        "text": chunk.text,
        **chunk.fields(),
    }
