"""Any net through ONNX: files made by hand, files that torch exports, and files that must be refused."""

from __future__ import annotations

import contextlib
import io
import resource
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lvm.cli import app, exit_codes
from models.registry.card import Card
from models.registry.checkpoint import BadCheckpoint, load_checkpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import Corpus
from models.runtimes import open_runtime
from models.runtimes.torch import build_net
from models.training.imported import ImportOptions
from models.training.importing import publish_model, read_model
from models.training.onnx_import import read_onnx
from models.training.onnx_trial import Facts, Request, examine
from models.vectors import Floats, normalise

DIM, LENGTH = 16, 5
Save = Callable[..., Path]
WEIGHTS = np.random.default_rng(0).standard_normal((LENGTH * DIM, DIM)).astype(np.float32)


def value(name: str, shape: Sequence[Any] | None, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def integers(name: str, values: Any) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def linear(*tail: NodeProto, out: str = "y") -> list[NodeProto]:
    """The nodes of a linear net, whose answer is `out`, and what comes behind."""
    return [
        helper.make_node("Reshape", ["x", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "W"], [out]),
        *tail,
    ]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Return a function that writes a graph with the weights of a linear net to a file."""

    def write(
        nodes: Sequence[NodeProto],
        *more: TensorProto,
        weights: TensorProto | None = None,
        inputs: Sequence[Any] = (value("x", ["batch", LENGTH, DIM]),),
        outputs: Sequence[Any] = (value("y", ["batch", DIM]),),
        opset: int = 17,
        change: Callable[[ModelProto], object] = lambda model: None,
    ) -> Path:
        weights = weights or numpy_helper.from_array(WEIGHTS, "W")
        tensors = [weights, integers("flat", [-1, LENGTH * DIM]), *more]
        graph = helper.make_graph(nodes, "net", inputs, outputs, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        change(model)
        path = tmp_path / "net.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


@pytest.fixture
def tried(tmp_path: Path) -> Callable[..., tuple[Facts, Any]]:
    """Return a function that tries a file in this process; it returns the facts, and a session of the files."""

    def run(path: Path, **wanted: Any) -> tuple[Facts, Any]:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        facts = examine(path, out, Request(str(path), str(out), **wanted))
        return facts, onnxruntime.InferenceSession(str(out / "net.onnx"), providers=["CPUExecutionProvider"])

    return run


Tried = Callable[..., tuple[Facts, Any]]
Contexts = Callable[..., Floats]


def answers(session: Any, contexts: Floats) -> Floats:
    vectors: Floats = session.run(["vector"], {"context": contexts})[0]
    return vectors


def expected(contexts: Floats) -> Floats:
    return normalise(contexts.reshape(len(contexts), -1) @ WEIGHTS)


def test_a_linear_graph_becomes_a_net_of_two_files_that_normalises(
    save: Save, tried: Tried, contexts: Contexts
) -> None:
    facts, session = tried(save(linear()))
    assert (facts.dim, facts.context_length, facts.parameters) == (DIM, LENGTH, WEIGHTS.size)
    assert "divides each answer by its length" in facts.remarks[0]
    for rows in (1, 2, 7):
        assert np.allclose(answers(session, contexts(rows)), expected(contexts(rows)), atol=1e-5)
    assert np.array_equal(answers(session, np.zeros((1, LENGTH, DIM), np.float32)), np.zeros((1, DIM)))


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 22])
def test_a_graph_of_any_operator_set_is_normalised(save: Save, tried: Tried, contexts: Contexts, opset: int) -> None:
    facts, session = tried(save(linear(), opset=opset))
    assert facts.config["opset"] == opset
    assert np.allclose(answers(session, contexts(3)), expected(contexts(3)), atol=1e-5)


def test_a_graph_that_ends_in_unit_vectors_is_left_as_it_is(save: Save, tried: Tried, contexts: Contexts) -> None:
    facts, session = tried(save(linear(helper.make_node("LpNormalization", ["z"], ["y"], axis=1), out="z")))
    assert facts.remarks == []
    assert np.allclose(answers(session, contexts(3)), expected(contexts(3)), atol=1e-5)


def test_names_in_a_graph_can_be_those_that_a_net_uses(save: Save, tried: Tried, contexts: Contexts) -> None:
    """The graph calls its input `vector`, its answer `context`, and a weight `context_`."""
    nodes = [
        helper.make_node("Reshape", ["vector", "flat"], ["vector_"]),
        helper.make_node("MatMul", ["vector_", "context_"], ["context"]),
    ]
    _, session = tried(
        save(
            nodes,
            weights=numpy_helper.from_array(WEIGHTS, "context_"),
            inputs=[value("vector", ["batch", LENGTH, DIM])],
            outputs=[value("context", ["batch", DIM])],
        )
    )
    assert np.allclose(answers(session, contexts(3)), expected(contexts(3)), atol=1e-5)


def test_initialisers_among_the_inputs_of_old_graphs_are_weights(save: Save, tried: Tried, contexts: Contexts) -> None:
    def age(model: ModelProto) -> None:
        model.ir_version = 3
        model.graph.input.append(value("W", WEIGHTS.shape))
        model.graph.input.append(value("flat", [2], TensorProto.INT64))

    facts, session = tried(save(linear(), opset=8, change=age))
    assert facts.parameters == WEIGHTS.size
    assert np.allclose(answers(session, contexts(3)), expected(contexts(3)), atol=1e-5)


def test_weights_in_nodes_functions_and_files_beside_the_graph_are_found(
    save: Save, tried: Tried, contexts: Contexts, tmp_path: Path
) -> None:
    constant = helper.make_node("Constant", [], ["V"], value=numpy_helper.from_array(WEIGHTS))
    nodes = [constant, *linear(helper.make_node("MatMul", ["row", "V"], ["y"]), out="unused")]
    facts, session = tried(save(nodes))
    assert facts.parameters == WEIGHTS.size
    assert np.allclose(answers(session, contexts(3)), expected(contexts(3)), atol=1e-5)

    def call(model: ModelProto) -> None:
        imports = [helper.make_opsetid("", 17)]
        body = [helper.make_node("Neg", ["a"], ["b"])]
        model.functions.append(helper.make_function("own", "Opposite", ["a"], ["b"], body, imports))
        model.opset_import.append(helper.make_opsetid("own", 1))

    nodes = linear(helper.make_node("Opposite", ["z"], ["y"], domain="own"), out="z")
    assert np.allclose(answers(tried(save(nodes, change=call))[1], contexts(3)), -expected(contexts(3)), atol=1e-5)

    path = save(linear())
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="net.onnx.data", size_threshold=0)
    assert (tmp_path / "net.onnx.data").stat().st_size >= WEIGHTS.nbytes
    assert np.allclose(answers(tried(path)[1], contexts(3)), expected(contexts(3)), atol=1e-5)


def test_half_and_quantised_weights_keep_their_types(save: Save, tried: Tried, contexts: Contexts) -> None:
    half = WEIGHTS.astype(np.float16)
    cast = helper.make_node("Cast", ["H"], ["V"], to=TensorProto.FLOAT)
    nodes = [cast, *linear(helper.make_node("MatMul", ["row", "V"], ["y"]), out="unused")]
    facts, session = tried(save(nodes, numpy_helper.from_array(half, "H")))
    wanted = normalise(contexts(3).reshape(3, -1) @ half.astype(np.float32))
    assert np.allclose(answers(session, contexts(3)), wanted, atol=1e-5)

    scale = np.abs(WEIGHTS).max(axis=0) / 127
    int8 = np.rint(WEIGHTS / scale).astype(np.int8)
    dequantise = helper.make_node("DequantizeLinear", ["Q", "scale"], ["V"], axis=1)
    nodes = [dequantise, *linear(helper.make_node("MatMul", ["row", "V"], ["y"]), out="unused")]
    facts, session = tried(save(nodes, numpy_helper.from_array(int8, "Q"), numpy_helper.from_array(scale, "scale")))
    assert facts.parameters == int8.size + scale.size
    wanted = normalise(contexts(3).reshape(3, -1) @ (int8 * scale))
    # onnxruntime rounds the contexts to eight bits too
    assert np.allclose(answers(session, contexts(3)), wanted, atol=5e-3)


def test_one_of_several_outputs_can_be_chosen(save: Save, tried: Tried, contexts: Contexts) -> None:
    outputs = [value("y", ["batch", DIM]), value("score", ["batch", 1])]
    score = [helper.make_node("MatMul", ["y", "U"], ["score"])]
    path = save(linear(*score), numpy_helper.from_array(WEIGHTS[:DIM, :1], "U"), outputs=outputs)
    facts, session = tried(path, output="y")
    assert facts.parameters == WEIGHTS.size
    assert np.allclose(answers(session, contexts(3)), expected(contexts(3)), atol=1e-5)


def test_free_sizes_come_from_the_options_or_the_answer(save: Save, tried: Tried, contexts: Contexts) -> None:
    mean = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)]
    free = save(mean, inputs=[value("x", ["batch", "length", "dim"])], outputs=[value("y", ["batch", "dim"])])
    facts, session = tried(free, context_length=3, dim=4)
    assert (facts.context_length, facts.dim) == (3, 4)
    assert np.allclose(answers(session, contexts(2, 4, 3)), normalise(contexts(2, 4, 3).mean(axis=1)), atol=1e-5)
    with pytest.raises(BadCheckpoint, match="D is free in the graph; --data DIR says it"):
        tried(free)
    facts, _ = tried(save(linear(), inputs=[value("x", None)], outputs=[value("y", None)]))
    assert (facts.context_length, facts.dim) == (LENGTH, DIM)


REFUSED: Mapping[str, tuple[Callable[[Save], Path], str]] = {
    "weights that are not finite": (
        lambda save: save(linear(), weights=numpy_helper.from_array(WEIGHTS * np.inf, "W")),
        "not finite: 'W'",
    ),
    "answers that are not finite": (
        lambda save: save(
            linear(helper.make_node("Div", ["z", "zero"], ["y"]), out="z"),
            numpy_helper.from_array(np.float32(0), "zero"),
        ),
        "7 of 7 answers are not finite",
    ),
    "answers without a direction": (
        lambda save: save(
            linear(helper.make_node("Mul", ["z", "zero"], ["y"]), out="z"),
            numpy_helper.from_array(np.float32(0), "zero"),
        ),
        "an answer has the length 0",
    ),
    "contexts that influence each other": (
        lambda save: save(linear(helper.make_node("Softmax", ["z"], ["y"], axis=0), out="z")),
        r"contexts influence each other's answers: an answer differs by 0\.\d+ in a batch of others",
    ),
    "random numbers": (
        lambda save: save(linear(helper.make_node("RandomNormalLike", ["z"], ["y"]), out="z")),
        "RandomNormalLike draw random numbers",
    ),
    "operators of other libraries": (
        lambda save: save(
            linear(helper.make_node("Foo", ["z"], ["y"], domain="theirs"), out="z"),
            change=lambda model: model.opset_import.append(helper.make_opsetid("theirs", 1)),
        ),
        "'theirs.Foo' are not of ONNX or onnxruntime",
    ),
    "operators that read files": (
        lambda save: save(
            linear(helper.make_node("EPContext", ["z"], ["y"], domain="com.microsoft"), out="z"),
            change=lambda model: model.opset_import.append(helper.make_opsetid("com.microsoft", 1)),
        ),
        "EPContext are not allowed",
    ),
    "another type": (
        lambda save: save(
            linear(),
            weights=numpy_helper.from_array(WEIGHTS.astype(np.float16), "W"),
            inputs=[value("x", ["batch", LENGTH, DIM], TensorProto.FLOAT16)],
            outputs=[value("y", ["batch", DIM], TensorProto.FLOAT16)],
        ),
        r"expected an input and an output of float32; found 1 input: 'x' float16 \(batch, 5, 16\)",
    ),
    "bfloat16": (
        lambda save: save(linear(), weights=helper.make_tensor("W", TensorProto.BFLOAT16, [1], [1.0])),
        "'W' is bfloat16; expected one of float",
    ),
    "two inputs": (
        lambda save: save(
            linear(helper.make_node("Add", ["z", "more"], ["y"]), out="z"),
            inputs=[value("x", ["batch", LENGTH, DIM]), value("more", ["batch", DIM])],
        ),
        r"found 2 inputs: 'x' float \(batch, 5, 16\), 'more' float",
    ),
    "two outputs": (
        lambda save: save(linear(), outputs=[value("y", ["batch", DIM]), value("row", ["batch", LENGTH * DIM])]),
        r"2 outputs: 'y' .*, 'row' .*; --output NAME chooses one",
    ),
    "an answer for each position": (
        lambda save: save([helper.make_node("Neg", ["x"], ["y"])], outputs=[value("y", ["batch", LENGTH, DIM])]),
        r"expected an input \(B, T, D\) and an output \(B, D\)",
    ),
    "an operator set of the future": (lambda save: save(linear(), opset=99), "Opset 99 is under development"),
    "too many nodes": (
        lambda save: save(linear(*[helper.make_node("Neg", ["y"], [f"n{n}"]) for n in range(20_000)])),
        "20002 nodes; expected at most 20000",
    ),
    "a circle": (
        lambda save: save(
            linear(
                helper.make_node("Add", ["z", "b"], ["a"]),
                helper.make_node("Neg", ["a"], ["b"]),
                helper.make_node("Neg", ["a"], ["y"]),
                out="z",
            )
        ),
        "Node input 'b' is not a graph input, initializer, or output of a previous node",
    ),
    "a header that promises too much": (
        lambda save: save(linear(), change=lambda model: model.graph.initializer[0].dims.__setitem__(0, 1 << 40)),
        "'W': its data do not fit the shape",
    ),
    "a function that calls itself": (
        lambda save: save(
            linear(helper.make_node("f", ["z"], ["y"], domain="own"), out="z"),
            change=lambda model: model.functions.append(
                helper.make_function("own", "f", ["a"], ["b"], [helper.make_node("f", ["a"], ["b"], domain="own")], [])
            ),
        ),
        "function 'f' calls itself",
    ),
    "functions that double 40 times": (lambda save: save(linear(), change=doubling), "nodes; expected at most 20000"),
    "a size that the input decides": (
        lambda save: save(
            linear(
                helper.make_node("ReduceSum", ["z"], ["sum"], keepdims=0),
                helper.make_node("Cast", ["sum"], ["size"], to=TensorProto.INT64),
                helper.make_node("Tile", ["z", "size"], ["y"]),
                out="z",
            )
        ),
        "values of the input decide a size or a branch: 'size', which Tile 'y' reads",
    ),
    "a loop that the input ends": (
        lambda save: save(linear(endless(by_input=True), out="z"), numpy_helper.from_array(np.array(True), "go")),
        "values of the input decide how often Loop 'y' runs",
    ),
    "a reserved name": (
        lambda save: save(
            linear(helper.make_node("Add", ["z", "__metadata__"], ["y"]), out="z"),
            numpy_helper.from_array(WEIGHTS[0], "__metadata__"),
        ),
        "which safetensors keeps for itself",
    ),
    "another T": (
        lambda save: save(linear(), inputs=[value("x", ["batch", 6, DIM])]),
        "onnxruntime fails on 1 contexts",
    ),
}


def doubling(model: ModelProto) -> None:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for n in range(40):
        called = [("Neg", "") if n == 0 else (f"f{n - 1}", "own")] * 2
        nodes = [
            helper.make_node(name, [f"v{at}"], [f"v{at + 1}"], domain=domain)
            for at, (name, domain) in enumerate(called)
        ]
        model.functions.append(helper.make_function("own", f"f{n}", ["v0"], ["v2"], nodes, imports))
    model.opset_import.append(imports[1])
    model.graph.node.append(helper.make_node("f39", ["y"], ["unused"], domain="own"))


def endless(by_input: bool) -> NodeProto:
    """Return a loop over `z` that goes on while its sum is positive, or forever."""
    turn = [helper.make_node("Add", ["state", "state"], ["next"])]
    if by_input:
        turn.append(helper.make_node("ReduceSum", ["state"], ["sum"], keepdims=0))
        turn.append(helper.make_node("Cast", ["sum"], ["again"], to=TensorProto.BOOL))
    else:
        turn.append(helper.make_node("Identity", ["on"], ["again"]))
    given = [value("turn", [], TensorProto.INT64), value("on", [], TensorProto.BOOL), value("state", None)]
    body = helper.make_graph(turn, "body", given, [value("again", [], TensorProto.BOOL), value("next", None)])
    return helper.make_node("Loop", ["", "go", "z"], ["y"], body=body)


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(save: Save, tried: Tried, what: str) -> None:
    make, reason = REFUSED[what]
    with pytest.raises(BadCheckpoint, match=reason):
        tried(make(save))


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_refuses_a_file_that_was_cut_short(save: Save, tried: Tried, cut: int) -> None:
    path = save(linear())
    path.write_bytes(path.read_bytes()[: -cut or 0])
    with pytest.raises(BadCheckpoint, match="not an ONNX model, or cut short"):
        tried(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "missing", ".", ""])
def test_reads_data_only_from_files_of_its_own_directory(
    save: Save, tried: Tried, tmp_path: Path, location: str
) -> None:
    (tmp_path.parent / "secret").write_bytes(WEIGHTS.tobytes())
    (tmp_path / "link").symlink_to(tmp_path.parent / "secret")
    outside = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=WEIGHTS.shape, data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value=location)
    with pytest.raises(BadCheckpoint, match="expected a file in the directory of the graph"):
        tried(save(linear(), weights=outside))


class Mixer(nn.Module):
    """An MLP mixer: an architecture that the project does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(LENGTH, 16), nn.GELU(), nn.Linear(16, LENGTH))
        self.channels = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 32), nn.GELU(), nn.Linear(32, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return (x + self.channels(x)).mean(dim=1)


class Convolution(nn.Module):
    """A convolution over the chunks, with the statistics of a batch normalisation fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(DIM, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten())
        self.out = nn.Linear(8 * LENGTH, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.out(self.layers(x.transpose(1, 2))), dim=1)


class Recurrent(nn.Module):
    """A recurrent net in two directions, whose states begin with zeros for a fixed batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(DIM, 8, batch_first=True, bidirectional=True)
        self.out = nn.Linear(16, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention with a first token, time before batch: reshapes merge the batch with heads and with time."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.attention = nn.MultiheadAttention(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1).transpose(0, 1)
        return self.attention(x, x, x)[0][0]  # type: ignore[no-any-return]


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that exports a net by torch for `rows` contexts, or for any number if that is None."""

    def run(net: nn.Module, opset: int, rows: int | None) -> Path:
        path, example, dynamo = tmp_path / "net.onnx", torch.zeros(rows or 2, LENGTH, DIM), opset >= 18
        free: dict[str, Any] = {} if rows else {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
        if dynamo and not rows:
            free = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=512)},)}
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                net.eval(),
                (example,),
                str(path),
                opset_version=opset,
                dynamo=dynamo,
                external_data=False,
                input_names=["x"],
                output_names=["y"],
                **free,
            )
        return path

    return run


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize(
    ("make", "opset"),
    [(Mixer, 11), (Mixer, 20), (Convolution, 13), (Convolution, 18), (Recurrent, 11), (Recurrent, 20), (Attention, 18)],
)
def test_a_net_that_torch_exports_answers_batches_as_torch_does(
    export: Callable[..., Path],
    tried: Tried,
    contexts: Contexts,
    make: Callable[[], nn.Module],
    opset: int,
    rows: int | None,
) -> None:
    """Of the attention with a batch of three, the first token is a constant of three rows: it stays fixed."""
    torch.manual_seed(0)
    net = make().eval()
    facts, session = tried(export(net, opset, rows))
    stays_fixed = make is Attention and rows == 3
    assert facts.config.get("fixed_rows", False) is stays_fixed
    assert facts.config["max_rows"] == (3 if stays_fixed else 256)
    given = contexts(3 if stays_fixed else 9)
    with torch.inference_mode():
        right = normalise(net(torch.from_numpy(given)).numpy())
    assert np.allclose(answers(session, given), right, atol=1e-5)


@pytest.fixture
def imported(registry: Registry, card: Callable[..., Card], other: Corpus) -> Callable[[Path], Version]:
    """Return a function that imports a file as a version, scored on the validation set."""

    def run(path: Path) -> Version:
        options = ImportOptions("theirs")
        return publish_model(registry, read_model(path, options), options, card(encoder="e"), {"other": other})

    return run


def test_an_imported_net_is_a_version_like_every_other(
    imported: Callable[[Path], Version], save: Save, contexts: Contexts
) -> None:
    version = imported(save(linear()))
    checkpoint = load_checkpoint(version.path)
    card = checkpoint.card
    assert (card.name, card.architecture, card.dim, card.context_length) == ("theirs", "onnx", DIM, LENGTH)
    assert (card.parameters, card.config["input"], card.config["opset"]) == (WEIGHTS.size, "x", 17)
    assert card.scores["other"]["cosine"] > -1
    assert any("divides each answer by its length" in limit for limit in card.limits)
    assert sorted(path.name for path in version.path.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "golden.safetensors",
        "net.onnx",
        "weights.safetensors",
    ]
    many = contexts(600)
    assert np.allclose(open_runtime(checkpoint, "cpu", threads=2).run(many), expected(many), atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_an_imported_net_computes_in_every_precision_that_golden_vectors_allow(
    imported: Callable[[Path], Version], save: Save, contexts: Contexts, precision: str
) -> None:
    openvino = pytest.importorskip("models.runtimes.openvino")
    if not openvino.supports_precision(precision):
        pytest.skip(f"this processor does not compute in {precision}")
    runtime = open_runtime(load_checkpoint(imported(save(linear())).path), "cpu", 1, precision)
    assert np.sum(runtime.run(contexts(9)) * expected(contexts(9)), axis=1).min() > 0.999


def test_an_imported_net_has_no_torch_module_and_runs_on_the_cpu_of_every_machine(
    imported: Callable[[Path], Version], save: Save, contexts: Contexts
) -> None:
    checkpoint = load_checkpoint(imported(save(linear())).path)
    with pytest.raises(BadCheckpoint, match="came as an ONNX file: it has no torch module"):
        build_net(checkpoint)
    runtime = open_runtime(checkpoint, "cuda", threads=1)
    assert (runtime.name, runtime.on_cpu) == ("onnxruntime", True)
    assert np.allclose(runtime.run(contexts(3)), expected(contexts(3)), atol=1e-5)


def test_a_fixed_batch_that_cannot_be_freed_runs_in_blocks(
    imported: Callable[[Path], Version], export: Callable[..., Path], contexts: Contexts
) -> None:
    torch.manual_seed(0)
    net = Attention().eval()
    checkpoint = load_checkpoint(imported(export(net, 18, 3)).path)
    assert any("contexts run 3 at a time" in limit for limit in checkpoint.card.limits)
    runtime = open_runtime(checkpoint, "cpu", threads=2)
    for rows in (1, 2, 3, 7, 40):
        with torch.inference_mode():
            right = normalise(net(torch.from_numpy(contexts(rows))).numpy())
        assert np.allclose(runtime.run(contexts(rows)), right, atol=1e-5)


@pytest.mark.parametrize("rows", [None, 0, -1, "many", True])
def test_a_card_without_a_number_of_rows_is_refused(imported: Callable[[Path], Version], save: Save, rows: Any) -> None:
    checkpoint = load_checkpoint(imported(save(linear())).path)
    config = {**checkpoint.card.config, "max_rows": rows}
    with pytest.raises(BadCheckpoint, match="expected a positive number"):
        open_runtime(replace(checkpoint, card=replace(checkpoint.card, config=config)), "cpu", 1)


def test_only_the_process_of_a_trial_has_its_limits(save: Save, tried: Tried) -> None:
    before = [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)]
    tried(save(linear()))
    assert [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)] == before


def test_a_loop_without_an_end_ends_only_the_trial(save: Save) -> None:
    path = save(linear(endless(by_input=False), out="z"), numpy_helper.from_array(np.array(True), "go"))
    with pytest.raises(BadCheckpoint, match="did not end within 2 s of CPU time"):
        read_onnx(path, ImportOptions("n"), cpu_s=2)


def test_an_array_that_fits_no_memory_ends_only_the_trial(save: Save) -> None:
    nodes = linear(
        helper.make_node("Expand", ["z", "size"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["y"], axes=[0], keepdims=0),
        out="z",
    )
    with pytest.raises(BadCheckpoint, match="Failed to allocate memory"):
        read_onnx(save(nodes, integers("size", [1 << 34, 1, 1])), ImportOptions("n"))


def test_texts_of_any_size_are_left_out(save: Save, tried: Tried) -> None:
    def talk(model: ModelProto) -> None:
        model.doc_string = "x" * 20_000_000
        model.producer_name = "y" * 1000
        model.training_info.add().algorithm.node.add(op_type="Foo")

    path = save(linear(), change=talk)
    facts, _ = tried(path)
    assert facts.config["producer"] == "y" * 100
    assert (path.parent / "out" / "net.onnx").stat().st_size < 10_000


def test_the_command_refuses_with_its_status_and_what_was_found(
    save: Save, registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LVM_REGISTRY", str(registry.root))
    path = save(linear(helper.make_node("Softmax", ["z"], ["y"], axis=0), out="z"))
    with pytest.raises(SystemExit) as end:
        exit_codes.run(lambda: app(["import", str(path), "--name", "theirs"]))
    messages = capsys.readouterr().err
    assert end.value.code == 65
    assert f"lvm: {path}: contexts influence each other's answers" in messages
    assert "next: export the net with one float32 input (B, T, D) and one output (B, D)" in messages
    assert registry.versions() == []
