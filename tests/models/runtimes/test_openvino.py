"""A reduced precision serves a net if it matches the golden vectors; otherwise it is rejected with the cosine."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from models.registry.checkpoint import BadCheckpoint, Checkpoint, load_checkpoint
from models.registry.registry import Registry
from models.runtimes import MIN_PARITY, NoSuchPrecision, Runtime, UnfitRuntime, check_parity, open_runtime
from models.vectors import Floats
from tests.conftest import SHIPPED

openvino = pytest.importorskip("models.runtimes.openvino", exc_type=ImportError)


@pytest.fixture(scope="module", params=["primary", "fallback"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    """A shipped net."""
    return load_checkpoint(Registry(SHIPPED).resolve(request.param).path)


@pytest.fixture(scope="module", params=["bf16", "int8"])
def runtime(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Runtime:
    if not openvino.supports_precision(request.param):
        with pytest.raises(NoSuchPrecision, match=f"this processor does not compute in {request.param}"):
            open_runtime(checkpoint, "cpu", 1, request.param)
        pytest.skip(f"no {request.param} here")
    made: Runtime = openvino.OpenVinoRuntime(checkpoint, request.param, 2)
    return made


def test_a_net_passes_parity_or_is_rejected_with_the_cosine(checkpoint: Checkpoint, runtime: Runtime) -> None:
    precision = runtime.name.removeprefix("openvino-")
    apart = np.sum((runtime.run(checkpoint.golden_context) - checkpoint.golden_vector) ** 2, axis=1)
    worst = float(1 - apart.max() / 2)
    assert 0.999 < worst < 0.9999999  # near, and truly computed in less
    if worst >= MIN_PARITY:
        assert open_runtime(checkpoint, "cpu", 2, precision).name == runtime.name
    else:
        with pytest.raises(UnfitRuntime, match=rf"{runtime.name}: cosine {worst:.6f} .* expected >= {MIN_PARITY}"):
            open_runtime(checkpoint, "cpu", 2, precision)


SIGNALLED = """
import gc, os, signal, sys
from pathlib import Path
from models.registry.checkpoint import load_checkpoint
from models.runtimes.openvino import OpenVinoRuntime, supports_precision

checkpoint = load_checkpoint(Path(sys.argv[1]))
supports_precision("bf16")
runtimes = [OpenVinoRuntime(checkpoint, precision, 1) for precision in ("float32", "int8")]
while runtimes:
    del runtimes[0]
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_is_handled_after_nets_were_unloaded() -> None:
    path = Registry(SHIPPED).resolve("primary").path
    done = subprocess.run([sys.executable, "-c", SIGNALLED, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_a_batch_of_n_is_n_singles_of_unit_length(checkpoint: Checkpoint, runtime: Runtime) -> None:
    contexts = checkpoint.golden_context
    together = runtime.run(contexts)
    assert together.dtype == np.float32
    assert np.allclose(together, np.concatenate([runtime.run(row[None]) for row in contexts]), atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_an_outlier_in_one_row_changes_no_other(checkpoint: Checkpoint, runtime: Runtime) -> None:
    contexts = checkpoint.golden_context.copy()
    before = runtime.run(contexts)
    contexts[3] *= 1e4
    assert np.allclose(np.delete(runtime.run(contexts), 3, 0), np.delete(before, 3, 0), atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 17, 33, 64])
def test_parts_of_a_batch_come_back_in_order(checkpoint: Checkpoint, runtime: Runtime, rows: int) -> None:
    contexts = checkpoint.golden_context[::-1][:rows]
    assert runtime.run(contexts).shape == (rows, checkpoint.card.dim)
    assert np.allclose(runtime.run(contexts), checkpoint.golden_vector[::-1][:rows], atol=0.02)


def test_rejects_contexts_of_another_shape(checkpoint: Checkpoint, runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="expected"):
        runtime.run(checkpoint.golden_context[:1, :, :1])


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (0, (1,)),
        (1, (1,)),
        (3, (4,)),
        (9, (8, 1)),
        (100, (32, 32, 32, 4)),
        (128, (128,)),
        (600, (128,) * 4 + (32,) * 2 + (24,)),
    ],
)
def test_a_batch_is_split_so_that_little_is_filled_up(rows: int, parts: tuple[int, ...]) -> None:
    assert sorted(openvino.split(rows, openvino.SIZES), reverse=True) == list(parts)


def test_answers_of_one_batch_outlive_the_next(checkpoint: Checkpoint, runtime: Runtime) -> None:
    first = runtime.run(checkpoint.golden_context[:4])
    kept = first.copy()
    runtime.run(checkpoint.golden_context[4:8])
    assert np.array_equal(first, kept)


def test_rejects_a_precision_that_is_too_coarse(checkpoint: Checkpoint, runtime: Runtime) -> None:
    turned = checkpoint.golden_vector[:, ::-1].copy()
    with pytest.raises(UnfitRuntime, match="to the golden vectors"):
        check_parity(runtime, replace(checkpoint, golden_vector=turned))


def test_it_reads_the_verified_weights(checkpoint: Checkpoint, runtime: Runtime) -> None:
    precision = runtime.name.removeprefix("openvino-")
    weights: dict[str, Floats] = {name: tensor[::-1].copy() for name, tensor in checkpoint.weights.items()}
    with pytest.raises(UnfitRuntime, match="cosine"):
        open_runtime(replace(checkpoint, weights=weights), "cpu", 1, precision)


@pytest.mark.parametrize("change", [lambda c: replace(c, graph=b"none"), lambda c: replace(c, weights={})])
def test_rejects_an_unreadable_graph(checkpoint: Checkpoint, change: Callable[[Checkpoint], Checkpoint]) -> None:
    with pytest.raises(BadCheckpoint, match="openvino rejects the graph"):
        openvino.OpenVinoRuntime(change(checkpoint), "bf16", 1)


def test_callers_compute_with_denormals_as_before(checkpoint: Checkpoint) -> None:
    tiny = np.full(4, 1e-20, np.float32)
    made = openvino.OpenVinoRuntime(checkpoint, "int8", 2)
    assert (tiny * tiny).any()
    made.run(checkpoint.golden_context)
    assert (tiny * tiny).any()
