"""Estimates of inner products in int8, with a bound of their error: an exact search scores few rows in full."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.runtimes.onnx import open_session
from models.vectors import Floats

Sums = NDArray[np.int32]
# The largest int8 of a row, and of a query; the latter where sums of two products must fit into int16.
_LEVELS, _FEWER_LEVELS = 127, 63
# above the rounding error of float32 in an inner product of unit vectors
_ROUNDING = 1e-5
# types of tensors in ONNX
_UINT8, _INT8, _INT32 = 2, 3, 6


class Estimated(NamedTuple):
    """`sums` `(Q, N)` grow with the inner products; two that differ by more than `slack` `(Q,)` are in their order."""

    sums: Sums
    slack: list[float]


class Estimator:
    """Estimates the inner products of queries and `vectors` `(N, D)`, of which it keeps D bytes each.

    `levels` is the largest number of a quantised query. By default it is as large as this processor allows: some
    processors add two products in int16, and the largest products would overflow.
    """

    def __init__(self, vectors: Floats, levels: int | None = None) -> None:
        self._scale = float(np.abs(vectors).max()) / _LEVELS or 1.0
        weights = np.rint(vectors / np.float32(self._scale)).astype(np.int8)
        restored = weights * np.float32(self._scale)
        self._row_error = _longest(vectors - restored)
        self._row_length = _longest(restored)
        weights = np.ascontiguousarray(weights.T)
        self._session = open_session(_graph(*weights.shape), {"rows": weights})
        self._levels = levels or (_LEVELS if self._is_right_at(_LEVELS, weights) else _FEWER_LEVELS)

    def run(self, units: Floats) -> Estimated:
        """Return the estimates for `units` `(Q, D)`, of at most unit length."""
        scales = np.maximum(np.abs(units).max(axis=1), np.finfo(np.float32).tiny) / np.float32(self._levels)
        whole = np.rint(units / scales[:, None])
        lost = units - whole * scales[:, None]
        # Cauchy-Schwarz, for what was lost of the rows and of the query
        errors = self._row_error + self._row_length * np.sqrt(np.vecdot(lost, lost), dtype=np.float64) + _ROUNDING
        return Estimated(self._sums(whole), (2 * errors / self._scale / scales).tolist())

    def _sums(self, whole: Floats) -> Sums:
        shifted = (whole + np.float32(self._levels + 1)).astype(np.uint8)
        sums: Sums = self._session.run(None, {"queries": shifted, "zero": np.array(self._levels + 1, np.uint8)})[0]
        return sums

    def _is_right_at(self, levels: int, weights: NDArray[np.int8]) -> bool:
        """Return whether the processor adds products exactly, by the query whose partial sums are the largest."""
        self._levels = levels
        largest = np.full((1, len(weights)), levels, np.float32)
        return np.array_equal(self._sums(largest)[0], levels * weights.sum(axis=0, dtype=np.int32))


def _longest(vectors: Floats) -> float:
    return float(np.sqrt(np.vecdot(vectors, vectors).max()))


def _graph(dim: int, rows: int) -> bytes:
    """Return an ONNX graph: `queries` uint8 `(Q, D)` minus `zero`, times `rows` int8 `(D, N)`, are `sums` int32."""
    location = _field(13, _field(1, b"location") + _field(2, b"memory"))
    weights = _number(1, dim) + _number(1, rows) + _number(2, _INT8) + _field(8, b"rows") + location + _number(14, 1)
    names = b"".join(_field(1, name) for name in (b"queries", b"rows", b"zero"))
    graph = _field(1, names + _field(2, b"sums") + _field(4, b"MatMulInteger")) + _field(2, b"estimates")
    graph += _field(5, weights)
    graph += _field(11, _value(b"queries", _UINT8, None, dim)) + _field(11, _value(b"zero", _UINT8))
    graph += _field(12, _value(b"sums", _INT32, None, rows))
    return _number(1, 8) + _field(7, graph) + _field(8, _number(2, 13))


def _value(name: bytes, kind: int, *shape: int | None) -> bytes:
    """Return the declaration of a tensor in ONNX; a dimension of None is open."""
    dims = b"".join(_field(1, _field(2, b"Q") if size is None else _number(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _number(1, kind) + _field(2, dims)))


def _field(number: int, content: bytes) -> bytes:
    """Return a field of a protobuf message that holds bytes or a message."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    """Return a field of a protobuf message that holds a whole number."""
    return bytes([field << 3]) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
