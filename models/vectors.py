"""Vectors: arrays of float32, and how to normalise them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# the bits that a float16 has after a shift by 13, with its sign
_SIGN_AND_HALF = np.int32(0x0FFFE000 - 0x80000000)


def normalise(vectors: NDArray[Any]) -> Floats:
    """Return float32 rows of unit length from `(..., D)` of any float type; zero rows stay zero."""
    rows = np.asarray(vectors, dtype=np.float32)
    length = np.sqrt(np.vecdot(rows, rows))[..., None]
    length[length == 0] = 1
    unit: Floats = rows / length
    return unit


class StoredVectors:
    """Unit vectors `(N, D)` of arrays on disk, one array after the other; rows become float32 when they are read.

    `arrays` are all that it consists of. `rows`, if given, are the rows of the arrays that it has.
    """

    def __init__(self, parts: Sequence[NDArray[Any]], rows: NDArray[np.int64] | None = None) -> None:
        self._parts = parts
        self._rows = np.arange(sum(map(len, parts))) if rows is None else rows
        self.shape = len(self._rows), int(parts[0].shape[1])
        self.arrays = (*parts, self._rows)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | NDArray[np.int64]) -> Floats:
        rows = self._rows[which]
        found = np.empty((*rows.shape, self.shape[1]), np.result_type(*self._parts))
        first = 0
        for part in self._parts:
            inside = (rows >= first) & (rows < first + len(part))
            found[inside] = part[rows[inside] - first]
            first += len(part)
        return normalise(found)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Floats:
        return self[:]

    def view(self, rows: NDArray[np.int64]) -> StoredVectors:
        """Return the vectors of `rows` only, without reading them."""
        return StoredVectors(self._parts, self._rows[rows])


Vectors = Floats | StoredVectors


def widen(vectors: NDArray[Any]) -> Floats:
    """Return finite floats of any type as float32, float16 in a third of the time that numpy takes."""
    if vectors.dtype.itemsize != 2:
        return vectors.astype(np.float32)
    # sign, exponent and fraction go to their places in a float32, whose exponent is greater by 112
    bits = vectors.view(vectors.dtype.str.replace("f", "i")).astype(np.int32)
    bits <<= 13
    bits &= _SIGN_AND_HALF
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide


def complete_context(chunks: Floats, length: int) -> Floats:
    """Return the vectors of `n` chunks `(n, D)`, 1 to `length` of them, as a context `(length, D)`.

    The mean of the chunks, as a unit vector, stands for each that is missing before them. Of the ways that
    `bench.partial_contexts` compares it is the best for nets, and as good as the best for retrieval.
    """
    missing = length - len(chunks)
    return np.concatenate([normalise(chunks.mean(axis=0, keepdims=True)).repeat(missing, axis=0), chunks])
