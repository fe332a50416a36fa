"""Metrics of a node: what ended processes counted stays in the sum, and new processes take their files over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scraping import scrape

pytest.importorskip("ray", reason="the ray extra; make ray-check")

from service.ray.node_metrics import NodeMetrics
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


def test_takes_over_the_file_of_an_ended_process_with_its_counts(tmp_path: Path) -> None:
    home = tmp_path / "node"
    home.mkdir()
    dead = {count_and_die(home) for _ in range(3)}
    node = NodeMetrics((), home)
    metrics = Metrics((), node.values())
    metrics.requests.inc("/predict", "ok")
    node.finalize_dead()
    rows = {int(path.stem) for path in home.glob(f"*{SUFFIX}")}
    text = scrape(metrics)[0].decode().splitlines()
    assert len(rows) == len(dead)
    assert os.getpid() in rows < dead | {os.getpid()}
    assert 'lvm_requests_total{route="/predict",outcome="ok"} 4.0' in text
    assert 'lvm_requests_total{route="/predict",outcome="lost"} 3.0' in text
    assert 'lvm_in_flight_requests{route="/predict"} 0.0' in text
