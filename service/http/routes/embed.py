"""POST /embed: texts, or the chunks of a passage, in; their unit vectors, which the nets and the corpora read, out."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from lvm.errors import Invalid, Unavailable, UnknownModel
from models.text.encoder import is_same_model
from service.deploy.deployments import Deployments
from service.engines.engine import Engine
from service.engines.router import Router
from service.engines.text import ENCODER, EmbedInput, Encoded, TextAdapter
from service.http import checks, codec, octets
from service.http.codec import Decoded, Fields, JsonReader
from service.http.messages import JSON, Headers, Request, Response, Stages, media_type_of
from service.http.octets import Shape
from service.http.routes.common import (
    PENDING_ROWS,
    full_read_headers,
    milliseconds,
    query_options,
    wanted_octets,
)
from service.overload.fairness import Slicer
from service.settings import Settings
from service.telemetry.metrics import TOTAL_TEXT

# of all texts of a request, for each text that it may have
CHARACTERS_PER_TEXT = 1000
OPTIONS: dict[str, checks.Check] = {
    "chunks": checks.flag,
    "model": checks.text,
    "encoding": checks.one_of("float", "base64"),
}


class EncoderTarget(NamedTuple):
    """The engine that encodes texts to vectors `(D,)`."""

    engine: Engine[TextAdapter]

    @property
    def shape(self) -> Shape:
        """The shape of a vector."""
        return (self.engine.info.shape[1],)


class Embed:
    """Answers POST /embed."""

    def __init__(self, router: Router, deployments: Deployments, settings: Settings, slicer: Slicer) -> None:
        self._router = router
        self._deployments = deployments
        self._slicer = slicer
        fields = {"text": checks.passage(settings.max_text), "texts": texts_check(settings)}
        self._fields = Fields({}, OPTIONS, fields)
        self._json = JsonReader(self._fields, settings.max_rows)

    async def __call__(self, request: Request) -> Response:
        """Return the response; raises `ServiceError`."""
        media_type_of(request.headers.get(b"content-type", JSON), (JSON,))
        decoded = await self._decode(request)
        wanted = _embed_input(decoded, request.client)
        decode_s = perf_counter() - request.started
        read = await encode(decoded.target.engine, wanted, request)
        return _respond(request, decoded, read, decode_s)

    async def _decode(self, request: Request) -> Decoded[EncoderTarget]:
        options = query_options(request, self._fields)
        decoded = self._json.read_at_once(request.body, self._target, options)
        if decoded is None:
            work = self._json.read_in_slices(request.body, self._target, options)
            decoded = await self._slicer.run(request.client, work)
        return decoded

    def _target(self, field: str, options: Mapping[str, Any]) -> EncoderTarget:
        if options.get("chunks") and field == "texts":
            raise Invalid("only `text`, a passage, is cut into chunks", pointer="/chunks")
        return encoder_of(options.get("model"), self._router, self._deployments, f"/{field}")


def encoder_of(model: str | None, router: Router, deployments: Deployments, pointer: str) -> EncoderTarget:
    """Return the encoder of that name, or the one whose vectors that alias or model reads.

    Without a `model`, it must be the encoder of some model in service; `pointer` is to the text.

    Raises:
        UnknownModel: no encoder, alias or model in service has that name.
        Unavailable: no net is loaded, so the name may be that of one in a moment.
        NoEncoder: there is no encoder here, or not that of the model.
    """
    loaded = deployments.encoder.engine
    if loaded and model and is_same_model(loaded.info.name, model):
        return EncoderTarget(loaded)
    served = [slot.engine.info for slot in deployments.slots.values() if slot.engine]
    named = [info for info in served if model in (None, info.alias, info.name)]
    if model and not named and not router.engines:
        raise Unavailable("no model is loaded")
    if model and not named:
        names = {info.alias for info in served} | {info.name for info in served}
        names |= {loaded.info.name} if loaded else set()
        raise UnknownModel(f'unknown model "{model[:100]}"; available: {", ".join(sorted(names))}')
    encoders = [info.encoder for info in named] or [router.chain(None, "realtime").engines[0].info.encoder]
    fitting = [name for name in encoders if loaded and is_same_model(loaded.info.name, name)]
    return EncoderTarget(deployments.encoder.require_engine((fitting or encoders)[0], pointer))


async def encode(engine: Engine[TextAdapter], wanted: EmbedInput, request: Request) -> Encoded:
    """Return the vectors of texts; only the rows that are in the encoder's queue count as rows in flight.

    Raises:
        Invalid: the encoder cannot read a text.
        NoEncoder, Overloaded, Expired, ModelFailed: as every engine.
    """
    request.set_rows(min(wanted.rows, PENDING_ROWS))
    return await engine.run(wanted, request.deadline)


def text_response(
    body: bytes, media_type: bytes, headers: Headers, read: Encoded, decode_s: float, began: float
) -> Response:
    """Return the response with vectors of texts; `began` is when it began to be encoded."""
    stages = {**embed_stages(read, decode_s), "encode": perf_counter() - began}
    response = Response(body, media_type, headers + full_read_headers(read), stages=stages, served_by=ENCODER)
    response.total = TOTAL_TEXT
    return response


def embed_stages(read: Encoded, decode_s: float) -> Stages:
    """Return the stages of a request until its vectors are there."""
    return {"decode": decode_s, "queue": read.queue_s, "embed": read.embed_s}


def texts_check(settings: Settings) -> checks.Check:
    """Return the check of a list of texts, each of which gets a vector."""
    return checks.texts(settings.max_rows, settings.max_text, CHARACTERS_PER_TEXT * settings.max_rows)


def _embed_input(decoded: Decoded[EncoderTarget], client: str) -> EmbedInput:
    text = decoded.text
    if isinstance(text, list):
        return EmbedInput(text, [f"/texts/{at}" for at in range(len(text))], client)
    assert text is not None
    return EmbedInput(text if decoded.options.get("chunks") else [text], ["/text"], client)


def _respond(request: Request, decoded: Decoded[EncoderTarget], read: Encoded, decode_s: float) -> Response:
    began = perf_counter()
    encoder = decoded.target.engine.info.name
    headers = [(b"x-model", encoder.encode())]
    dtype = wanted_octets(request, decoded.options)
    if dtype:
        body, media_type = (
            np.ascontiguousarray(read.vectors, dtype).tobytes(),
            octets.octets_of(dtype, read.vectors.shape),
        )
    else:
        body, media_type = codec.encode_json(_body(decoded, read, encoder, decode_s)), JSON
    return text_response(body, media_type, headers, read, decode_s, began)


def _body(decoded: Decoded[EncoderTarget], read: Encoded, encoder: str, decode_s: float) -> dict[str, Any]:
    vectors: Any = read.vectors
    if decoded.options.get("encoding") == "base64":
        vectors = [octets.encode_base64(vector) for vector in read.vectors]
    return {
        "vectors": vectors,
        "encoder": encoder,
        "dimensions": decoded.target.shape[0],
        **({"chunks": read.chunks} if decoded.options.get("chunks") else {}),
        "truncated": [info.truncated for info in read.infos],
        "unread": [round(info.unread, 3) for info in read.infos],
        "timing_ms": milliseconds(embed_stages(read, decode_s)),
    }
