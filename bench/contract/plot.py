"""The pictures: latency and goodput over the offered rate, the minute at 10C, the soak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from bench.plot import canvas, dress

Report = Mapping[str, Any]


def draw(directory: Path, report: Report) -> list[str]:
    """Draw what the report has figures for; returns the names of the pictures, without .png."""
    drawn = []
    if "capacity" in report:
        _rates(directory / "rates.png", report)
        drawn.append("rates")
    for times in ("2C", "10C"):
        if times in report:
            _timeline(directory / f"{times}.png", f"0.7C, {times}, 0.7C", report[times])
            drawn.append(times)
    if "soak" in report:
        _soak(directory / "soak.png", report["soak"])
        drawn.append("soak")
    return drawn


def _rates(path: Path, report: Report) -> None:
    points = sorted(_points(report), key=lambda point: point["rate"])
    picture = canvas()
    latency, goodput = picture.subplots(1, 2)
    rates = [point["rate"] for point in points]
    for name in ("p50_ms", "p90_ms", "p99_ms"):
        _line(latency, rates, [point[name] for point in points], "o", name.removesuffix("_ms"))
    for axes in (latency, goodput):
        axes.set(xlabel="offered [1/s]", xscale="log", yscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    latency.axhline(report["plan"]["slo_ms"], linestyle=":", color="gray", label="SLO")
    latency.set(title="Latency of good answers", ylabel="ms")
    _line(goodput, rates, [point["goodput"] for point in points], "o", "good answers")
    goodput.plot(rates, rates, linestyle=":", color="gray", label="all that is offered")
    goodput.axhline(report["capacity"]["per_second"], linestyle="--", color="tab:green", label="C")
    goodput.set(title="Goodput", ylabel="1/s")
    for axes in (latency, goodput):
        dress(axes)
    picture.savefig(path, dpi=110)


def _points(report: Report) -> list[Report]:
    loads = [report[times][part] for times in ("2C", "10C") if times in report for part in ("before", "during")]
    return [*report["capacity"]["probes"], *({**load, "rate": load["offered_rate"]} for load in loads)]


def _timeline(path: Path, title: str, run: Report) -> None:
    picture = canvas()
    counts, latency = picture.subplots(2, 1, sharex=True)
    known = run["timeline"]
    at = list(range(len(known["good"])))
    for name, colour in (("good", "tab:green"), ("refused", "tab:orange"), ("other", "tab:red")):
        counts.plot(at, known[name], color=colour, label=name)
    counts.set(title=title, ylabel="1/s", yscale="symlog", ylim=(0, None))
    for name in ("p50_ms", "p99_ms"):
        _line(latency, at, known[name], ".-", name.removesuffix("_ms"))
    latency.set(xlabel="s", ylabel="ms", yscale="log")
    for axes in (counts, latency):
        axes.axvspan(*run["at_s"], color="gray", alpha=0.15)
        dress(axes)
    picture.savefig(path, dpi=110)


def _soak(path: Path, run: Report) -> None:
    picture = canvas()
    axes = picture.subplots()
    axes.plot(run["at_s"], run["rss_mb"], label="resident memory")
    axes.set(title="Soak", xlabel="s", ylabel="MB")
    dress(axes)
    picture.savefig(path, dpi=110)


def _line(axes: Axes, at: Sequence[float], values: Sequence[float | None], style: str, label: str) -> None:
    known = [(x, y) for x, y in zip(at, values, strict=True) if y]
    axes.plot([x for x, _ in known], [y for _, y in known], style, markersize=3, label=label)
