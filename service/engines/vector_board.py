"""The vector board: what boards share that score predictions by their cosine to the true next vectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.vectors import Floats, normalise
from service.engines.pair_store import Bytes, Pairs
from service.engines.pairing import Answered, Board

# Bytes of a number in float16, and of a length.
_HALF = 2
_LENGTH = 4


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
    """Keeps the first vector of a context, and the prediction without its length; the later context holds the others.

    They are unit vectors in float16, which ends at 65504, and the length of the first vector in float32.
    """

    def width(self, dim: int) -> int:
        """Return the number of bytes of a prediction and a first vector."""
        return 2 * _HALF * dim + _LENGTH

    def pack(self, answered: Sequence[Answered]) -> Bytes:
        """Return the bytes of predictions `(D,)` and first vectors."""
        firsts = np.stack([each.first for each in answered])
        both = normalise(np.hstack([np.stack([each.answer for each in answered]), firsts]).reshape(len(firsts), 2, -1))
        halves = both.reshape(len(firsts), -1).astype(np.float16)
        lengths = np.linalg.norm(firsts, axis=1, keepdims=True)
        return np.hstack([halves.view(np.uint8), lengths.view(np.uint8)])

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
    halves = np.ascontiguousarray(answers[:, :-_LENGTH]).view(np.float16).astype(np.float32)
    lengths = np.ascontiguousarray(answers[:, -_LENGTH:]).view(np.float32)
    predictions, firsts = np.split(halves, 2, axis=1)
    return predictions, firsts * lengths
