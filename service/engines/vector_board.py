"""The vector board: what boards share that score predictions by their cosine to the true next vectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.vectors import Floats, normalise
from service.engines.pair_store import Bytes, Pairs
from service.engines.pairing import Answered, Board

# Bytes of a number in bfloat16: the upper half of one in float32.
_HALF = 2
# The lower half that is put in its place: the middle of those that it may have had.
_MIDDLE = 0x8000


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
    """Keeps the first vector of a context, and the prediction, in bfloat16; the later context holds the others."""

    def width(self, dim: int) -> int:
        """Return the number of bytes of a prediction and a first vector."""
        return 2 * _HALF * dim

    def pack(self, answered: Sequence[Answered]) -> Bytes:
        """Return the bytes of predictions `(D,)` and first vectors."""
        both = np.stack([vector for each in answered for vector in (each.answer, each.first)])
        halves = np.ascontiguousarray(both.astype("<f4", copy=False).view(np.uint16)[:, 1::2])
        return halves.view(np.uint8).reshape(len(answered), -1)

    def count(self, pairs: Pairs, contexts: Sequence[Floats]) -> None:
        """Score predictions by the last vectors of `contexts`. One that is zero has no direction and scores nothing."""
        later = np.stack([contexts[row] for row in pairs.rows.tolist()])
        truths = normalise(later[:, -1])
        chosen = np.flatnonzero(truths.any(axis=1))
        if len(chosen):
            truths = truths[chosen]
            predictions, firsts = _unpack(pairs.answers[chosen])
            earlier = np.concatenate([firsts[:, None], later[chosen, :-1]], axis=1)
            rows, authors = pairs.rows[chosen].tolist(), pairs.authors[chosen].tolist()
            self.count_scores(Scored(rows, authors, cosines(predictions, truths), earlier, truths))

    @abstractmethod
    def count_scores(self, scored: Scored) -> None:
        """Count scores."""


def cosines(vectors: Floats, truths: Floats) -> Floats:
    """Return the cosines `(m,)` of vectors `(m, D)` and unit vectors `(m, D)`."""
    found: Floats = np.vecdot(normalise(vectors), truths)
    return found


def _unpack(answers: Bytes) -> tuple[Floats, Floats]:
    """Return the predictions `(m, D)` and the first vectors `(m, D)` of packed answers."""
    halves = answers.view(np.uint16).reshape(len(answers), 2, -1)
    both = np.full((*halves.shape, 2), _MIDDLE, np.uint16)
    both[..., 1] = halves
    vectors = both.view("<f4")[..., 0]
    return vectors[:, 0], vectors[:, 1]
