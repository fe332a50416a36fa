"""Threads that load versions have a lower priority."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.onnx import MIN_ROWS_PER_THREAD, OnnxRuntime
from models.runtimes.priority import NICE, lower_priority

SHIPPED = Path(__file__).parents[3] / "artifacts" / "lvm"


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="a priority is a process's there")
def test_lowers_the_priority_of_one_thread_only() -> None:
    before = priority()
    with ThreadPoolExecutor(1, initializer=lower_priority) as aside:
        assert aside.submit(priority).result() == max(NICE, before)
    assert priority() == before


def test_a_thread_of_low_priority_starts_no_helpers() -> None:
    known = load_checkpoint(Registry(SHIPPED).resolve("primary").path)
    contexts = known.golden_context[:1].repeat(2 * MIN_ROWS_PER_THREAD, axis=0)

    def load_and_run() -> OnnxRuntime:
        runtime = OnnxRuntime(known, threads=2)
        runtime.run(contexts)
        return runtime

    before = helpers()
    with ThreadPoolExecutor(1, initializer=lower_priority) as aside:
        runtime = aside.submit(load_and_run).result()
    assert helpers() <= before
    runtime.run(contexts)
    assert not helpers() <= before


def helpers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("onnxruntime")}
