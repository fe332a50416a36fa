"""The articles of the corpus that serves: a list to choose from, one with its passages and vectors, and a map."""

from __future__ import annotations

import json
from threading import Lock
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Path, Query, Response
from numpy.typing import NDArray

from lvm.errors import Invalid, UnknownArticle
from models.retrieval.projection import Plane, sample_rows
from models.retrieval.retriever import Retriever
from service.deploy.deployments import Deployments
from service.http import codec, octets, schemas

LAST = 2**31 - 1  # ids are int32
# characters of a passage that the map has
EXCERPT = 160
Offset = Annotated[int, Query(ge=0, le=LAST, description="How many to pass over.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many to return at most.")]
Ids = Annotated[
    str,
    Query(
        pattern=r"^\[(0|[1-9]\d{0,9})(,(0|[1-9]\d{0,9}))*\]$",
        max_length=1000,
        description="Place these passages instead of a sample: `[5613,5609]`.",
    ),
]


def add_routes(app: FastAPI, deployments: Deployments) -> None:
    """Add /articles and /articles/{article} to `app`; they run in threads, for a corpus may lie on disk."""

    @app.get("/articles", response_model=schemas.Articles, responses=schemas.ARTICLES)
    def articles(
        search: Annotated[str, Query(max_length=200, description="A part of the title, in any case.")] = "",
        offset: Offset = 0,
        limit: Limit = 100,
    ) -> Response:
        """The articles of the corpus that /retrieve searches, by id."""
        retriever = deployments.require_retriever_engine().model.retriever
        found = [entry for entry in retriever.article_index.entries if search.casefold() in entry.title.casefold()]
        page = [entry._asdict() for entry in found[offset : offset + limit]]
        return _json({**_corpus(retriever), "total": len(found), "articles": page})

    maps = _Maps()

    # before the route of one article, which would take `map` for an id
    @app.get("/articles/map", response_model=schemas.ArticleMap, responses=schemas.ARTICLES)
    def article_map(ids: Ids = "") -> Response:
        """Passages on the plane of the two principal axes of the corpus: a sample, or those of `ids`.

        A vector is placed at `axes @ (vector - mean)`.
        """
        retriever = deployments.require_retriever_engine().model.retriever
        return _json(maps.of(retriever, json.loads(ids) if ids else None))

    @app.get("/articles/{article}", response_model=schemas.Article, responses=schemas.ARTICLES)
    def article(article: Annotated[int, Path(ge=0, le=LAST)]) -> Response:
        """One article in reading order: the passages with their vectors."""
        return _json(_article(deployments.require_retriever_engine().model.retriever, article))


class _Maps:
    """The map of the last corpus that was asked for. One thread makes it; others wait, and take what it made."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._version = ""
        self._plane: Plane
        self._sample: Any

    def of(self, retriever: Retriever, ids: list[int] | None) -> dict[str, Any]:
        """Return the body of /articles/map; raises `Invalid` if the corpus has no such id."""
        count = len(retriever.corpus)
        if ids is not None and max(ids) >= count:
            raise Invalid(f"the corpus has no such id; expected 0 to {count - 1}", pointer="/ids")
        plane, passages = self._made_of(retriever)
        if ids is not None:
            passages = _places(retriever, plane, np.array(ids))
        return {
            **_corpus(retriever),
            "dim": retriever.dim,
            "total": count,
            "mean": octets.encode_base64(plane.mean),
            "axes": octets.encode_base64(plane.axes),
            "explained": plane.explained.tolist(),
            "passages": passages,
        }

    def _made_of(self, retriever: Retriever) -> tuple[Plane, Any]:
        with self._lock:
            if self._version != retriever.version:
                rows = sample_rows(retriever.corpus)
                self._plane = Plane.fit(retriever.corpus.vectors_at(rows))
                self._sample = codec.encode_part(_places(retriever, self._plane, rows))
                self._version = retriever.version
            return self._plane, self._sample


def _places(retriever: Retriever, plane: Plane, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return the passages of `rows` `(n,)` with their coordinates."""
    coordinates = plane.project(retriever.corpus.vectors_at(rows)).astype(float).round(4).tolist()
    return [_place(retriever, row, x, y) for row, (x, y) in zip(rows.tolist(), coordinates, strict=True)]


def _place(retriever: Retriever, row: int, x: float, y: float) -> dict[str, Any]:
    chunk = retriever.corpus.chunk(row)
    text = chunk.text and chunk.text[:EXCERPT]
    return {
        "id": row,
        "article": chunk.article,
        "title": chunk.title,
        "position": chunk.position,
        "text": text,
        "x": x,
        "y": y,
    }


def _article(retriever: Retriever, article: int) -> dict[str, Any]:
    """Return the body of /articles/{article}; raises `UnknownArticle`."""
    rows = retriever.article_index.rows(article)
    if not len(rows):
        raise UnknownArticle("the corpus has no such article")
    card = retriever.card
    return {
        **_corpus(retriever),
        "article": article,
        "title": retriever.corpus.chunk(int(rows[0])).title,
        "encoder": card.encoder,
        "dim": card.dim,
        "context_length": card.context_length,
        "chunks": [_passage(retriever, row) for row in rows.tolist()],
    }


def _passage(retriever: Retriever, row: int) -> dict[str, Any]:
    chunk = retriever.corpus.chunk(row)
    vector = retriever.corpus.vectors_at(np.array([row]))[0]
    known = {"id": row, "position": chunk.position, "text": chunk.text, **chunk.fields()}
    return {**known, "vector": octets.encode_base64(vector)}


def _corpus(retriever: Retriever) -> dict[str, str]:
    return {"corpus": retriever.name, "corpus_version": retriever.version}


def _json(body: dict[str, Any]) -> Response:
    return Response(codec.encode_json(body), media_type="application/json")
