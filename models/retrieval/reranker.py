"""The reranker: reorders the candidates of a search by features of their vectors. numpy only, for serving."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
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
_ROUNDING = np.float32(1e-5)
_LOG1P = np.log1p(np.arange(NEIGHBOUR_COUNT + 1, dtype=np.float32))


class BadReranker(ValueError):
    """A file of a reranker that cannot be used."""


def candidate_features(cosines: Floats, scores: Floats, neighbours: Floats) -> Floats:
    """Return features `(C, feature_count(T))` of candidates, from vectors alone.

    `cosines` `(T, C)` are those of the context and the candidates; `scores` `(C,)` are those of the search, descending;
    `neighbours` `(C, NEIGHBOUR_COUNT)` are each candidate's largest cosines in its corpus, descending. The strongest
    feature is the number of passages that are closer to a candidate than the context is: the passage that follows has
    the context among its neighbours, a merely similar one has others (reciprocal neighbours; Jegou et al., 2007).
    """
    length, count = cosines.shape
    # one feature a row: numpy is fast along the last axis
    nearest = np.ascontiguousarray(neighbours.T)
    features = np.empty((feature_count(length), count), np.float32)
    features[:length] = cosines
    features[length : 2 * length] = _LOG1P[_count_greater(nearest, cosines + _ROUNDING)]
    features[2 * length : -5] = nearest[_NEIGHBOUR_FEATURES, :]
    features[-5] = scores
    features[-4] = scores - scores.max(initial=-1)
    features[-3] = np.log1p(np.arange(count, dtype=np.float32))
    features[-2] = cosines.max(axis=0)
    features[-1] = nearest.mean(axis=0)
    return features.T


def _count_greater(nearest: Floats, cosines: Floats) -> NDArray[np.uint8]:
    """Return how many of `nearest` `(NEIGHBOUR_COUNT, C)` are greater than each of `cosines` `(T, C)`."""
    counts: NDArray[np.uint8] = np.add.reduce((nearest > cosines[:, None]).view(np.uint8), axis=1, dtype=np.uint8)
    return counts


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
