"""Publishes a corpus as a version: searched exactly or by an approximate index, alone or with towers. Imports no torch.

A corpus is made step by step: its files, then the lists of its index, then what towers add to it. Long steps are
cached next to the registry's models, so the same command continues work that was stopped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from models.registry.card import CARD_FILE, Card
from models.registry.registry import Registry, Version
from models.retrieval.corpus import (
    PASSAGES_FILE,
    SPANS_FILE,
    Corpus,
    MappedCorpus,
    count_chunks,
    file_names,
    map_unverified_corpus,
    read_corpus,
    write_passages,
)
from models.retrieval.index import IVF_FILE, InvertedLists
from models.training import indexing
from models.training.indexing import CachedSteps, Counter, Progress
from models.training.work_cache import cache_next_to, digest, source_digest

FLAT_ROWS = 25_000  # chunks up to which exact search takes less than half a millisecond
Index = Literal["auto", "flat", "ivf"]


@dataclass(frozen=True)
class CorpusDraft:
    """A version of a corpus in the making: its files as bytes or paths, what they hold, and its card.

    A corpus on disk has the `lists` of its index. Large files are made in `directory`.
    """

    files: Mapping[str, bytes | Path]
    corpus: Corpus | MappedCorpus
    card: Card
    directory: Path
    lists: InvertedLists | None = None

    @property
    def vectors(self) -> NDArray[Any]:
        """The vectors `(N, D)` as they are kept: float16 on disk, float32 in memory."""
        return self.corpus.halves if isinstance(self.corpus, MappedCorpus) else self.corpus.vectors

    def with_files(self, files: Mapping[str, bytes | Path]) -> CorpusDraft:
        """Return a draft with more files."""
        return replace(self, files={**self.files, **files})

    def with_card(self, config: Mapping[str, Any], *limits: str) -> CorpusDraft:
        """Return a draft with more configuration and more limits on its card."""
        card = replace(self.card, limits=(*self.card.limits, *limits), config={**self.card.config, **config})
        return replace(self, card=card)


class Extension(Protocol):
    """What a corpus is published with: towers, and a reranker."""

    def count_steps(self, rows: int, is_listed: bool) -> int:
        """Return the number of steps of `add_to` for a corpus of `rows` chunks, on disk with lists or in memory."""
        ...

    def check(self, card: Card, dim: int) -> None:
        """Raise if a corpus of D = `dim` with this card cannot be extended."""
        ...

    def add_to(self, draft: CorpusDraft, steps: CachedSteps) -> CorpusDraft:
        """Return the draft with files and with what its card says of them."""
        ...


def publish_corpus(
    registry: Registry,
    directory: Path,
    card: Card,
    index: Index = "auto",
    progress: Progress = lambda done, total: None,
    extension: Extension | None = None,
) -> Version:
    """Store the corpus in `directory` as a new version of `card.name`.

    Args:
        registry: where the version is stored.
        directory: the corpus.
        card: what the card says besides the counts.
        index: `flat` is searched exactly; `ivf` has an approximate index, and vectors and text stay on disk;
            `auto` is `flat` up to `FLAT_ROWS` chunks.
        progress: called with (steps done, steps in all).
        extension: the towers of a bundle.

    Raises:
        BadCorpus: a file is missing or unreadable, they contradict each other, or a vector is not finite.
        BadIndex: the recall of the approximate index is too low.
        BadCheckpoint: the extension does not fit the corpus.
    """
    is_listed = index == "ivf" or (index == "auto" and count_chunks(directory) > FLAT_ROWS)
    registry.root.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".passages-", dir=registry.root) as made,
        cache_next_to(registry.root / card.name) as cache,
    ):
        draft = (_map if is_listed else _read)(directory, card, Path(made))
        rows = len(draft.corpus)
        total = indexing.count_steps(rows) if is_listed else 0
        if extension:
            extension.check(card, draft.corpus.dim)
            total += extension.count_steps(rows, is_listed)
        steps = CachedSteps(cache, digest(draft.vectors, source_digest()), Counter(total, progress))
        draft = _with_lists(draft, steps) if is_listed else draft
        draft = extension.add_to(draft, steps) if extension else draft
        return registry.add(card.name, {**draft.files, CARD_FILE: draft.card.to_markdown().encode()})


def _read(directory: Path, card: Card, made: Path) -> CorpusDraft:
    """Return a draft of a corpus in memory."""
    corpus = read_corpus(directory)
    files = {name: (directory / name).read_bytes() for name in file_names(directory)}
    return CorpusDraft(files, corpus, _counted(card, corpus, len(corpus.articles)), made)


def _map(directory: Path, card: Card, made: Path) -> CorpusDraft:
    """Return a draft of a corpus on disk, with its text written so that it can be mapped."""
    articles = write_passages(directory, made)
    files = {name: directory / name for name in file_names(directory)}
    files |= {name: made / name for name in (PASSAGES_FILE, SPANS_FILE)}
    corpus = map_unverified_corpus(files)
    return CorpusDraft(files, corpus, _counted(card, corpus, articles), made)


def _counted(card: Card, corpus: Corpus | MappedCorpus, articles: int) -> Card:
    counts = {"chunks": len(corpus), "articles": articles}
    return replace(card, dim=corpus.dim, data={**card.data, **counts})


def _with_lists(draft: CorpusDraft, steps: CachedSteps) -> CorpusDraft:
    assert isinstance(draft.corpus, MappedCorpus)
    searches = indexing.mean_searches(draft.corpus, draft.card.context_length)
    made = indexing.build(draft.corpus, draft.card, searches, steps)
    draft = draft.with_files({IVF_FILE: made.lists.to_bytes()}).with_card(made.config, made.limit("Search"))
    return replace(draft, lists=made.lists)
