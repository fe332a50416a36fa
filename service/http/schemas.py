"""What OpenAPI shows: the bodies of the routes and of errors. Documentation only; the wire does the checking."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lvm import errors
from lvm.errors import Invalid, Malformed, ServiceError, Unauthorised, Unavailable, UnknownModel
from models.registry.alias import PREDICTORS
from models.registry.registry import Move
from models.text.encoder import BUNDLED_MODEL

Vector = list[float]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Query = Annotated[list[Number], Field(min_length=1)]
Context = Annotated[list[Query], Field(min_length=1)]
Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Id = Annotated[int, Field(ge=0, le=2**53)]
FilterValue = Annotated[str, Field(max_length=1000)] | float | bool
PLACE = Field(description="Place among `texts` or `chunks`, from 0.")


class Truncated(BaseModel):
    """A chunk that is too long for the encoder: the vector does not cover the word-pieces beyond those it read."""

    index: int = PLACE
    word_pieces: int
    read: int


class Unread(BaseModel):
    """A chunk with words that the encoder does not know: the vector does not cover them."""

    index: int = PLACE
    share: float = Field(description="Share of its letters, digits and symbols; over 0.8 is refused.")


class TextInfo(BaseModel):
    """How a text was read."""

    read_as: Literal["context", "partial_context", "query"] | None = Field(
        None, description="What text was read as. A partial context is one of fewer than T chunks."
    )
    chunks: list[str] | None = Field(None, description="If `text` was given, the chunks of it that count.")
    truncated: list[Truncated] | None = Field(None, description="Chunks that were not read to their end, if any.")
    unread: list[Unread] | None = Field(None, description="Chunks with unknown words, if there are any.")


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
    served_by: str = Field(description="The alias that answered.", json_schema_extra={"enum": [*PREDICTORS]})
    fallback_reason: str | None = Field(description="Why the first engine did not answer, or null.")
    timing_ms: Timing


class RequestPart(BaseModel):
    """What a request holds: nothing but what is named here; null is absent."""

    model_config = ConfigDict(extra="forbid")


class TextRequest(RequestPart):
    """What requests in text share."""

    texts: list[Text] | None = Field(
        None, min_length=1, description="The 2 to T chunks of a context, oldest first, as text."
    )


class PredictRequest(TextRequest):
    """Exactly one of `context`, `contexts`, `text` and `texts`, and options; null is absent."""

    context: Context | Base64 | None = Field(
        None, description="T vectors of D numbers, oldest first; or the base64 of their float32 bytes."
    )
    contexts: list[Context | Base64] | None = Field(
        None, min_length=1, description="Many contexts, at most LVM_MAX_ROWS."
    )
    text: Text | None = Field(
        None, description="A passage of 2 chunks or more, cut as in training, of which the last T are the context."
    )
    model: Name | None = Field(None, description="An alias or a model name; all but `primary` are the only one tried.")
    profile: Literal["realtime", "batch"] | None = Field(
        None,
        description="Which net is asked first: the primary (realtime, the default) or the fallbacks (batch). Refused "
        "beside a model that is the only one tried.",
    )
    encoding: Literal["float", "base64"] | None = Field(
        None, description="How vectors stand in the answer. Default: float. If it is given, the answer is JSON."
    )


class PredictResponse(TextInfo, MadeBy):
    """The next vector of one context, or the next vectors of many; unit length."""

    vector: Vector | str | None = None
    vectors: list[Vector | str] | None = None


class RetrieveRequest(TextRequest):
    """Exactly one of `query`, `queries`, `context`, `contexts`, `text` and `texts`, and options; null is absent."""

    query: Query | Base64 | None = Field(None, description="D numbers, or the base64 of their float32 bytes.")
    queries: list[Query | Base64] | None = Field(None, min_length=1, description="Many queries, at most LVM_MAX_ROWS.")
    context: Context | Base64 | None = Field(None, description="As for /predict; it becomes a query.")
    contexts: list[Context | Base64] | None = Field(
        None, min_length=1, description="Many contexts, at most LVM_MAX_ROWS."
    )
    text: Text | None = Field(
        None, description="A passage of T chunks or more, or of over 254 word-pieces, read as for /predict; or a query."
    )
    read_as: Literal["query"] | None = Field(
        None, description="Read `text` as a query however long it is, or each of `texts` as a query of its own."
    )
    k: int | None = Field(10, ge=1, description="How many passages to return, at most LVM_MAX_K.")
    exclude: list[Id] | None = Field(None, max_length=10_000, description="Ids that must not come back.")
    exclude_context: bool | None = Field(
        None,
        description="Leave out the chunks that are the context itself. Default: true. Refused beside a `query`.",
    )
    filter: dict[str, FilterValue | list[FilterValue]] | None = Field(
        None,
        max_length=16,
        description="Find only passages that have one of these values in each field: `article`, or a metadata field of "
        "the corpus. At most 1000 values.",
    )
    mmr: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Maximal marginal relevance: the weight of relevance, the rest is that of being unlike the results "
        "before. 1 is the order without it.",
    )
    rerank: bool | None = Field(
        None,
        description="Rerank the best passages by their relation to the context and to each other. Default: if the "
        "corpus has a reranker and its own towers made the query of a context. `true` is refused if they did not.",
    )
    model: Name | None = Field(
        None,
        description="An alias or a model name whose next vector is the query, instead of what the towers make. "
        "Refused beside a query.",
    )


class EmbedRequest(RequestPart):
    """Exactly one of `text` and `texts`, and options; null is absent."""

    texts: list[Text] | None = Field(None, min_length=1, description="Texts, at most LVM_MAX_ROWS; each gets a vector.")
    text: Text | None = Field(None, description="One text; or a passage, if `chunks` is true.")
    chunks: bool | None = Field(
        None,
        description="Cut `text` into chunks as in training, and return the vector of each. Default: false. Refused "
        "beside `texts`.",
    )
    model: Name | None = Field(
        None,
        description="The encoder's name, or an alias or a model name, which is refused if it reads vectors of another "
        "encoder.",
    )
    encoding: Literal["float", "base64"] | None = Field(
        None, description="How vectors stand in the answer. Default: float. If it is given, the answer is JSON."
    )


class EmbedTiming(BaseModel):
    """Milliseconds a request spent, by stage."""

    decode: float
    queue: float
    embed: float


class EmbedResponse(BaseModel):
    """The vectors of texts, or of the chunks of a passage, in their order; unit length."""

    vectors: list[Vector | str]
    encoder: str
    dimensions: int = Field(description="D, the length of a vector.")
    chunks: list[str] | None = Field(None, description="The chunks of the passage, if it was cut.")
    truncated: list[bool] = Field(description="Whether each text is longer than what the encoder reads.")
    unread: list[float] = Field(description="Share of each text in words that the encoder does not know.")
    timing_ms: EmbedTiming


class OpenAIEmbeddingsRequest(RequestPart):
    """A text, or many; null is absent."""

    input: Text | list[Text] = Field(description="One text, or at most LVM_MAX_ROWS. Arrays of tokens are refused.")
    model: Name = Field(description="The encoder's name, or an alias or a model name that reads its vectors.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="How vectors stand in the answer: numbers, or the base64 of their float32 bytes."
    )
    dimensions: int | None = Field(None, ge=1, description="The length of vectors, if it is given.")
    user: Name | None = Field(None, description="Has no effect.")


class OpenAIEmbedding(BaseModel):
    """The vector of one text; unit length."""

    object: Literal["embedding"]
    index: int
    embedding: Vector | str


class OpenAIUsage(BaseModel):
    """Word-pieces that were read."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddings(BaseModel):
    """The vectors of texts, in their order."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIModel(BaseModel):
    """The encoder."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenAIModels(BaseModel):
    """The encoder, if there is one."""

    object: Literal["list"]
    data: list[OpenAIModel]


class Searched(BaseModel):
    """The corpus that answers."""

    corpus: str
    corpus_version: str


class FoundPassage(BaseModel):
    """What every answer says of a passage."""

    id: int = Field(description="The id that `exclude` takes.")
    position: int
    text: str | None
    source_id: str | None = Field(None, description="Only if the corpus has ids: that of the passage in its source.")
    metadata: dict[str, str | float | bool] | None = Field(None, description="Only if the corpus has metadata.")


class Result(FoundPassage):
    """One passage."""

    score: float = Field(description="Inner product with the query.")
    rerank_score: float | None = Field(
        None,
        description="The reranker's score, if it judged the passage: higher is better, in one list of results.",
    )
    article: int
    title: str


class RetrieveResponse(TextInfo, Searched):
    """The best passages, best first, a list for each of many; and what made the query, if a context was given.

    `served_by` is `retriever` if the towers of the corpus made it, else the alias of the net that did. Reranked, the
    order is the reranker's, and scores, inner products as always, need not fall.
    `fallback_reason` is the net's, or why the corpus was searched here and not in its Milvus.
    """

    results: list[Result] | list[list[Result]]
    is_exact: bool
    reranked: bool
    model: str | None = None
    version: str | None = None
    served_by: str | None = None
    fallback_reason: str | None = None
    timing_ms: Timing


class InputParameters(RequestPart):
    """Parameters of an input."""

    binary_data_size: int | None = Field(None, ge=0, le=2**53, description="Bytes of it that follow the JSON.")


class InputTensor(RequestPart):
    """The contexts; in `data`, nested or flat in row-major order, or as bytes that follow the JSON."""

    name: Literal["context"]
    datatype: Literal["FP32"]
    shape: list[int] = Field(min_length=3, max_length=3, description="[n, T, D].")
    parameters: InputParameters | None = None
    data: list[Number] | list[Context] | None = None


class OutputParameters(RequestPart):
    """Parameters of a requested output."""

    binary_data: bool | None = Field(None, description="Whether the vectors follow the JSON as bytes.")


class RequestedOutput(RequestPart):
    """The output that is asked for; the only one is `vector`."""

    name: Literal["vector"] | None = None
    parameters: OutputParameters | None = None


class InferParameters(RequestPart):
    """Parameters of a request. Those that are not supported may only have the value that has no effect."""

    binary_data_output: bool | None = Field(None, description="As `binary_data`, which overrides it, of all outputs.")
    timeout: int | None = Field(
        None,
        ge=0,
        le=3_600_000_000,
        description="Microseconds to answer; 0: the default. Refused beside the header X-Request-Timeout-Ms.",
    )
    priority: Literal[0] | None = Field(None, description="Not supported.")
    sequence_id: Literal[0] | Literal[""] | None = Field(None, description="Not supported.")
    sequence_start: Literal[False] | None = Field(None, description="Not supported.")
    sequence_end: Literal[False] | None = Field(None, description="Not supported.")


class InferRequest(RequestPart):
    """One input, `context`, and at most one output, `vector`; null is absent."""

    id: str | None = Field(None, max_length=200, description="Comes back in the answer.")
    model_name: str | None = Field(None, description="The model of the path, if it is given.")
    parameters: InferParameters | None = None
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] | None = Field(None, max_length=1)


class OutputTensor(BaseModel):
    """The next vectors; in `data`, flat in row-major order, or as the `binary_data_size` bytes that follow the JSON."""

    name: Literal["vector"]
    datatype: Literal["FP32"]
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: Vector | None = None


class InferResponse(BaseModel):
    """One output, `vector`, and who made it."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str]
    outputs: list[OutputTensor]


class ServerMetadata(BaseModel):
    """The server, and the extensions of the protocol that it has."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """An input or output; -1 is any number of rows."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model reads and answers."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """That a model is served."""

    name: str
    ready: bool


class TensorConfig(BaseModel):
    """An input or output of one row."""

    name: str
    data_type: str
    dims: list[int]


class ModelConfig(BaseModel):
    """Inputs and outputs of a model, as in Triton."""

    name: str
    platform: str
    max_batch_size: int = Field(description="The most rows of a request.")
    input: list[TensorConfig]
    output: list[TensorConfig]


class IndexRequest(RequestPart):
    """What the index holds; all that is there is ready."""

    ready: bool | None = None


class IndexEntry(BaseModel):
    """A name that a model can be asked by."""

    name: str
    version: str
    state: str
    reason: str


class LnspOptions(RequestPart):
    """Options that may only have the value that every answer has."""

    temperature: Literal[1] | None = Field(None, description="The nets have no temperature.")
    normalize: Literal[True] | None = Field(None, description="Every predicted vector has unit length.")


class LnspRequest(LnspOptions):
    """One context, and options; null is absent."""

    context_vectors: Context = Field(description="T vectors of D numbers, oldest first.")


class LnspBatchRequest(LnspOptions):
    """Contexts, and options; null is absent."""

    context_vectors: list[Context] = Field(min_length=1, description="Many contexts, at most LVM_MAX_ROWS.")


class LnspAnswer(BaseModel):
    """What made an answer, and how long it took."""

    latency_ms: float = Field(description="Milliseconds from the last byte of the request.")
    model_type: str = Field(description="The name of the model that answered.")
    device: Literal["cpu", "cuda", "mps"]


class LnspResponse(LnspAnswer):
    """The next vector of a context; unit length."""

    predicted_vector: Vector
    confidence: float = Field(description="Mean cosine of the predicted vector to the vectors of its context.")


class LnspBatchResponse(LnspAnswer):
    """The next vectors of contexts, in their order; unit length."""

    predicted_vectors: list[Vector]
    confidences: list[float] = Field(description="Of each predicted vector, as `confidence` of /infer.")


class LnspHealth(BaseModel):
    """That a net is loaded and requests may come."""

    status: Literal["healthy"]
    model_loaded: Literal[True]


class LnspInfo(BaseModel):
    """The net that is asked first."""

    model_type: str = Field(description="Its name.")
    version: str
    architecture: str | None
    parameters: int | None
    dim: int
    context_length: int
    encoder: str
    device: Literal["cpu", "cuda", "mps"]


class OpenAIError(BaseModel):
    """An error as OpenAI's clients read it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The pointer, without its slash.")
    code: str


class Problem(BaseModel):
    """An error, RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    error: str | OpenAIError | None = Field(
        None, description="Below /v2 the detail again, below /v1 an object: what clients of these protocols read."
    )
    request_id: str
    pointer: str | None = Field(None, description="JSON pointer to what is wrong in the body or the query string.")


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


class LiveScore(BaseModel):
    """How near the predictions of a version were to the true next vectors, which later contexts showed."""

    alias: str
    id: str
    pairs: int = Field(description="How many predictions met their true next vector.")
    cosine: float
    interval: tuple[float, float] = Field(description="Of the cosine, with 95 % confidence.")
    margin: float = Field(description="The cosine less that of the best baseline.")
    baselines: dict[str, float] = Field(description="The cosines of baselines for the same contexts.")


class LiveRanks(BaseModel):
    """At which rank searches had the passage that came next, which later contexts showed."""

    id: str = Field(description="The corpus that was searched.")
    query: str = Field(description="The towers or the net that made the query.")
    pairs: int
    R_at_1: float = Field(alias="R@1")
    R_at_5: float = Field(alias="R@5")
    MRR: float


class LiveScores(BaseModel):
    """Live scores since the start, of all workers; `aliases` has how many predictions were kept and scored."""

    versions: list[LiveScore]
    retrieval: list[LiveRanks]
    aliases: dict[str, dict[str, int]]


class Models(BaseModel):
    """Versions, aliases, cards."""

    aliases: dict[str, Alias]
    encoder: Encoder
    store: Store | None = None
    versions: list[dict[str, Any]]
    live: LiveScores | None = None


class Entry(BaseModel):
    """One article of the corpus."""

    article: int
    title: str
    chunks: int = Field(description="How many passages it has.")


class Articles(Searched):
    """The articles of the corpus that was asked for, by id."""

    total: int = Field(description="How many articles match, on all pages.")
    articles: list[Entry]


class Passage(FoundPassage):
    """One passage of an article, with its vector."""

    vector: str = Field(description="Base64 of D little-endian float32 numbers.")


class Article(Searched):
    """One article in reading order; T passages in a row are a context."""

    article: int
    title: str
    encoder: str
    dim: int
    context_length: int
    chunks: list[Passage]


class PlacedPassage(BaseModel):
    """One passage on the map."""

    id: int
    article: int
    title: str
    position: int
    text: str | None = Field(description="The beginning of its text.")
    x: float
    y: float


class ArticleMap(Searched):
    """The plane of the two principal axes of the corpus' vectors, and passages on it."""

    dim: int
    total: int = Field(description="How many passages the corpus has.")
    mean: str = Field(description="Base64 of D little-endian float32 numbers: the vector at the origin of the plane.")
    axes: str = Field(description="Base64 of 2 x D little-endian float32 numbers: two orthonormal vectors.")
    explained: list[float] = Field(description="The share of the variance of the vectors along each axis.")
    passages: list[PlacedPassage]


class Ledger(BaseModel):
    """Moves of the aliases, newest first."""

    total: int
    skipped: int = Field(description="How many lines of the ledger are no moves, and are left out.")
    moves: list[Move]


Responses = dict[int | str, dict[str, Any]]
STRING = {"type": "string"}
HEADERS = {
    "X-Request-ID": "The id of the request, which is in the log.",
    "X-Model": "Who made the answer.",
    "X-Model-Version": "Its version.",
    "X-Served-By": "The alias that served it.",
    "X-Fallback-Reason": "Why it was not the first in order; only if it was not.",
    "X-Batch-Size": "How many rows ran together.",
    "Server-Timing": "Milliseconds of every stage.",
    "Inference-Header-Content-Length": "Bytes of JSON before those of the vectors.",
    "Retry-After": "Seconds after which to come back.",
    "WWW-Authenticate": "Bearer",
}
MADE_BY = [*HEADERS][1:7]


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"description": HEADERS[name], "schema": STRING} for name in ("X-Request-ID", *names)}


def problems(*kinds: type[ServiceError]) -> Responses:
    """Return the responses to errors, each of another status, with what their classes say of themselves."""
    found: Responses = {}
    for error in kinds:
        headers = [name for name in HEADERS if name.lower().encode() in dict(error.headers)]
        retry = ["Retry-After"] if error.status in (429, 503) else []
        found[error.status] = {
            "description": (error.__doc__ or "").partition("\n")[0],
            "headers": _headers(*headers, *retry),
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    return found


def _text(*media_types: str) -> Responses:
    return {200: {"content": {media_type: {"schema": STRING} for media_type in media_types}}}


def summarise(document: dict[str, Any]) -> None:
    """Make the first line of the description of each GET route, which is a docstring, its summary."""
    for operation in [item["get"] for item in document["paths"].values() if "get" in item]:
        operation["summary"], _, rest = operation.pop("description", operation["summary"]).partition("\n")
        if rest.strip():
            operation["description"] = rest.strip()


def require_token(document: dict[str, Any], without_token: Set[str]) -> None:
    """Say in an OpenAPI document that a bearer token is required, but for some paths."""
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    for path in without_token & document["paths"].keys():
        for operation in document["paths"][path].values():
            operation["security"] = []


_CHECKED = Malformed, Invalid, Unauthorised
UNAUTHORISED = problems(*_CHECKED)
PROBLEMS = problems(Malformed, Invalid, Unavailable)
PAGED = problems(*_CHECKED, Unavailable)
NOT_FOUND = problems(*_CHECKED, UnknownModel)
ARTICLES = problems(*_CHECKED, errors.UnknownArticle, Unavailable)
CARD = problems(*_CHECKED, UnknownModel, Unavailable) | _text("text/markdown")
METRICS = UNAUTHORISED | _text("text/plain", "application/openmetrics-text")
_HOT = problems(
    *_CHECKED,
    UnknownModel,
    errors.TooSlow,
    errors.TooLarge,
    errors.UnsupportedMediaType,
    errors.ClientLimit,
    Unavailable,
    errors.Expired,
)


def _octets(description: str) -> dict[str, Any]:
    content = {"schema": {"type": "string", "format": "binary", "description": description}}
    return {"application/octet-stream": content}


_ROWS = _octets(
    "Little-endian float32 rows; float16 with the parameter `dtype=float16` in the media type. `shape=2x5x384` there "
    "is their shape; without it there is one row only."
)
_RETRIEVED = _octets(
    "As for /predict. `shape=384` is a query, `shape=5x384` a context, `shape=8x1x384` are 8 queries, and "
    "`shape=8x5x384` are 8 contexts."
)
_TENSORS = _octets(
    "A JSON object, and the bytes of a tensor behind it; Inference-Header-Content-Length is the length of the object."
)
# What requests and errors name; FastAPI adds only what other answers do.
COMPONENTS: dict[str, Any] = {}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    COMPONENTS.update(schema.pop("$defs", {}))
    return schema


def _body(model: type[BaseModel], **examples: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON body of a request, with examples that the service of what ships answers."""
    shown = {"examples": {name: {"value": value} for name, value in examples.items()}} if examples else {}
    return {"application/json": {"schema": _schema(model), **shown}}


COMPONENTS["Problem"] = _schema(Problem)


def _options(model: type[BaseModel], *names: str) -> list[dict[str, Any]]:
    """Return fields of a request as parameters of the query string, which has no null."""
    properties = model.model_json_schema()["properties"]
    schemas = {name: next(kind for kind in properties[name]["anyOf"] if kind != {"type": "null"}) for name in names}
    return [_parameter(name, "query", schema, properties[name].get("description")) for name, schema in schemas.items()]


def _parameter(name: str, place: str, schema: dict[str, Any], description: str | None = None) -> dict[str, Any]:
    described = {"description": description} if description else {}
    return {"name": name, "in": place, "required": place == "path", **described, "schema": schema}


def _hot(
    operation_id: str,
    summary: str,
    asked: dict[str, Any],
    answer: type[BaseModel],
    parameters: list[dict[str, Any]],
    answers: dict[str, Any] | None = None,
    headers: Iterable[str] = MADE_BY,
) -> dict[str, Any]:
    """Return the documentation of a hot route: `asked` are its bodies, `answers` those beside JSON, by media type."""
    said: dict[str, Any] = {"headers": _headers(*headers)} | ({"content": answers} if answers else {})
    return {
        "operation_id": operation_id,
        "summary": summary,
        "response_model": answer,
        "responses": {200: said, **_HOT},
        "openapi_extra": {"requestBody": {"required": True, "content": asked}, "parameters": parameters},
    }


_CHUNKS = [
    "Rabbits are small mammals.",
    "They live in groups.",
    "Many dig burrows.",
    "Hares do not.",
    "Hares live alone.",
]
_PASSAGE = " ".join([*_CHUNKS, "They rest in shallow hollows, in the open, and flee by speed."])
_ANYWHERE = {
    "description": "Options are in the body or, for JSON and octets alike, in the query string, but not in both."
}
_EXCLUDE = _parameter("exclude", "query", {"type": "string", "pattern": r"^\[(\d{1,15}(,\d{1,15})*)?\]$"}, "[1,2,3]")
_FILTER = _parameter("filter", "query", {"type": "string", "pattern": r"^\{.*\}$"}, 'JSON: {"article": [3, 4]}')
PREDICT = _ANYWHERE | _hot(
    "predict",
    "Predict the next vector of each context.",
    _body(PredictRequest, chunks={"texts": _CHUNKS}) | _ROWS,
    PredictResponse,
    _options(PredictRequest, "model", "profile", "encoding"),
    _ROWS,
)
RETRIEVE = _ANYWHERE | _hot(
    "retrieve",
    "Find the passages nearest to a query, or to what a context predicts.",
    _body(
        RetrieveRequest,
        what_comes_next={"texts": _CHUNKS, "k": 3},
        question={"text": "Do hares dig burrows?", "k": 3},
        questions={"texts": ["Do hares dig burrows?", "What do rabbits eat?"], "read_as": "query", "k": 3},
    )
    | _RETRIEVED,
    RetrieveResponse,
    [*_options(RetrieveRequest, "k", "exclude_context", "mmr", "rerank", "model", "read_as"), _EXCLUDE, _FILTER],
)

EMBED = _ANYWHERE | _hot(
    "embed",
    "Encode texts, or the chunks of a passage, to the vectors that the nets and the corpora read.",
    _body(EmbedRequest, texts={"texts": _CHUNKS[:2]}, passage={"text": _PASSAGE, "chunks": True}),
    EmbedResponse,
    _options(EmbedRequest, "chunks", "model", "encoding"),
    _ROWS,
    ["X-Model", "Server-Timing"],
)

OPENAI_EMBEDDINGS = _hot(
    "openai_embeddings",
    "OpenAI: encode texts.",
    _body(OpenAIEmbeddingsRequest, texts={"input": _CHUNKS[:2], "model": BUNDLED_MODEL}),
    OpenAIEmbeddings,
    [],
    headers=["X-Model", "Server-Timing"],
)


def _infer(operation_id: str, *path: str) -> dict[str, Any]:
    length = "Inference-Header-Content-Length"
    parameters = [_parameter(name, "path", STRING) for name in path]
    parameters += [_parameter(length, "header", {"type": "integer", "minimum": 0}, "Bytes of JSON.")]
    summary = "Open Inference Protocol v2: input `context` FP32 [-1, T, D], output `vector` FP32 [-1, D]."
    asked = _body(InferRequest) | _TENSORS
    return _hot(operation_id, summary, asked, InferResponse, parameters, _TENSORS, [*MADE_BY, length])


INFER, INFER_VERSION = _infer("infer", "model"), _infer("infer_version", "model", "version")
LNSP_INFER, LNSP_INFER_BATCH = (
    _hot(name, summary, _body(asked), answer, _options(asked, "temperature", "normalize"))
    for name, summary, asked, answer in (
        ("lnsp_infer", "LNSP: predict the next vector of a context.", LnspRequest, LnspResponse),
        ("lnsp_infer_batch", "LNSP: predict the next vectors of contexts.", LnspBatchRequest, LnspBatchResponse),
    )
)
INDEX: dict[str, Any] = {
    "responses": problems(*_CHECKED, errors.TooLarge),
    "openapi_extra": {"requestBody": {"content": _body(IndexRequest)}},
}
