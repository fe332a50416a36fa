"""Responses to answers. All that is read is checked: types, shapes, sizes, and that numbers are finite."""

from __future__ import annotations

import math
from time import monotonic
from typing import Any

import httpx
import numpy as np

from lvm.client.answers import (
    AliasState,
    Article,
    ArticleEntry,
    ArticlePassage,
    Articles,
    Embeddings,
    MadeBy,
    Models,
    ModelVersion,
    Passage,
    Prediction,
    Retrieval,
)
from lvm.client.failures import BadAnswer, request_id_of
from lvm.client.members import Members
from lvm.client.requests import OCTETS, Floats, HttpRequest
from lvm.errors import Expired

# accepted codings of responses; the decoded size of others cannot be bounded
CODINGS = ("identity", "gzip", "deflate")
# headers that describe a body in transfer
FRAMING_HEADERS = (b"content-encoding", b"content-length", b"transfer-encoding")
# decoded bytes of a response, in addition to the size of the request
MAX_ANSWER_BYTES = 64 << 20
MAX_STAGES = 100


class ResponseBody:
    """Collects the decoded body of a response, up to a size and a deadline in monotonic seconds.

    Raises:
        BadAnswer: the client did not accept this Content-Encoding.
    """

    def __init__(self, response: httpx.Response, ask: HttpRequest, deadline: float) -> None:
        self._answer = response
        self._deadline = deadline
        self._parts: list[bytes] = []
        self._left = MAX_ANSWER_BYTES + len(ask.content)
        if response.headers.get("content-encoding", "identity").strip().lower() not in CODINGS:
            raise BadAnswer(f"response has an unknown Content-Encoding; expected {', '.join(CODINGS)}")

    def add(self, part: bytes) -> None:
        """Add the next part.

        Raises:
            BadAnswer: the response is larger than the limit.
            Expired: the deadline passed.
        """
        self._left -= len(part)
        if self._left < 0:
            raise BadAnswer(f"response has more than {MAX_ANSWER_BYTES} decoded bytes")
        if monotonic() > self._deadline:
            raise Expired("the deadline passed before the response was complete")
        self._parts.append(part)

    def whole(self) -> httpx.Response:
        """Return the response with its decoded body."""
        headers = [(name, value) for name, value in self._answer.headers.raw if name.lower() not in FRAMING_HEADERS]
        return httpx.Response(self._answer.status_code, headers=headers, content=b"".join(self._parts))


def read_prediction(response: httpx.Response, shape: tuple[int, ...]) -> Prediction:
    """Return next vectors of octets; raises `BadAnswer` if they are not finite or have another shape."""
    _check_type(response.headers.get("content-type", OCTETS).lower(), shape)
    size = 4 * math.prod(shape)
    if len(response.content) != size:
        raise BadAnswer(f"response has {len(response.content)} bytes; expected {size} (float32, shape {shape})")
    vectors: Floats = np.frombuffer(response.content, "<f4").reshape(shape).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise BadAnswer("response has values that are not finite")
    return Prediction(vectors, (_made_by_headers(response.headers),), **_about(response))


def read_text_prediction(response: httpx.Response) -> Prediction:
    """Return the next vector of a text; raises `BadAnswer`."""
    found = Members.of_body(response.content)
    return Prediction(found.vector("vector"), (_made_by(found),), **_text_info(found), **_about(response))


def read_retrieval(response: httpx.Response, most: int | None) -> Retrieval:
    """Return the passages of one query, `most` at most; raises `BadAnswer`."""
    found = Members.of_body(response.content)
    about = {**_about_search(found, response), **_text_info(found)}
    return Retrieval(_passages(found.objects("results"), most), **about)


def read_retrievals(response: httpx.Response, count: int, most: int | None) -> list[Retrieval]:
    """Return the passages of each of `count` queries, `most` each at most; raises `BadAnswer`."""
    found = Members.of_body(response.content)
    results, about, info = found.lists_of_objects("results"), _about_search(found, response), _text_info(found)
    if len(results) != count:
        raise BadAnswer(f"response has {len(results)} lists of passages; expected {count}")
    return [Retrieval(_passages(each, most), **about, **_info_of(info, at)) for at, each in enumerate(results)]


def read_embeddings(response: httpx.Response, count: int | None) -> Embeddings:
    """Return the vectors `(n, D)` of `count` texts, or of the chunks of one if it is None; raises `BadAnswer`."""
    found = Members.of_body(response.content)
    chunks = found.texts("chunks") if count is None else None
    count = count or len(chunks or ())
    truncated, unread = found.flags("truncated"), found.numbers("unread")
    if not len(truncated) == len(unread) == count:
        raise BadAnswer(f"response: /truncated or /unread: expected {count} items")
    return Embeddings(
        vectors=found.vectors("vectors", found.count("dimensions"), count),
        encoder=found.text("encoder"),
        chunks=None if chunks is None else tuple(chunks),
        truncated=tuple(at for at, is_truncated in enumerate(truncated) if is_truncated),
        unread={at: share for at, share in enumerate(unread) if share},
        **_about(response),
    )


def read_articles(response: httpx.Response, most: int) -> Articles:
    """Return a page of articles, `most` at most; raises `BadAnswer`."""
    found = Members.of_body(response.content)
    entries, total = found.objects("articles"), found.count("total")
    if len(entries) > min(most, total):
        raise BadAnswer(f"response has {len(entries)} articles of {total}; expected at most {most}")
    page = [ArticleEntry(each.count("article"), each.text("title"), each.count("chunks")) for each in entries]
    return Articles(page, total=total, **_corpus(found), **_about(response))


def read_article(response: httpx.Response, article: int) -> Article:
    """Return an article with its vectors; raises `BadAnswer`."""
    found = Members.of_body(response.content)
    passages, dim, length = found.objects("chunks"), found.count("dim"), found.count("context_length")
    if found.count("article") != article or not passages or not dim or not length:
        raise BadAnswer(f"response is not article {article} with its passages")
    return Article(
        article=article,
        title=found.text("title"),
        encoder=found.text("encoder"),
        context_length=length,
        passages=tuple(map(_article_passage, passages)),
        vectors=np.stack([passage.vector("vector", dim) for passage in passages]),
        **_corpus(found),
        **_about(response),
    )


def read_models(response: httpx.Response) -> Models:
    """Return what is served, and the versions of the registry; raises `BadAnswer`."""
    found = Members.of_body(response.content)
    aliases = found.object("aliases")
    return Models(
        aliases={name: _alias(aliases.object(name)) for name in aliases.found},
        versions=tuple(map(_version, found.objects("versions"))),
        encoder=found.object("encoder").optional_text("name"),
        **_about(response),
    )


def read_status(response: httpx.Response, expected: str) -> None:
    """Raise `BadAnswer` if a probe is not answered as the service does, but by a web page, for example."""
    if Members.of_body(response.content).text("status") != expected:
        raise BadAnswer(f"response is not that of a probe; expected the status {expected}")


def server_timings(header: str) -> dict[str, float]:
    """Return milliseconds by stage of a header Server-Timing; what is malformed, or of a proxy, is left out."""
    timings: dict[str, float] = {}
    for entry in header.split(",")[:MAX_STAGES]:
        stage, *parameters = (part.strip() for part in entry.split(";"))
        found = dict(part.lower().partition("=")[::2] for part in parameters)
        milliseconds = _milliseconds(found.get("dur", ""))
        if stage and milliseconds is not None:
            timings[stage] = timings.get(stage, 0.0) + milliseconds
    return timings


def _milliseconds(text: str) -> float | None:
    try:
        number = float(text.strip(' "'))
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


def _about(response: httpx.Response) -> dict[str, Any]:
    """Return the attributes of `Answer`."""
    timings = server_timings(response.headers.get("server-timing", ""))
    return {"request_id": request_id_of(response), "timings": timings}


def _about_search(found: Members, response: httpx.Response) -> dict[str, Any]:
    """Return the attributes of `Retrieval`."""
    return {
        "is_exact": found.flag("is_exact"),
        "reranked": found.flag("reranked"),
        "made_by": (_made_by(found),) if found.has("model") else (),
        "fallback_reason": found.optional_text("fallback_reason"),
        **_corpus(found),
        **_about(response),
    }


def _passages(results: list[Members], most: int | None) -> list[Passage]:
    if most is not None and len(results) > most:
        raise BadAnswer(f"response has {len(results)} passages; expected at most {most}")
    return [_passage(result) for result in results]


def _passage(found: Members) -> Passage:
    return Passage(
        id=found.count("id"),
        score=found.number("score"),
        article=found.count("article"),
        title=found.text("title"),
        position=found.count("position"),
        text=found.text_or_null("text"),
        source_id=found.optional_text("source_id"),
        metadata=found.optional_scalars("metadata"),
        rerank_score=found.optional_number("rerank_score"),
    )


def _article_passage(found: Members) -> ArticlePassage:
    return ArticlePassage(
        id=found.count("id"),
        position=found.count("position"),
        text=found.text_or_null("text"),
        source_id=found.optional_text("source_id"),
        metadata=found.optional_scalars("metadata"),
    )


def _alias(state: Members) -> AliasState:
    return AliasState(
        id=state.text("id"),
        since=state.text("since"),
        breaker=state.optional_text("breaker"),
        warning=state.optional_text("warning"),
        refused=state.optional_scalars("refused"),
    )


def _version(found: Members) -> ModelVersion:
    return ModelVersion(
        id=found.text("id"),
        model=found.optional_text("model"),
        version=found.optional_text("version"),
        kind=found.optional_text("kind"),
        error=found.optional_text("error"),
        summary=found.found,
    )


def _corpus(found: Members) -> dict[str, Any]:
    return {name: found.text(name) for name in ("corpus", "corpus_version")}


def _text_info(found: Members) -> dict[str, Any]:
    """Return the attributes of `TextAnswer`."""
    return {
        "read_as": found.optional_text("read_as"),
        "chunks": tuple(found.texts("chunks")) if found.has("chunks") else None,
        "truncated": tuple(each.count("index") for each in found.optional_objects("truncated")),
        "unread": {each.count("index"): each.number("share") for each in found.optional_objects("unread")},
    }


def _info_of(info: dict[str, Any], at: int) -> dict[str, Any]:
    """Return what `_text_info` of many texts says of one."""
    unread = {0: info["unread"][at]} if at in info["unread"] else {}
    return {**info, "truncated": (0,) if at in info["truncated"] else (), "unread": unread}


def _made_by(found: Members) -> MadeBy:
    reason = found.optional_text("fallback_reason")
    return MadeBy(found.text("model"), found.text("version"), found.text("served_by"), reason)


def _made_by_headers(headers: httpx.Headers) -> MadeBy:
    model, version, served_by = (headers.get(name, "") for name in ("x-model", "x-model-version", "x-served-by"))
    return MadeBy(model, version, served_by, headers.get("x-fallback-reason"))


def _check_type(header: str, shape: tuple[int, ...]) -> None:
    """Raise `BadAnswer` if a media type is not float32 octets, or has another shape; the shape may be absent."""
    media_type, *parameters = (part.strip() for part in header.split(";"))
    found = dict(parameter.partition("=")[::2] for parameter in parameters)
    expected = "x".join(map(str, shape))
    is_right = found.get("dtype", "float32") == "float32" and found.get("shape", expected) == expected
    if media_type != OCTETS or not is_right:
        raise BadAnswer(f"response has media type {header[:100]}; expected {OCTETS} of float32 and shape {expected}")
