"""OpenAI's interface to embeddings, for its clients and those of others: POST /v1/embeddings, GET /v1/models."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Annotated, Any

from fastapi import FastAPI, Path

from lvm.errors import Invalid, UnknownModel
from models.text.encoder import BUNDLED_MODEL, is_same_model
from service.deploy.deployments import Deployments
from service.engines.router import Router
from service.engines.text import EmbedInput, Encoded
from service.http import checks, codec, octets, schemas
from service.http.codec import Decoded, Fields, JsonReader
from service.http.messages import JSON, Request, Response, media_type_of
from service.http.routes.common import document_route, query_options
from service.http.routes.embed import EncoderTarget, encode, encoder_of, text_response, texts_check
from service.overload.fairness import Slicer
from service.settings import Settings

Name = Annotated[str, Path(openapi_examples={"encoder": {"value": BUNDLED_MODEL}})]
EMBEDDINGS, MODELS = "/v1/embeddings", "/v1/models"
OPTIONS: dict[str, checks.Check] = {
    "model": checks.text,
    "encoding_format": checks.one_of("float", "base64"),
    "dimensions": checks.whole(1, 2**31 - 1),
    # names the end user, for whoever reads the calls; it has no effect there either
    "user": checks.text,
}


class Embeddings:
    """Answers POST /v1/embeddings."""

    def __init__(self, router: Router, deployments: Deployments, settings: Settings, slicer: Slicer) -> None:
        self._router = router
        self._deployments = deployments
        self._slicer = slicer
        self._fields = Fields({}, OPTIONS, {"input": _input_check(settings)})
        self._json = JsonReader(self._fields, settings.max_rows)

    async def __call__(self, request: Request) -> Response:
        """Return the response; raises `ServiceError`."""
        media_type_of(request.headers.get(b"content-type", JSON), (JSON,))
        options = query_options(request, self._fields)
        decoded = self._json.read_at_once(request.body, self._target, options)
        if decoded is None:
            work = self._json.read_in_slices(request.body, self._target, options)
            decoded = await self._slicer.run(request.client, work)
        decode_s = perf_counter() - request.started
        read = await encode(decoded.target.engine, _embed_input(decoded, request.client), request)
        return _respond(decoded, read, decode_s)

    def _target(self, field: str, options: Mapping[str, Any]) -> EncoderTarget:
        if "model" not in options:
            raise Invalid("expected the name of the encoder, or of a model that reads its vectors", pointer="/model")
        target = encoder_of(options["model"], self._router, self._deployments, f"/{field}")
        (dim,) = target.shape
        if options.get("dimensions", dim) != dim:
            raise Invalid(f"expected {dim}: vectors are not shortened", pointer="/dimensions")
        return target


def add_routes(app: FastAPI, deployments: Deployments) -> None:
    """Add /v1/models to `app`, and document /v1/embeddings there."""

    def listed() -> list[dict[str, Any]]:
        engine = deployments.encoder.engine
        return [{"id": engine.info.name, "object": "model", "created": 0, "owned_by": "lvm-serve"}] if engine else []

    @app.get(MODELS, response_model=schemas.OpenAIModels, responses=schemas.UNAUTHORISED)
    async def openai_models() -> dict[str, Any]:
        """OpenAI: the encoder, if there is one."""
        return {"object": "list", "data": listed()}

    @app.get(MODELS + "/{model:path}", response_model=schemas.OpenAIModel, responses=schemas.NOT_FOUND)
    async def openai_model(model: Name) -> dict[str, Any]:
        """OpenAI: the encoder of that name."""
        for each in listed():
            if is_same_model(each["id"], model):
                return each
        raise UnknownModel(f'unknown model "{model[:100]}"; available: {", ".join(each["id"] for each in listed())}')

    document_route(app, EMBEDDINGS, schemas.OPENAI_EMBEDDINGS)


def _input_check(settings: Settings) -> checks.Check:
    """Return the check of `input`: one text, or a list of texts."""
    one, many = checks.passage(settings.max_text), texts_check(settings)

    def check(value: Any, pointer: str) -> list[str] | str:
        if isinstance(value, list) and value and isinstance(value[0], int | list):
            detail = "expected a string or a list of strings: arrays of tokens are of a tokeniser of another encoder"
            raise Invalid(detail, pointer=pointer)
        found: list[str] | str = many(value, pointer) if isinstance(value, list) else one(value, pointer)
        return found

    return check


def _embed_input(decoded: Decoded[EncoderTarget], client: str) -> EmbedInput:
    text = decoded.text
    if isinstance(text, list):
        return EmbedInput(text, [f"/input/{at}" for at in range(len(text))], client)
    assert text is not None
    return EmbedInput([text], ["/input"], client)


def _respond(decoded: Decoded[EncoderTarget], read: Encoded, decode_s: float) -> Response:
    began = perf_counter()
    encoder = decoded.target.engine.info.name
    is_base64 = decoded.options.get("encoding_format") == "base64"
    word_pieces = sum(info.read for info in read.infos)
    body = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": at, "embedding": octets.encode_base64(vector) if is_base64 else vector}
            for at, vector in enumerate(read.vectors)
        ],
        "model": encoder,
        "usage": {"prompt_tokens": word_pieces, "total_tokens": word_pieces},
    }
    return text_response(codec.encode_json(body), JSON, [(b"x-model", encoder.encode())], read, decode_s, began)
