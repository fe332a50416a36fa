"""Nets are timed as they are served, and an answer that differs from torch's stops the table."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench import nets
from bench.load import WrongAnswers
from bench.machine import rss_mb
from bench.nets import RunMode, time_batch, time_queries
from bench.untrained import draw_contexts
from models.nets import architecture_of, config_dict
from models.registry.card import Card
from models.registry.checkpoint import Checkpoint
from models.runtimes import UnfitRuntime
from models.runtimes.torch import TorchRuntime, run_net, state_arrays


class Counting:
    """A runtime that answers zeros and counts."""

    name = "counting"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, contexts: Any) -> Any:
        self.sizes.append(len(contexts))
        return np.zeros((len(contexts), contexts.shape[2]), np.float32)


def test_times_single_queries_without_the_warm_up() -> None:
    runtime = Counting()
    figures = time_queries(runtime, draw_contexts(3, 8), 10)
    assert runtime.sizes == [1] * (10 + nets.WARM_UP)
    assert figures.keys() == {"mean_ms", "p50_ms", "p95_ms", "p99_ms"}


def test_times_a_whole_batch_per_context() -> None:
    runtime = Counting()
    assert time_batch(runtime, draw_contexts(8, 8)) > 0
    assert set(runtime.sizes) == {8}


def test_cpu_always_has_a_run_mode() -> None:
    labels = [mode.label for mode in nets.run_modes()]
    assert labels[0] == "onnxruntime cpu x1"
    assert len(labels) == len(set(labels))
    assert rss_mb(os.getpid()) > 10


def test_leaves_out_a_precision_too_low_for_a_net_but_never_float32() -> None:
    class Refused(RunMode):
        def open(self, checkpoint: Checkpoint) -> Any:
            raise UnfitRuntime("cosine 0.9")

    loaded: Any = {"amn": None}
    assert nets.open_all(loaded, [Refused("openvino", "cpu", 1, "int8")]) == {}
    with pytest.raises(UnfitRuntime):
        nets.open_all(loaded, [Refused("onnxruntime", "cpu", 1)])


def test_rejects_a_runtime_that_answers_otherwise(tiny_net: Any) -> None:
    golden = draw_contexts(4, 16)
    card = Card(
        name="amn", kind="net", dim=16, encoder="none", license="other", attribution="", command="",
        architecture=architecture_of(tiny_net), config=config_dict(tiny_net), context_length=5,
    )  # fmt: skip
    weights = state_arrays(tiny_net.state_dict())
    known = Checkpoint("v", "", card, weights, b"", golden, run_net(tiny_net, golden))
    other = replace(known, weights={name: array * np.float32(1.5) for name, array in weights.items()})
    assert nets.checked_difference(RunMode("torch", "cpu").open(known), known, draw_contexts(16, 16)) < 1e-5
    with pytest.raises(WrongAnswers, match="from torch's answer"):
        nets.checked_difference(TorchRuntime(other, "cpu"), known, draw_contexts(16, 16))
