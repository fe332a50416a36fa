"""Cells: what several processes count is one sum, whoever is asked and whoever has died."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from service.telemetry.metrics import Metrics
from service.telemetry.shared_memory import (
    CELLS,
    KEYS,
    SHM,
    MetricValues,
    SharedMetricValues,
    metrics_directory,
)
from tests.conftest import Mount


def test_a_row_hands_out_zeros_without_overlap() -> None:
    cells = MetricValues()
    assert [cells.take((name,), 3) for name in "abc"] == [0, 3, 6]
    assert cells.values == [0.0] * 9


def test_a_row_goes_on_where_its_last_holder_stopped(tmp_path: Path) -> None:
    first = SharedMetricValues(tmp_path, 0)
    first.values[first.take(("a", "x"), 2) + 1] = 7.5
    first.take(("b",), 1)
    second = SharedMetricValues(tmp_path, 0)
    assert second.values[second.take(("a", "x"), 2) + 1] == 7.5
    assert second.take(("c",), 1) == 3


def test_a_reader_sees_what_another_process_counts(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from service.telemetry.shared_memory import SharedMetricValues\n"
        f"cells = SharedMetricValues(Path({str(tmp_path)!r}), 1); cells.values[cells.take(('a', 'x'), 1)] = 41\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert [(key, list(numbers)) for key, numbers in SharedMetricValues(tmp_path, 0).elsewhere()] == [
        (("a", "x"), [41.0])
    ]


def test_a_row_that_is_full_says_so(tmp_path: Path) -> None:
    cells = SharedMetricValues(tmp_path, 0)
    cells.take(("a",), CELLS)
    with pytest.raises(OverflowError, match="no room"):
        cells.take(("b",), 1)


def test_the_rows_are_in_memory_and_gone_afterwards() -> None:
    with metrics_directory(2) as home:
        assert home.parent == (SHM if SHM.is_dir() else Path(tempfile.gettempdir()))
        assert sorted(path.name for path in home.iterdir()) == ["0.cells", "1.cells"]
        blocks = [path.stat().st_blocks * 512 for path in home.iterdir()]
        assert min(blocks) >= KEYS + 8 * CELLS  # a process that writes to a file of holes may be killed for it
    assert not home.exists()


def test_the_rows_are_elsewhere_if_memory_has_no_room_for_them(mount: Mount, tmp_path: Path) -> None:
    small = mount("size=64k")
    with metrics_directory(2, [small, tmp_path]) as home:
        assert home.parent == tmp_path
        assert not list(small.iterdir())
    with pytest.raises(OSError, match="No space left"), metrics_directory(2, [small]):
        pass
    assert not list(small.iterdir())


def test_what_a_killed_supervisor_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from service.telemetry.shared_memory import metrics_directory\n"
        f"with metrics_directory(1, [Path({str(tmp_path)!r})]) as home:\n"
        "    print(home, flush=True); os.kill(os.getpid(), 9)"
    )
    dead = Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout[:-1])
    other = tmp_path / "somebody-else"
    other.mkdir()
    assert dead.parent == tmp_path
    assert dead.exists()
    with metrics_directory(1, [tmp_path]) as first:
        assert not dead.exists()
        with metrics_directory(1, [tmp_path]):
            assert first.exists()
    assert [*tmp_path.iterdir()] == [other]


def test_what_processes_use_is_a_sum_that_no_death_lowers(tmp_path: Path) -> None:
    """Each of several shows the same, whoever is asked; a successor counts on from what the dead one used."""

    def used(metrics: Metrics) -> dict[str, float]:
        lines = metrics.scrape()[0].decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("process_")}

    alone = used(Metrics())
    first, second = Metrics((), SharedMetricValues(tmp_path, 0)), Metrics((), SharedMetricValues(tmp_path, 1))
    one = used(first)
    both = used(second)
    assert both["process_open_fds"] == pytest.approx(2 * one["process_open_fds"], abs=4)
    assert both["process_cpu_seconds_total"] >= 2 * one["process_cpu_seconds_total"] > 0
    assert both["process_start_time_seconds"] == alone["process_start_time_seconds"]
    Metrics((), SharedMetricValues(tmp_path, 0)).finalize()
    left = used(second)
    assert left["process_open_fds"] == pytest.approx(one["process_open_fds"], abs=4)
    assert left["process_cpu_seconds_total"] >= both["process_cpu_seconds_total"]
    assert left["process_start_time_seconds"] == alone["process_start_time_seconds"]
    successor = used(Metrics((), SharedMetricValues(tmp_path, 0)))
    added = successor["process_cpu_seconds_total"] - left["process_cpu_seconds_total"]
    assert added >= one["process_cpu_seconds_total"] * 0.99


def test_a_scrape_adds_what_the_other_workers_counted(tmp_path: Path) -> None:
    workers = [Metrics((5, 10), SharedMetricValues(tmp_path, slot)) for slot in range(3)]
    for count, metrics in enumerate(workers, 1):
        for _ in range(count):
            metrics.requests.inc("/predict", "ok")
            metrics.seconds.labels("/predict", "total").observe(0.5)
        metrics.breaker.set(count / 4, "primary")
        metrics.ready.set(float(count > 1))
    workers[2].requests.inc("/predict", "odd")
    for metrics in workers:
        text = metrics.scrape()[0].decode().splitlines()
        assert 'lvm_requests_total{route="/predict",outcome="ok"} 6.0' in text
        assert 'lvm_requests_total{route="/predict",outcome="odd"} 1.0' in text
        assert 'lvm_request_seconds_count{route="/predict",stage="total"} 6' in text
        assert 'lvm_request_seconds_sum{route="/predict",stage="total"} 3.0' in text
        assert 'lvm_breaker_open{engine="primary"} 0.75' in text
        assert "lvm_ready 0.0" in text


def test_what_a_dead_worker_was_answering_is_lost_and_its_levels_are_nothing(tmp_path: Path) -> None:
    dead = Metrics((), SharedMetricValues(tmp_path, 0))
    for _ in range(3):
        dead.in_flight.inc("/predict")
    dead.requests.inc("/predict", "ok")
    dead.queue_rows.set(12, "primary")
    dead.ready.set(0.0)
    Metrics((), SharedMetricValues(tmp_path, 0)).finalize()
    living = Metrics((), SharedMetricValues(tmp_path, 1))
    living.ready.set(1.0)
    text = living.scrape()[0].decode().splitlines()
    assert "lvm_ready 1.0" in text
    assert 'lvm_requests_total{route="/predict",outcome="lost"} 3.0' in text
    assert 'lvm_requests_total{route="/predict",outcome="ok"} 1.0' in text
    assert 'lvm_in_flight_requests{route="/predict"} 0.0' in text
    assert 'lvm_queue_rows{engine="primary"} 0.0' in text
