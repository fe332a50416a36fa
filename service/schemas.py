"""What OpenAPI shows: the bodies of the routes and of errors. Documentation only; the wire does the checking."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

Vector = list[float]
Context = list[Vector]
TEXT = Field(None, description="A passage, cut into chunks as in training, of which the last T are the context.")
TEXTS = Field(None, description="The T chunks of a context, oldest first, as text.")
READ_AS = Field(None, description="What text was read as.")
CHUNKS = Field(None, description="Where `text` was given, the chunks of it that count.")


class Timing(BaseModel):
    """Milliseconds a request spent, by stage."""

    decode: float
    queue: float
    infer: float | None = None
    search: float | None = None
    rerank: float | None = None
    embed: float | None = Field(None, description="Text to vectors, the encoder's queue included.")


class MadeBy(BaseModel):
    """Who made an answer."""

    model: str
    version: str
    served_by: Literal["primary", "fallback"] = Field(description="The alias that answered.")
    fallback_reason: str | None = Field(description="Why the first engine did not answer, or null.")
    timing_ms: Timing


class PredictRequest(BaseModel):
    """One context or many; every number finite in float32; or each context as base64 of its bytes."""

    context: Context | str | None = Field(None, description="T vectors of D numbers, oldest first.")
    contexts: list[Context | str] | None = None
    text: str | None = TEXT
    texts: list[str] | None = TEXTS
    model: str | None = Field(None, description="An alias or a model name; named, it is the only one tried.")
    profile: Literal["realtime", "batch"] = "realtime"
    encoding: Literal["float", "base64"] = "float"


class PredictResponse(MadeBy):
    """The next vector of one context, or the next vectors of many; unit length."""

    vector: Vector | str | None = None
    vectors: list[Vector | str] | None = None
    read_as: Literal["context"] | None = READ_AS
    chunks: list[str] | None = CHUNKS


class RetrieveRequest(BaseModel):
    """A query vector, or a context that becomes one; in vectors or in words."""

    query: Vector | str | None = None
    context: Context | str | None = None
    text: str | None = Field(
        None, description="A passage of T chunks or more, read as for /predict; or a query of up to 254 word-pieces."
    )
    texts: list[str] | None = TEXTS
    k: int = Field(10, ge=1)
    exclude: list[int] = Field([], description="Ids that must not come back.")
    exclude_context: bool = Field(True, description="Leave out the chunks that are the context itself.")
    rerank: bool | None = Field(
        None,
        description="Order the best passages anew by how they lie to the context and to each other. Default: where the "
        "corpus has a reranker and its own towers made the query of a context.",
    )
    model: str | None = Field(
        None, description="An alias or a model name whose next vector is the query, instead of what the towers make."
    )


class Result(BaseModel):
    """One passage."""

    id: int
    score: float
    article: int
    title: str
    position: int
    text: str | None


class RetrieveResponse(BaseModel):
    """The best passages, best first; who made the query where a context was given.

    `served_by` is `retriever` where the towers of the corpus made it, else the alias of the net that did. Reranked, the
    order is the reranker's, and scores, inner products as always, need not fall.
    `fallback_reason` is the net's, or why the corpus was searched here and not in its Milvus.
    """

    results: list[Result]
    read_as: Literal["context", "query"] | None = READ_AS
    chunks: list[str] | None = CHUNKS
    corpus: str
    corpus_version: str
    is_exact: bool
    reranked: bool
    model: str | None = None
    version: str | None = None
    served_by: str | None = None
    fallback_reason: str | None = None
    timing_ms: Timing


class Tensor(BaseModel):
    """A tensor of the Open Inference Protocol; binary data follows the JSON."""

    name: str
    datatype: Literal["FP32"]
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class InferRequest(BaseModel):
    """One input, `context`; `outputs` may ask for binary data."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[Tensor]
    outputs: list[dict[str, Any]] = []


class InferResponse(BaseModel):
    """One output, `vector`."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any]
    outputs: list[Tensor]


class Problem(BaseModel):
    """An error, RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    pointer: str | None = Field(None, description="JSON pointer to what is wrong.")


class Alias(BaseModel):
    """What an alias serves."""

    id: str
    sha256: str | None = None
    runtime: str | None = None
    since: str
    breaker: str | None
    refused: dict[str, str | None] | None


class Encoder(BaseModel):
    """What turns text into vectors, or what is missing to do so."""

    name: str | None
    missing: str | None


class Store(BaseModel):
    """The object store that the registry follows."""

    url: str
    is_stale: bool = Field(description="Whether it did not answer last; what is served is what was mirrored before.")
    answered: str | None = Field(description="When it last did.")
    error: str | None


class Models(BaseModel):
    """Versions, aliases, cards."""

    aliases: dict[str, Alias]
    encoder: Encoder
    store: Store | None = None
    versions: list[dict[str, Any]]


class Entry(BaseModel):
    """One article of the corpus."""

    article: int
    title: str
    chunks: int = Field(description="How many passages it has.")


class Articles(BaseModel):
    """The articles of the corpus that was asked for, by id."""

    corpus: str
    corpus_version: str
    total: int = Field(description="How many articles match, on all pages.")
    articles: list[Entry]


class Passage(BaseModel):
    """One passage of an article, with its vector."""

    id: int = Field(description="The id that /retrieve answers with.")
    position: int
    text: str | None
    vector: str = Field(description="Base64 of D little-endian float32 numbers.")


class Article(BaseModel):
    """One article in reading order; T passages in a row are a context."""

    corpus: str
    corpus_version: str
    article: int
    title: str
    encoder: str
    dim: int
    context_length: int
    chunks: list[Passage]


class Move(BaseModel):
    """One line of the ledger: who moved an alias, when, from where to where, and why."""

    time: str
    who: str
    alias: str
    action: Literal["promote", "rollback"]
    before: str | None
    after: str
    why: str


class Ledger(BaseModel):
    """Moves of the aliases, newest first."""

    total: int
    moves: list[Move]


def _problem(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": description, "content": {"application/problem+json": {"schema": schema}}}


PROBLEMS: dict[int | str, dict[str, Any]] = {503: {"model": Problem, **_problem("Not now; Retry-After says when.")}}
UNAUTHORISED: dict[int | str, dict[str, Any]] = {401: _problem("A token is wanted, and is missing or unknown.")}
_HOT: dict[int | str, dict[str, Any]] = {
    **UNAUTHORISED,
    400: _problem("The bytes are not what their media type says."),
    404: _problem("No model of that name is served."),
    408: _problem("The headers or the body came too slowly."),
    413: _problem("The body, or the number of rows, is over the limit."),
    415: _problem("Neither JSON nor octet-stream of float32 or float16."),
    422: _problem("Not a context, query or option."),
    429: _problem("This client holds its share of what may be in flight; Retry-After says when to come back."),
    503: _problem("Overloaded, draining or failed; Retry-After says when to come back."),
    504: _problem("The deadline passed."),
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {**UNAUTHORISED, 404: _HOT[404]}
CARD: dict[int | str, dict[str, Any]] = {
    **UNAUTHORISED,
    200: {"content": {"text/markdown": {"schema": {"type": "string"}}}},
    404: _problem("No such version."),
}
PAGED: dict[int | str, dict[str, Any]] = {**UNAUTHORISED, 422: _problem("A page that is none.")}
ARTICLES: dict[int | str, dict[str, Any]] = {
    **UNAUTHORISED,
    404: _problem("The corpus has no such article."),
    422: _problem("An id or a page that is none."),
    503: _problem("No corpus is promoted as `retriever`."),
}
_OCTETS = {
    "schema": {
        "type": "string",
        "format": "binary",
        "description": "Little-endian float32 rows; float16 with the parameter `dtype=float16` in the media type.",
    }
}


def _body(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # what they name, responses name too
    content = {
        "application/json": {"schema": schema},
        "application/octet-stream": _OCTETS,
    }
    return {"requestBody": {"required": True, "content": content}}


PREDICT: dict[str, Any] = {
    "summary": "Predict the next vector of each context.",
    "response_model": PredictResponse,
    "responses": {200: {"content": {"application/octet-stream": _OCTETS}}, **_HOT},
    "openapi_extra": _body(PredictRequest),
}
INFER: dict[str, Any] = {
    "summary": "Open Inference Protocol v2: input `context` FP32 [-1, T, D], output `vector` FP32 [-1, D].",
    "response_model": InferResponse,
    "responses": _HOT,
    "openapi_extra": {
        **_body(InferRequest),
        "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
    },
}
RETRIEVE: dict[str, Any] = {
    "summary": "Find the passages nearest to a query, or to what a context predicts.",
    "response_model": RetrieveResponse,
    "responses": _HOT,
    "openapi_extra": _body(RetrieveRequest),
}
