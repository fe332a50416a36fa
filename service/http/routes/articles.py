"""The articles of the corpus that serves: a list to choose from, and one with its passages and vectors."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Path, Query, Response

from lvm.errors import UnknownArticle
from models.retrieval.retriever import Retriever
from service.deploy.deployments import Deployments
from service.http import codec, octets, schemas

LAST = 2**31 - 1  # ids are int32
Offset = Annotated[int, Query(ge=0, le=LAST, description="How many to pass over.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many to return at most.")]


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

    @app.get("/articles/{article}", response_model=schemas.Article, responses=schemas.ARTICLES)
    def article(article: Annotated[int, Path(ge=0, le=LAST)]) -> Response:
        """One article in reading order: the passages with their vectors."""
        return _json(_article(deployments.require_retriever_engine().model.retriever, article))


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
