"""The reranker: reorders the candidates of a search by features of their vectors. numpy only, for serving."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from models.vectors import Floats

RERANKER_FILE = "reranker.safetensors"
# candidates that are reordered
RERANK_DEPTH = 100
# neighbours of each passage whose cosines are stored
NEIGHBOUR_COUNT = 16
# ranks of the neighbours whose cosines are features
_NEIGHBOUR_FEATURES = (0, 1, 3, 7, 15)
# A stored cosine of a context vector may differ by this from the one computed here.
_ROUNDING = 1e-5


class BadReranker(ValueError):
    """A file of a reranker that cannot be used."""


def candidate_features(context: Floats, scores: Floats, candidates: Floats, neighbours: Floats) -> Floats:
    """Return features `(C, feature_count(T))` of candidates, from vectors alone.

    `context` `(T, D)` and `candidates` `(C, D)` have unit length; `scores` `(C,)` are those of the search, descending;
    `neighbours` `(C, NEIGHBOUR_COUNT)` are each candidate's largest cosines in its corpus, descending. The strongest
    feature is the number of passages that are closer to a candidate than the context is: the passage that follows has
    the context among its neighbours, a merely similar one has others (reciprocal neighbours; Jegou et al., 2007).
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
    return np.hstack(
        [cosines, np.log1p(closer, dtype=np.float32), neighbours[:, _NEIGHBOUR_FEATURES], np.stack(columns, axis=1)]
    )


def feature_count(length: int) -> int:
    """Return the number of features of a candidate for a context of `length` vectors."""
    return 2 * length + len(_NEIGHBOUR_FEATURES) + 5


@dataclass(frozen=True)
class Reranker:
    """A 2-layer MLP: `hidden` `(H, F)`, `bias` `(H,)`, `output` `(H,)`, float32."""

    hidden: Floats
    bias: Floats
    output: Floats

    def score(self, features: Floats) -> Floats:
        """Return a score for each candidate `(C,)`, higher is better, from its features `(C, F)`."""
        scores: Floats = np.maximum(features @ self.hidden.T + self.bias, 0) @ self.output
        return scores

    def to_bytes(self) -> bytes:
        """Return the reranker as a safetensors file."""
        return bytes(save_tensors(asdict(self)))

    @classmethod
    def from_bytes(cls, data: bytes, length: int) -> Self:
        """Read a reranker for contexts of `length` vectors from a safetensors file.

        Raises:
            BadReranker: the file is unreadable, a weight is not finite, or the number of features differs.
        """
        try:
            reranker = cls(**load_tensors(data))
        except (SafetensorError, TypeError) as error:
            raise BadReranker(f"unreadable reranker: {error}") from error
        rows = len(reranker.output)
        shapes = reranker.hidden.shape, reranker.bias.shape, reranker.output.shape
        if shapes != ((rows, feature_count(length)), (rows,), (rows,)):
            raise BadReranker(f"reranker has shapes {shapes}; expected {feature_count(length)} features")
        if not all(np.isfinite(part).all() for part in (reranker.hidden, reranker.bias, reranker.output)):
            raise BadReranker("a weight of the reranker is not finite")
        return reranker
