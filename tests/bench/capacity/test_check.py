"""Processor time is read by thread, and a wrong prediction is marked."""

import os
import threading
from time import thread_time

import pytest

from bench.capacity import table
from bench.capacity.costs import Curve
from bench.capacity.measure import LoadCost
from bench.machine import core_s, processor_s

ROW = {"net": "gru", "rows": 8, "p99_ms": 100.0, "predictions": [150.0, 152.0], "measured": 148.0, "ratio": 1.02}


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="Linux counts by thread")
def test_separates_the_first_thread_from_the_others() -> None:
    def work() -> None:
        began = thread_time()
        while thread_time() - began < 0.05:
            pass

    before, at_work, done = processor_s(os.getpid()), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (work(), at_work.set(), done.wait()))
    thread.start()
    at_work.wait()
    after = processor_s(os.getpid())
    done.set()
    thread.join()
    assert after[1] - before[1] > 0.04
    assert after[0] - before[0] < 0.04
    worked, passed = core_s(0)
    assert 0 < worked <= passed


def test_batch_on_the_event_loop_is_not_charged_to_the_request() -> None:
    batch, spent = Curve((1, 100), (0.01, 1.0)), LoadCost(requests=100, batches=4, rows=200, loop_s=3.0, aside_s=8.0)
    assert spent.batch_s == (50, 2.0)
    assert spent.batches_s(batch) == pytest.approx(4 * 0.5)
    assert spent.request_s(batch, is_inline=True) == pytest.approx((3.0 - 2.0) / 100)
    assert spent.request_s(batch, is_inline=False) == pytest.approx(3.0 / 100)


def test_marks_a_prediction_beyond_its_tolerance() -> None:
    right = {**ROW, "is_met": True, "free": 0.99, "ratio_free": 1.01}
    wrong = {**right, "ratio": 1.3, "is_met": False}
    head, good, bad = table.of_checks([right, wrong]).splitlines()
    assert head.startswith("net")
    assert "beyond" in bad
    assert "beyond" not in good
