"""The Open Inference Protocol v2 over the same router: metadata, health, `infer` in JSON and binary.

Model names are the aliases and the model names; input `context` FP32 `[-1, T, D]`, output `vector`
FP32 `[-1, D]`. Source: KServe's inference protocol v2 and Triton's binary tensor data extension.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any, NamedTuple

from fastapi import FastAPI

from service import schemas, wire
from service.api import DocumentedHotRoute, check_live, check_ready, headers_of, outcome_of, stages_of
from service.door import Call, Door, HotRoute, Reply, problem_reply
from service.engine import Floats
from service.errors import Invalid, Malformed, ServiceError, UnknownModel
from service.lineup import Lineup
from service.routing import EngineLike, Routed, Router
from service.settings import Settings
from service.wire import JSON, OCTETS, Decoded, Shape

INPUT, OUTPUT, DATATYPE = "context", "vector", "FP32"
HEADER_LENGTH = b"inference-header-content-length"
MAX_DIGITS = 18  # of a length in bytes; Python refuses to read thousands
MODEL = "/v2/models/{model}"


class Asked(NamedTuple):
    """What an infer request asks for: rows, the caller's id for it, and a binary answer or not."""

    rows: Floats
    id: str | None
    binary: bool


class Infer:
    """POST /v2/models/{model}[/versions/{version}]/infer."""

    def __init__(self, router: Router, settings: Settings) -> None:
        self._router, self._max_rows, self._norms = router, settings.max_rows, settings.norm_policy

    async def __call__(self, call: Call) -> Reply:
        """Answer one call; errors leave as `ServiceError`."""
        chain = _chain(self._router, *_names(call.path))
        asked = self._decode(call, chain[0].shape)
        call.place.settle(len(asked.rows))
        decoded_s = perf_counter() - call.started
        routed = await self._router.predict(asked.rows, chain, call.deadline)
        began = perf_counter()
        body, media_type, more = _encode(asked, routed)
        stages = (*stages_of(routed, decoded_s), ("encode", perf_counter() - began))
        return Reply(
            body, media_type, [*headers_of(routed, stages), *more], outcome_of(routed), stages, made_by=routed.served_by
        )

    def _decode(self, call: Call, shape: Shape) -> Asked:
        header, tail = _split(call)
        document = wire.parse_object(header)
        tensor = _only_input(document)
        parameters = _object(tensor, "parameters", "/inputs/0")
        given = Decoded(_rows(tensor, parameters, tail, shape, self._max_rows), "inputs", {})
        rows = wire.held_to(self._norms, given).rows
        identity = document.get("id")
        return Asked(rows, wire.text(identity, "/id") if identity else None, _wants_binary(document))


def _names(path: str) -> tuple[str, str | None]:
    parts = path.split("/")[3:-1]  # behind "", v2, models and before infer: NAME[, versions, VERSION]
    if len(parts) not in (1, 3) or parts[1:2] not in ([], ["versions"]):
        raise UnknownModel("no such model")
    return parts[0], parts[2] if len(parts) == 3 else None


def _chain(router: Router, model: str, version: str | None) -> list[EngineLike]:
    chain = router.chain(model, "realtime")
    if version is None:
        return chain
    if chain[0].version != version:
        raise UnknownModel("that version is not the one served")
    return chain[:1]


def _split(call: Call) -> tuple[bytes, bytes]:
    length = call.headers.get(HEADER_LENGTH)
    if length is None:
        return call.body, b""
    if not length.isdigit() or len(length) > MAX_DIGITS or int(length) > len(call.body):
        raise Malformed("Inference-Header-Content-Length is no length within the body")
    return call.body[: int(length)], call.body[int(length) :]


def _only_input(document: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Invalid("want a list of one input", pointer="/inputs")
    if inputs[0].get("name") != INPUT:
        raise Invalid(f"the input is called {INPUT}", pointer="/inputs/0/name")
    if inputs[0].get("datatype") != DATATYPE:
        raise Invalid(f"want {DATATYPE}", pointer="/inputs/0/datatype")
    return inputs[0]


def _object(document: Mapping[str, Any], name: str, pointer: str) -> Mapping[str, Any]:
    value = document.get(name) or {}
    if not isinstance(value, dict):
        raise Invalid("want an object", pointer=f"{pointer}/{name}")
    return value


def _rows(tensor: Mapping[str, Any], parameters: Mapping[str, Any], tail: bytes, shape: Shape, max_rows: int) -> Floats:
    said = tensor.get("shape")
    count = said[0] if isinstance(said, list) and said and type(said[0]) is int else 0
    if count < 1 or said != [count, *shape]:
        raise Invalid(f"want the shape [-1, {', '.join(map(str, shape))}]", pointer="/inputs/0/shape")
    if "binary_data_size" in parameters:
        if parameters["binary_data_size"] != len(tail):
            raise Malformed(f"{len(tail)} bytes follow the header, not binary_data_size")
        rows = wire.decode_octets(tail, shape, max_rows)
    else:
        rows = wire.decode_tensor(tensor.get("data"), "/inputs/0/data", (count, *shape), max_rows)
    if len(rows) != count:
        raise Malformed(f"the data holds {len(rows)} rows, its shape says {count}")
    return rows


def _wants_binary(document: Mapping[str, Any]) -> bool:
    outputs = document.get("outputs") or [{}]
    if not isinstance(outputs, list) or len(outputs) != 1 or not isinstance(outputs[0], dict):
        raise Invalid("want a list of one output", pointer="/outputs")
    if outputs[0].get("name", OUTPUT) != OUTPUT:
        raise Invalid(f"the output is called {OUTPUT}", pointer="/outputs/0/name")
    default = _object(document, "parameters", "").get("binary_data_output", False)
    return _object(outputs[0], "parameters", "/outputs/0").get("binary_data", default) is True


def _encode(asked: Asked, routed: Routed) -> tuple[bytes, bytes, list[tuple[bytes, bytes]]]:
    vectors = routed.prediction.vectors
    output: dict[str, Any] = {"name": OUTPUT, "datatype": DATATYPE, "shape": list(vectors.shape)}
    answer = {
        "model_name": routed.prediction.model,
        "model_version": routed.prediction.version,
        **({"id": asked.id} if asked.id else {}),
        "parameters": {"served_by": routed.served_by, "fallback_reason": routed.fallback_reason or ""},
        "outputs": [output],
    }
    if not asked.binary:
        output["data"] = vectors.ravel()
        return wire.encode_json(answer), JSON, []
    data = wire.encode_octets(vectors)
    output["parameters"] = {"binary_data_size": len(data)}
    header = wire.encode_json(answer)
    return header + data, OCTETS, [(HEADER_LENGTH, b"%d" % len(header))]


def is_infer(path: bytes) -> bool:
    """Whether a path is that of an infer request."""
    return path.startswith(b"/v2/models/") and path.endswith(b"/infer")


class InferRoute(HotRoute):
    """The infer route: one label for every model, and errors that Triton's clients can read."""

    def problem(self, error: ServiceError, identity: str, /, **members: str) -> Reply:
        """Return the RFC 9457 answer with the protocol's own `error` member beside it."""
        return problem_reply(error, identity, error=error.detail)


def add_routes(app: FastAPI, router: Router, lineup: Lineup, door: Door) -> InferRoute:
    """Add the protocol's routes to `app`; return the hot one, which is found by its path's two ends."""
    settings, state = door.settings, door.state

    @app.get("/v2", responses=schemas.UNAUTHORISED)
    async def server_metadata() -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return {"name": "lvm-serve", "version": app.version, "extensions": ["binary_tensor_data"]}

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

    @app.get(MODEL, responses=schemas.NOT_FOUND)
    @app.get(MODEL + "/versions/{version}", responses=schemas.NOT_FOUND)
    async def model_metadata(model: str, version: str | None = None) -> dict[str, Any]:
        """Name, versions, inputs and outputs of a served model."""
        engine = _chain(router, model, version)[0]
        length, dim = engine.shape
        return {
            "name": engine.name,
            "versions": [engine.version],
            "platform": engine.runtime,
            "inputs": [{"name": INPUT, "datatype": DATATYPE, "shape": [-1, length, dim]}],
            "outputs": [{"name": OUTPUT, "datatype": DATATYPE, "shape": [-1, dim]}],
        }

    @app.get(MODEL + "/ready", responses=schemas.NOT_FOUND)
    @app.get(MODEL + "/versions/{version}/ready", responses=schemas.NOT_FOUND)
    async def model_ready(model: str, version: str | None = None) -> dict[str, Any]:
        """200 while the model is served."""
        return {"name": _chain(router, model, version)[0].name, "ready": True}

    route = InferRoute(MODEL + "/infer", Infer(router, door.settings), door)
    app.routes.append(DocumentedHotRoute(route, **schemas.INFER))
    return route
