"""ONNX files: reads their graphs and weights as data, and changes a graph into the form of `net.onnx`. No torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node, make_tensor_type_proto, tensor_dtype_to_np_dtype
from onnx.inliner import inline_local_functions

from models.registry.checkpoint import WEIGHTS_FILE, BadCheckpoint

MAX_FILE_BYTES = (1 << 31) - 1  # protobuf reads no larger message
MAX_GRAPH_BYTES = 1 << 24  # of a graph without its weights
MAX_NODES = 20_000
# Integers of this size or less describe shapes; they stay in the graph.
_SMALL_BYTES = 1024
_INDEX_TYPES = ("int64", "int32", "bool")  # are no parameters
INPUT, OUTPUT = "context", "vector"
_EPSILON = 1e-12  # added to a length before a division by it
Arrays = dict[str, NDArray[Any]]
_STORED_TYPES = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.INT32,
    TensorProto.UINT32,
    TensorProto.INT64,
    TensorProto.UINT64,
    TensorProto.BOOL,
}


def decode(path: Path) -> ModelProto:
    """Return the model in `path` without what only training needs.

    Raises:
        BadCheckpoint: the file is no ONNX model, or is too large.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise BadCheckpoint(f"{size} bytes; expected at most {MAX_FILE_BYTES}: export with external data")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:
        # protobuf is not a dependency of its own, so its classes have no name here
        raise BadCheckpoint("not an ONNX model, or cut short: protobuf cannot decode it") from error
    if not model.opset_import or not model.graph.node:
        raise BadCheckpoint("not an ONNX model, or cut short: it has no operator set or no node")
    model.ClearField("training_info")
    _check_size(model)
    return model


def external_bytes(model: ModelProto, directory: Path) -> int:
    """Return the size of the files beside a graph that hold its data; raises `BadCheckpoint` if one is not there."""
    outside = [tensor for tensor in tensors_of(model) if tensor.data_location == TensorProto.EXTERNAL]
    return sum(path.stat().st_size for path in {_external_path(tensor, directory) for tensor in outside})


def load_tensors(model: ModelProto, directory: Path) -> ModelProto:
    """Return a model with every tensor checked and in the model itself, and its functions inlined.

    Raises:
        BadCheckpoint: the data of a tensor do not fit its shape, or are not in a file of `directory`.
    """
    for tensor in tensors_of(model):
        _check_tensor(tensor, directory)
    return inline_local_functions(model) if model.functions else model


def _check_size(model: ModelProto) -> None:
    """Raise `BadCheckpoint` if the model has too many nodes, counted as if its functions were inlined."""
    sizes: dict[tuple[str, str], int] = {}
    bodies = {(function.domain, function.name): function.node for function in model.functions}

    def count(nodes: Any, calls: tuple[tuple[str, str], ...]) -> int:
        found = 0
        for node in nodes_of(nodes):
            called = (node.domain, node.op_type)
            if called in calls:
                raise BadCheckpoint(f"function {called[1]!r} calls itself")
            if called in bodies and called not in sizes:
                sizes[called] = count(bodies[called], (*calls, called))
            found += sizes.get(called, 1)
        return found

    nodes = count(model.graph.node, ())
    if nodes > MAX_NODES:
        raise BadCheckpoint(f"{nodes} nodes; expected at most {MAX_NODES}")


def nodes_of(nodes: Any) -> Iterator[NodeProto]:
    """Yield `nodes` and all nodes of their subgraphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from nodes_of(graph.node)


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Return the graphs among the attributes of a node, such as the body of a loop."""
    return [graph for each in node.attribute for graph in ([each.g] if each.HasField("g") else each.graphs)]


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and all its subgraphs."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs_of(inner)


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor in a model: initialisers and attributes, in subgraphs and functions too.

    Raises:
        BadCheckpoint: a tensor is sparse.
    """
    nodes = [*nodes_of(model.graph.node), *(node for each in model.functions for node in nodes_of(each.node))]
    bodies = [graph for node in nodes for graph in subgraphs(node)]
    for graph in (model.graph, *bodies):
        if graph.sparse_initializer:
            raise BadCheckpoint("sparse initialisers; expected dense ones")
        yield from graph.initializer
    for attribute in (each for node in nodes for each in node.attribute):
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise BadCheckpoint(f"attribute {shown(attribute.name)} is a sparse tensor; expected a dense one")
        yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)


def _check_tensor(tensor: TensorProto, directory: Path) -> None:
    """Load external data into `tensor`; raises `BadCheckpoint` if its data do not fit its shape."""
    if tensor.data_type == TensorProto.STRING:
        return
    what = f"tensor {shown(tensor.name)}"
    if tensor.data_type not in _STORED_TYPES:
        raise BadCheckpoint(f"{what} is {type_name(tensor.data_type)}; expected one of {_type_names()}")
    if any(dim < 0 for dim in tensor.dims):
        raise BadCheckpoint(f"{what} has the shape {list(tensor.dims)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        _load_external(tensor, directory, what)
    try:
        numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise BadCheckpoint(f"{what}: its data do not fit the shape {list(tensor.dims)}: {error}") from error


def _type_names() -> str:
    return ", ".join(type_name(number) for number in sorted(_STORED_TYPES))


def type_name(number: int) -> str:
    """Return the name of an element type of ONNX, such as float16."""
    names = {value: name for name, value in TensorProto.DataType.items()}
    return str(names.get(number, f"type {number}")).lower()


def shown(name: str) -> str:
    """Return a name of a file as short text in quotes."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _external_path(tensor: TensorProto, directory: Path) -> Path:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    parts = PurePosixPath(location).parts
    is_inside = parts and parts[0] != "/" and ".." not in parts and not {"\\", "\0"} & set(location)
    path = directory / location if is_inside else directory
    if not path.is_file() or not path.resolve().is_relative_to(directory.resolve()):
        raise BadCheckpoint(
            f"tensor {shown(tensor.name)} is in {shown(location)}; expected a file in the directory of the graph"
        )
    return path


def _load_external(tensor: TensorProto, directory: Path, what: str) -> None:
    path = _external_path(tensor, directory)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    expected = math.prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError as error:
        raise BadCheckpoint(f"{what}: offset or length is not a number") from error
    size = path.stat().st_size
    if offset < 0 or length != expected or offset + length > size:
        found = f"{length} bytes at {offset} of {path.name}, which has {size}"
        raise BadCheckpoint(f"{what} has the shape {list(tensor.dims)}, {expected} bytes; it refers to {found}")
    with path.open("rb") as file:
        file.seek(offset)
        tensor.raw_data = file.read(length)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def true_inputs(graph: GraphProto) -> list[Any]:
    """Return the inputs that a caller gives; old operator sets list initialisers among the inputs."""
    known = {tensor.name for tensor in graph.initializer}
    return [each for each in graph.input if each.name not in known]


def shape_of(value: Any) -> tuple[int | None, ...] | None:
    """Return the shape of an input or output, None for each free dimension; None if the file has no shape."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims)


def standardise(model: ModelProto, source: str, target: str, shape: tuple[int | None, int, int]) -> None:
    """Make the graph one of the input `context` with `shape` and the output `vector`; remove what is not needed.

    `source` and `target` are the names of its input and its output until now. A None in `shape` is free.
    """
    graph = model.graph
    _rename_values(graph)
    graph.node.insert(0, make_node("Identity", [INPUT], [_other_name(source)]))
    graph.node.append(make_node("Identity", [_other_name(target)], [OUTPUT]))
    prune(graph)
    del graph.input[:], graph.output[:], graph.value_info[:]
    _declare(graph.input.add(), INPUT, (shape[0] or "batch", *shape[1:]))
    _declare(graph.output.add(), OUTPUT, (shape[0] or "batch", shape[2]))
    _strip(model)
    model.ir_version = max(model.ir_version, 4)  # in which initialisers need not be inputs


def _declare(value: Any, name: str, shape: tuple[int | str, ...]) -> None:
    value.name = name
    value.type.CopyFrom(make_tensor_type_proto(TensorProto.FLOAT, shape))


def _rename_values(graph: GraphProto) -> None:
    for each in graphs_of(graph):
        for value in (*each.initializer, *each.input, *each.output, *each.value_info):
            value.name = _other_name(value.name)
        for node in each.node:
            node.input[:] = map(_other_name, node.input)
            node.output[:] = map(_other_name, node.output)


def _other_name(name: str) -> str:
    """Return a name with an underscore more if it could be `context` or `vector`, so that these are free."""
    return f"{name}_" if name.rstrip("_") in (INPUT, OUTPUT) else name


def prune(graph: GraphProto) -> None:
    """Remove nodes and initialisers that `vector` does not need."""
    needed, kept = {OUTPUT}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed.update(node.input, *(each.input for inner in subgraphs(node) for each in nodes_of(inner.node)))
            needed.update(value.name for inner in subgraphs(node) for each in graphs_of(inner) for value in each.output)
    nodes, tensors = kept[::-1], [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)


def _strip(model: ModelProto) -> None:
    """Remove texts and annotations, which a session does not need."""
    for field in ("metadata_props", "doc_string", "functions"):
        model.ClearField(field)
    for graph in graphs_of(model.graph):
        for field in ("metadata_props", "doc_string", "quantization_annotation", "value_info"):
            graph.ClearField(field)
        for item in (*graph.node, *graph.initializer):
            item.ClearField("doc_string")
            item.ClearField("metadata_props")


def normalise_output(model: ModelProto) -> None:
    """Divide the output of a standardised graph by its length; a zero vector stays zero."""
    graph = model.graph
    version = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    graph.node[-1].output[0] = f"raw {OUTPUT}"
    names = [f"{what} {OUTPUT}" for what in ("raw", "length of", "safe length of", "epsilon of", "axis of")]
    raw, length, safe, epsilon, axis = names
    graph.initializer.append(numpy_helper.from_array(np.array(_EPSILON, np.float32), epsilon))
    if version < 18:
        graph.node.append(make_node("ReduceL2", [raw], [length], axes=[1], keepdims=1))
    else:
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), axis))
        graph.node.append(make_node("ReduceL2", [raw, axis], [length], keepdims=1))
    graph.node.append(make_node("Add", [length, epsilon], [safe]))
    graph.node.append(make_node("Div", [raw, safe], [OUTPUT]))


def lift_constants(graph: GraphProto) -> None:
    """Make an initialiser of each `Constant` node of the graph that holds a tensor."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        tensors = [each.t for each in node.attribute if each.type == AttributeProto.TENSOR]
        if node.op_type == "Constant" and not node.domain and tensors:
            graph.initializer.add().CopyFrom(tensors[0])
            graph.initializer[-1].name = node.output[0]
        else:
            graph.node.add().CopyFrom(node)


def split_weights(model: ModelProto, sizes: Container[str]) -> Arrays:
    """Return the parameters of a graph by name, and leave their names, types and shapes in it.

    Scalars, small integers, texts and the tensors named in `sizes`, which give shapes, stay in the graph.
    """
    weights: Arrays = {}
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            raise BadCheckpoint(f"two initialisers have the name {shown(tensor.name)}")
        if tensor.name == "__metadata__":
            raise BadCheckpoint("a tensor has the name __metadata__, which safetensors keeps for itself")
        if _moves(tensor, sizes):
            weights[tensor.name] = np.ascontiguousarray(numpy_helper.to_array(tensor))
            _refer(tensor, 0, 0)
    if broken := [name for name, array in weights.items() if not np.isfinite(array).all()]:
        raise BadCheckpoint(f"not finite: {', '.join(map(shown, broken[:5]))}")
    if (size := model.ByteSize()) > MAX_GRAPH_BYTES:
        raise BadCheckpoint(f"the graph without its weights has {size} bytes; expected at most {MAX_GRAPH_BYTES}")
    return weights


def count_parameters(weights: Mapping[str, NDArray[Any]]) -> int:
    """Return how many numbers the weights have, without indices and masks."""
    return sum(array.size for array in weights.values() if array.dtype.name not in _INDEX_TYPES)


def _moves(tensor: TensorProto, sizes: Container[str]) -> bool:
    count = math.prod(tensor.dims)
    if not tensor.dims or not count or tensor.name in sizes or tensor.data_type == TensorProto.STRING:
        return False
    stored = tensor_dtype_to_np_dtype(tensor.data_type)
    return stored.name not in _INDEX_TYPES or count * stored.itemsize > _SMALL_BYTES


def refer_to_weights(model: ModelProto, weights: bytes) -> None:
    """Replace the data of initialisers by their places in the safetensors file `weights`."""
    (size,) = struct.unpack_from("<Q", weights)
    header: Mapping[str, Any] = json.loads(weights[8 : 8 + size])
    for tensor in model.graph.initializer:
        if tensor.name in header:
            begin, end = header[tensor.name]["data_offsets"]
            _refer(tensor, 8 + size + begin, end - begin)


def _refer(tensor: TensorProto, offset: int, length: int) -> None:
    bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    bare.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", length)):
        bare.external_data.add(key=key, value=str(value))
    tensor.CopyFrom(bare)
