"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Report = Mapping[str, Any]
PARTS = ("decode", "queue", "infer", "encode", "rest", "outside")


def draw(directory: Path, report: Report) -> list[str]:
    """Draw what the report has figures for; returns the names of the pictures, without .png."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    if "closed" in report:
        _pair(directory / "throughput.png", report["closed"]["cells"], "per_second", "requests/s")
        _pair(directory / "latency.png", report["closed"]["cells"], "p50_ms", "p50 [ms]")
        _stages(directory / "stages.png", report["closed"]["stages"])
        drawn += ["throughput", "latency", "stages"]
    if "nets" in report:
        _nets(directory / "nets.png", report["nets"])
        drawn.append("nets")
    return drawn


def leaderboard(path: Path, figures: Report) -> None:
    """Draw cosine against time of a query, and in-distribution against out of it with their intervals."""
    names = list(figures["scores"])
    inside, outside = figures["scores"].values()
    picture = canvas()
    cost, beyond = picture.subplots(1, 2)
    for name in figures["nets"]:
        cost.plot(figures["speed"][name]["query"]["mean_ms"], inside[name]["cosine"], "o", label=name)
    for name in ("weighted_mean", "mean"):
        cost.axhline(inside[name]["cosine"], linestyle=":", color="gray", label=name)
    cost.set(title="Accuracy and time", xlabel="one query [ms]", ylabel=f"cosine, {names[0]}", xscale="log")
    dress(cost)
    for name in inside:
        if "interval" in inside[name]:
            _crossed(beyond, name, inside[name], outside[name])
    beyond.set(title="Generalisation", xlabel=f"cosine, {names[0]}", ylabel=f"cosine, {names[1]}")
    dress(beyond)
    picture.savefig(path, dpi=110)


def _crossed(axes: Axes, name: str, inside: Report, outside: Report) -> None:
    arms = [
        [[score["cosine"] - score["interval"][0]], [score["interval"][1] - score["cosine"]]]
        for score in (inside, outside)
    ]
    axes.errorbar(inside["cosine"], outside["cosine"], xerr=arms[0], yerr=arms[1], fmt="o", label=name, alpha=0.7)


def _pair(path: Path, cells: Sequence[Report], figure: str, label: str) -> None:
    wires = list(dict.fromkeys(cell["wire"] for cell in cells))
    picture = canvas()
    for axes, wire in zip(picture.subplots(1, len(wires), squeeze=False)[0], wires, strict=True):
        _lines(axes, [cell for cell in cells if cell["wire"] == wire], figure)
        axes.set(title=f"/predict, {wire}", xlabel="connections", ylabel=label)
        dress(axes)
    picture.savefig(path, dpi=110)


def _lines(axes: Axes, cells: Sequence[Report], figure: str) -> None:
    at = [cell["connections"] for cell in cells]
    for name in cells[0]["servers"]:
        spreads = [cell["servers"][name][figure] for cell in cells]
        (line,) = axes.plot(at, [spread["median"] for spread in spreads], "o-", label=name)
        low, high = ([spread[end] for spread in spreads] for end in ("min", "max"))
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(at, [str(connections) for connections in at])


def _stages(path: Path, rows: Sequence[Report]) -> None:
    picture = canvas()
    axes = picture.subplots()
    labels = [f"{row['wire']} x{row['connections']}" for row in rows]
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [max(0.0, row[part]) / row["client"] * 100 for row in rows]
        axes.barh(labels, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(title="Where a request's time goes", xlabel="share of the latency the client saw [%]")
    dress(axes)
    picture.savefig(path, dpi=110)


def _nets(path: Path, nets: Report) -> None:
    picture = canvas()
    single, batch = picture.subplots(1, 2)
    labels = [f"{row['net']}, {row['runtime']}" for row in nets["query"]]
    single.barh(labels, [row["p50_ms"] for row in nets["query"]])
    single.invert_yaxis()
    single.set(title="One query", xlabel="p50 [ms]", xscale="log")
    single.grid(visible=True, alpha=0.3)
    for row in nets["batch"]:
        sizes = [int(size) for size in row["ms_per_sample"]]
        batch.plot(sizes, list(row["ms_per_sample"].values()), "o-", label=f"{row['net']}, {row['runtime']}")
    batch.set(title="By batch", xlabel="batch", ylabel="ms per sample", xscale="log", yscale="log")
    dress(batch)
    picture.savefig(path, dpi=110)


def canvas() -> Figure:
    """Return an empty picture."""
    picture = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


def dress(axes: Axes) -> None:
    """Give axes a grid and a legend."""
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="x-small")
