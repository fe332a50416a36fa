"""Vectors: arrays of float32, and how to normalise them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def normalise(vectors: NDArray[Any]) -> Floats:
    """Return float32 rows of unit length from `(..., D)` of any float type; zero rows stay zero."""
    rows = np.asarray(vectors, dtype=np.float32)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: Floats = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return unit


def complete_context(chunks: Floats, length: int) -> Floats:
    """Return the vectors of `n` chunks `(n, D)`, 1 to `length` of them, as a context `(length, D)`.

    The mean of the chunks, as a unit vector, stands for each that is missing before them. Of the ways that
    `bench.partial_contexts` compares it is the best for nets, and as good as the best for retrieval.
    """
    missing = length - len(chunks)
    return np.concatenate([normalise(chunks.mean(axis=0, keepdims=True)).repeat(missing, axis=0), chunks])
