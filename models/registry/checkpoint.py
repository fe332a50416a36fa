"""A checkpoint: the files of one version of a net, verified when they are loaded. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from models.registry import manifest
from models.registry.card import CARD_FILE, BadCard, Card
from models.vectors import Floats

WEIGHTS_FILE = "weights.safetensors"
GRAPH_FILE = "net.onnx"
GOLDEN_FILE = "golden.safetensors"
# the architecture of a net that came as an ONNX file: it has a graph and no torch module
ONNX_NET = "onnx"


class BadCheckpoint(ValueError):
    """A version that must not be served; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """One version of a net in memory.

    `weights` are arrays by name, float32 unless an ONNX file had another type. `graph` is the ONNX graph without
    weights. `golden_vector` `(G, D)` are the answers to `golden_context` `(G, T, D)` of the float32 torch net, or of
    onnxruntime if the net came as an ONNX file.
    """

    version: str
    sha256: str
    card: Card
    weights: Mapping[str, NDArray[Any]]
    graph: bytes
    golden_context: Floats
    golden_vector: Floats


def load_checkpoint(directory: Path) -> Checkpoint:
    """Load the version in `directory`; the bytes that are used are the bytes that were verified.

    Raises:
        BadCheckpoint: a file is missing, altered or unreadable, a weight is not finite, or the golden vectors do not
            have the T and D of the card.
    """
    try:
        return parse_checkpoint(directory.name, manifest.read_files(directory))
    except manifest.Corrupt as error:
        raise BadCheckpoint(str(error)) from error


def parse_checkpoint(version: str, files: Mapping[str, bytes]) -> Checkpoint:
    """Make a checkpoint of the bytes of a version's files; raises as `load_checkpoint`."""
    try:
        golden = load_tensors(files[GOLDEN_FILE])
        checkpoint = Checkpoint(
            version,
            manifest.digest(files[WEIGHTS_FILE]),
            Card.from_markdown(files[CARD_FILE].decode()),
            load_tensors(files[WEIGHTS_FILE]),
            files[GRAPH_FILE],
            golden["context"],
            golden["vector"],
        )
    except KeyError as error:
        raise BadCheckpoint(f"{version} is not a net: it lacks {error}") from error
    except (BadCard, SafetensorError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{version}: {error}") from error
    return _checked(checkpoint)


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    card = checkpoint.card
    broken = [name for name, tensor in checkpoint.weights.items() if not np.isfinite(tensor).all()]
    if broken:
        raise BadCheckpoint(f"{checkpoint.version}: not finite: {', '.join(sorted(broken))}")
    if not len(checkpoint.golden_context) or checkpoint.golden_context.shape[1:] != (card.context_length, card.dim):
        raise BadCheckpoint(f"{checkpoint.version}: golden contexts do not have the shape (G, T, D) of its card")
    if checkpoint.golden_vector.shape != (len(checkpoint.golden_context), card.dim):
        raise BadCheckpoint(f"{checkpoint.version}: golden vectors do not have the shape (G, D) of its card")
    return checkpoint
