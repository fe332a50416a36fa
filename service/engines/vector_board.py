"""The vector board: what boards share that score predictions by their cosine to the true next vectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.vectors import Floats, normalise
from service.engines.pair_store import Bytes, Pairs
from service.engines.pairing import Answered, Board

_HALF = 2


class Scored(NamedTuple):
    """Predictions with their true next vectors.

    Attributes:
        rows: `(m,)` the context that showed the true next vector; predictions of one context have the same.
        authors: `(m,)` numbers of who predicted.
        cosines: `(m,)` of prediction and true next vector.
        contexts: `(m, T, D)` that the predictions were made of.
        truths: `(m, D)`, unit length.
    """

    rows: list[int]
    authors: list[int]
    cosines: Floats
    contexts: Floats
    truths: Floats


class VectorBoard(Board):
    """Keeps a prediction and the first vector of its context, as float16; the later context holds the others."""

    def width(self, dim: int) -> int:
        """Return the number of bytes of a prediction and a first vector."""
        return 2 * _HALF * dim

    def pack(self, answered: Sequence[Answered]) -> Bytes:
        """Return the bytes of predictions `(D,)` and first vectors."""
        both = [np.stack([each.answer for each in answered]), np.stack([each.first for each in answered])]
        return np.concatenate(both, axis=1).astype(np.float16).view(np.uint8)

    def count(self, pairs: Pairs, contexts: Sequence[Floats]) -> None:
        """Score predictions by the last vectors of `contexts`."""
        kept = pairs.answers.view(np.float16).astype(np.float32)
        predictions, firsts = np.split(kept, 2, axis=1)
        rows = pairs.rows.tolist()
        later = np.stack([contexts[row] for row in rows])
        truths = normalise(later[:, -1])
        earlier = np.concatenate([firsts[:, None], later[:, :-1]], axis=1)
        self.count_scores(Scored(rows, pairs.authors.tolist(), cosines(predictions, truths), earlier, truths))

    @abstractmethod
    def count_scores(self, scored: Scored) -> None:
        """Count scores."""


def cosines(vectors: Floats, truths: Floats) -> Floats:
    """Return the cosines `(m,)` of vectors `(m, D)` and unit vectors `(m, D)`."""
    found: Floats = np.vecdot(normalise(vectors), truths)
    return found
