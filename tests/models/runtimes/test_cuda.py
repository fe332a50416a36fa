"""Graphs are captured once per power of two; a batch runs in the smallest that holds it and gets its own rows."""

import numpy as np
import pytest
import torch

from models.predictor import Predictor
from models.runtimes.cuda import MAX_GRAPH_ROWS, GraphRuntime
from models.vectors import Floats


class Capture:
    """A fake GPU: a step that answers from a fixed buffer of `size` rows and records its captures."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.ran: list[tuple[int, int]] = []

    def __call__(self, size: int) -> "Step":
        self.captured.append(size)
        return Step(self, size)


class Step:
    def __init__(self, capture: Capture, size: int) -> None:
        self.capture, self.given = capture, np.full((size, 5, 16), np.nan, np.float32)

    def __call__(self, contexts: Floats) -> Floats:
        self.capture.ran.append((len(self.given), len(contexts)))
        self.given[: len(contexts)] = contexts
        return self.given[: len(contexts), -1].copy()


@pytest.fixture
def capture() -> Capture:
    return Capture()


def rows(count: int) -> Floats:
    return np.random.default_rng(count).standard_normal((count, 5, 16)).astype(np.float32)


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (100, 128), (MAX_GRAPH_ROWS, MAX_GRAPH_ROWS)]
)
def test_a_batch_is_padded_to_the_next_power_of_two_and_cut_again(capture: Capture, count: int, size: int) -> None:
    contexts = rows(count)
    assert np.array_equal(GraphRuntime("fake", capture).run(contexts), contexts[:, -1])
    assert capture.ran == [(size, count)]


def test_more_rows_than_the_largest_graph_run_in_several(capture: Capture) -> None:
    contexts = rows(2 * MAX_GRAPH_ROWS + 3)
    assert np.array_equal(GraphRuntime("fake", capture).run(contexts), contexts[:, -1])
    assert capture.ran == [(MAX_GRAPH_ROWS, MAX_GRAPH_ROWS), (MAX_GRAPH_ROWS, MAX_GRAPH_ROWS), (4, 3)]


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (8, [1, 2, 4, 8]), (100, [1, 2, 4, 8, 16, 32, 64, 128])])
def test_warm_up_captures_every_size(capture: Capture, largest: int, sizes: list[int]) -> None:
    runtime = GraphRuntime("fake", capture)
    Predictor("v", "0", None, runtime, rows(1)).warm_up(largest)  # type: ignore[arg-type]  # no card is read
    for count in range(1, largest + 1):
        runtime.run(rows(count))
    assert capture.captured == sizes


def test_answers_of_one_batch_outlive_the_next(capture: Capture) -> None:
    runtime = GraphRuntime("fake", capture)
    first = runtime.run(rows(3))
    kept = first.copy()
    runtime.run(-rows(4))
    assert np.array_equal(first, kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_captured_graphs_answer_as_the_net_does(precision: str) -> None:
    from models.registry.checkpoint import load_checkpoint
    from models.registry.registry import Registry
    from models.runtimes import open_runtime
    from models.runtimes.torch import build_net, run_net
    from tests.conftest import SHIPPED

    for alias in ("primary", "fallback"):
        checkpoint = load_checkpoint(Registry(SHIPPED).resolve(alias).path)
        runtime = open_runtime(checkpoint, "cuda", 1, precision)
        contexts = checkpoint.golden_context
        right = run_net(build_net(checkpoint), contexts)
        for count in (1, 3, 16, 2):
            assert np.allclose(
                runtime.run(contexts[:count]), right[:count], atol=1e-5 if precision == "float32" else 1e-2
            )
