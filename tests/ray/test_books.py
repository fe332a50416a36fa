"""The books of a node: what the dead counted stays in the sum, and their rows go to those who come after them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the ray extra; make ray-check")

from service.ray.books import Books
from service.telemetry.metrics import Metrics
from service.telemetry.shared_memory import SUFFIX, SharedMetricValues

pytestmark = pytest.mark.ray


def count_and_die(home: Path) -> int:
    """Count a request answered and one being answered for a process that has ended; return its id."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    metrics = Metrics((), SharedMetricValues(home, child.pid))
    metrics.requests.inc("/predict", "ok")
    metrics.in_flight.inc("/predict")
    return child.pid


def test_a_row_of_the_dead_is_taken_over_with_what_it_counted(tmp_path: Path) -> None:
    home = tmp_path / "node"
    home.mkdir()
    dead = {count_and_die(home) for _ in range(3)}
    books = Books((), home)
    metrics = Metrics((), books.row())
    metrics.requests.inc("/predict", "ok")
    books.close_dead()
    rows = {int(path.stem) for path in home.glob(f"*{SUFFIX}")}
    text = metrics.scrape()[0].decode().splitlines()
    assert len(rows) == len(dead)
    assert os.getpid() in rows < dead | {os.getpid()}
    assert 'lvm_requests_total{route="/predict",outcome="ok"} 4.0' in text
    assert 'lvm_requests_total{route="/predict",outcome="lost"} 3.0' in text
    assert 'lvm_in_flight_requests{route="/predict"} 0.0' in text
