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
