"""The Open Inference Protocol v2 over the same router: metadata, health, `infer` in JSON and binary.

Model names are the aliases and the model names; input `context` FP32 `[-1, T, D]`, output `vector`
FP32 `[-1, D]`. Source: KServe's inference protocol v2 and Triton's binary tensor data extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI, HTTPException
from fastapi import Request as FastAPIRequest

from lvm.errors import (
    Invalid,
    Malformed,
    ServiceError,
    TooLarge,
    UnknownModel,
)
from models.vectors import Floats
from service.deploy.deployments import Deployments
from service.deploy.shadow import Shadow
from service.engines.remote import PredictEngine
from service.engines.router import Routed, Router
from service.http import checks, codec, content_coding, octets, schemas
from service.http.codec import Decoded
from service.http.gateway import State
from service.http.json_slices import LongArray, find_array
from service.http.messages import JSON, MAX_DIGITS, Headers, Request, Response, media_type_of
from service.http.octets import OCTETS, Shape
from service.http.routes.common import MadeBy, document_route, headers_of
from service.http.routes.health import check_live, check_ready
from service.overload.fairness import Slicer, Work
from service.settings import Settings

INPUT, OUTPUT, DATATYPE = "context", "vector", "FP32"
HEADER_LENGTH = b"inference-header-content-length"
MODEL = "/v2/models/{model}"
INFER = MODEL + "/infer"
EXTENSIONS = ("binary_tensor_data", "model_configuration")
MISSING = {  # what to use instead of extensions of Triton, by a part of their paths
    "/stats": "there is no statistics extension: GET /metrics counts and times all requests",
    "/trace/setting": "there is no trace extension: LVM_OTLP_ENDPOINT and LVM_TRACE_SHARE are set at start",
    "/logging": "there is no logging extension: LVM_LOG_LEVEL is set at start",
    "sharedmemory": "there is no shared memory extension: send tensors in the body, as JSON or binary",
    "/repository/models/": "models are loaded by the registry: lvm promote, lvm rollback",
}
# What `curl -d` sends with any body; Triton reads JSON from it.
FORM = b"application/x-www-form-urlencoded"
MEMBERS = ("id", "model_name", "parameters", "inputs", "outputs")
MAX_INDEX_BODY = 2**16  # bytes
Json = Mapping[str, Any]


def _neutral(*values: Any) -> checks.Check:
    """A parameter that is not supported, except for the `values` that have no effect."""

    def check(value: Any, pointer: str) -> None:
        if value not in values:
            raise Invalid(f"{pointer.rpartition('/')[2]} is not supported", pointer=pointer)

    return check


PARAMETERS: Mapping[str, checks.Check] = {
    "binary_data_output": checks.flag,
    "timeout": checks.whole(0, 3_600_000_000),
    "priority": _neutral(0),
    "sequence_id": _neutral(0, ""),
    "sequence_start": _neutral(False),
    "sequence_end": _neutral(False),
}
INPUT_PARAMETERS: Mapping[str, checks.Check] = {"binary_data_size": checks.whole(0, 2**53)}
OUTPUT_PARAMETERS: Mapping[str, checks.Check] = {"binary_data": checks.flag}


class ParsedRequest(NamedTuple):
    """What an infer request asks for: rows, the caller's id for it, and a binary response or not."""

    rows: Floats
    id: str | None
    binary: bool


Encoded = tuple[bytes, bytes, Headers]
"""A body, its media type, and headers that it needs."""
Encode = Callable[[ParsedRequest, Routed], Encoded]


class Inference:
    """What an infer request asks for and gets, in JSON and binary and over gRPC: checks, routing, the response."""

    def __init__(self, router: Router, shadow: Shadow, settings: Settings, slicer: Slicer) -> None:
        self._router = router
        self._shadow = shadow
        self._max_rows = settings.max_rows
        self._norm_policy = settings.norm_policy
        self._slicer = slicer

    def _parsed(
        self, request: Request, json: Json, model: str, tail: bytes, shape: Shape, *, binary: bool = False
    ) -> ParsedRequest:
        """Return what `model` is asked, with binary data in `tail`; `binary`: the answer's form unless it is named."""
        document = _members(json, "", MEMBERS)
        if "model_name" in document and document["model_name"] != model:
            raise Invalid("not the model of the path", pointer="/model_name")
        parameters = parameters_of(document, "", PARAMETERS)
        _set_timeout(request, parameters.get("timeout"))
        rows = _rows(only_input(document), tail, shape, self._max_rows)
        rows = codec.normalised(self._norm_policy, Decoded(rows, "inputs", {}, None, answers_many=True)).rows
        return ParsedRequest(rows, _id(document), _wants_binary(document, parameters, binary))

    async def _answer(
        self, request: Request, parsed: ParsedRequest, chain: list[PredictEngine], encode: Encode
    ) -> Response:
        request.set_rows(len(parsed.rows))
        decode_s = perf_counter() - request.started
        routed = await self._router.predict(parsed.rows, chain, request.deadline)
        began = perf_counter()
        prediction = routed.prediction
        body, media_type, more = encode(parsed, routed)
        stages = {"decode": decode_s, "queue": prediction.queue_s, "infer": prediction.infer_s}
        stages["encode"] = perf_counter() - began
        self._shadow.maybe_compare(parsed.rows, routed)
        made_by = MadeBy(prediction.model, prediction.version, routed.served_by, routed.fallback_reason)
        headers = [*headers_of(made_by, prediction.batch_rows, prediction.replica), *more]
        outcome = "fallback" if routed.fallback_reason else "ok"
        return Response(body, media_type, headers, outcome=outcome, stages=stages, served_by=routed.served_by)


class Infer(Inference):
    """Answers POST /v2/models/{model}[/versions/{version}]/infer."""

    def __init__(self, router: Router, shadow: Shadow, settings: Settings, slicer: Slicer) -> None:
        super().__init__(router, shadow, settings, slicer)
        self._arrays = codec.ArrayReader()

    async def __call__(self, request: Request) -> Response:
        """Return the response; raises `ServiceError`."""
        media_type_of(request.headers.get(b"content-type", JSON), (JSON, OCTETS, FORM))
        checks.reject_unknown(request.options(), (), "option")
        chain = chain_of(self._router, *_names(request.path))
        parsed = await self._read(request, chain[0].info.shape)
        return await self._answer(request, parsed, chain, encode_answer)

    def parse(self, request: Request, shape: Shape) -> Work[ParsedRequest]:
        """Return what a request asks of a model of contexts of `shape`; yield between slices; raises `ServiceError`."""
        header, tail = _split(request)
        model, _ = _names(request.path)
        array = None if tail else find_array(header, "data")
        quick = self._read_fast(array, shape) if array else None
        if quick or len(header) <= codec.QUICK:
            return self._parsed(request, quick or codec.parse_object(header), model, tail, shape)
        if array is None or not array.is_most_of_the_body:
            codec.check_values(header)
            yield
            return self._parsed(request, codec.parse_object(header), model, tail, shape)
        codec.check_values(array.rest)
        document = codec.parse_object(array.rest)
        tensor = only_input(document)
        if tensor.get("data") != []:
            raise Invalid("expected a list of numbers", pointer="/inputs/0/data")
        data = yield from self._numbers(array, count_of(tensor, shape, self._max_rows), shape)
        document["inputs"][0]["data"] = data
        return self._parsed(request, document, model, tail, shape)

    def _read_fast(self, array: LongArray, shape: Shape) -> Json | None:
        """Return a document with its numbers read, if it is provably right, and what is not numbers is short."""
        if len(array.rest) > codec.QUICK:
            return None
        try:
            document = codec.parse_object(array.rest)
            tensor = only_input(document)
            count = count_of(tensor, shape, self._max_rows)
        except ServiceError:
            return None
        given = (count, *shape) if array.depth > 1 else (count * math.prod(shape),)
        data = self._arrays.read_at_once(array, given)
        if data is None or tensor.get("data") != []:
            return None
        document["inputs"][0]["data"] = data
        return document

    async def _read(self, request: Request, shape: Shape) -> ParsedRequest:
        work = self.parse(request, shape)
        if len(request.body) <= codec.AT_ONCE:
            try:
                next(work)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
        return await self._slicer.run(request.client, work)

    def _numbers(self, array: LongArray, count: int, shape: Shape) -> Work[Floats]:
        item, most = (shape, count) if array.depth > 1 else ((), count * math.prod(shape))
        data = yield from self._arrays.read(array, item, "/inputs/0/data", most, Invalid)
        if len(data) != most:
            raise Invalid(f"{len(data)} items; expected {most}", pointer="/inputs/0/data")
        return data


def _set_timeout(request: Request, microseconds: int | None) -> None:
    """Set the deadline to what the parameter `timeout` asks for; 0 asks for nothing."""
    if not microseconds:
        return
    if b"x-request-timeout-ms" in request.headers:
        raise Invalid("given also in the header X-Request-Timeout-Ms", pointer="/parameters/timeout")
    request.set_timeout(microseconds / 1000)


def _names(path: str) -> tuple[str, str | None]:
    parts = path.split("/")[3:-1]  # behind "", v2, models and before infer: NAME[, versions, VERSION]
    if len(parts) not in (1, 3) or parts[1:2] not in ([], ["versions"]):
        raise UnknownModel("unknown model: malformed path")
    return parts[0], parts[2] if len(parts) == 3 else None


def chain_of(router: Router, model: str, version: str | None) -> list[PredictEngine]:
    """Return the engines to try for a model, only one if a version is given; raises `UnknownModel`, `Unavailable`."""
    chain = router.chain(model, "realtime").engines
    if version is None:
        return chain
    if chain[0].info.version != version:
        raise UnknownModel(f"unknown version of {chain[0].info.name}; available: {chain[0].info.version}")
    return chain[:1]


def _split(request: Request) -> tuple[bytes, bytes]:
    length = request.headers.get(HEADER_LENGTH)
    if length is None:
        return request.body, b""
    if not length.isdigit() or len(length) > MAX_DIGITS or int(length) > len(request.body):
        raise Malformed("malformed Inference-Header-Content-Length; expected a length within the body")
    return request.body[: int(length)], request.body[int(length) :]


def only_input(document: Json) -> Json:
    """Return the members of the input of a document; raises `Invalid` if it is not one tensor `context` of FP32."""
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise Invalid(f"expected a list of one input, {INPUT}", pointer="/inputs")
    tensor = _members(inputs[0], "/inputs/0", ("name", "datatype", "shape", "parameters", "data"))
    if tensor.get("name") != INPUT:
        raise Invalid(f"unknown input; expected {INPUT}", pointer="/inputs/0/name")
    if tensor.get("datatype") != DATATYPE:
        raise Invalid(f"unsupported datatype; expected {DATATYPE}", pointer="/inputs/0/datatype")
    return tensor


def _members(value: Any, pointer: str, known: Collection[str], what: str = "member") -> dict[str, Any]:
    """Return the members of a JSON object that are not null.

    Raises:
        Invalid: it is not an object, or has a member that is not `known`.
    """
    if not isinstance(value, dict):
        raise Invalid("expected an object", pointer=pointer)
    checks.reject_unknown(value, known, what, pointer)
    return {name: member for name, member in value.items() if member is not None}


def parameters_of(document: Json, pointer: str, checks: Mapping[str, checks.Check]) -> dict[str, Any]:
    """Return the checked parameters of what `pointer` points at; raises `Invalid`."""
    pointer = f"{pointer}/parameters"
    given = _members(document.get("parameters", {}), pointer, checks.keys(), "parameter")
    return {name: checks[name](value, f"{pointer}/{name}") for name, value in given.items()}


def _id(document: Json) -> str | None:
    identity = document.get("id")
    return identity if identity in (None, "") else checks.text(identity, "/id")


def _rows(tensor: Json, tail: bytes, shape: Shape, max_rows: int) -> Floats:
    count, parameters = count_of(tensor, shape, max_rows), parameters_of(tensor, "/inputs/0", INPUT_PARAMETERS)
    size = parameters.get("binary_data_size")
    if (size or 0) != len(tail):
        raise Malformed(f"{len(tail)} bytes follow the JSON object; expected binary_data_size, {size or 0}")
    if size is not None and "data" in tensor:
        raise Invalid("given both here and as binary data", pointer="/inputs/0/data")
    if size is None:
        return codec.decode_tensor(_data(tensor), "/inputs/0/data", (count, *shape), max_rows)
    return octets.read_octets(tail, octets.OctetType(shape=(count, *shape)), shape, max_rows, many=True)


def _data(tensor: Json) -> list[Any] | Floats:
    data: Any = tensor.get("data")
    if not isinstance(data, list | np.ndarray):
        raise Invalid("expected a list of numbers, or binary_data_size", pointer="/inputs/0/data")
    return data


def count_of(tensor: Json, shape: Shape, max_rows: int) -> int:
    """Return the number of rows in the shape of an input.

    Raises:
        Invalid: it is not that of contexts of `shape`.
        TooLarge: more than `max_rows` rows.
    """
    given = tensor.get("shape")
    count = given[0] if isinstance(given, list) and given and type(given[0]) in (int, float) else 0
    if count < 1 or count % 1 or given != [count, *shape] or bool in map(type, given):
        raise Invalid(f"expected the shape [-1, {', '.join(map(str, shape))}]", pointer="/inputs/0/shape")
    if count > max_rows:
        raise TooLarge(f"{int(count)} rows; expected at most {max_rows}", pointer="/inputs/0/shape")
    return int(count)


def _wants_binary(document: Json, parameters: Json, default: bool) -> bool:
    outputs = document.get("outputs", [])
    if not isinstance(outputs, list) or len(outputs) > 1:
        raise Invalid(f"expected a list of one output, {OUTPUT}", pointer="/outputs")
    output = _members(outputs[0], "/outputs/0", ("name", "parameters")) if outputs else {}
    if output.get("name", OUTPUT) != OUTPUT:
        raise Invalid(f"unknown output; expected {OUTPUT}", pointer="/outputs/0/name")
    wanted: bool = parameters.get("binary_data_output", default)
    return parameters_of(output, "/outputs/0", OUTPUT_PARAMETERS).get("binary_data", wanted) is True


def encode_answer(parsed: ParsedRequest, routed: Routed) -> Encoded:
    """Return the response to an infer request over HTTP."""
    vectors = routed.prediction.vectors
    output: dict[str, Any] = {"name": OUTPUT, "datatype": DATATYPE, "shape": list(vectors.shape)}
    answer = {
        "model_name": routed.prediction.model,
        "model_version": routed.prediction.version,
        **({} if parsed.id is None else {"id": parsed.id}),
        "parameters": {"served_by": routed.served_by, "fallback_reason": routed.fallback_reason or ""},
        "outputs": [output],
    }
    if not parsed.binary:
        output["data"] = vectors.ravel()
        return codec.encode_json(answer), JSON, []
    data = octets.encode_octets(vectors)
    output["parameters"] = {"binary_data_size": len(data)}
    header = codec.encode_json(answer)
    return header + data, OCTETS, [(HEADER_LENGTH, b"%d" % len(header))]


def model_metadata(engine: PredictEngine) -> dict[str, Any]:
    """Name, versions, inputs and outputs of a served model."""
    length, dim = engine.info.shape
    return {
        "name": engine.info.name,
        "versions": [engine.info.version],
        "platform": engine.info.runtime,
        "inputs": [{"name": INPUT, "datatype": DATATYPE, "shape": [-1, length, dim]}],
        "outputs": [{"name": OUTPUT, "datatype": DATATYPE, "shape": [-1, dim]}],
    }


def model_ready(engine: PredictEngine) -> dict[str, Any]:
    """200 while the model is served."""
    return {"name": engine.info.name, "ready": True}


def model_config(engine: PredictEngine, max_rows: int) -> dict[str, Any]:
    """Inputs, outputs and largest batch of a served model, as Triton's model configuration extension has them."""
    length, dim = engine.info.shape
    return {
        "name": engine.info.name,
        "platform": engine.info.runtime,
        "max_batch_size": max_rows,
        "input": [{"name": INPUT, "data_type": f"TYPE_{DATATYPE}", "dims": [length, dim]}],
        "output": [{"name": OUTPUT, "data_type": f"TYPE_{DATATYPE}", "dims": [dim]}],
    }


def repository_index_of(router: Router) -> list[dict[str, str]]:
    """Return every name that a model can be asked by; all of them are ready."""
    named = {
        name: engine.info.version for alias, engine in router.engines.items() for name in (alias, engine.info.name)
    }
    return [{"name": name, "version": version, "state": "READY", "reason": ""} for name, version in named.items()]


def is_infer(path: str) -> bool:
    """Return whether a path is that of an infer request."""
    return path.startswith("/v2/models/") and path.endswith("/infer")


def missing(path: str) -> str | None:
    """Return what to use instead of the extension of Triton that a path belongs to, else None."""
    if not path.startswith("/v2/"):
        return None
    return next((instead for part, instead in MISSING.items() if part in path), None)


def add_routes(app: FastAPI, router: Router, deployments: Deployments, state: State, settings: Settings) -> None:
    """Add the protocol's routes to `app`, but for infer, which is only documented there."""

    @app.get("/v2", responses=schemas.UNAUTHORISED, response_model=schemas.ServerMetadata)
    async def server_metadata() -> Any:
        """Name, version and extensions of the server."""
        return {"name": "lvm-serve", "version": app.version, "extensions": EXTENSIONS}

    @app.get("/v2/health/live", responses=schemas.PROBLEMS)
    async def live() -> dict[str, bool]:
        """200 while every inference thread beats."""
        check_live(deployments, settings)
        return {"live": True}

    @app.get("/v2/health/ready", responses=schemas.PROBLEMS)
    async def ready() -> dict[str, bool]:
        """200 while /readyz answers 200."""
        check_ready(deployments, state)
        return {"ready": True}

    @app.get("/v2/models/stats", include_in_schema=False)
    async def statistics() -> None:
        """Keep statistics from being taken for a model of that name."""
        raise HTTPException(404)

    _add_repository_index(app, router)
    _add_model_routes(app, router, settings.max_rows)
    document_route(app, INFER, schemas.INFER)
    document_route(app, MODEL + "/versions/{version}/infer", schemas.INFER_VERSION)


def _add_repository_index(app: FastAPI, router: Router) -> None:
    @app.post("/v2/repository/index", response_model=list[schemas.IndexEntry], **schemas.INDEX)
    async def repository_index(request: FastAPIRequest) -> Any:
        """Every name that a model can be asked by; all of them are ready."""
        body = await _small_body(request)
        asked = _members(codec.parse_object(body) if body else {}, "", ("ready",))
        checks.flag(asked.get("ready", False), "/ready")
        return repository_index_of(router)


async def _small_body(request: FastAPIRequest) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_INDEX_BODY:
            raise TooLarge(f"the body is longer than {MAX_INDEX_BODY} bytes")
    codings = request.headers.get("content-encoding", "").encode("latin-1")
    return await content_coding.decode(body, codings, MAX_INDEX_BODY, lambda size: None) if codings else body


def _add_model_routes(app: FastAPI, router: Router, max_rows: int) -> None:
    def add(suffix: str, response: type, answer: Callable[[PredictEngine], dict[str, Any]]) -> None:
        documented: Any = {
            "response_model": response,
            "responses": schemas.NOT_FOUND,
            "name": answer.__name__,
            "description": answer.__doc__,
        }

        @app.get(MODEL + suffix, **documented)
        async def of_model(model: str) -> dict[str, Any]:
            return answer(chain_of(router, model, None)[0])

        @app.get(f"{MODEL}/versions/{{version}}{suffix}", **documented)
        async def of_version(model: str, version: str) -> dict[str, Any]:
            return answer(chain_of(router, model, version)[0])

    @wraps(model_config)
    def config(engine: PredictEngine) -> dict[str, Any]:
        return model_config(engine, max_rows)

    add("", schemas.ModelMetadata, model_metadata)
    add("/ready", schemas.ModelReady, model_ready)
    add("/config", schemas.ModelConfig, config)
