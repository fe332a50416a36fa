"""Is an answer right? How far its vectors are from the expected ones; infinitely, where it is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import orjson

from models.vectors import Floats

Kind = Literal["json", "octet", "hits"]
Check = Callable[[int, bytes], float]

TOLERANCE = 1e-5  # largest difference of one coordinate to the float32 torch net
HITS = 10  # results of one /retrieve


def checker(kind: Kind, expected: Floats | None) -> Check:
    """Return what tells how far the body of answer i is from `expected[i]`, `(rows, D)`; hits need none."""
    if kind == "hits" or expected is None:
        return lambda index, body: 0.0 if _has_hits(body) else math.inf
    return lambda index, body: apart(vectors_of(kind, body, expected.shape[2]), expected[index])


def apart(vectors: Floats | None, expected: Floats) -> float:
    """Return the largest difference of one coordinate, infinite where shapes differ or a value is not finite."""
    if vectors is None or vectors.shape != expected.shape:
        return math.inf
    worst = float(np.max(np.abs(vectors - expected)))
    return worst if math.isfinite(worst) else math.inf


def vectors_of(kind: Kind, body: bytes, dim: int) -> Floats | None:
    """Return the vectors `(rows, dim)` of an answer of /predict, None where it has none."""
    try:
        if kind == "octet":
            return np.frombuffer(body, "<f4").reshape(-1, dim)
        answer = orjson.loads(body)
        return np.asarray(answer.get("vectors") or [answer["vector"]], np.float32)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _has_hits(body: bytes) -> bool:
    try:
        results: Any = orjson.loads(body)["results"]
        return len(results) == HITS and all(math.isfinite(hit["score"]) for hit in results)
    except (ValueError, KeyError, TypeError):
        return False
