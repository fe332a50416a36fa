"""What calls return. Arrays are float32; whatever is read of a response is checked first (`lvm.client.responses`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lvm.client.requests import Floats


class MadeBy(NamedTuple):
    """What made a response: model, version, the alias that served it, and the reason if it was a fallback."""

    model: str
    version: str
    served_by: str
    fallback_reason: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What every answer says of its requests.

    Attributes:
        request_id: what the service logs the requests of the call by.
        timings: milliseconds in the service by stage, such as `decode`, `queue`, `infer`; the sum if the call took
            several requests.
    """

    request_id: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextAnswer(Answer):
    """What an answer says of text, if text was sent.

    Attributes:
        read_as: `context`, `query` or the like: what the service took the text for. None if no text was sent.
        chunks: the chunks of the text that count, if one text was sent.
        truncated: places of the texts or chunks that the encoder did not read to their end.
        unread: by place, the share of a text or chunk that is in words that the encoder does not know.
    """

    read_as: str | None = None
    chunks: tuple[str, ...] | None = None
    truncated: tuple[int, ...] = ()
    unread: Mapping[int, float] = field(default_factory=dict)


class _Made:
    """Who answered; if the call took several requests, the first of them."""

    made_by: tuple[MadeBy, ...]

    @property
    def model(self) -> str | None:
        """The model that answered; None if no model took part, as for a query."""
        return self.made_by[0].model if self.made_by else None

    @property
    def version(self) -> str | None:
        """The version of the model."""
        return self.made_by[0].version if self.made_by else None

    @property
    def served_by(self) -> str | None:
        """The alias that served the model, such as `primary`."""
        return self.made_by[0].served_by if self.made_by else None


@dataclass(frozen=True, eq=False)
class Prediction(_Made, TextAnswer):
    """Next vectors: `(D,)` for one context, `(n, D)` for n, of unit length.

    `made_by` has one entry; more if a version was swapped during the call.
    """

    vectors: Floats
    made_by: tuple[MadeBy, ...] = ()

    @property
    def fallback_reason(self) -> str | None:
        """Why the primary did not answer some context; None if it answered all."""
        return next((made.fallback_reason for made in self.made_by if made.fallback_reason), None)

    def __iter__(self) -> Iterator[Any]:
        """Yield `vectors` and `made_by`."""
        return iter((self.vectors, self.made_by))


class Passage(NamedTuple):
    """A passage that was found.

    `score` is the inner product with the query. `text`, `source_id` and `metadata` are None if the corpus has none,
    `rerank_score` is None if the passages were not reranked.
    """

    id: int
    score: float
    article: int
    title: str
    position: int
    text: str | None
    source_id: str | None = None
    metadata: Mapping[str, Any] | None = None
    rerank_score: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Retrieval(_Made, TextAnswer, list[Passage]):
    """The passages that were found, best first, as a list, and who found them.

    Attributes:
        corpus: name of the corpus that was searched.
        corpus_version: its version.
        is_exact: whether the search was exact; False if it was approximate.
        reranked: whether the order is that of the reranker.
        made_by: what made the query; empty if a query was sent.
        fallback_reason: why the primary did not make the query, or why the service searched its own index instead of
            the Milvus; else None.
    """

    passages: InitVar[Iterable[Passage]] = ()
    _: KW_ONLY
    corpus: str
    corpus_version: str
    is_exact: bool
    reranked: bool
    made_by: tuple[MadeBy, ...] = ()
    fallback_reason: str | None = None

    def __post_init__(self, passages: Iterable[Passage]) -> None:
        self.extend(passages)

    def __repr__(self) -> str:
        return f"Retrieval({list(self)})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings(TextAnswer):
    """Vectors of texts, of unit length: `(D,)` for one text, `(n, D)` for n texts or chunks; and their encoder."""

    vectors: Floats
    encoder: str


class ArticleEntry(NamedTuple):
    """An article of the corpus: its id, its title, and how many passages it has."""

    article: int
    title: str
    chunks: int


@dataclass(frozen=True, eq=False, repr=False)
class Articles(Answer, list[ArticleEntry]):
    """A page of the articles of the corpus, by id, as a list; `total` is the number of those that match."""

    entries: InitVar[Iterable[ArticleEntry]] = ()
    _: KW_ONLY
    total: int
    corpus: str
    corpus_version: str

    def __post_init__(self, entries: Iterable[ArticleEntry]) -> None:
        self.extend(entries)

    def __repr__(self) -> str:
        return f"Articles({list(self)}, total={self.total})"


class ArticlePassage(NamedTuple):
    """A passage of an article; `text`, `source_id` and `metadata` are None if the corpus has none."""

    id: int
    position: int
    text: str | None
    source_id: str | None = None
    metadata: Mapping[str, Any] | None = None


class Windows(NamedTuple):
    """All n runs of T + 1 passages of an article: T as the context, and the one that follows.

    Attributes:
        contexts: `(n, T, D)`.
        next_vectors: `(n, D)`, the vectors of the passages that follow.
        next_ids: the ids of these passages.
    """

    contexts: Floats
    next_vectors: Floats
    next_ids: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Article(Answer):
    """An article in reading order, `passages` with their `vectors` `(n, D)`.

    `context_length` (T) and `encoder` are those of the nets that the corpus is for.
    """

    article: int
    title: str
    corpus: str
    corpus_version: str
    encoder: str
    context_length: int
    passages: tuple[ArticlePassage, ...]
    vectors: Floats = field(repr=False)

    def windows(self) -> Windows:
        """Return every context of the article and the passage that follows it; none if the article is too short."""
        length, count = self.context_length, max(0, len(self.passages) - self.context_length)
        rows = np.arange(count)[:, None] + np.arange(length)
        ids = [passage.id for passage in self.passages[length:]]
        return Windows(self.vectors[rows], self.vectors[length : length + count], ids)


class AliasState(NamedTuple):
    """What an alias serves.

    Attributes:
        id: the version, as `model/version`.
        since: when it began to be served, as ISO 8601.
        breaker: `closed`, `open` or `half_open`; None if the alias has no circuit breaker.
        warning: why the inputs look like those of another encoder, or None.
        refused: `id` and `reason` of the version that the alias points at, if that one is not served.
    """

    id: str
    since: str
    breaker: str | None
    warning: str | None
    refused: Mapping[str, Any] | None


class ModelVersion(NamedTuple):
    """A version of the registry.

    Attributes:
        id: `model/version`.
        model: its name, such as `amn`; None, as `version` and `kind`, if the card cannot be read.
        version: date and digest.
        kind: `net` or `corpus`, for example.
        error: why the card cannot be read, or None.
        summary: all that `/models` says of the version: `encoder`, `scores`, `parameters` and more.
    """

    id: str
    model: str | None
    version: str | None
    kind: str | None
    error: str | None
    summary: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Models(Answer):
    """What the service serves by alias, the versions of its registry, and its encoder, None if it reads no text."""

    aliases: Mapping[str, AliasState]
    versions: tuple[ModelVersion, ...]
    encoder: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Health(Answer):
    """Whether the inference threads of the service work, whether it takes requests, and the reason if not."""

    is_live: bool
    is_ready: bool
    reason: str | None = None
