"""Shared memory: a scrape of any process shows the sum of all, including processes that have exited."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from service.telemetry.instruments import Counter, Histogram
from service.telemetry.metrics import Metrics
from service.telemetry.shared_memory import (
    KEY_BYTES,
    MAX_VALUES,
    SHM,
    MetricValues,
    SharedMetricValues,
    metrics_directory,
    shared_block,
)
from tests.conftest import Mount
from tests.scraping import scrape


def test_allocates_zeros_without_overlap() -> None:
    memory = MetricValues()
    assert [memory.allocate((name,), 3) for name in "abc"] == [0, 3, 6]
    assert memory.values == [0.0] * 9


def test_a_process_continues_the_counts_of_the_last_one_in_its_slot(tmp_path: Path) -> None:
    first = SharedMetricValues(tmp_path, 0)
    first.values[first.allocate(("a", "x"), 2) + 1] = 7.5
    first.allocate(("b",), 1)
    second = SharedMetricValues(tmp_path, 0)
    assert second.values[second.allocate(("a", "x"), 2) + 1] == 7.5
    assert second.allocate(("c",), 1) == 3


def test_reads_the_counts_of_a_process_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from service.telemetry.shared_memory import SharedMetricValues\n"
        f"memory = SharedMetricValues(Path({str(tmp_path)!r}), 1); memory.values[memory.allocate(('a', 'x'), 1)] = 41\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert [(key, list(numbers)) for key, numbers in SharedMetricValues(tmp_path, 0).other_processes()] == [
        (("a", "x"), [41.0])
    ]


def test_counts_that_find_no_room_in_a_file_are_lost_and_break_nothing(tmp_path: Path) -> None:
    memory = SharedMetricValues(tmp_path, 0)
    counter = Counter("a", "Things.", ("kind",), memory=memory)
    histogram = Histogram("b", "Seconds.", ("kind",), edges=(1.0, 2.0), memory=memory)
    for number in range(3000):
        counter.inc(f"{number:0100}")
    histogram.labels("x" * 100).observe(1.5)
    assert [*histogram.lines({})][2:] == []
    shown = counter.totals({})
    assert 1000 < len(shown) < 3000
    assert {*shown.values()} == {1.0}


def test_keys_of_another_release_are_left_alone(tmp_path: Path) -> None:
    SharedMetricValues(tmp_path, 0).allocate(("lvm_of_tomorrow", "x"), 3)
    SharedMetricValues(tmp_path, 1).allocate(("lvm_of_yesterday", "x"), 1)
    for slot in range(2):
        other = SharedMetricValues(tmp_path, slot)
        other.values[other.allocate(("lvm_requests", "a label"), 1)] = 7
        other.values[other.allocate(("lvm_batch_rows", "primary"), 3)] = 7
    memory = SharedMetricValues(tmp_path, 0)
    metrics = Metrics(memory=memory)
    metrics.batch_rows.labels("primary").observe(1)
    text, _ = scrape(metrics)
    assert b"lvm_of_" not in text
    assert b"a label" not in text
    assert b'lvm_batch_rows_count{engine="primary"} 1\n' in text
    again, _ = scrape(Metrics(memory=SharedMetricValues(tmp_path, 0)))
    assert b'lvm_batch_rows_count{engine="primary"} 1\n' in again


def test_the_directory_is_in_memory_and_is_removed_at_the_end() -> None:
    with metrics_directory(2) as home:
        assert home.parent == (SHM if SHM.is_dir() else Path(tempfile.gettempdir()))
        assert sorted(path.name for path in home.iterdir()) == ["0.cells", "1.cells"]
        blocks = [path.stat().st_blocks * 512 for path in home.iterdir()]
        assert min(blocks) >= KEY_BYTES + 8 * MAX_VALUES  # else a write may kill the process
    assert not home.exists()


def test_the_directory_is_in_the_next_parent_if_the_first_has_no_room(mount: Mount, tmp_path: Path) -> None:
    small = mount("size=64k")
    with metrics_directory(2, [small, tmp_path]) as home:
        assert home.parent == tmp_path
        assert not list(small.iterdir())
    with pytest.raises(OSError, match="No space left"), metrics_directory(2, [small]):
        pass
    assert not list(small.iterdir())


def test_removes_directories_of_killed_supervisors_only(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from service.telemetry.shared_memory import metrics_directory\n"
        f"with metrics_directory(1, [Path({str(tmp_path)!r})]) as home:\n"
        "    print(home, flush=True); os.kill(os.getpid(), 9)"
    )
    dead = Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout[:-1])
    other = tmp_path / "unrelated"
    other.mkdir()
    assert dead.parent == tmp_path
    assert dead.exists()
    with metrics_directory(1, [tmp_path]) as first:
        assert not dead.exists()
        with metrics_directory(1, [tmp_path]):
            assert first.exists()
    assert [*tmp_path.iterdir()] == [other]


def test_process_counters_are_a_sum_that_no_exit_lowers(tmp_path: Path) -> None:
    """Every worker shows the same sum. A successor continues the counters of the worker that has exited."""

    def used(metrics: Metrics) -> dict[str, float]:
        lines = scrape(metrics)[0].decode().splitlines()
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


def test_a_scrape_of_any_worker_shows_the_sum_of_all(tmp_path: Path) -> None:
    workers = [Metrics((5, 10), SharedMetricValues(tmp_path, slot)) for slot in range(3)]
    for count, metrics in enumerate(workers, 1):
        for _ in range(count):
            metrics.requests.inc("/predict", "ok")
            metrics.seconds.labels("/predict", "total").observe(0.5)
        metrics.breaker.set(count / 4, "primary")
        metrics.ready.set(float(count > 1))
        metrics.input_drift.set(count - 4.0, "primary", "alignment")
    workers[2].requests.inc("/predict", "odd")
    for metrics in workers:
        text = scrape(metrics)[0].decode().splitlines()
        assert 'lvm_requests_total{route="/predict",outcome="ok"} 6.0' in text
        assert 'lvm_requests_total{route="/predict",outcome="odd"} 1.0' in text
        assert 'lvm_request_seconds_count{route="/predict",stage="total"} 6' in text
        assert 'lvm_request_seconds_sum{route="/predict",stage="total"} 3.0' in text
        assert 'lvm_breaker_open{engine="primary"} 0.75' in text
        assert "lvm_ready 0.0" in text
        assert 'lvm_input_drift{engine="primary",figure="alignment"} -3.0' in text


def test_finalize_counts_unanswered_requests_as_lost_and_resets_gauges(tmp_path: Path) -> None:
    dead = Metrics((), SharedMetricValues(tmp_path, 0))
    for _ in range(3):
        dead.in_flight.inc("/predict")
    dead.requests.inc("/predict", "ok")
    dead.queue_rows.set(12, "primary")
    dead.ready.set(0.0)
    Metrics((), SharedMetricValues(tmp_path, 0)).finalize()
    living = Metrics((), SharedMetricValues(tmp_path, 1))
    living.ready.set(1.0)
    text = scrape(living)[0].decode().splitlines()
    assert "lvm_ready 1.0" in text
    assert 'lvm_requests_total{route="/predict",outcome="lost"} 3.0' in text
    assert 'lvm_requests_total{route="/predict",outcome="ok"} 1.0' in text
    assert 'lvm_in_flight_requests{route="/predict"} 0.0' in text
    assert 'lvm_queue_rows{engine="primary"} 0.0' in text


@pytest.mark.skipif(not SHM.is_dir(), reason="no memory file system")
def test_a_block_is_shared_by_path_and_never_on_a_disk(tmp_path: Path) -> None:
    assert shared_block(tmp_path / "pairs", 100) is None
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        ours, theirs = (shared_block(Path(directory) / "pairs", 100) for _ in range(2))
        assert ours is not None
        assert theirs is not None
        ours[7:8] = b"x"
        assert theirs[:9] == b"\0" * 7 + b"x\0"


@pytest.mark.skipif(not SHM.is_dir(), reason="no memory file system")
def test_a_block_that_has_no_room_is_not_shared() -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        assert shared_block(Path(directory) / "pairs", 1 << 50) is None


def test_every_process_shows_the_same_sum_however_it_is_rounded(tmp_path: Path) -> None:
    parts = (0.1, 0.2, 0.3, 0.7, 1e-9)
    processes = [Metrics(memory=SharedMetricValues(tmp_path, slot)) for slot in range(len(parts))]
    for metrics, part in zip(processes, parts, strict=True):
        metrics.limit_rows.set(part)
        metrics.seconds.labels("/predict", "total").observe(part)
    shown = [
        [line for line in scrape(metrics)[0].decode().splitlines() if line.startswith(("lvm_limit", "lvm_request_s"))]
        for metrics in processes
    ]
    assert all(lines == shown[0] for lines in shown)
