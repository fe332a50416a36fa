"""The towers of a bundle: the query tower, ready to run, and the index of the payload tower's vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.registry import manifest
from models.registry.card import CARD_FILE
from models.registry.checkpoint import GOLDEN_FILE, GRAPH_FILE, WEIGHTS_FILE, parse_checkpoint
from models.registry.manifest import Buffer
from models.retrieval.corpus import BadCorpus, HalfVectors, check_finite, release_memory
from models.retrieval.index import BadIndex, FlatIndex, VectorIndex, open_lists
from models.retrieval.reranker import NEIGHBOUR_COUNT
from models.retrieval.tensors import BadTensors, view_tensors, write_tensors
from models.runtimes import Runtime, open_runtime
from models.vectors import Floats

PAYLOAD_FILE = "payload.safetensors"
TOWER_INDEX_FILE = "towers.safetensors"
PAYLOAD_LISTS_FILE = "payload-ivf.safetensors"
# the key under which the config of a card has the parameters of the payload's lists
PAYLOAD_CONFIG = "payload"
_NET_FILES = (CARD_FILE, WEIGHTS_FILE, GRAPH_FILE, GOLDEN_FILE)


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


def write_tower_index(path: Path, payload: bytes, vectors: NDArray[np.float16], neighbours: Floats) -> None:
    """Write a file of payload vectors `(N, D)` and neighbours with the digest of the payload tower that made them."""
    sha256 = np.frombuffer(bytes.fromhex(manifest.digest(payload)), np.uint8)
    write_tensors(path, {"payload_sha256": sha256, "vectors": vectors, "neighbours": neighbours})


def open_towers(
    version: str, files: Mapping[str, Buffer], rows: int, config: Mapping[str, Any], threads: int
) -> Towers:
    """Return the towers of a bundle of `rows` passages; `config` is that of its card.

    If there are lists of the payload vectors, vectors and neighbours stay where `files` has them: on disk, if mapped.

    Raises:
        BadIndex: the index belongs to another payload tower or corpus, or cannot be read.
        BadCheckpoint: the query tower must not be served.
    """
    checkpoint = parse_checkpoint(version, {name: files[name][:] for name in _NET_FILES})
    vectors, neighbours = _read_index(files[TOWER_INDEX_FILE], files[PAYLOAD_FILE])
    if vectors.halves.shape != (rows, checkpoint.card.dim) or neighbours.shape != (rows, NEIGHBOUR_COUNT):
        raise BadIndex(
            f"tower index has shapes {vectors.halves.shape} and {neighbours.shape}; the corpus has {rows} passages"
        )
    index: VectorIndex
    if PAYLOAD_LISTS_FILE in files:
        index = open_lists(files[PAYLOAD_LISTS_FILE], vectors, config.get(PAYLOAD_CONFIG), threads)
        release_memory({TOWER_INDEX_FILE: files[TOWER_INDEX_FILE]})
    else:
        index, neighbours = FlatIndex(vectors.vectors_at(np.arange(rows))), neighbours.copy()
    name, _, number = config["towers"].rpartition("/")
    return Towers(name, number, open_runtime(checkpoint, "cpu", threads), index, neighbours)


def _read_index(data: Buffer, payload: Buffer) -> tuple[HalfVectors, Floats]:
    try:
        parts = view_tensors(data)
        sha256, halves, neighbours = (parts[name] for name in ("payload_sha256", "vectors", "neighbours"))
    except (BadTensors, KeyError) as error:
        raise BadIndex(f"unreadable index: {error}") from error
    types = halves.dtype.name, neighbours.dtype.name
    if types != ("float16", "float32") or halves.ndim != 2:
        raise BadIndex(f"vectors and neighbours of the index are {', '.join(types)}; expected float16, float32")
    if sha256.tobytes().hex() != manifest.digest(payload[:]):
        raise BadIndex("the index was not built by the payload tower of this bundle")
    try:
        check_finite(halves)
    except BadCorpus as error:
        raise BadIndex(f"index: {error}") from error
    if not np.isfinite(neighbours).all():
        raise BadIndex("a cosine of the index is not finite")
    return HalfVectors(halves), neighbours
