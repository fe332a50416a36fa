"""From the figures to report.md and report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.report import number, table, targets

Report = Mapping[str, Any]

INTRO = """# Figures

All from this one run, by the open-loop driver (`python -m loadtest`): Poisson arrivals, latency from the intended
start, a service as it ships on a core of its own and its clients, each a process, on the others. C is the highest
rate that holds: errors below 0.1 %, p99 within the SLO. What could not be offered in full is not measured, not met.
Promotions move the alias in the registry (`Registry.point`), without the checks of `lvm promote`, which take seconds.
"""
HEADS = ("run", "intended /s", "offered /s", "good /s", "p50 ms", "p90 ms", "p99 ms", "outcomes")


def write(directory: Path, report: Report) -> None:
    """Write report.json and report.md into `directory`."""
    (directory / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(to_markdown(report), encoding="utf-8")


def to_markdown(report: Report) -> str:
    """Return the whole report."""
    facts = [f"- {name}: {value}" for name, value in {**report["machine"], **report["plan"]}.items()]
    c = report.get("capacity", {}).get("per_second")
    pictures = [f"![{name}]({name}.png)\n" for name in report["plots"]]
    return "\n".join(
        [INTRO, *facts, f"- C: {number(c)} requests/s\n", targets(report["targets"]), _runs(report), *pictures]
    )


def _runs(report: Report) -> str:
    rows = [_row(name, run) for name, run in _loads(report).items()]
    return "## Runs\n\n" + table(HEADS, rows)


def _loads(report: Report) -> dict[str, Report]:
    found = {
        f"{run}, {part}": report[run][part] for run in ("2C", "10C") for part in ("before", "during") if run in report
    }
    found |= {"promotions": report["promotions"]} if "promotions" in report else {}
    return found | {name: report["fairness"][name] for name in ("greedy", "modest") if "fairness" in report}


def _row(name: str, run: Report) -> tuple[str, ...]:
    figures = ("intended_rate", "offered_rate", "goodput", "p50_ms", "p90_ms", "p99_ms")
    outcomes = ", ".join(f"{status}: {count}" for status, count in run["statuses"].items())
    return (name, *(number(run[figure]) for figure in figures), outcomes)
