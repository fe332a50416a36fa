"""From a trained net, or a corpus, to a version in the registry: exported, scored, carded, sealed."""

from __future__ import annotations

import json
import logging
import struct
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx.external_data_helper import set_external_data
from onnx.helper import make_node
from onnx.numpy_helper import from_array
from onnx.shape_inference import infer_shapes
from safetensors.numpy import save as save_tensors
from torch import nn

from models.evaluate import TOLERANCE, evaluate, mean_cosine
from models.nets import architecture_of, config_dict
from models.predictor import build_predictor
from models.registry.card import CARD_FILE, Card, Reference
from models.registry.checkpoint import GOLDEN_FILE, GRAPH_FILE, WEIGHTS_FILE, BadCheckpoint, parse_checkpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import (
    CORPUS_FILES,
    PASSAGES_FILE,
    SPANS_FILE,
    Corpus,
    Passages,
    count_chunks,
    map_unverified_corpus,
    read_corpus,
    write_passages,
)
from models.retrieval.index import IVF_FILE
from models.runtimes.torch import run_net, state_arrays
from models.training import indexing
from models.training.indexing import Progress
from models.training.parts import beside
from models.vectors import Floats, normalise
from models.windows import Windows, windows

GOLDEN = 64  # golden contexts in a version; fewer say too little about its space
FLAT_ROWS = 25_000  # chunks up to which exact search takes less than half a millisecond
Index = Literal["auto", "flat", "ivf"]


class NotAsTrained(BadCheckpoint):
    """A net that is not, as it will be served, what was trained; says both scores."""


def publish(
    registry: Registry,
    net: nn.Module,
    card: Card,
    golden: Floats,
    data: Mapping[str, Corpus],
    train: Corpus | None = None,
    held_out: tuple[Windows, float] | None = None,
) -> Version:
    """Store `net` as a new version of `card.name`.

    The card's sizes are read off the net, its scores computed by the serving predictor on every
    corpus of `data` (with the ridge baseline where `train` is given); `golden` is `(G, T, D)`, `held_out`
    windows with the mean cosine that the net in training scored on them.

    Raises:
        BadConfig: `net` is of no known class, whatever it is called.
        BadCheckpoint: the exported net does not answer as the torch net does.
        NotAsTrained: the serving predictor scores otherwise on `held_out` than training did.
    """
    card = replace(card, **facts(net))
    files = net_files(net, golden)
    draft = parse_checkpoint("draft", {**files, CARD_FILE: card.to_markdown().encode()})
    served = build_predictor(draft, device="cpu", threads=torch.get_num_threads())
    if held_out:
        compare(mean_cosine(served.predict_batch, held_out[0]), held_out[1])
    scores = {name: rounded(evaluate(served, corpus, card.context_length, train)) for name, corpus in data.items()}
    card = replace(card, scores=scores, limits=(*card.limits, *_beaten_by(scores)))
    return registry.add(card.name, {**files, CARD_FILE: card.to_markdown().encode()})


def publish_corpus(
    registry: Registry,
    directory: Path,
    card: Card,
    index: Index = "auto",
    progress: Progress = lambda done, total: None,
) -> Version:
    """Store the corpus in `directory` as a new version of `card.name`.

    `flat` stores it as it is, to be searched exactly; `ivf` adds an approximate index and lets the rest stay on disk;
    `auto` is `flat` up to `FLAT_ROWS` chunks. `progress` is called with (steps done, steps in all) of the index.

    Raises:
        BadCorpus: a file is missing or unreadable, they contradict each other, or a vector is not finite.
        BadIndex: the approximate index does not find enough.
    """
    if index == "ivf" or (index == "auto" and count_chunks(directory) > FLAT_ROWS):
        return _publish_indexed(registry, directory, card, progress)
    corpus = read_corpus(directory)
    files = {name: (directory / name).read_bytes() for name in CORPUS_FILES}
    return _add_corpus(registry, card, corpus, len(corpus.articles), files)


def _publish_indexed(registry: Registry, directory: Path, card: Card, progress: Progress) -> Version:
    registry.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".passages-", dir=registry.root) as text:
        articles = write_passages(directory, Path(text))
        files = {name: directory / name for name in CORPUS_FILES}
        files |= {name: Path(text) / name for name in (PASSAGES_FILE, SPANS_FILE)}
        corpus = map_unverified_corpus(files)
        with beside(registry.root / card.name) as parts:
            lists, card = indexing.build(corpus, card, progress, parts)
            return _add_corpus(registry, card, corpus, articles, {**files, IVF_FILE: lists.to_bytes()})


def _add_corpus(
    registry: Registry, card: Card, corpus: Passages, articles: int, files: Mapping[str, bytes | Path]
) -> Version:
    counts = {"chunks": len(corpus), "articles": articles}
    card = replace(card, dim=corpus.dim, data={**card.data, **counts})
    return registry.add(card.name, {**files, CARD_FILE: card.to_markdown().encode()})


def net_files(net: nn.Module, golden: Floats) -> dict[str, bytes]:
    """Return the weights, the ONNX graph and the golden vectors of `net` as files."""
    weights = save_tensors(state_arrays(net.state_dict()))
    vectors = {"context": golden, "vector": run_net(net, golden)}
    return {
        WEIGHTS_FILE: weights,
        GRAPH_FILE: export_graph(net, golden.shape[1:], weights),
        GOLDEN_FILE: save_tensors(vectors),
    }


def export_graph(net: nn.Module, shape: tuple[int, ...], weights: bytes) -> bytes:
    """Return the ONNX graph of `net` for contexts `(B, *shape)`, its parameters left in `weights`.

    The graph names the bytes of each tensor in the safetensors file beside it as ONNX external data,
    so the weights exist once and `onnxruntime.InferenceSession("net.onnx")` opens the pair as it is.
    """
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own deprecations and of its own GRU
        program = torch.onnx.export(
            net.cpu().eval(),
            (torch.zeros(2, *shape),),
            dynamo=True,
            optimize=False,
            input_names=["context"],
            output_names=["vector"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _fold_static_shapes(model)
    _strip(model)
    _point_at(model, weights)
    return bytes(model.SerializeToString(deterministic=True))


def _fold_static_shapes(model: onnx.ModelProto) -> None:
    """Replace every `Shape` whose dimensions are known by a constant.

    The exporter takes the size of a recurrent state from its shape, and slices the weights of the gates
    by it: not folded, onnxruntime reorders these weights anew for every request.
    """
    inferred = infer_shapes(model, data_prop=True).graph
    known = {info.name: info.type.tensor_type.shape.dim for info in (*inferred.value_info, *inferred.input)}
    for node in model.graph.node:
        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        dims = known.get(node.input[0], ())[bounds.get("start", 0) : bounds.get("end")] if node.input else ()
        if node.op_type == "Shape" and dims and all(dim.HasField("dim_value") for dim in dims):
            value = from_array(np.array([dim.dim_value for dim in dims], np.int64))
            node.CopyFrom(make_node("Constant", [], [node.output[0]], value=value))


def _strip(model: onnx.ModelProto) -> None:
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del item.metadata_props[:]
        item.ClearField("doc_string")


def _point_at(model: onnx.ModelProto, weights: bytes) -> None:
    (size,) = struct.unpack_from("<Q", weights)
    header = json.loads(weights[8 : 8 + size])
    for tensor in model.graph.initializer:
        if tensor.name in header:
            begin, end = header[tensor.name]["data_offsets"]
            place = {"offset": 8 + size + begin, "length": end - begin}
            set_external_data(tensor, WEIGHTS_FILE, **place)
            tensor.ClearField("raw_data")


def compare(served: float, trained: float) -> None:
    """Raise `NotAsTrained` where a score as served is further than the tolerance from what it was in training."""
    if not abs(served - trained) <= TOLERANCE:
        raise NotAsTrained(f"served it scores {served:.4f}, in training it scored {trained:.4f}")


@contextmanager
def _quiet() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter warns of packages that nobody here needs
    try:
        yield
    finally:
        logging.disable(before)


def _beaten_by(scores: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every data set on which a baseline has the higher cosine."""
    said = []
    for data, score in scores.items():
        name, best = max(score["baselines"].items(), key=lambda item: item[1]["cosine"])
        if best["cosine"] > score["cosine"]:
            said.append(f"On {data} the baseline {name} scores {best['cosine']:.4f}, this net {score['cosine']:.4f}.")
    return said


def facts(net: nn.Module) -> dict[str, Any]:
    """Return what a card says of a net that can be read off it."""
    config = config_dict(net)
    return {
        "architecture": architecture_of(net),
        "config": config,
        "dim": config["dim"],
        "context_length": config["context_length"],
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
    }


def golden_contexts(corpus: Corpus | None, dim: int, length: int) -> Floats:
    """Return contexts `(G, T, D)` spread over the corpus, or seeded random unit ones without it."""
    if corpus is None:
        noise = np.random.default_rng(0).standard_normal((GOLDEN, length, dim))
        return normalise(noise + noise.mean(axis=1, keepdims=True))
    data = windows(corpus, length)
    pick = np.linspace(0, len(data) - 1, min(GOLDEN, len(data))).astype(int)
    contexts: Floats = data.vectors[data.rows()[pick]]
    return contexts


def reference_of(corpus: Corpus) -> Reference:
    """Return the reference statistics of a corpus's vectors: norm, and cosine of neighbours."""
    norms = np.linalg.norm(corpus.vectors, axis=1)
    neighbours = np.diff(corpus.position) == 1
    cosines = np.sum(corpus.vectors[1:] * corpus.vectors[:-1], axis=1)[neighbours]
    return Reference(_mean_std(norms), _mean_std(cosines))


def _mean_std(values: Floats) -> tuple[float, float]:
    return round(float(values.mean()), 6), round(float(values.std()), 6)


def rounded(scores: Any) -> Any:
    """Return `scores` with every float cut to five decimals, for a card that people read."""
    if isinstance(scores, dict):
        return {key: rounded(value) for key, value in scores.items()}
    return round(scores, 5) if isinstance(scores, float) else scores


def today() -> str:
    """Return today's date in UTC, as versions carry it."""
    return f"{datetime.now(UTC):%Y-%m-%d}"
