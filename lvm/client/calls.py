"""The calls of a client: what each sends, in how many requests, and what it makes of the responses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lvm.client import requests, responses
from lvm.client.answers import Answer, Article, Articles, Embeddings, Health, Models, Prediction, Retrieval
from lvm.client.failures import BadAnswer
from lvm.client.flow import Call, Pause, Steps
from lvm.client.requests import HttpRequest, Text
from lvm.errors import Expired, ServiceError, Unavailable

# seconds between two probes of a service that is not ready: the first pause, and the longest
PROBE_PAUSES_S = (0.05, 1.0)
# of one probe, so that a host that does not respond is asked again
PROBE_TIMEOUT_S = 5.0
# a JSON pointer to an item, or into one: what is before its place, its place, and the rest
PLACE = re.compile(r"((?:/contexts|/queries|/texts)?/)(\d{1,9})(?!\d)(.*)", re.DOTALL)
LIVE = HttpRequest("GET", "/livez")
READY = HttpRequest("GET", "/readyz")
READ_LIVE = partial(responses.read_status, expected="live")
READ_READY = partial(responses.read_status, expected="ready")


def predict(call: Call, contexts: ArrayLike | Text, options: Mapping[str, Any]) -> Steps[Prediction]:
    """Request the next vectors of contexts `(n, T, D)`, of one `(T, D)`, or of a text."""
    given = requests.to_json_options(options)
    text = requests.text_of(contexts)
    if text is not None:
        body = {**requests.text_field(text), **given, "encoding": "base64"}
        return (yield from call.send(requests.json_request("/predict", body), responses.read_text_prediction))
    rows = requests.to_numbers(contexts, "contexts", {2: "(T, D)", 3: "(n, T, D)"})
    if rows.ndim == 2:
        return (yield from _predict_rows(call, rows, given))
    parts: list[Prediction] = []
    for at in range(0, len(rows), call.flow.rows):
        with _items_from(at):
            parts += [(yield from _predict_rows(call, rows[at : at + call.flow.rows], given))]
    return _joined(parts, rows.shape[-1])


def retrieve(call: Call, asked: ArrayLike | Text, options: Mapping[str, Any]) -> Steps[Retrieval]:
    """Request the passages nearest to a query `(D,)`, to the prediction of a context `(T, D)`, or to a text."""
    given = requests.to_json_options(options)
    text = requests.text_of(asked)
    if isinstance(text, list) and "read_as" in given:
        raise ValueError("read_as: expected one query as a string; many are for `retrieve_many`")
    if text is None:
        rows = requests.to_numbers(asked, "a query or a context", {1: "(D,)", 2: "(T, D)"})
        ask = requests.retrieve_request("query" if rows.ndim == 1 else "context", rows, given)
    else:
        ask = requests.json_request("/retrieve", {**requests.text_field(text), **given})
    return (yield from call.send(ask, partial(responses.read_retrieval, most=_most(given))))


def retrieve_many(call: Call, asked: ArrayLike | Sequence[Text], options: Mapping[str, Any]) -> Steps[list[Retrieval]]:
    """Request the passages nearest to each of many queries `(n, D)`, contexts `(n, T, D)`, or texts."""
    given = requests.to_json_options(options)
    texts = requests.texts_of(asked)
    if texts is not None:
        return (yield from _retrieve_texts(call, texts, given))
    rows = requests.to_numbers(asked, "queries or contexts", {2: "(n, D)", 3: "(n, T, D)"})
    field = "queries" if rows.ndim == 2 else "contexts"
    size = requests.queries_of_a_part(given, call.flow.rows)
    found: list[Retrieval] = []
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        read = partial(responses.read_retrievals, count=len(part), most=_most(given))
        with _items_from(at):
            found += yield from call.send(requests.retrieve_request(field, part, given), read)
    return found


def embed(call: Call, texts: Text, chunks: bool, options: Mapping[str, Any]) -> Steps[Embeddings]:
    """Request the vectors of texts, of one text, or of its chunks."""
    given = {**requests.to_json_options(options), "encoding": "base64"}
    text = requests.text_of(texts)
    if text is None:
        kind = type(texts).__name__
        raise ValueError(f"texts: expected a string, or a list of strings that is not empty; got {kind}")
    if isinstance(text, str):
        return (yield from _embed_one(call, text, chunks, given))
    if chunks:
        raise ValueError("chunks: only one text, a string, is cut into chunks")
    parts: list[Embeddings] = []
    for part in requests.parts_of_texts(text, call.flow.rows, requests.CHARACTERS_PER_ROW * call.flow.rows):
        ask = requests.json_request("/embed", {"texts": part, **given})
        with _items_from(sum(len(each.vectors) for each in parts)):
            parts += [(yield from call.send(ask, partial(responses.read_embeddings, count=len(part))))]
    return _joined_embeddings(parts)


def models(call: Call) -> Steps[Models]:
    """Request what is served."""
    return (yield from call.send(HttpRequest("GET", "/models"), responses.read_models))


def articles(call: Call, search: str, offset: int, limit: int) -> Steps[Articles]:
    """Request a page of the articles with `search` in their titles."""
    given = {"search": search, "offset": requests.parse_count("offset", offset, 0)}
    given["limit"] = requests.parse_count("limit", limit, 1)
    ask = HttpRequest("GET", "/articles", params={name: str(value) for name, value in given.items()})
    return (yield from call.send(ask, partial(responses.read_articles, most=limit)))


def article(call: Call, article: int) -> Steps[Article]:
    """Request an article with its vectors."""
    number = requests.parse_count("article", article, 0)
    ask = HttpRequest("GET", f"/articles/{number}")
    return (yield from call.send(ask, partial(responses.read_article, article=number)))


def health(call: Call) -> Steps[Health]:
    """Ask both probes, once."""
    states: list[ServiceError | None] = []
    for probe, read in ((LIVE, READ_LIVE), (READY, READ_READY)):
        try:
            yield from call.send_once(probe, read)
        except Unavailable as error:
            states.append(error)
        else:
            states.append(None)
    reason = next((error.detail for error in states if error), None)
    return Health(is_live=not states[0], is_ready=not states[1], reason=reason, request_id=call.request_id)


def wait_ready(call: Call) -> Steps[None]:
    """Ask until the service is ready.

    Raises:
        Expired: the deadline passed; the last failure is its cause.
        ServiceError: the address is not that of a service.
    """
    pause, longest = PROBE_PAUSES_S
    while True:
        try:
            return (yield from call.send_once(READY, READ_READY, PROBE_TIMEOUT_S))
        except ServiceError as error:
            left = call.seconds_left()
            if error.status < 500 or isinstance(error, BadAnswer):
                raise
            if left < PROBE_PAUSES_S[0]:
                raise Expired(f"the service did not become ready in time; last failure: {error}") from error
        yield Pause(min(pause, left / 2))
        pause = min(2 * pause, longest)


def _predict_rows(call: Call, rows: NDArray[Any], options: Mapping[str, Any]) -> Steps[Prediction]:
    read = partial(responses.read_prediction, shape=(*rows.shape[:-2], rows.shape[-1]))
    return (yield from call.send(requests.predict_request(rows, options), read))


def _retrieve_texts(call: Call, texts: list[str | list[str]], options: Mapping[str, Any]) -> Steps[list[Retrieval]]:
    """Return the passages of each text; several are one request if all are to be read as queries."""
    found: list[Retrieval] = []
    queries = [text for text in texts if isinstance(text, str)]
    if "read_as" not in options or len(queries) < len(texts):
        for at, text in enumerate(texts):
            with _item(at):
                found += [(yield from retrieve(call, text, options))]
        return found
    size = requests.queries_of_a_part(options, call.flow.rows)
    for part in requests.parts_of_texts(queries, size, requests.MAX_TEXT):
        ask = requests.json_request("/retrieve", {"texts": part, **options})
        with _items_from(len(found)):
            found += yield from call.send(ask, partial(responses.read_retrievals, count=len(part), most=_most(options)))
    return found


def _embed_one(call: Call, text: str, chunks: bool, options: Mapping[str, Any]) -> Steps[Embeddings]:
    """Return the vectors `(n, D)` of the chunks of a text, or the vector `(D,)` of the text."""
    if chunks:
        ask = requests.json_request("/embed", {"text": text, "chunks": True, **options})
        return (yield from call.send(ask, partial(responses.read_embeddings, count=None)))
    ask = requests.json_request("/embed", {"text": text, **options})
    found = yield from call.send(ask, partial(responses.read_embeddings, count=1))
    return replace(found, vectors=found.vectors[0])


@contextmanager
def _items_from(at: int) -> Iterator[None]:
    """Point at the items of the whole call in errors of a request that has those from the place `at` on."""
    try:
        yield
    except ServiceError as error:
        if found := PLACE.match(error.pointer or ""):
            error.pointer = f"{found[1]}{at + int(found[2])}{found[3]}"
        raise


@contextmanager
def _item(at: int) -> Iterator[None]:
    """Point at an item of the whole call in errors of a request that has this item only."""
    try:
        yield
    except ServiceError as error:
        if error.pointer and error.pointer.startswith("/text"):
            error.pointer = f"/{at}{error.pointer}"
        raise


def _most(options: Mapping[str, Any]) -> int | None:
    k = options.get("k")
    return k if isinstance(k, int) else None


def _joined(parts: Sequence[Prediction], dim: int) -> Prediction:
    """Return the predictions of several requests as one."""
    made_by = dict.fromkeys(made for part in parts for made in part.made_by)
    vectors = np.concatenate([np.empty((0, dim), np.float32), *(part.vectors for part in parts)])
    return Prediction(vectors, tuple(made_by), **_about(parts))


def _joined_embeddings(parts: Sequence[Embeddings]) -> Embeddings:
    """Return the vectors of several requests as one; raises `BadAnswer` if the encoder changed meanwhile."""
    if len({(part.encoder, part.vectors.shape[1]) for part in parts}) > 1:
        raise BadAnswer("the encoder of the service changed during the call")
    starts = [0, *accumulate(len(part.vectors) for part in parts)]
    placed = list(zip(starts, parts, strict=False))
    return Embeddings(
        vectors=np.concatenate([part.vectors for part in parts]),
        encoder=parts[0].encoder,
        truncated=tuple(start + at for start, part in placed for at in part.truncated),
        unread={start + at: share for start, part in placed for at, share in part.unread.items()},
        **_about(parts),
    )


def _about(parts: Sequence[Answer]) -> dict[str, Any]:
    """Return the attributes of `Answer` of several requests."""
    timings = Counter[str]()
    for part in parts:
        timings.update(part.timings)
    return {"request_id": parts[0].request_id if parts else None, "timings": dict(timings)}
