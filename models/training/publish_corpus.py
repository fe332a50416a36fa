"""Publishes a corpus as a version: searched exactly as it is, or with an approximate index. Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from models.registry.card import CARD_FILE, Card
from models.registry.registry import Registry, Version
from models.retrieval.corpus import (
    PASSAGES_FILE,
    SPANS_FILE,
    Passages,
    count_chunks,
    file_names,
    map_unverified_corpus,
    read_corpus,
    write_passages,
)
from models.retrieval.index import IVF_FILE
from models.training import indexing
from models.training.indexing import Progress
from models.training.work_cache import cache_next_to

FLAT_ROWS = 25_000  # chunks up to which exact search takes less than half a millisecond
Index = Literal["auto", "flat", "ivf"]


def publish_corpus(
    registry: Registry,
    directory: Path,
    card: Card,
    index: Index = "auto",
    progress: Progress = lambda done, total: None,
) -> Version:
    """Store the corpus in `directory` as a new version of `card.name`.

    Args:
        registry: where the version is stored.
        directory: the corpus.
        card: what the card says besides the counts.
        index: `flat` is searched exactly; `ivf` has an approximate index, and vectors and text stay on disk;
            `auto` is `flat` up to `FLAT_ROWS` chunks.
        progress: called with (steps done, steps in all) of the index.

    Raises:
        BadCorpus: a file is missing or unreadable, they contradict each other, or a vector is not finite.
        BadIndex: the recall of the approximate index is too low.
    """
    if index == "ivf" or (index == "auto" and count_chunks(directory) > FLAT_ROWS):
        return _publish_indexed(registry, directory, card, progress)
    corpus = read_corpus(directory)
    files = {name: (directory / name).read_bytes() for name in file_names(directory)}
    return _add(registry, card, corpus, len(corpus.articles), files)


def _publish_indexed(registry: Registry, directory: Path, card: Card, progress: Progress) -> Version:
    registry.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".passages-", dir=registry.root) as text:
        articles = write_passages(directory, Path(text))
        files = {name: directory / name for name in file_names(directory)}
        files |= {name: Path(text) / name for name in (PASSAGES_FILE, SPANS_FILE)}
        corpus = map_unverified_corpus(files)
        with cache_next_to(registry.root / card.name) as cache:
            lists, card = indexing.build(corpus, card, progress, cache)
            return _add(registry, card, corpus, articles, {**files, IVF_FILE: lists.to_bytes()})


def _add(registry: Registry, card: Card, corpus: Passages, articles: int, files: Mapping[str, bytes | Path]) -> Version:
    counts = {"chunks": len(corpus), "articles": articles}
    card = replace(card, dim=corpus.dim, data={**card.data, **counts})
    return registry.add(card.name, {**files, CARD_FILE: card.to_markdown().encode()})
