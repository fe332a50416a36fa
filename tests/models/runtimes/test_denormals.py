"""Nets flush denormals to zero; the thread that calls them computes as before."""

from threading import Thread

import numpy as np
import onnx
import pytest
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from models.registry.checkpoint import Checkpoint
from models.runtimes.denormals import FlushedDenormals
from models.runtimes.onnx import OnnxRuntime
from models.vectors import Floats

TINY = np.full((2, 1, 4), 1e-20, np.float32)


def square(values: Floats) -> Floats:
    return values * values


@pytest.fixture(scope="module")
def squares() -> OnnxRuntime:
    """A runtime whose answer is the square of its context."""
    shapes = [make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", 1, 4]) for name in ("context", "vector")]
    graph = make_graph([make_node("Mul", ["context", "context"], ["vector"])], "square", shapes[:1], shapes[1:])
    model = make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=8)
    return OnnxRuntime(Checkpoint("square", "", None, {}, model.SerializeToString(), TINY, TINY), 2)  # type: ignore[arg-type]


def test_denormals_are_zero_in_the_context_only() -> None:
    assert square(TINY).any()
    with FlushedDenormals():
        assert not square(TINY).any()
    assert square(TINY).any()


def test_contexts_nest() -> None:
    with FlushedDenormals():
        with FlushedDenormals():
            assert not square(TINY).any()
        assert not square(TINY).any()
    assert square(TINY).any()


def test_the_mode_is_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), FlushedDenormals():
        _ = 1 / 0
    assert square(TINY).any()


def test_a_net_flushes_denormals_in_every_thread_that_runs_it(squares: OnnxRuntime) -> None:
    many = np.repeat(TINY, 32, axis=0)  # enough rows for a helper thread
    answers = [squares.run(TINY)]
    thread = Thread(target=lambda: answers.append(squares.run(many)))
    thread.start()
    thread.join()
    assert len(answers) == 2
    assert not any(answer.any() for answer in answers)
    assert square(TINY).any()
