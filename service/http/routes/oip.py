"""The Open Inference Protocol v2 over the same router: metadata, health, `infer` in JSON and binary.

Model names are the aliases and the model names; input `context` FP32 `[-1, T, D]`, output `vector`
FP32 `[-1, D]`. Source: KServe's inference protocol v2 and Triton's binary tensor data extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI, HTTPException, Request

from lvm.errors import (
    Invalid,
    Malformed,
    TooLarge,
    UnknownModel,
)
from models.vectors import Floats
from service.deploy.deployments import Deployments
from service.engines.remote import PredictEngine
from service.engines.router import Routed, Router
from service.http import codec, content_coding, schemas
from service.http.codec import (
    JSON,
    OCTETS,
    Decoded,
    Shape,
)
from service.http.gateway import (
    Call,
    Door,
    HotRoute,
    Reply,
    want_media_type,
)
from service.http.json_slices import LongArray, find_array
from service.http.routes.hot import (
    DocumentedHotRoute,
    check_live,
    check_ready,
    headers_of,
    outcome_of,
    stages_of,
)
from service.overload.fairness import Slicer, Work
from service.settings import Settings

INPUT, OUTPUT, DATATYPE = "context", "vector", "FP32"
HEADER_LENGTH = b"inference-header-content-length"
MAX_DIGITS = 18  # of a length in bytes; Python refuses to read thousands
MODEL = "/v2/models/{model}"
EXTENSIONS = ("binary_tensor_data", "model_configuration")
MISSING = {  # extensions of Triton, by what their paths contain
    "/stats": "there is no statistics extension: GET /metrics counts and times all requests",
    "/trace/setting": "there is no trace extension: LVM_OTLP_ENDPOINT and LVM_TRACE_SHARE are set at start",
    "/logging": "there is no logging extension: LVM_LOG_LEVEL is set at start",
    "sharedmemory": "there is no shared memory extension: send tensors in the body, as JSON or binary",
    "/repository/models/": "models are loaded by the registry: lvm promote, lvm rollback",
}
# What `curl -d` says of any body; Triton takes JSON from it.
FORM = b"application/x-www-form-urlencoded"
MEMBERS = ("id", "model_name", "parameters", "inputs", "outputs")
MAX_INDEX_BODY = 2**16  # bytes
Json = Mapping[str, Any]


def _neutral(*values: Any) -> codec.Check:
    """A parameter that is not supported, but for the `values` that say the same as none."""

    def check(value: Any, pointer: str) -> None:
        if value not in values:
            raise Invalid(f"{pointer.rpartition('/')[2]} is not supported", pointer=pointer)

    return check


PARAMETERS: Mapping[str, codec.Check] = {
    "binary_data_output": codec.flag,
    "timeout": codec.whole(0, 3_600_000_000),
    "priority": _neutral(0),
    "sequence_id": _neutral(0, ""),
    "sequence_start": _neutral(False),
    "sequence_end": _neutral(False),
}
INPUT_PARAMETERS: Mapping[str, codec.Check] = {"binary_data_size": codec.whole(0, 2**53)}
OUTPUT_PARAMETERS: Mapping[str, codec.Check] = {"binary_data": codec.flag}


class Asked(NamedTuple):
    """What an infer request asks for: rows, the caller's id for it, and a binary answer or not."""

    rows: Floats
    id: str | None
    binary: bool


class Infer:
    """POST /v2/models/{model}[/versions/{version}]/infer."""

    def __init__(self, router: Router, settings: Settings, slicer: Slicer | None = None) -> None:
        self._router, self._max_rows, self._norms = router, settings.max_rows, settings.norm_policy
        self._arrays, self._slicer = codec.ArrayReader(), slicer or Slicer()
        self._timeout_ms = settings.timeout_ms

    async def __call__(self, call: Call) -> Reply:
        """Answer one call; errors leave as `ServiceError`."""
        want_media_type(call, JSON, OCTETS, FORM)
        codec.refuse_unknown(call.options(), (), "option")
        chain = _chain(self._router, *_names(call.path))
        asked = await self._read(call, chain[0].info.shape)
        call.place.settle(len(asked.rows))
        decoded_s = perf_counter() - call.started
        routed = await self._router.predict(asked.rows, chain, call.deadline)
        began = perf_counter()
        body, media_type, more = _encode(asked, routed)
        stages = (*stages_of(routed, decoded_s), ("encode", perf_counter() - began))
        return Reply(
            body, media_type, [*headers_of(routed, stages), *more], outcome_of(routed), stages, made_by=routed.served_by
        )

    async def _read(self, call: Call, shape: Shape) -> Asked:
        if len(call.body) <= codec.QUICK:
            return self._decode(call, shape)
        return await self._slicer.run(call.place.client, self._decode_in_slices(call, shape))

    def _decode(self, call: Call, shape: Shape) -> Asked:
        return codec.drained(self._decode_in_slices(call, shape))

    def _decode_in_slices(self, call: Call, shape: Shape) -> Work[Asked]:
        header, tail = _split(call)
        if len(header) <= codec.QUICK:
            return self._asked(call, codec.parse_object(header), tail, shape)
        array = find_array(header, "data")
        if array is None or not array.is_most_of_the_body:
            codec.check_values(header)
            yield
            return self._asked(call, codec.parse_object(header), tail, shape)
        codec.check_values(array.rest)
        document = codec.parse_object(array.rest)
        tensor = _only_input(document)
        if tensor.get("data") != []:
            raise Invalid("want a list of numbers", pointer="/inputs/0/data")
        data = yield from self._numbers(array, _count(tensor, shape), shape)
        document["inputs"][0]["data"] = data
        return self._asked(call, document, tail, shape)

    def _numbers(self, array: LongArray, count: int, shape: Shape) -> Work[Floats]:
        if count > self._max_rows:
            raise TooLarge(f"{count} rows, at most {self._max_rows}", pointer="/inputs/0/data")
        item, most = (shape, count) if array.depth > 1 else ((), count * math.prod(shape))
        data = yield from self._arrays.read(array, item, "/inputs/0/data", most, Invalid)
        if len(data) != most:
            raise Invalid(f"want a list of {most}, not list of {len(data)}", pointer="/inputs/0/data")
        return data

    def _asked(self, call: Call, json: dict[str, Any], tail: bytes, shape: Shape) -> Asked:
        document = _members(json, "", MEMBERS)
        if "model_name" in document and document["model_name"] != _names(call.path)[0]:
            raise Invalid("not the model of the path", pointer="/model_name")
        parameters = _parameters(document, "", PARAMETERS)
        self._take_timeout(call, parameters.get("timeout"))
        given = Decoded(_rows(_only_input(document), tail, shape, self._max_rows), "inputs", {})
        rows = codec.held_to(self._norms, given).rows
        return Asked(rows, _id(document), _wants_binary(document, parameters))

    def _take_timeout(self, call: Call, microseconds: int | None) -> None:
        """Move the deadline to what the parameter `timeout` asks for; 0 asks for nothing."""
        if not microseconds:
            return
        if b"x-request-timeout-ms" in call.headers:
            raise Invalid("given in the header X-Request-Timeout-Ms, too", pointer="/parameters/timeout")
        call.deadline += (microseconds / 1000 - self._timeout_ms) / 1000


def _names(path: str) -> tuple[str, str | None]:
    parts = path.split("/")[3:-1]  # behind "", v2, models and before infer: NAME[, versions, VERSION]
    if len(parts) not in (1, 3) or parts[1:2] not in ([], ["versions"]):
        raise UnknownModel("no such model")
    return parts[0], parts[2] if len(parts) == 3 else None


def _chain(router: Router, model: str, version: str | None) -> list[PredictEngine]:
    chain = router.chain(model, "realtime")
    if version is None:
        return chain
    if chain[0].info.version != version:
        raise UnknownModel(f"{chain[0].info.name} is served in version {chain[0].info.version}")
    return chain[:1]


def _split(call: Call) -> tuple[bytes, bytes]:
    length = call.headers.get(HEADER_LENGTH)
    if length is None:
        return call.body, b""
    if not length.isdigit() or len(length) > MAX_DIGITS or int(length) > len(call.body):
        raise Malformed("Inference-Header-Content-Length is no length within the body")
    return call.body[: int(length)], call.body[int(length) :]


def _only_input(document: Json) -> Json:
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise Invalid(f"want a list of one input, {INPUT}", pointer="/inputs")
    tensor = _members(inputs[0], "/inputs/0", ("name", "datatype", "shape", "parameters", "data"))
    if tensor.get("name") != INPUT:
        raise Invalid(f"the input is called {INPUT}", pointer="/inputs/0/name")
    if tensor.get("datatype") != DATATYPE:
        raise Invalid(f"the datatype of {INPUT} is {DATATYPE}", pointer="/inputs/0/datatype")
    return tensor


def _members(value: Any, pointer: str, known: Collection[str], what: str = "member") -> dict[str, Any]:
    """Return the members of a JSON object that are not null.

    Raises:
        Invalid: it is not an object, or has a member that is not `known`.
    """
    if not isinstance(value, dict):
        raise Invalid("want an object", pointer=pointer)
    codec.refuse_unknown(value, known, what, pointer)
    return {name: member for name, member in value.items() if member is not None}


def _parameters(document: Json, pointer: str, checks: Mapping[str, codec.Check]) -> dict[str, Any]:
    pointer = f"{pointer}/parameters"
    given = _members(document.get("parameters", {}), pointer, checks.keys(), "parameter")
    return {name: checks[name](value, f"{pointer}/{name}") for name, value in given.items()}


def _id(document: Json) -> str | None:
    identity = document.get("id")
    return identity if identity in (None, "") else codec.text(identity, "/id")


def _rows(tensor: Json, tail: bytes, shape: Shape, max_rows: int) -> Floats:
    count, parameters = _count(tensor, shape), _parameters(tensor, "/inputs/0", INPUT_PARAMETERS)
    size = parameters.get("binary_data_size")
    if (size or 0) != len(tail):
        raise Malformed(f"{len(tail)} bytes follow the JSON object; binary_data_size says {size or 0}")
    if size is not None and "data" in tensor:
        raise Invalid("given beside binary_data_size", pointer="/inputs/0/data")
    if size is None:
        return codec.decode_tensor(_data(tensor), "/inputs/0/data", (count, *shape), max_rows)
    rows = codec.decode_octets(tail, shape, max_rows)
    if len(rows) != count:
        raise Malformed(f"the data holds {len(rows)} rows, its shape says {count}")
    return rows


def _data(tensor: Json) -> list[Any] | Floats:
    data: Any = tensor.get("data")
    if not isinstance(data, list | np.ndarray):
        raise Invalid("want a list of numbers, or binary_data_size", pointer="/inputs/0/data")
    return data


def _count(tensor: Json, shape: Shape) -> int:
    """Return how many rows the shape of an input says."""
    given = tensor.get("shape")
    count = given[0] if isinstance(given, list) and given and type(given[0]) in (int, float) else 0
    if count < 1 or count % 1 or given != [count, *shape] or bool in map(type, given):
        raise Invalid(f"want the shape [-1, {', '.join(map(str, shape))}]", pointer="/inputs/0/shape")
    return int(count)


def _wants_binary(document: Json, parameters: Json) -> bool:
    outputs = document.get("outputs", [])
    if not isinstance(outputs, list) or len(outputs) > 1:
        raise Invalid(f"want a list of one output, {OUTPUT}", pointer="/outputs")
    output = _members(outputs[0], "/outputs/0", ("name", "parameters")) if outputs else {}
    if output.get("name", OUTPUT) != OUTPUT:
        raise Invalid(f"the output is called {OUTPUT}", pointer="/outputs/0/name")
    wanted: bool = parameters.get("binary_data_output", False)
    return _parameters(output, "/outputs/0", OUTPUT_PARAMETERS).get("binary_data", wanted) is True


def _encode(asked: Asked, routed: Routed) -> tuple[bytes, bytes, list[tuple[bytes, bytes]]]:
    vectors = routed.prediction.vectors
    output: dict[str, Any] = {"name": OUTPUT, "datatype": DATATYPE, "shape": list(vectors.shape)}
    answer = {
        "model_name": routed.prediction.model,
        "model_version": routed.prediction.version,
        **({} if asked.id is None else {"id": asked.id}),
        "parameters": {"served_by": routed.served_by, "fallback_reason": routed.fallback_reason or ""},
        "outputs": [output],
    }
    if not asked.binary:
        output["data"] = vectors.ravel()
        return codec.encode_json(answer), JSON, []
    data = codec.encode_octets(vectors)
    output["parameters"] = {"binary_data_size": len(data)}
    header = codec.encode_json(answer)
    return header + data, OCTETS, [(HEADER_LENGTH, b"%d" % len(header))]


def is_infer(path: str) -> bool:
    """Whether a path is that of an infer request."""
    return path.startswith("/v2/models/") and path.endswith("/infer")


def missing(path: str) -> str | None:
    """Return what stands in for the extension of Triton that a path belongs to, None if it belongs to none."""
    if not path.startswith("/v2/"):
        return None
    return next((said for part, said in MISSING.items() if part in path), None)


def add_routes(app: FastAPI, router: Router, lineup: Deployments, door: Door) -> HotRoute:
    """Add the protocol's routes to `app`; return the hot one, which is found by its path's two ends."""
    settings, state = door.settings, door.state

    @app.get("/v2", responses=schemas.UNAUTHORISED, response_model=schemas.ServerMetadata)
    async def server_metadata() -> Any:
        """Name, version and extensions of the server."""
        return {"name": "lvm-serve", "version": app.version, "extensions": EXTENSIONS}

    @app.get("/v2/health/live", responses=schemas.PROBLEMS)
    async def live() -> dict[str, bool]:
        """200 while every inference thread beats."""
        check_live(lineup, settings)
        return {"live": True}

    @app.get("/v2/health/ready", responses=schemas.PROBLEMS)
    async def ready() -> dict[str, bool]:
        """200 while /readyz says so."""
        check_ready(lineup, state)
        return {"ready": True}

    @app.get("/v2/models/stats", include_in_schema=False)
    async def statistics() -> None:
        """Keep statistics from being taken for a model of that name."""
        raise HTTPException(404)

    _add_repository_index(app, router)
    _add_model_routes(app, router, settings.max_rows)
    route = HotRoute(MODEL + "/infer", Infer(router, door.settings, door.slicer), door)
    app.routes.append(DocumentedHotRoute(route, **schemas.INFER))
    app.routes.append(DocumentedHotRoute(route, MODEL + "/versions/{version}/infer", **schemas.INFER_VERSION))
    return route


def _add_repository_index(app: FastAPI, router: Router) -> None:
    @app.post("/v2/repository/index", response_model=list[schemas.IndexEntry], **schemas.INDEX)
    async def repository_index(request: Request) -> Any:
        """Every name that a model can be asked by; all of them are ready."""
        body = await _small_body(request)
        asked = _members(codec.parse_object(body) if body else {}, "", ("ready",))
        codec.flag(asked.get("ready", False), "/ready")
        named = {
            name: engine.info.version for alias, engine in router.engines.items() for name in (alias, engine.info.name)
        }
        return [{"name": name, "version": version, "state": "READY", "reason": ""} for name, version in named.items()]


async def _small_body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_INDEX_BODY:
            raise TooLarge(f"a body of more than {MAX_INDEX_BODY} bytes")
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
            return answer(_chain(router, model, None)[0])

        @app.get(f"{MODEL}/versions/{{version}}{suffix}", **documented)
        async def of_version(model: str, version: str) -> dict[str, Any]:
            return answer(_chain(router, model, version)[0])

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

    def model_config(engine: PredictEngine) -> dict[str, Any]:
        """Inputs, outputs and largest batch of a served model, as Triton's model configuration extension has them."""
        length, dim = engine.info.shape
        return {
            "name": engine.info.name,
            "platform": engine.info.runtime,
            "max_batch_size": max_rows,
            "input": [{"name": INPUT, "data_type": f"TYPE_{DATATYPE}", "dims": [length, dim]}],
            "output": [{"name": OUTPUT, "data_type": f"TYPE_{DATATYPE}", "dims": [dim]}],
        }

    add("", schemas.ModelMetadata, model_metadata)
    add("/ready", schemas.ModelReady, model_ready)
    add("/config", schemas.ModelConfig, model_config)
