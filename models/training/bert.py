"""Builds the ONNX graph of a BERT sentence encoder node by node, without torch and transformers.

The graph encodes texts of one length: `(B, S)` word-piece ids in, the unit vectors `(B, D)` of their means out. Such
texts need no padding, so the graph has no mask. Tensors keep their names and layout in the safetensors file, to whose
bytes the graph refers; the graph itself is a few kilobytes.

After J. Devlin et al., BERT, 2019; pooling as N. Reimers and I. Gurevych, Sentence-BERT, 2019.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.external_data_helper import set_external_data
from onnx.numpy_helper import from_array

from models.text import encoder

OPSET, IR = 20, 9  # Gelu came with 20
Sizes = Mapping[str, Any]  # what a `config.json` of transformers calls them


class _Graph:
    """Nodes in order; each method adds nodes and returns the name of the last output."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.weights: dict[str, tuple[int, ...]] = {}

    def node(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    def constant(self, name: str, value: Any, dtype: type = np.int64) -> str:
        self.constants[name] = from_array(np.array(value, dtype), name)
        return name

    def weight(self, name: str, *shape: int) -> str:
        self.weights[name] = shape
        return name

    def linear(self, x: str, name: str, wide: int, narrow: int) -> str:
        """Map rows of `narrow` numbers to rows of `wide`."""
        return self.node(
            "Gemm", x, self.weight(f"{name}.weight", wide, narrow), self.weight(f"{name}.bias", wide), transB=1
        )

    def normed(self, x: str, name: str) -> str:
        dim = self.sizes["hidden_size"]
        scale, bias = self.weight(f"{name}.weight", dim), self.weight(f"{name}.bias", dim)
        return self.node("LayerNormalization", x, scale, bias, epsilon=self.sizes["layer_norm_eps"])

    def embeddings(self, ids: str) -> str:
        dim = self.sizes["hidden_size"]
        words = self.weight("embeddings.word_embeddings.weight", self.sizes["vocab_size"], dim)
        places = self.weight("embeddings.position_embeddings.weight", self.sizes["max_position_embeddings"], dim)
        kinds = self.weight("embeddings.token_type_embeddings.weight", self.sizes["type_vocab_size"], dim)
        first, length = self.constant("first", [0]), self.node("Shape", ids, start=1)
        place = self.node("Slice", places, first, length, first)
        kind = self.node("Gather", kinds, first)
        total = self.node("Add", self.node("Add", self.node("Gather", words, ids), place), kind)
        return self.normed(self.node("Reshape", total, self.constant("joined", [-1, dim])), "embeddings.LayerNorm")

    def shape(self, ids: str, name: str, *last: int) -> str:
        """Return the shape (B, S, *last)."""
        return self.node("Concat", self.node("Shape", ids), self.constant(name, last), axis=0)

    def attention(self, x: str, name: str) -> str:
        dim, heads = self.sizes["hidden_size"], self.sizes["num_attention_heads"]
        split, joined = self.shape("ids", "heads", heads, dim // heads), self.constant("joined", [-1, dim])
        parts = [
            self.node("Reshape", self.linear(x, f"{name}.self.{part}", dim, dim), split)
            for part in ("query", "key", "value")
        ]
        # (B, S, heads, d) to (B, heads, S, d); the key to (B, heads, d, S)
        turns = ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))
        query, key, value = [self.node("Transpose", part, perm=turn) for part, turn in zip(parts, turns, strict=True)]
        scale = self.constant("scale", (dim // heads) ** -0.5, np.float32)
        weights = self.node("Softmax", self.node("Mul", self.node("MatMul", query, key), scale), axis=-1)
        attended = self.node("Transpose", self.node("MatMul", weights, value), perm=(0, 2, 1, 3))
        return self.linear(self.node("Reshape", attended, joined), f"{name}.output.dense", dim, dim)

    def layer(self, x: str, name: str) -> str:
        dim, wide = self.sizes["hidden_size"], self.sizes["intermediate_size"]
        attended = self.node("Add", x, self.attention(x, f"{name}.attention"))
        x = self.normed(attended, f"{name}.attention.output.LayerNorm")
        hidden = self.node("Gelu", self.linear(x, f"{name}.intermediate.dense", wide, dim))
        added = self.node("Add", x, self.linear(hidden, f"{name}.output.dense", dim, wide))
        return self.normed(added, f"{name}.output.LayerNorm")

    def pooled(self, x: str) -> str:
        texts = self.node("Reshape", x, self.shape("ids", "wide", self.sizes["hidden_size"]))
        mean = self.node("ReduceMean", texts, self.constant("pieces", [1]), keepdims=0)
        length = self.node("ReduceL2", mean, self.constant("numbers", [1]), keepdims=1)
        return self.node("Div", mean, length, out="vector")


def graph_of(sizes: Sizes, weights: bytes) -> bytes:
    """Return the graph of an encoder of these sizes; it refers to the safetensors file that has the bytes `weights`."""
    graph = _Graph(sizes)
    x = graph.embeddings("ids")
    for layer in range(sizes["num_hidden_layers"]):
        x = graph.layer(x, f"encoder.layer.{layer}")
    graph.pooled(x)
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["texts", "pieces"])
    vector = helper.make_tensor_value_info("vector", onnx.TensorProto.FLOAT, ["texts", sizes["hidden_size"]])
    tensors = [*graph.constants.values(), *_external(graph.weights, weights)]
    whole = helper.make_graph(graph.nodes, "encoder", [ids], [vector], tensors)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    return bytes(model.SerializeToString(deterministic=True))


def _external(shapes: Mapping[str, tuple[int, ...]], weights: bytes) -> Iterator[onnx.TensorProto]:
    """Yield tensors of these shapes by name, with the place of their bytes in a safetensors file."""
    size = int.from_bytes(weights[:8], "little")
    head = json.loads(weights[8 : 8 + size])
    for name, shape in shapes.items():
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=onnx.TensorProto.FLOAT, raw_data=b"")
        begin, end = head[name]["data_offsets"]
        set_external_data(tensor, encoder.WEIGHTS, 8 + size + begin, end - begin)
        tensor.ClearField("raw_data")
        yield tensor


def main() -> None:
    """Write the graph of the packaged encoder; the argument is the directory of its files."""
    directory = Path(sys.argv[1])
    sizes = json.loads((directory / "config.json").read_text())
    encoder.GRAPH.write_bytes(graph_of(sizes, (directory / encoder.WEIGHTS).read_bytes()))


if __name__ == "__main__":
    main()
