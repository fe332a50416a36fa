"""Every runtime answers like the float32 torch net, or is rejected with the cosine."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from torch import nn

from models.nets import architecture_of, config_dict
from models.predictor import build_predictor
from models.registry.card import CARD_FILE, Card
from models.registry.checkpoint import BadCheckpoint, Checkpoint, load_checkpoint, parse_checkpoint
from models.registry.registry import Version
from models.runtimes import (
    MIN_PARITY,
    NoSuchDevice,
    NoSuchPrecision,
    UnfitRuntime,
    check_every_path,
    check_parity,
    find_device,
    open_runtime,
)
from models.runtimes.onnx import OnnxRuntime
from models.runtimes.torch import TorchRuntime, best_device, build_net, run_net
from models.training.export import net_files
from models.training.publish import golden_contexts
from models.vectors import Floats

Contexts = Callable[..., Floats]


@pytest.fixture(scope="session", params=["amn", "gmn", "gru", "lstm", "lstm_stack", "transformer"])
def pair(request: pytest.FixtureRequest, tiny_net: Callable[..., nn.Module]) -> tuple[nn.Module, Checkpoint]:
    """A net and the checkpoint exported of it."""
    if request.param in ("amn", "gru"):  # already exported
        stored = load_checkpoint(request.getfixturevalue(f"{request.param}_version").path)
        return build_net(stored), stored
    net = tiny_net(request.param, **({"decay": 0.7} if request.param == "lstm_stack" else {}))
    config: Mapping[str, Any] = config_dict(net)
    card = Card("toy", "net", 16, "e", "l", "a", architecture=architecture_of(net), config=config)
    files = net_files(net, golden_contexts(None, 16, 5))
    return net, parse_checkpoint("v", {**files, CARD_FILE: card.to_markdown().encode()})


@pytest.fixture(scope="module")
def checkpoint(gru_version: Version) -> Checkpoint:
    return load_checkpoint(gru_version.path)


def test_onnxruntime_answers_as_torch_does(pair: tuple[nn.Module, Checkpoint], contexts: Contexts) -> None:
    net, checkpoint = pair
    runtime = open_runtime(checkpoint, "cpu", threads=1)
    assert runtime.name == "onnxruntime"
    for batch in (1, 2, 33):
        context = contexts(batch, seed=batch)
        answer = runtime.run(context)
        assert answer.dtype == np.float32
        assert np.allclose(answer, run_net(net, context), atol=1e-5)
    assert np.allclose(answer, TorchRuntime(checkpoint, "cpu").run(context), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 15, 31, 32, 33, 100])
def test_rows_divided_among_threads_come_back_in_order(
    pair: tuple[nn.Module, Checkpoint], contexts: Contexts, batch: int
) -> None:
    context = contexts(batch)
    together = OnnxRuntime(pair[1], threads=3).run(context)
    assert np.allclose(together, OnnxRuntime(pair[1], threads=1).run(context), atol=1e-6)


def test_a_failure_in_another_thread_is_raised(checkpoint: Checkpoint) -> None:
    wrong = np.zeros((64, 5, 15), np.float32)
    with pytest.raises(Exception, match="Got: 15 Expected: 16"):
        OnnxRuntime(checkpoint, threads=2).run(wrong)


def test_bfloat16_passes_the_same_gate_with_unit_vectors(pair: tuple[nn.Module, Checkpoint]) -> None:
    runtime = TorchRuntime(pair[1], "cpu", "bf16")
    assert (runtime.name, TorchRuntime(pair[1], "cpu").name) == ("torch-bf16", "torch")
    answer = runtime.run(pair[1].golden_context)
    assert answer.dtype == np.float32
    assert np.allclose(np.linalg.norm(answer, axis=1), 1, atol=1e-5)
    assert np.sum(answer * pair[1].golden_vector, axis=1).min() > 0.999
    assert not np.allclose(answer, pair[1].golden_vector, atol=1e-5)


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp4"), ("cuda", "int8"), ("mps", "int8")])
def test_rejects_an_unavailable_precision_by_name(checkpoint: Checkpoint, device: str, precision: str) -> None:
    with pytest.raises(NoSuchPrecision, match=precision):
        open_runtime(checkpoint, device, 1, precision)


def test_the_graph_carries_no_weights(pair: tuple[nn.Module, Checkpoint]) -> None:
    """It reads the verified weights; changing them changes the answer."""
    net, checkpoint = pair
    name = next(
        name for name, _ in net.named_parameters() if name.endswith(("output_proj.bias", "6.bias", "head.3.bias"))
    )
    other = replace(checkpoint, weights={**checkpoint.weights, name: checkpoint.weights[name] + 5})
    context = checkpoint.golden_context
    assert np.abs(OnnxRuntime(other, 1).run(context) - OnnxRuntime(checkpoint, 1).run(context)).max() > 0.1
    for tensor in checkpoint.weights.values():
        assert tensor.nbytes < 256 or tensor.tobytes() not in checkpoint.graph


def test_a_published_version_opens_as_plain_onnx(amn_version: Version) -> None:
    """With the graph and its safetensors only, without our code."""
    import onnxruntime

    session = onnxruntime.InferenceSession(amn_version.path / "net.onnx", providers=["CPUExecutionProvider"])
    golden = load((amn_version.path / "golden.safetensors").read_bytes())
    (answer,) = session.run(["vector"], {"context": golden["context"]})
    assert np.allclose(answer, golden["vector"], atol=1e-5)


# Parity


class Fake:
    """A runtime with given answers."""

    name = "fake"

    def __init__(self, answer: Floats) -> None:
        self.answer = answer

    def run(self, contexts: Floats) -> Floats:
        return self.answer


def test_the_right_answer_passes(checkpoint: Checkpoint) -> None:
    check_parity(Fake(checkpoint.golden_vector), checkpoint)
    check_parity(Fake(checkpoint.golden_vector + np.float32(1e-6)), checkpoint)


def turned(vectors: Floats, row: int, cosine: float) -> Floats:
    """Return `vectors` with one row rotated to the given cosine."""
    answer = vectors.copy()
    side = np.roll(answer[row], 1)
    side -= answer[row] * (side @ answer[row])
    answer[row] = cosine * answer[row] + np.sqrt(1 - cosine**2) * side / np.linalg.norm(side)
    return answer


@pytest.mark.parametrize("row", [0, 7, 15])
def test_rejects_one_wrong_answer_with_the_cosine(checkpoint: Checkpoint, row: int) -> None:
    check_parity(Fake(turned(checkpoint.golden_vector, row, 0.99995)), checkpoint)
    with pytest.raises(
        UnfitRuntime, match=rf"fake: cosine 0\.9990\d\d to the golden vectors; expected >= {MIN_PARITY}"
    ):
        check_parity(Fake(turned(checkpoint.golden_vector, row, 0.999)), checkpoint)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rejects_non_finite_answers(checkpoint: Checkpoint, value: float) -> None:
    for column in range(16):
        answer = checkpoint.golden_vector.copy()
        answer[5, column] = value
        with pytest.raises(UnfitRuntime):
            check_parity(Fake(answer), checkpoint)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, -1.0])
def test_rejects_answers_of_another_length(checkpoint: Checkpoint, scale: float) -> None:
    with pytest.raises(UnfitRuntime, match="cosine"):
        check_parity(Fake(checkpoint.golden_vector * np.float32(scale)), checkpoint)


@pytest.mark.parametrize("shape", [(16, 15), (15, 16), (16,), (16, 16, 1)])
def test_rejects_answers_of_another_shape(checkpoint: Checkpoint, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnfitRuntime, match="answers have shape"):
        check_parity(Fake(np.zeros(shape, np.float32)), checkpoint)


@pytest.mark.parametrize(
    "serve", [build_predictor, lambda wrong: check_parity(TorchRuntime(wrong, "cpu"), wrong)], ids=["onnx", "torch"]
)
def test_rejects_weights_that_do_not_match_the_golden_vectors(
    checkpoint: Checkpoint, serve: Callable[[Checkpoint], object]
) -> None:
    """The LSTM bug: the served net is not the trained one, although every file matches its checksum."""
    weights = {name: tensor[::-1].copy() for name, tensor in checkpoint.weights.items()}
    with pytest.raises(UnfitRuntime, match=r"cosine -?0\.\d+"):
        serve(replace(checkpoint, weights=weights))


def test_rejects_non_finite_golden_vectors(checkpoint: Checkpoint) -> None:
    with pytest.raises(UnfitRuntime, match="cosine nan"):
        open_runtime(replace(checkpoint, golden_vector=np.full_like(checkpoint.golden_vector, np.nan)), "cpu", 1)


def test_checks_every_number_of_rows_that_has_a_path_of_its_own(checkpoint: Checkpoint) -> None:
    class WrongAlone:
        name, on_cpu, sizes = "fake", True, (1, 40)

        def run(self, contexts: Floats) -> Floats:
            right = np.resize(checkpoint.golden_vector, (len(contexts), 16))
            return right if len(contexts) != 40 else -right

    with pytest.raises(UnfitRuntime, match="cosine"):
        check_every_path(WrongAlone(), checkpoint)


def test_one_row_answers_as_the_first_of_many(checkpoint: Checkpoint, contexts: Contexts) -> None:
    runtime, many = OnnxRuntime(checkpoint, 1), contexts(9)
    singles = [runtime.run(context[None]) for context in many]
    assert np.allclose(np.concatenate(singles), runtime.run(many), atol=1e-6)


# What cannot be loaded


@pytest.mark.parametrize("graph", [b"", b"\xff" * 100, b"\x08\x0a", b"{}"])
def test_rejects_an_invalid_graph(checkpoint: Checkpoint, graph: bytes) -> None:
    with pytest.raises(BadCheckpoint, match="onnxruntime rejects the graph"):
        OnnxRuntime(replace(checkpoint, graph=graph), 1)


def without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    return replace(checkpoint, weights={n: t for n, t in checkpoint.weights.items() if n != name})


def test_both_runtimes_reject_a_missing_tensor(checkpoint: Checkpoint) -> None:
    missing = without(checkpoint, "output_proj.weight")
    with pytest.raises(BadCheckpoint, match=r"output_proj\.weight"):
        build_net(missing)
    with pytest.raises(BadCheckpoint, match="onnxruntime rejects the graph"):
        OnnxRuntime(missing, 1)


def test_both_runtimes_reject_a_tensor_of_another_shape(checkpoint: Checkpoint) -> None:
    weights = {**checkpoint.weights, "output_proj.bias": np.zeros(15, np.float32)}
    with pytest.raises(BadCheckpoint, match=r"output_proj\.bias"):
        build_net(replace(checkpoint, weights=weights))
    with pytest.raises(BadCheckpoint):
        open_runtime(replace(checkpoint, weights=weights), "cpu", 1)


def test_torch_rejects_a_superfluous_tensor(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadCheckpoint, match="surprise"):
        build_net(replace(checkpoint, weights={**checkpoint.weights, "surprise": np.zeros(1, np.float32)}))


@pytest.mark.parametrize(
    "change", [{"architecture": "mamba"}, {"config": {"surprise": 1}}, {"config": {"dim": 16, "hidden_dim": 8}}]
)
def test_torch_builds_only_what_the_card_describes(checkpoint: Checkpoint, change: dict[str, Any]) -> None:
    with pytest.raises(BadCheckpoint):
        build_net(replace(checkpoint, card=replace(checkpoint.card, **change)))


# Devices


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has an accelerator")
def test_auto_is_the_cpu_without_accelerator() -> None:
    assert find_device("auto") == best_device() == "cpu"


@pytest.mark.parametrize("device", ["cuda", "mps", "tpu"])
def test_rejects_a_missing_device_by_name(device: str) -> None:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if available.get(device):
        assert find_device(device) == device
    else:
        with pytest.raises(NoSuchDevice, match=device):
            find_device(device)


def test_arrays_survive_a_round_trip(checkpoint: Checkpoint) -> None:
    assert save(dict(checkpoint.weights)) == save(dict(load(save(dict(checkpoint.weights)))))
