"""Which operators a graph may have, and what may decide the sizes and the time that it takes."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto, ModelProto, NodeProto

from models.registry.checkpoint import BadCheckpoint
from models.training.onnx_graph import nodes_of, shown, subgraphs

# of the standard, and of onnxruntime itself
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
RANDOM = {
    "Bernoulli",
    "BiasDropout",
    "BitmaskBiasDropout",
    "BitmaskDropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Sampling",
}
# They read files, or search for an unknown time.
REFUSED = {"BeamSearch", "EPContext", "GreedySearch", "PyOp", "WhisperBeamSearch"}
# Operators whose inputs at these places give the sizes of what they make, or how often they run.
SIZE_INPUTS: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "Compress": (1,),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "If": (0,),
    "ImageDecoder": (0,),
    "Loop": (0, 1),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1),
    "NonMaxSuppression": (0, 1, 2, 3, 4),
    "NonZero": (0,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "SequenceAt": (1,),
    "SequenceErase": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "StringSplit": (0,),
    "Tile": (1, 2),
    "TopK": (1,),
    "Unique": (0,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
# Their answers are known from the shapes of their inputs.
_OF_SHAPES = ("Shape", "Size", "ConstantOfShape", "EyeLike", "SequenceLength")


def check_operators(model: ModelProto) -> None:
    """Raise `BadCheckpoint` if a graph has operators of other libraries, draws random numbers, or reads files."""
    nodes = list(nodes_of(model.graph.node))
    strangers = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in DOMAINS})
    if strangers:
        raise BadCheckpoint(
            f"operators {', '.join(map(shown, strangers[:5]))} are not of ONNX or onnxruntime; expected the domains "
            "ai.onnx, ai.onnx.ml or com.microsoft"
        )
    drawing = sorted({node.op_type for node in nodes if node.op_type in RANDOM or _trains(node)})
    if drawing:
        raise BadCheckpoint(f"operators {', '.join(drawing)} draw random numbers or train; export the net in eval mode")
    refused = sorted({node.op_type for node in nodes if node.op_type in REFUSED})
    if refused:
        raise BadCheckpoint(f"operators {', '.join(refused)} are not allowed: they read files, or may not end")


def _trains(node: NodeProto) -> bool:
    return any(each.name == "training_mode" and each.i for each in node.attribute)


def size_inputs(graph: GraphProto) -> set[str]:
    """Return the names of the values that give sizes in a graph or its subgraphs."""
    return {name for node in nodes_of(graph.node) for name in _size_names(node)}


def _size_names(node: NodeProto) -> Iterator[str]:
    places = SIZE_INPUTS.get(node.op_type, ())
    if node.op_type.startswith("Reduce"):
        places = (1,)
    yield from (name for place, name in enumerate(node.input) if place in places and name)


def check_sizes(graph: GraphProto, source: str) -> None:
    """Raise `BadCheckpoint` if values of the input `source` decide the size of an array, a branch or a loop.

    Without that, the shape of the input alone decides how much time and memory a run takes, so that a trial of some
    inputs shows it for all.
    """
    _Dependence().add(graph, {source})


class _Dependence:
    """Finds which values depend on the numbers in the input, and not on its shape alone."""

    def __init__(self) -> None:
        self._dependent: set[str] = set()

    def add(self, graph: GraphProto, sources: set[str]) -> list[bool]:
        """Follow `sources` through a graph; return which of the outputs depend on them."""
        self._dependent |= sources
        for node in graph.node:
            self._check(node)
            if any(self._outputs_depend(node)):
                depend = self._outputs_depend(node)
                self._dependent |= {name for name, is_so in zip(node.output, depend, strict=False) if name and is_so}
        return [value.name in self._dependent for value in graph.output]

    def _check(self, node: NodeProto) -> None:
        deciding = self._dependent & set(_size_names(node))
        if deciding:
            raise BadCheckpoint(
                f"values of the input decide a size or a branch: {shown(min(deciding))}, which {node.op_type} "
                f"{shown(node.name or node.output[0])} reads; expected sizes that follow from the input's shape"
            )

    def _outputs_depend(self, node: NodeProto) -> list[bool]:
        if inner := subgraphs(node):
            return self._of_subgraphs(node, inner)
        reads = node.op_type not in _OF_SHAPES and not self._dependent.isdisjoint(node.input)
        return [reads] * len(node.output)

    def _of_subgraphs(self, node: NodeProto, inner: list[GraphProto]) -> list[bool]:
        if node.op_type == "If":
            branches = [self.add(graph, set()) for graph in inner]
            return [any(each) for each in zip(*branches, strict=False)]
        (body,) = inner
        carried = _carried(node, body)
        given = [name in self._dependent for name in carried]
        while True:
            names = [value.name for value in body.input]
            made = self.add(body, {name for name, is_so in zip(names, given, strict=False) if is_so})
            if node.op_type == "Loop" and made[:1] == [True]:
                raise BadCheckpoint(
                    f"values of the input decide how often Loop {shown(node.name or node.output[0])} runs; "
                    "expected a number of turns that follows from the input's shape"
                )
            again = _next(node, given, made)
            if again == given:
                return made[1:] if node.op_type == "Loop" else made
            given = again


def _carried(node: NodeProto, body: GraphProto) -> list[str]:
    """Return the names outside of the inputs of a body, the empty name for the number and condition of a turn."""
    if node.op_type == "Loop":
        return ["", "", *node.input[2:]]
    states = len(body.input)
    return list(node.input)[-states:] if states else []


def _next(node: NodeProto, given: list[bool], made: list[bool]) -> list[bool]:
    """Return which inputs of a body depend on the input after one more turn."""
    if node.op_type == "Loop":
        turned = [False, *made[: len(given) - 1]]
    elif node.op_type == "Scan":
        scanned = next((each.i for each in node.attribute if each.name == "num_scan_inputs"), 0)
        states = max(0, len(given) - scanned)
        turned = [*made[:states], *given[states:]]
    else:
        turned = given
    return [before or now for before, now in zip(given, turned, strict=False)]
