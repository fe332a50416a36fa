"""What every other model server serves: the same version's net in onnxruntime, JSON by orjson, octets by numpy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import orjson

from models.registry.checkpoint import load_checkpoint
from models.runtimes import open_runtime
from models.vectors import Floats

VERSION, THREADS = "BENCH_VERSION", 1


class Net:
    """The net of the version whose directory the environment names, in one session of one thread."""

    def __init__(self) -> None:
        loaded = load_checkpoint(Path(os.environ[VERSION]))
        self._runtime = open_runtime(loaded, "cpu", THREADS)
        self._shape = (-1, loaded.card.context_length, loaded.card.dim)

    def answer(self, requests: Sequence[Floats]) -> list[Floats]:
        """Map the contexts `(n, T, D)` of each request to its vectors `(n, D)`, all in one run."""
        vectors = self._runtime.run(np.concatenate(requests))
        return [vectors[start:end] for start, end in pairwise(accumulate(map(len, requests), initial=0))]

    def from_octets(self, body: bytes) -> Floats:
        """Read the contexts of a raw body."""
        return np.frombuffer(body, np.float32).reshape(self._shape)


def from_json(body: bytes) -> Floats:
    """Read the one context of a JSON body."""
    return np.array([orjson.loads(body)["context"]], np.float32)


def to_json(vectors: Floats) -> bytes:
    """Write the one vector of a JSON answer."""
    return orjson.dumps({"vector": vectors[0]}, option=orjson.OPT_SERIALIZE_NUMPY)
