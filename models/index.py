"""Vector indexes: the nearest rows of a corpus by inner product."""

from __future__ import annotations

from typing import Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from models.corpus import Floats

Rows = NDArray[np.int64]


class VectorIndex(Protocol):
    """Searches an immutable set of vectors; safe to call from several threads."""

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the true top-k."""
        ...

    def __len__(self) -> int: ...

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Return scores and rows, both `(Q, k)`, best first, equal scores by row; k <= len(self)."""
        ...


class FlatIndex:
    """faiss IndexFlatIP: exact, by brute force over unit vectors `(N, D)`."""

    is_exact = True

    def __init__(self, vectors: Floats) -> None:
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Return scores and rows `(Q, k)`; queries `(Q, D)` must be finite."""
        scores, rows = self._index.search(np.ascontiguousarray(queries), k)
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
