"""What the handlers of predictions share: decoding, text, and the members and headers about the model that answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fastapi import FastAPI
from fastapi.routing import APIRoute

from models.vectors import complete_context
from service.deploy.deployments import Deployments
from service.engines.batcher import MAX_QUEUED_PARTS
from service.engines.text import ENCODER, MAX_BATCH, Encoded, TextInput
from service.http import checks, codec, octets
from service.http.codec import Decoded, Fields
from service.http.headers import chosen
from service.http.messages import JSON, Header, Headers, Request, Response, Stages
from service.http.octets import OCTETS
from service.settings import Settings
from service.telemetry.metrics import TOTAL_TEXT

T = TypeVar("T", bound=codec.HasInputShape)
# rows of many texts that are in the encoder's queue at a time
PENDING_ROWS = MAX_BATCH * MAX_QUEUED_PARTS
# places of texts that a header lists: proxies accept a few kilobytes of headers
MAX_LISTED = 100


class MadeBy(NamedTuple):
    """What made an answer: the model, the alias that served it, and why it was not the first in order, or None."""

    model: str
    version: str
    served_by: str
    fallback_reason: str | None


def document_route(app: FastAPI, path: str, documentation: dict[str, Any]) -> None:
    """Document POST `path` in `app`, which never sees such requests: the gateway answers them before."""

    async def documented() -> None: ...

    app.routes.append(APIRoute(path, documented, methods=["POST"], **documentation))


def text_fields(settings: Settings) -> dict[str, checks.Check]:
    """Return the fields of a body that hold text, with their checks."""
    return {"text": checks.passage(settings.max_text), "texts": checks.passages(settings.max_text)}


def query_options(request: Request, fields: Fields) -> dict[str, Any]:
    """Return the options of the query string; raises `Malformed` or `Invalid`."""
    return checks.query_options(request.options(), fields.options) if request.query else {}


async def embed(
    deployments: Deployments,
    encoder: str,
    decoded: Decoded[T],
    length: int,
    request: Request,
    *,
    may_be_query: bool = False,
) -> Decoded[T]:
    """Return a decoded text as vectors `(1, length, D)` of `encoder`, or as a query `(1, D)` if it `may_be_query`.

    A context of fewer chunks is completed.

    Raises:
        NoEncoder: there is no such encoder here.
        Invalid: the text is too short.
        Overloaded, Expired: as every engine.
    """
    assert decoded.text is not None
    engine = deployments.encoder.require_engine(encoder, f"/{decoded.field}")
    read = await engine.run(TextInput(decoded.text, length, may_be_query, request.client), request.deadline)
    chunks = {"chunks": read.chunks} if decoded.field == "text" else {}
    info = {"read_as": read.read_as, **chunks, **not_fully_read(read)}
    if read.read_as == "query":
        return decoded._replace(rows=read.vectors, field="query", text_info=info)
    return decoded._replace(rows=complete_context(read.vectors, length)[None], field="context", text_info=info)


def not_fully_read(read: Encoded) -> dict[str, list[dict[str, Any]]]:
    """Return which chunks were truncated, and which hold unknown words; without empty members."""
    truncated = [
        {"index": at, "word_pieces": info.word_pieces, "read": info.read}
        for at, info in enumerate(read.infos)
        if info.truncated
    ]
    unread = [{"index": at, "share": round(info.unread, 3)} for at, info in enumerate(read.infos) if info.unread]
    return {name: found for name, found in (("truncated", truncated), ("unread", unread)) if found}


def mark_as_text(response: Response, text_info: Mapping[str, Any]) -> Response:
    """Return the response to a text: timed apart from those to vectors; headers name the chunks not fully read."""
    response.total = TOTAL_TEXT
    response.served_by = ENCODER
    for name in ("truncated", "unread"):
        response.headers += _listed(name, [each["index"] for each in text_info.get(name, ())])
    return response


def full_read_headers(read: Encoded) -> Headers:
    """Return headers that name the texts that were truncated, or that have unknown words, if there are any."""
    truncated = [at for at, info in enumerate(read.infos) if info.truncated]
    unread = [at for at, info in enumerate(read.infos) if info.unread]
    return _listed("truncated", truncated) + _listed("unread", unread)


def _listed(name: str, indices: Sequence[int]) -> Headers:
    """Return a header with the first places, or no header if there are none."""
    text = ", ".join(map(str, indices[:MAX_LISTED]))
    return [(f"x-{name}".encode(), text.encode())] if text else []


def wanted_octets(request: Request, options: Mapping[str, Any]) -> np.dtype[Any] | None:
    """Return the type of number in which Accept asks for octets, None if it prefers JSON."""
    accept = request.headers.get(b"accept")
    if accept is None or options.get("encoding"):
        return None
    if accept == OCTETS:
        return octets.FLOAT32
    wanted = chosen(accept, OCTETS, JSON)
    return None if wanted is None else octets.dtype_of(wanted)


def milliseconds(stages: Stages) -> dict[str, float]:
    """Return stages as a body has them."""
    return {stage: round(seconds * 1e3, 3) for stage, seconds in stages.items()}


@lru_cache(maxsize=1024)
def headers_of(made_by: MadeBy, batch_rows: int = 0, replica: str = "") -> tuple[Header, ...]:
    """Return the headers about what made an answer, in a batch of how many rows, in which replica."""
    headers = [
        (b"x-model", made_by.model.encode()),
        (b"x-model-version", made_by.version.encode()),
        (b"x-served-by", made_by.served_by.encode()),
    ]
    if made_by.fallback_reason:
        headers.append((b"x-fallback-reason", made_by.fallback_reason.encode()))
    if batch_rows:
        headers.append((b"x-batch-size", b"%d" % batch_rows))
    if replica:
        headers.append((b"x-replica", replica.encode()))
    return tuple(headers)
