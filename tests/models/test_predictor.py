"""A version loads without torch and answers any batch like the net that was trained."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.predictor import Predictor, load_predictor
from models.registry.checkpoint import WEIGHTS_FILE, BadCheckpoint, load_checkpoint
from models.registry.registry import Version
from models.vectors import Floats
from tests.conftest import PATIENCE_S

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = """
import sys
from pathlib import Path
import numpy as np
from models.predictor import load_predictor
from models.retrieval import retriever
from models.runtimes import find_device

assert find_device("auto") == "cpu"
net = load_predictor(Path(sys.argv[1]))
answer = net.predict_batch(np.load(sys.argv[2]))
np.save(sys.argv[3], answer)
heavy = {name for name in sys.modules if name.split(".")[0] in ("torch", "onnx", "openvino", "fastapi", "hypothesis")}
assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def predictor(gru_version: Version) -> Predictor:
    return load_predictor(gru_version.path, device="cpu")


def test_describes_its_version(predictor: Predictor, gru_version: Version) -> None:
    checkpoint = load_checkpoint(gru_version.path)
    assert (predictor.name, predictor.version, predictor.runtime) == ("gru", gru_version.version, "onnxruntime")
    assert predictor.sha256 == checkpoint.sha256
    assert predictor.card == checkpoint.card


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 32, 128, 257])
def test_a_batch_of_any_size_is_answered_as_the_net_does(
    predictor: Predictor, gru_net: nn.Module, contexts: Callable[..., Floats], batch: int
) -> None:
    context = contexts(batch, seed=batch)
    answer = predictor.predict_batch(context)
    with torch.inference_mode():
        expected = gru_net(torch.from_numpy(context)).numpy()
    assert (answer.shape, answer.dtype) == ((batch, 16), np.float32)
    assert np.allclose(answer, expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(answer, axis=1), 1, atol=1e-5)


def test_a_batch_of_n_is_n_singles(predictor: Predictor, contexts: Callable[..., Floats]) -> None:
    context = contexts(40)
    alone = np.concatenate([predictor.predict_batch(row[None]) for row in context])
    assert np.allclose(predictor.predict_batch(context), alone, atol=1e-5)


def test_a_bad_row_affects_no_other(predictor: Predictor, contexts: Callable[..., Floats]) -> None:
    context = contexts(8)
    healthy = predictor.predict_batch(context)
    context[3, 2, 5] = np.nan
    answer = predictor.predict_batch(context)
    assert np.allclose(np.delete(answer, 3, 0), np.delete(healthy, 3, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (2, [1, 2]), (32, [1, 2, 4, 8, 16, 32]), (33, [1, 2, 4, 8, 16, 32, 33])]
)
def test_warming_up_runs_every_power_of_two_and_the_largest_batch(
    gru_version: Version, largest: int, sizes: list[int]
) -> None:
    class Recorder:
        name, on_cpu = "recorder", False

        def __init__(self) -> None:
            self.shapes: list[tuple[int, ...]] = []

        def run(self, contexts: Floats) -> Floats:
            self.shapes.append(contexts.shape)
            return contexts[:, -1]

    checkpoint = load_checkpoint(gru_version.path)
    recorder = Recorder()
    Predictor("v", "0", checkpoint.card, recorder, checkpoint.golden_context).warm_up(largest)
    assert recorder.shapes == [(size, 5, 16) for size in sizes]


def test_no_part_of_serving_imports_torch(
    gru_version: Version, predictor: Predictor, contexts: Callable[..., Floats], tmp_path: Path
) -> None:
    np.save(tmp_path / "context.npy", contexts(3))
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, gru_version.path, tmp_path / "context.npy", tmp_path / "answer.npy"],
        cwd=ROOT,
        check=True,
        timeout=PATIENCE_S,
    )
    assert np.array_equal(np.load(tmp_path / "answer.npy"), predictor.predict_batch(contexts(3)))


def test_rejects_a_damaged_version(gru_version: Version, copy_of: Callable[[Version], Path]) -> None:
    directory = copy_of(gru_version)
    (directory / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(BadCheckpoint, match=r"weights\.safetensors was altered"):
        load_predictor(directory)


def test_rejects_a_corpus_as_a_predictor(corpus_version: Version) -> None:
    with pytest.raises(BadCheckpoint, match="is not a net"):
        load_predictor(corpus_version.path)
