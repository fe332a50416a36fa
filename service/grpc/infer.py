"""ModelInfer: contexts in, as bytes or numbers; the next vectors out, in the same form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lvm.errors import Invalid
from models.vectors import Floats
from service.engines.router import Routed
from service.grpc.messages import check_parts, message_type, parse
from service.http import codec
from service.http.messages import Request, Response
from service.http.octets import Shape, encode_octets, reject_non_finite
from service.http.routes import oip
from service.http.routes.oip import DATATYPE, OUTPUT, ParsedRequest
from service.overload.fairness import Work

ModelInferRequest = message_type("ModelInferRequest")
ModelInferResponse = message_type("ModelInferResponse")
InferParameter = message_type("InferParameter")
NUMBERS = "/inputs/0/contents/fp32_contents"
# Numbers that are copied in one go, in about a millisecond.
SLICE = 2**15


class ModelInfer(oip.Inference):
    """Answers ModelInfer as POST /v2/models/{model}/infer answers the same request in JSON."""

    async def __call__(self, request: Request) -> Response:
        """Return the response; raises `ServiceError`."""
        check_parts(request.body)
        message = parse(ModelInferRequest, request.body)
        chain = oip.chain_of(self._router, message.model_name, message.model_version or None)
        work = self.parse(request, message, chain[0].info.shape)
        is_quick = message.raw_input_contents or len(request.body) <= codec.QUICK
        parsed = codec.run_to_end(work) if is_quick else await self._slicer.run(request.client, work)
        return await self._answer(request, parsed, chain, _encode)

    def parse(self, request: Request, message: Any, shape: Shape) -> Work[ParsedRequest]:
        """Return what a message asks of a model of contexts of `shape`; yield between slices; raises `ServiceError`."""
        document = _document(message)
        tensor = oip.only_input(document)
        raw = _raw_contents(message)
        given = document["inputs"][0]
        if raw is None:
            oip.parameters_of(tensor, "/inputs/0", oip.INPUT_PARAMETERS)
            given["data"] = yield from self._numbers(
                message.inputs[0].contents, oip.count_of(tensor, shape, self._max_rows), shape
            )
        else:
            given["parameters"]["binary_data_size"] = len(raw)
        is_raw = raw is not None
        return self._parsed(request, document, message.model_name, raw or b"", shape, binary=is_raw)

    def _numbers(self, contents: Any, count: int, shape: Shape) -> Work[Floats]:
        if [field.name for field, _ in contents.ListFields()] != ["fp32_contents"]:
            raise Invalid("expected fp32_contents, or raw_input_contents", pointer="/inputs/0/contents")
        given, expected = contents.fp32_contents, count * math.prod(shape)
        if len(given) != expected:
            raise Invalid(f"{len(given)} items; expected {expected}", pointer=NUMBERS)
        numbers: Floats = np.empty(expected, np.float32)
        for start in range(0, expected, SLICE):
            numbers[start : start + SLICE] = given[start : start + SLICE]
            yield
        reject_non_finite(numbers, NUMBERS)
        return numbers


def _document(message: Any) -> dict[str, Any]:
    """Return the members that a message without its numbers has in JSON."""
    return {
        "id": message.id,
        "parameters": _parameters(message.parameters),
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": _parameters(tensor.parameters),
            }
            for tensor in message.inputs
        ],
        "outputs": [{"name": output.name, "parameters": _parameters(output.parameters)} for output in message.outputs],
    }


def _parameters(given: Any) -> dict[str, Any]:
    """Return parameters as JSON has them, by name, as a map has no order; one without a value is null."""
    kinds = {name: given[name].WhichOneof("parameter_choice") for name in sorted(given)}
    return {name: kind and getattr(given[name], kind) for name, kind in kinds.items()}


def _raw_contents(message: Any) -> bytes | None:
    """Return the bytes of the only tensor, None if it has numbers.

    Raises:
        Invalid: there are several, or numbers as well.
    """
    contents = message.raw_input_contents
    if not contents:
        return None
    if len(contents) > 1:
        raise Invalid(f"{len(contents)} contents; expected one for each input", pointer="/raw_input_contents")
    if message.inputs[0].contents.ByteSize():
        raise Invalid("given both here and in raw_input_contents", pointer="/inputs/0/contents")
    raw: bytes = contents[0]
    return raw


def _encode(parsed: ParsedRequest, routed: Routed) -> oip.Encoded:
    prediction = routed.prediction
    vectors = prediction.vectors
    numbers = {} if parsed.binary else {"contents": {"fp32_contents": vectors.ravel().tolist()}}
    message = ModelInferResponse(
        model_name=prediction.model,
        model_version=prediction.version,
        id=parsed.id or "",
        outputs=[{"name": OUTPUT, "datatype": DATATYPE, "shape": vectors.shape, **numbers}],
        raw_output_contents=[encode_octets(vectors)] if parsed.binary else [],
    )
    message.parameters["served_by"].string_param = routed.served_by
    message.parameters["fallback_reason"].string_param = routed.fallback_reason or ""
    return message.SerializeToString(), b"", []
