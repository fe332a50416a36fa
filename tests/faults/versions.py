"""A version made by hand, of a few hundred bytes, which the real runtime loads in milliseconds; ways to spoil it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data
from safetensors.numpy import save

from models import card as cards
from models import sealed
from models.checkpoint import GOLDEN, GRAPH, WEIGHTS
from models.corpus import normalise
from models.registry import Registry, Version
from tests.fakes import D, T, card, contexts

SCALE = "scale"


def files(seed: int = 0, name: str = "amn", **changes: object) -> dict[str, bytes]:
    """Return the files of a net that weighs the mean of its context by one learned vector."""
    scale = np.random.default_rng(seed).uniform(0.5, 1.5, D).astype(np.float32)
    weights = save({SCALE: scale})
    golden = contexts(8, seed)
    answers = {"context": golden, "vector": normalise(golden.mean(axis=1) * scale)}
    text = card(name, architecture="amn", **changes).to_markdown()
    return {
        WEIGHTS: weights,
        GRAPH: graph(len(weights) - scale.nbytes),
        GOLDEN: save(answers),
        cards.FILE: text.encode(),
    }


def graph(offset: int, location: str = WEIGHTS) -> bytes:
    """Return the net's ONNX graph; its one weight lies `offset` bytes into `location`."""
    scale = TensorProto(name=SCALE, data_type=TensorProto.FLOAT, dims=[D], raw_data=b"-")
    set_external_data(scale, location, offset=offset, length=4 * D)
    scale.ClearField("raw_data")
    nodes = [
        helper.make_node("ReduceMean", ["context"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["mean", SCALE], ["weighed"]),
        helper.make_node("LpNormalization", ["weighed"], ["vector"], axis=1, p=2),
    ]
    into = helper.make_tensor_value_info("context", TensorProto.FLOAT, ["batch", T, D])
    out = helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", D])
    made = helper.make_graph(nodes, "net", [into], [out], [scale])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString(deterministic=True))


def tiny_registry(root: Path) -> Path:
    """Return a registry where `primary` and `fallback` are such nets."""
    registry = Registry(root)
    registry.point("primary", registry.add("amn", files()))
    registry.point("fallback", registry.add("gru", files(1, "gru")))
    return root


def unsealed(version: Version, into: Path) -> Path:
    """Return a copy of a version whose files may be altered, sums and all."""
    into.mkdir(parents=True)
    for file in version.path.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    return into


def seal(directory: Path, files: Mapping[str, bytes]) -> Path:
    """Write `files` with sums that fit, as who made them in bad faith, or with a bug, would."""
    sealed.write(directory, files)
    return directory
