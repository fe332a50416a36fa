"""A missing figure does not meet its target, and every run has its sums compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import plot, report
from bench.contract import measures, targets
from loadtest.samples import Samples
from tests.made_samples import make


def test_target_without_a_value_is_not_met() -> None:
    rows = targets.results({"promotions": {"failed": 1, "live": 100, "p99_by_steady": None}}, ["promotions"])
    met = {row["name"]: row["is_met"] for row in rows}
    assert met["F4 promotions that went live"] is True
    assert met["F4 failed requests"] is False
    assert met["F4 p99 during a swap / p99 between swaps"] is None
    assert [row["name"][:2] for row in rows] == sorted(row["name"][:2] for row in rows)


@pytest.mark.parametrize("run", [run for run in targets.BY_RUN if run != "life"])
def test_uncounted_request_breaks_the_target_of_its_run(run: str) -> None:
    (row,) = [row for row in targets.results({run: {"difference": 1}}, [run]) if row["name"].startswith("F8")]
    assert row["is_met"] is False


def test_report_has_every_target_and_picture(tmp_path: Path) -> None:
    load = Samples.joined([make(0, 10), make(3, 6, rate=500, outcome=503, retry_after=True)])
    run = {
        "before": measures.steady(load, (0, 3)),
        "during": measures.overload(load, (3, 6), 100, 10, 100),
        "recovery_s": 0.0,
        "probes": {"p99_ms": 3.0},
        "at_s": (3, 6),
        "timeline": measures.timeline(load, (0, 10)),
        "difference": 0,
    }
    probe = {"rate": 100.0, "goodput": 100.0, "p50_ms": 1.0, "p90_ms": None, "p99_ms": 9.0}
    soak = {"at_s": [0.0, 1.0], "rss_mb": [300.0, 301.0]}
    figures: dict[str, Any] = {"machine": {}, "plan": {"slo_ms": 100}, "2C": run, "soak": soak}
    figures["capacity"] = {"per_second": 100.0, "probes": [probe]}
    figures["targets"] = targets.results(figures, ["2C"])
    figures["plots"] = plot.draw_contract(tmp_path, figures)
    report.write(tmp_path, figures, report.figures_to_markdown)
    text = (tmp_path / "report.md").read_text()
    assert all(target.name in text for target in targets.BY_RUN["2C"])
    assert "**not met**" not in text
    assert json.loads((tmp_path / "report.json").read_text())["2C"]["difference"] == 0
    for name in ("rates", "2C", "soak"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
