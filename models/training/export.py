"""Exports a torch net: weights, an ONNX graph without weights, and golden vectors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import torch
from onnx.helper import make_node
from onnx.numpy_helper import from_array
from onnx.shape_inference import infer_shapes
from safetensors.numpy import save as save_tensors
from torch import nn

from models.nets.two_tower import TwoTower
from models.registry.checkpoint import GOLDEN_FILE, GRAPH_FILE, WEIGHTS_FILE
from models.retrieval.towers import PAYLOAD_FILE
from models.runtimes.torch import run_net, state_arrays
from models.training.onnx_graph import refer_to_weights
from models.vectors import Floats

_MAX_BATCH = 65_536
# golden contexts that run at a time; a state space keeps megabytes for each
_GOLDEN_ROWS = 16


def net_files(net: nn.Module, golden: Floats) -> dict[str, bytes]:
    """Return the files of a net: weights, ONNX graph and golden vectors; of towers, the payload tower's weights too.

    `golden` are the contexts `(G, T, D)` of the golden vectors.
    """
    if isinstance(net, TwoTower):
        payload = bytes(save_tensors(state_arrays(net.payload.state_dict())))
        return {**net_files(net.query, golden), PAYLOAD_FILE: payload}
    weights = save_tensors(state_arrays(net.state_dict()))
    parts = np.array_split(golden, -(-len(golden) // _GOLDEN_ROWS))
    vectors = {"context": golden, "vector": np.concatenate([run_net(net, part) for part in parts])}
    return {
        WEIGHTS_FILE: weights,
        GRAPH_FILE: export_graph(net, golden.shape[1:], weights),
        GOLDEN_FILE: save_tensors(vectors),
    }


def export_graph(net: nn.Module, shape: tuple[int, ...], weights: bytes) -> bytes:
    """Return the ONNX graph of `net` for contexts `(B, *shape)`, without the parameters.

    The graph refers to each tensor in the safetensors file `weights` as ONNX external data. So weights are stored
    once, and `onnxruntime.InferenceSession("net.onnx")` opens the two files as they are.
    """
    with _quiet(), warnings.catch_warnings():
        # torch warns of its own deprecations, and of its own GRU
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net.cpu().eval(),
            (torch.zeros(2, *shape),),
            dynamo=True,
            optimize=False,
            input_names=["context"],
            output_names=["vector"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # first, because shape inference copies all that the model holds
    refer_to_weights(model, weights)
    _fold_static_shapes(model)
    _strip(model)
    return bytes(model.SerializeToString(deterministic=True))


def _fold_static_shapes(model: onnx.ModelProto) -> None:
    """Replace every `Shape` node with known dimensions by a constant.

    The exporter reads the size of a recurrent state from its shape, and slices the weights of the gates by it.
    With `Shape` nodes left, onnxruntime would reorder these weights at every request.
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


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    # the exporter warns of optional packages that are not needed
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
