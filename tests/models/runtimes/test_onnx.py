"""onnxruntime: a net is loaded beside one that answers."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from models.runtimes.onnx import NICE, _aside


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="a priority is a process's there")
def test_what_is_done_aside_gives_way_and_leaves_the_others_as_they_are() -> None:
    before = priority()
    assert _aside(priority) == max(NICE, before)
    assert priority() == before


def test_what_fails_aside_fails_for_who_asked() -> None:
    with pytest.raises(ZeroDivisionError):
        _aside(lambda: 1 / 0)
