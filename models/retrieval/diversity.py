"""Maximal marginal relevance: results that are relevant and unlike each other.

Carbonell and Goldstein, The use of MMR, diversity-based reranking for reordering documents and producing summaries,
SIGIR 1998.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.vectors import Floats


def marginal_order(relevance: Floats, vectors: Floats, count: int, weight: float) -> NDArray[np.int64]:
    """Return the places `(count,)` of candidates, in the order in which they are chosen; equal ones in their order.

    `relevance` `(C,)` is on the scale of the cosines of the unit `vectors` `(C, D)`; count <= C. Each choice is the
    candidate with the greatest `weight` x relevance - (1 - `weight`) x cosine to the nearest one chosen before.
    """
    gain = weight * relevance
    chosen = np.empty(count, np.int64)
    nearest = np.zeros_like(gain)
    for turn in range(count):
        best = int(np.argmax(gain - (1 - weight) * nearest))
        chosen[turn] = best
        gain[best] = -np.inf
        # a product of matrices has threads, which wait for each other longer than it takes if the cores are busy
        similarity = np.vecdot(vectors, vectors[best])
        nearest = np.maximum(nearest, similarity) if turn else similarity
    return chosen
