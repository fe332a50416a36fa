"""The towers of a bundle: the query tower, ready to run, and the index of the payload tower's vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from models.registry import manifest
from models.registry.checkpoint import parse_checkpoint
from models.retrieval.index import BadIndex, FlatIndex, VectorIndex
from models.retrieval.reranker import NEIGHBOUR_COUNT
from models.runtimes import Runtime, open_runtime
from models.vectors import Floats, normalise

PAYLOAD_FILE = "payload.safetensors"
TOWER_INDEX_FILE = "towers.safetensors"


@dataclass(frozen=True)
class Towers:
    """`query` maps contexts to queries, `index` searches payload vectors, `neighbours` is `(N, NEIGHBOUR_COUNT)`.

    `name` and `version` are those of the two-tower model.
    """

    name: str
    version: str
    query: Runtime
    index: VectorIndex
    neighbours: Floats


def tower_index_bytes(payload: bytes, vectors: Floats, neighbours: Floats) -> bytes:
    """Return a file of payload vectors `(N, D)` with the digest of the payload tower that made them."""
    sha256 = np.frombuffer(bytes.fromhex(manifest.digest(payload)), np.uint8)
    parts: dict[str, NDArray[Any]] = {
        "payload_sha256": sha256,
        "vectors": vectors.astype(np.float16),
        "neighbours": neighbours,
    }
    return bytes(save_tensors(parts))


def open_towers(version: str, files: Mapping[str, bytes], rows: int, made_by: str, threads: int) -> Towers:
    """Return the towers of a bundle of `rows` passages; `made_by` is the id of the two-tower version.

    Raises:
        BadIndex: the index belongs to another payload tower or corpus, or cannot be read.
        BadCheckpoint: the query tower must not be served.
    """
    checkpoint = parse_checkpoint(version, files)
    vectors, neighbours = _read_index(files[TOWER_INDEX_FILE], files[PAYLOAD_FILE])
    if vectors.shape != (rows, checkpoint.card.dim) or neighbours.shape != (rows, NEIGHBOUR_COUNT):
        raise BadIndex(f"tower index has shapes {vectors.shape} and {neighbours.shape}; the corpus has {rows} passages")
    name, _, number = made_by.rpartition("/")
    return Towers(name, number, open_runtime(checkpoint, "cpu", threads), FlatIndex(normalise(vectors)), neighbours)


def _read_index(data: bytes, payload: bytes) -> tuple[Floats, Floats]:
    try:
        parts = load_tensors(data)
        sha256, vectors, neighbours = (parts[name] for name in ("payload_sha256", "vectors", "neighbours"))
    except (SafetensorError, KeyError) as error:
        raise BadIndex(f"unreadable index: {error}") from error
    if sha256.tobytes().hex() != manifest.digest(payload):
        raise BadIndex("the index was not built by the payload tower of this bundle")
    if not (np.isfinite(vectors).all() and np.isfinite(neighbours).all()):
        raise BadIndex("a vector of the index is not finite")
    return vectors, neighbours
