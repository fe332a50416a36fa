"""A record is read back whole, joined with others, and cut by time."""

from pathlib import Path

import numpy as np
import pytest

from loadtest.record import Failure, Record
from loadtest.samples import Samples
from tests.made_samples import make


def _record(directory: Path, count: int) -> Path:
    record = Record(1000.0, (n / 10 for n in range(count)))
    for n, due in enumerate(record.intended):
        record.sent[n], record.done[n], record.outcome[n] = due + 0.001, due + 0.02, 200
        record.version[n] = record.versions.code(b"one" if n % 2 else b"two")
    record.outcome[0], record.retry_after[0], record.version[0] = 503, 1, -1
    record.outcome[1], record.sent[2], record.outcome[2] = Failure.LOST_FRESH, 0.0, Failure.REFUSED
    record.invalid[3] = 1
    path = directory / "run.npz"
    record.save(path)
    return path


def test_reads_a_record_as_it_was_written(tmp_path: Path) -> None:
    known = Samples.read(_record(tmp_path / "new", 10))
    assert known.statuses == {str(int(Failure.LOST_FRESH)): 1, "-1": 1, "200": 7, "503": 1}
    assert known.good.tolist() == [False] * 4 + [True] * 6
    assert known.retry_after.tolist() == [True] + [False] * 9
    assert known.version.tolist() == ["", "one", "two", "one", "two", "one", "two", "one", "two", "one"]
    assert known.invalid.tolist() == [False] * 3 + [True] + [False] * 6
    assert known.success() == 0.6
    assert known.p_ms(99) == pytest.approx(20)


def test_joins_clients_in_the_order_of_time() -> None:
    both = Samples.joined([make(1, 2, version="b"), make(0, 3)])
    assert len(both) == 400
    assert (np.diff(both.intended) >= 0).all()
    assert (both.version == "b").sum() == 100
    assert [len(slot) for slot in both.slots(0, 3)] == [100, 200, 100]


def test_offered_rate_counts_requests_written_in_time() -> None:
    late = np.r_[np.zeros(60), np.full(40, 5.0)]
    load = make(0, 1, sent=np.arange(100) / 100 + 0.001 + late)
    assert load.offered(0, 1) == (100, 60)


def test_goodput_counts_answers_by_their_end() -> None:
    assert make(0, 2, latency_ms=1000.0).goodput(0, 2) == 50
    assert make(0, 2, outcome=503).goodput(0, 2) == 0
