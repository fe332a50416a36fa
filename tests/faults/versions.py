"""A version made by hand, of a few hundred bytes, which the real runtime loads in milliseconds; ways to spoil it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data
from safetensors.numpy import save

from models.registry import manifest
from models.registry.card import CARD_FILE
from models.registry.checkpoint import GOLDEN_FILE, GRAPH_FILE, WEIGHTS_FILE
from models.registry.registry import Registry
from models.retrieval.corpus import CORPUS_FILES, write_corpus
from models.vectors import normalise
from tests.fakes import D, T, card, contexts, corpus

SCALE = "scale"


def files(seed: int = 0, name: str = "amn", **changes: object) -> dict[str, bytes]:
    """Return the files of a net that weighs the mean of its context by one learned vector."""
    scale = np.random.default_rng(seed).uniform(0.5, 1.5, D).astype(np.float32)
    weights = save({SCALE: scale})
    golden = contexts(8, seed)
    answers = {"context": golden, "vector": normalise(golden.mean(axis=1) * scale)}
    text = card(name, architecture="amn", **changes).to_markdown()
    return {
        WEIGHTS_FILE: weights,
        GRAPH_FILE: graph(len(weights) - scale.nbytes),
        GOLDEN_FILE: save(answers),
        CARD_FILE: text.encode(),
    }


def graph(offset: int, location: str = WEIGHTS_FILE) -> bytes:
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


def write_version(directory: Path, files: Mapping[str, bytes]) -> Path:
    """Write `files` with sums that fit, as who spoiled them in bad faith would; nothing is synced, for speed."""
    directory.mkdir()
    sums = "".join(f"{manifest.digest(data)}  {name}\n" for name, data in sorted(files.items()))
    for name, data in {**files, manifest.CHECKSUMS_FILE: sums.encode()}.items():
        (directory / name).write_bytes(data)
    return directory


def corrupted(random: Random, data: bytes) -> tuple[str, bytes]:
    """Return what was done to `data`, and other bytes than it."""
    at = random.randrange(len(data) or 1)
    ways = {
        "a bit flipped": data[:at] + bytes([(data[at] if data else 0) ^ 1 << random.randrange(8)]) + data[at + 1 :],
        "cut short": data[:at],
        "a byte put in": data[:at] + random.randbytes(1) + data[at:],
        "a byte lost": data[:at] + data[at + 1 :],
        "a page of zeros": data[: at & -512] + bytes(512) + data[(at & -512) + 512 :],
        "a part twice": data[:at] + data[max(0, at - 64) :],
    }
    ways = {way: made for way, made in ways.items() if made != data}
    way = random.choice(sorted(ways))
    return way, ways[way]


def corpus_files(rows: int = 40) -> dict[str, bytes]:
    """Return the files of a corpus of two articles, as `lvm corpus` stores them."""
    known = corpus(rows)
    with TemporaryDirectory() as made:
        write_corpus(Path(made), known.vectors, list(known.articles.values()))
        files = {name: (Path(made) / name).read_bytes() for name in CORPUS_FILES}
    said = card("corpus", kind="corpus", data={"chunks": rows, "articles": 2})
    return {**files, CARD_FILE: said.to_markdown().encode()}
