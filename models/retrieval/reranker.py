"""The reranker: orders what a search found anew, by figures of vectors alone. numpy only; it serves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from models.vectors import Floats

RERANKER_FILE = "reranker.safetensors"
RERANK_DEPTH = 100  # candidates that are ordered anew; a service returns 50 at most of what matters
NEIGHBOUR_COUNT = 16  # cosines of each passage to its nearest in the corpus
_SHOWN = (0, 1, 3, 7, 15)  # of these, as features
_ROUNDING = 1e-5  # by which a context's own cosine among the neighbours may differ from the one computed here


class BadReranker(ValueError):
    """A file that holds no reranker."""


def candidate_features(context: Floats, scores: Floats, candidates: Floats, neighbours: Floats) -> Floats:
    """Return figures `(C, features_of(T))` of candidates in the order found; where nothing is known of article or text.

    `context` `(T, D)` and `candidates` `(C, D)` are unit, `scores` `(C,)` those of the search, and `neighbours`
    `(C, NEIGHBOURS)` each candidate's largest cosines in its corpus, falling. What decides most is how many passages
    are closer to a candidate than the context is: the passage that follows has the context for its neighbour, one that
    is merely similar has others (reciprocal neighbours; Jegou et al., 2007).
    """
    cosines = candidates @ context.T  # (C, T)
    closer = (neighbours[:, None, :] > (cosines + _ROUNDING)[:, :, None]).sum(axis=2)  # (C, T)
    columns = (
        scores,
        scores - scores.max(initial=-1),
        np.log1p(np.arange(len(scores), dtype=np.float32)),
        cosines.max(axis=1),
        neighbours.mean(axis=1),
    )
    return np.hstack([cosines, np.log1p(closer, dtype=np.float32), neighbours[:, _SHOWN], np.stack(columns, axis=1)])


def feature_count(length: int) -> int:
    """Return how many figures a candidate has for a context of `length` vectors."""
    return 2 * length + len(_SHOWN) + 5


@dataclass(frozen=True)
class Reranker:
    """A 2-layer MLP: `hidden` `(H, F)`, `bias` `(H,)`, `output` `(H,)`, float32."""

    hidden: Floats
    bias: Floats
    output: Floats

    def score(self, figures: Floats) -> Floats:
        """Return a score for each candidate `(C,)`, higher is better, from its figures `(C, F)`."""
        scores: Floats = np.maximum(figures @ self.hidden.T + self.bias, 0) @ self.output
        return scores

    def to_bytes(self) -> bytes:
        """Return the reranker as a safetensors file."""
        return bytes(save_tensors(asdict(self)))

    @classmethod
    def from_bytes(cls, data: bytes, length: int) -> Self:
        """Read what `to_bytes` wrote, for contexts of `length` vectors.

        Raises:
            BadReranker: it is no such file, is not finite, or reads other figures than `features` gives.
        """
        try:
            reranker = cls(**load_tensors(data))
        except (SafetensorError, TypeError) as error:
            raise BadReranker(f"unreadable reranker: {error}") from error
        rows = len(reranker.output)
        shapes = reranker.hidden.shape, reranker.bias.shape, reranker.output.shape
        if shapes != ((rows, feature_count(length)), (rows,), (rows,)):
            raise BadReranker(f"a reranker of shapes {shapes}, want {feature_count(length)} figures")
        if not all(np.isfinite(part).all() for part in (reranker.hidden, reranker.bias, reranker.output)):
            raise BadReranker("a weight of the reranker is not finite")
        return reranker
