"""Frees the batch dimension of a graph that was exported for a fixed number of contexts."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node, make_tensor_type_proto
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_shapes

from models.training.onnx_graph import INPUT, prune

# A batch size for shape inference: a prime, so that a dimension that it divides holds the batch.
PROBE = 100_003
_RECURRENT = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
_FOLDED = {
    "Add",
    "Cast",
    "Concat",
    "ConstantOfShape",
    "Div",
    "Equal",
    "Gather",
    "Mod",
    "Mul",
    "Reshape",
    "Slice",
    "Squeeze",
    "Sub",
    "Unsqueeze",
    "Where",
}
_MAX_FOLDED = 64  # numbers; a shape has no more
_REARRANGING = ("Expand", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Slice", "Transpose", "Tile")
Shape = tuple[int, ...]


def free_batch(model: ModelProto, fixed: int, zeros: Container[str] = ()) -> ModelProto:
    """Return a copy of a standardised graph whose batch of `fixed` contexts is free, as far as that can be found.

    A constant target of `Reshape` gets -1 at the dimension that holds the batch, a constant target of `Expand` 1. What
    `Concat` joins to every context, such as a first token, is expanded to the batch. Zero states of recurrent operators
    are left out, which means zeros for any batch. `Reshape` keeps the order of numbers, so the product of the sizes
    before the batch says which dimension of the target holds it.
    `zeros` are the names of weights that are all zero. The caller compares the answers of the copy with those of
    `model`.
    """
    freed = ModelProto()
    freed.CopyFrom(model)
    _drop_zero_states(freed.graph, zeros)
    _fold_integers(freed)
    work = _Freeing(freed, fixed)
    for node in list(freed.graph.node):
        work.visit(node)
    prune(freed.graph)
    return freed


class _Freeing:
    """The state of the work: the graph, its shapes for `PROBE` contexts, and what lies before the batch in a dimension.

    `_outer` has, for a value with the batch, the product of the sizes before the batch within the dimension that holds
    the batch: 1 unless another dimension was merged into it.
    """

    def __init__(self, model: ModelProto, fixed: int) -> None:
        self._model = model
        self._fixed = fixed
        self._constants = _constants(model.graph)
        self._sizes = {each.name: tuple(each.dims) for each in model.graph.initializer}
        self._shapes = _shapes(model)
        self._outer = {INPUT: 1}

    def visit(self, node: NodeProto) -> None:
        """Change one node if the batch is fixed in it."""
        known = next((self._outer[name] for name in node.input if name in self._outer), None)
        if known is not None:
            self._outer.update((name, known) for name in node.output if name)
        changed = False
        if node.op_type in ("Reshape", "Expand"):
            changed = self._retarget(node)
        elif node.op_type == "Concat" and self._fixed == 1:
            changed = self._expand_parts(node)
        if changed:
            self._shapes = _shapes(self._model)

    def _retarget(self, node: NodeProto) -> bool:
        before = self._shapes.get(node.input[0], ())
        target, axis = self._constants.get(node.input[1]), _batch_axis(before)
        if target is None or axis is None:
            return False
        position = math.prod(before[:axis]) * self._outer.get(node.input[0], 1)
        new = _freed_target(node.op_type, target.tolist(), before, position, self._fixed)
        if new is None:
            return False
        wanted, self._outer[node.output[0]] = new
        # a target of its own: others may share the old one
        node.input[1] = self._constant(f"target of {node.output[0]}", wanted)
        return True

    def _expand_parts(self, node: NodeProto) -> bool:
        shapes = [self._shapes.get(name) or self._sizes.get(name, ()) for name in node.input]
        whole = next((n for n, shape in enumerate(shapes) if PROBE in shape), None)
        if whole is None:
            return False
        axis, rank = shapes[whole].index(PROBE), len(shapes[whole])
        parts = [n for n, shape in enumerate(shapes) if len(shape) == rank and shape[axis] == 1]
        for n in parts:
            self._expand(node, n, node.input[whole], axis, rank)
        return bool(parts)

    def _expand(self, node: NodeProto, part: int, whole: str, axis: int, rank: int) -> None:
        """Insert nodes that expand an input of `node` to the batch of `whole`."""
        own = f"{part} of {node.output[0]}"
        place = self._constant(f"axis {own}", [axis])
        ahead, behind = (self._constant(f"ones {n} {own}", [1] * n) for n in (axis, rank - axis - 1))
        sizes, batch, target, wide = (f"{what} {own}" for what in ("sizes", "batch", "target", "wide"))
        new = [
            make_node("Shape", [whole], [sizes]),
            make_node("Gather", [sizes, place], [batch]),
            make_node("Concat", [ahead, batch, behind], [target], axis=0),
            make_node("Expand", [node.input[part], target], [wide]),
        ]
        node.input[part] = wide
        graph = self._model.graph
        at = next(n for n, each in enumerate(graph.node) if each.output == node.output)
        for offset, each in enumerate(new):
            graph.node.insert(at + offset, each)

    def _constant(self, name: str, values: list[int]) -> str:
        self._model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name


def _freed_target(
    kind: str, target: list[int], before: Shape, position: int, fixed: int
) -> tuple[list[int], int] | None:
    """Return the target with a free batch, and the product of the sizes before the batch within its dimension.

    `before` is the shape of the reshaped array, with `PROBE` contexts; `position` the product of the sizes before the
    batch.
    """
    if kind == "Expand":
        return ([1 if size == fixed and size > 1 else size for size in target], 1) if fixed > 1 else None
    if 0 in target:
        target = [before[n] if size == 0 and n < len(before) else size for n, size in enumerate(target)]
        target = [size // PROBE * fixed if size % PROBE == 0 and size > 0 else size for size in target]
    total = math.prod(before) // PROBE * fixed
    if -1 in target:
        known = -math.prod(target)
        target = [total // known if size == -1 and known > 0 else size for size in target]
    places = [
        (len(target) - 1 == axis, target[axis] != fixed, position // ahead > 1, axis, position // ahead)
        for axis in range(len(target))
        for ahead in [math.prod(target[:axis])]
        if ahead > 0 and position % ahead == 0 and target[axis] % (position // ahead * fixed) == 0
    ]
    if not places or math.prod(target) != total:
        return None
    *_, axis, inside = min(places)
    return [-1 if n == axis else size for n, size in enumerate(target)], inside


def _batch_axis(shape: Shape) -> int | None:
    return next((axis for axis, size in enumerate(shape) if size > 0 and size % PROBE == 0), None)


def _shapes(model: ModelProto) -> dict[str, Shape]:
    """Return the shapes of the values of a graph for `PROBE` contexts, as far as they can be inferred."""
    probe = ModelProto()
    probe.CopyFrom(model)
    graph = probe.graph
    shape = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    graph.input[0].type.CopyFrom(make_tensor_type_proto(TensorProto.FLOAT, [PROBE, *shape[1:]]))
    graph.output[0].type.tensor_type.ClearField("shape")
    inferred = infer_shapes(probe, data_prop=True).graph
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim
        )
        for value in (*inferred.value_info, *inferred.input)
    }


def _constants(graph: GraphProto) -> dict[str, NDArray[Any]]:
    """Return the initialisers that are in the graph itself; the weights are not."""
    inside = (each for each in graph.initializer if each.data_location != TensorProto.EXTERNAL)
    return {each.name: numpy_helper.to_array(each) for each in inside}


def _fold_integers(model: ModelProto) -> None:
    """Compute the nodes that calculate with constant integers, which shape inference does not follow everywhere."""
    graph, opsets = model.graph, {each.domain: each.version for each in model.opset_import}
    constants = {name: array for name, array in _constants(graph).items() if array.dtype.kind in "iub"}
    for node in graph.node:
        known = node.op_type in _FOLDED and not node.domain and all(name in constants for name in node.input)
        if known and (node.op_type != "ConstantOfShape" or math.prod(constants[node.input[0]].tolist()) <= _MAX_FOLDED):
            inputs = {name: constants[name] for name in node.input}
            (value,) = ReferenceEvaluator(node, opsets=opsets).run(None, inputs)
            constants[node.output[0]] = np.asarray(value)
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), node.output[0]))
            node.output[0] = f"folded {node.output[0]}"


def _drop_zero_states(graph: GraphProto, zeros: Container[str]) -> None:
    constants = _constants(graph)
    makers = {name: node for node in graph.node for name in node.output}

    def is_zero(name: str) -> bool:
        node = makers.get(name)
        if node is None:
            return name in zeros or (name in constants and not constants[name].any())
        if node.op_type == "ConstantOfShape":
            return not any(numpy_helper.to_array(each.t).any() for each in node.attribute)
        return node.op_type in _REARRANGING and is_zero(node.input[0])

    for node in graph.node:
        for place in _RECURRENT.get(node.op_type, ()):
            if place < len(node.input) and is_zero(node.input[place]):
                node.input[place] = ""
