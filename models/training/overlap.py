"""What training data and a held-out data set share: articles of the same title, and chunks that are nearly equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.registry import manifest
from models.retrieval.corpus import ARTICLES_FILE, BadCorpus, MappedVectors, map_vectors, read_articles
from models.vectors import Floats
from models.windows import check_dim

NEAR = 0.95  # cosine above which two chunks count as nearly equal
_PART = 2048  # training chunks that are compared with a block of held-out ones at a time


@dataclass(frozen=True)
class Overlap:
    """Held-out chunks and how many of them are `near` a training chunk; articles by title, with the `shared_titles`.

    `near_articles` counts the held-out articles that have such a chunk.
    """

    chunks: int
    near: int
    near_share: float
    articles: int
    near_articles: int
    train_chunks: int
    shared_titles: list[str]


def find_overlap(held_out: Path, train: Sequence[Path], progress: Callable[[int, int], None]) -> Overlap:
    """Compare every chunk of `held_out` with every chunk of `train`; `progress` is called with (chunks, all chunks).

    Raises:
        BadCorpus: a directory has no data set that can be read.
        OtherDimension: the vectors differ in D.
    """
    held, others = map_vectors(held_out), [map_vectors(path) for path in train]
    for path, other in zip(train, others, strict=True):
        check_dim(str(path), other.dim, held.dim)
    is_near = _near_any(held, others, progress)
    titles = _titles(held_out) & set[str]().union(*map(_titles, train))
    return Overlap(
        chunks=len(held),
        near=int(is_near.sum()),
        near_share=round(float(is_near.mean()), 6),
        articles=len(np.unique(held.article)),
        near_articles=len(np.unique(held.article[is_near])),
        train_chunks=sum(map(len, others)),
        shared_titles=sorted(titles),
    )


def _near_any(
    held: MappedVectors, others: Sequence[MappedVectors], progress: Callable[[int, int], None]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which held-out chunks `(N,)` are near a chunk of `others`."""
    total = len(held) * sum(map(len, others))
    best: Floats = np.full(len(held), -1, np.float32)
    done = 0
    for row, block in held.blocks():
        for part in (part for other in others for _, part in other.blocks()):
            for first in range(0, len(part), _PART):
                found = (block @ part[first : first + _PART].T).max(axis=1)
                np.maximum(best[row : row + len(block)], found, out=best[row : row + len(block)])
            done += len(block) * len(part)
            progress(done // len(held), total // len(held))
    return best > NEAR


def _titles(directory: Path) -> set[str]:
    try:
        articles = read_articles(manifest.map_file(directory / ARTICLES_FILE))
        return {str(article["title"]) for article in articles if article.get("title")}
    except (OSError, EOFError, ValueError) as error:
        raise BadCorpus(f"{directory}: unreadable articles: {error}") from error
