"""A report has only measured figures: ratios to the stronger baseline, and targets met, not met or not measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare, metrics, plot, report, targets
from bench.metrics import stages
from bench.servers import ECHO, NAIVE, SERVICE, TUNED

SPEEDS = {SERVICE: 600.0, NAIVE: 100.0, TUNED: 120.0, ECHO: 6000.0}
STAGES = {"decode": 0.1, "queue": 0.1, "infer": 0.3, "encode": 0.1, "total": 0.8}


def measurement(number: int, server: str, wire: str, connections: int) -> dict[str, Any]:
    ms = 1e3 / SPEEDS[server]
    times = {"mean_ms": ms, "p50_ms": ms, "p95_ms": 2 * ms, "p99_ms": 3 * ms}
    named = {"round": number, "server": server, "wire": wire, "rows": 1, "connections": connections}
    spent = {**STAGES, "rest": 0.2, "outside": 0.2, "client": 1.0, "cpu": 0.5, "batch_rows": 1.0}
    more = {"apart": 1e-7, "stages": spent if server == SERVICE else {}}
    return {**named, "per_second": SPEEDS[server] * (1 + number), **times, **more}


@pytest.fixture
def figures() -> dict[str, Any]:
    """A run of two rounds, nothing measured but the closed loop."""
    everything = [
        measurement(number, server, wire, connections)
        for number in range(2)
        for wire in ("json", "octet")
        for connections in (1, 32)
        for server in SPEEDS
    ]
    cells = dict.fromkeys((one["wire"], one["rows"], one["connections"]) for one in everything)
    closed = {
        "generator": "a test",
        "apart": 1e-7,
        "cells": [compare.compare(cell, everything) for cell in cells],
        "stages": metrics.stage_table(everything),
    }
    made: dict[str, Any] = {"machine": {"cores": "2"}, "plan": {"rounds": 2}, "failures": {}, "closed": closed}
    return {**made, "targets": [target.judge(made) for target in targets.TARGETS]}


def test_compares_with_the_better_naive_app(figures: dict[str, Any]) -> None:
    cell = figures["closed"]["cells"][0]
    assert cell["strongest"]["naive"] == {"per_second": TUNED, "p50_ms": TUNED, "p99_ms": TUNED}
    assert cell["ratios"]["naive"]["per_second"] == {"median": 5.0, "min": 5.0, "max": 5.0}
    assert cell["ratios"]["echo"]["per_second"]["median"] == pytest.approx(0.1)


def test_target_is_met_not_met_or_not_measured(figures: dict[str, Any]) -> None:
    judged = {row["name"]: row["is_met"] for row in figures["targets"]}
    assert judged["json, 32 connections: throughput / naive"] is False
    assert judged["json, 1 connection: p50 / naive"] is True
    assert judged["largest difference to torch's float32 answers"] is True
    assert judged["resident memory at idle"] is None
    assert judged["json, 32 connection(s): throughput / mosec"] is None


def test_report_has_well_formed_tables_of_the_measured_sections_only(figures: dict[str, Any]) -> None:
    text = report.to_markdown(figures)
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block
    assert "| json | 1 | service | 900 (600-1,200) |" in text
    assert "**not met**" in text
    assert "## Start" not in text


def test_report_names_a_failed_section(figures: dict[str, Any]) -> None:
    assert "**rows failed, its figures are left out:** 3 wrong" in report.to_markdown(
        {**figures, "failures": {"rows": "3 wrong"}}
    )


def test_writes_report_and_pictures(figures: dict[str, Any], tmp_path: Path) -> None:
    figures["plots"] = plot.draw_bench(tmp_path, figures)
    report.write(tmp_path, figures, report.to_markdown)
    assert json.loads((tmp_path / "report.json").read_text())["closed"]["cells"]
    text = (tmp_path / "report.md").read_text()
    for name in figures["plots"]:
        assert f"({name}.png)" in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_stages_are_per_request_with_their_remainders() -> None:
    grown = {"decode": 1.0, "queue": 1.0, "infer": 2.0, "encode": 1.0, "total": 8.0}
    after = {**grown, "requests": 1000.0, "cpu": 4.0, "rows": 1000.0, "batches": 100.0}
    spent = stages(after, mean_ms=10.0)
    assert spent["infer"] == pytest.approx(2.0)
    assert (spent["rest"], spent["outside"]) == (pytest.approx(3.0), pytest.approx(2.0))
    assert (spent["cpu"], spent["batch_rows"]) == (pytest.approx(4.0), pytest.approx(10.0))
    assert stages(metrics.growth(after, after), 1.0) == {}


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0.0, "0"), (1.2e-7, "1.2e-07"), (0.12345, "0.123"), (12345.6, "12,346")]
)
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert report.number(value) == shown
