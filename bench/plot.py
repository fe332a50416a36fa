"""The pictures of `lvm bench`, of the leaderboard and of the figures F1 to F8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from loadtest.plot import canvas, save

Figures = Mapping[str, Any]
Draw = Callable[[Figure, Figures], None]
STAGES = ("decode", "queue", "infer", "encode", "rest", "outside")


def draw_bench(directory: Path, figures: Figures) -> list[str]:
    """Draw the pictures of `lvm bench` that there are figures for; return their names, without .png."""
    pictures: dict[str, tuple[str, Draw]] = {
        "throughput": ("closed", lambda picture, found: _wires(picture, found["cells"], "per_second", "requests/s")),
        "latency": ("closed", lambda picture, found: _wires(picture, found["cells"], "p50_ms", "p50 [ms]")),
        "stages": ("closed", lambda picture, found: _stages(picture, found["stages"])),
        "nets": ("nets", _nets),
    }
    return _draw(directory, {name: (what, figures.get(key)) for name, (key, what) in pictures.items()})


def draw_contract(directory: Path, figures: Figures) -> list[str]:
    """Draw the pictures of F1 to F8 that there are figures for; return their names, without .png."""
    pictures: dict[str, tuple[Draw, Figures | None]] = {
        "rates": (_rates, figures if "capacity" in figures else None),
        "2C": (_timeline("0.7C, 2C, 0.7C"), figures.get("2C")),
        "10C": (_timeline("0.7C, 10C, 0.7C"), figures.get("10C")),
        "soak": (_soak, figures.get("soak")),
    }
    return _draw(directory, pictures)


def draw_leaderboard(path: Path, figures: Figures) -> None:
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
    for name in inside:
        if "interval" in inside[name]:
            _crossed(beyond, name, inside[name], outside[name])
    beyond.set(title="Generalisation", xlabel=f"cosine, {names[0]}", ylabel=f"cosine, {names[1]}")
    save(picture, path)


def draw_learning_curves(path: Path, curves: Mapping[Any, Mapping[int, float]]) -> None:
    """Draw score against windows, by (model, data set, figure); a panel for each figure."""
    figures = list(dict.fromkeys(figure for _, _, figure in curves))
    picture = canvas()
    for axes, figure in zip(picture.subplots(1, len(figures), squeeze=False)[0], figures, strict=True):
        for (model, data, of), curve in curves.items():
            if of == figure:
                axes.plot(list(curve), list(curve.values()), "o-", label=f"{model}, {data}")
        axes.set(title=figure, xlabel="windows trained on", xscale="log")
    save(picture, path)


def draw_diagnosis(path: Path, figures: Figures) -> None:
    """Draw the cosine to each chunk, what a changed context loses, and the answers that are fed back, as a PNG."""
    picture = canvas()
    offsets, order, rollout = picture.subplots(1, 3)
    for name, cosines in figures["cosine"].items():
        offsets.plot(figures["offsets"], cosines, _style(name), label=name)
    offsets.axvspan(figures["offsets"][0], 0, alpha=0.1, color="gray", label="chunks read")
    offsets.set(title="Nearness", xlabel="chunk, 0: the last one read", ylabel="cosine")
    for at, (name, lost) in enumerate(figures["order"].items()):
        low, high = lost["loss"]["interval"] or (lost["loss"]["mean"],) * 2
        order.bar(at, lost["loss"]["mean"], label=name)
        order.vlines(at, low, high, color="black")
    order.set(title="Changed context", xticks=[], ylabel="loss of cosine to the next chunk")
    steps = range(1, figures["steps"] + 1)
    for name, cosines in figures["rollout"].items():
        rollout.plot(steps, cosines, _style(name), label=name)
    rollout.set(title="Answers fed back", xlabel="step", xticks=steps, ylabel="cosine to the true chunk")
    picture.suptitle(f"{figures['version']} on {figures['data']}")
    save(picture, path)


def _style(name: str) -> str:
    return "o-" if name == "net" else ".:"


def _draw(directory: Path, pictures: Mapping[str, tuple[Draw, Figures | None]]) -> list[str]:
    drawn = []
    for name, (draw_on, figures) in pictures.items():
        if figures is not None:
            picture = canvas()
            draw_on(picture, figures)
            save(picture, directory / f"{name}.png")
            drawn.append(name)
    return drawn


def _crossed(axes: Axes, name: str, inside: Figures, outside: Figures) -> None:
    arms = [
        [[score["cosine"] - score["interval"][0]], [score["interval"][1] - score["cosine"]]]
        for score in (inside, outside)
    ]
    axes.errorbar(inside["cosine"], outside["cosine"], xerr=arms[0], yerr=arms[1], fmt="o", label=name, alpha=0.7)


def _wires(picture: Figure, cells: Sequence[Figures], figure: str, label: str) -> None:
    wires = list(dict.fromkeys(cell["wire"] for cell in cells))
    for axes, wire in zip(picture.subplots(1, len(wires), squeeze=False)[0], wires, strict=True):
        _lines(axes, [cell for cell in cells if cell["wire"] == wire], figure)
        axes.set(title=f"/predict, {wire}", xlabel="connections", ylabel=label)


def _lines(axes: Axes, cells: Sequence[Figures], figure: str) -> None:
    connections = [cell["connections"] for cell in cells]
    for name in cells[0]["servers"]:
        spreads = [cell["servers"][name][figure] for cell in cells]
        (line,) = axes.plot(connections, [spread["median"] for spread in spreads], "o-", label=name)
        low, high = ([spread[end] for spread in spreads] for end in ("min", "max"))
        axes.fill_between(connections, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(connections, [str(number) for number in connections])


def _stages(picture: Figure, rows: Sequence[Figures]) -> None:
    axes = picture.subplots()
    labels = [f"{row['wire']} x{row['connections']}" for row in rows]
    left = [0.0] * len(rows)
    for stage in STAGES:
        widths = [max(0.0, row[stage]) / row["client"] * 100 for row in rows]
        axes.barh(labels, widths, left=left, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(title="Where a request's time goes", xlabel="share of the latency the client saw [%]")


def _nets(picture: Figure, nets: Figures) -> None:
    single, batch = picture.subplots(1, 2)
    labels = [f"{row['net']}, {row['runtime']}" for row in nets["query"]]
    single.barh(labels, [row["p50_ms"] for row in nets["query"]])
    single.invert_yaxis()
    single.set(title="One query", xlabel="p50 [ms]", xscale="log")
    for row in nets["batch"]:
        sizes = [int(size) for size in row["ms_per_sample"]]
        batch.plot(sizes, list(row["ms_per_sample"].values()), "o-", label=f"{row['net']}, {row['runtime']}")
    batch.set(title="By batch", xlabel="batch", ylabel="ms per sample", xscale="log", yscale="log")


def _rates(picture: Figure, figures: Figures) -> None:
    latency, goodput = picture.subplots(1, 2)
    points = sorted(_points(figures), key=lambda point: point["rate"])
    rates = [point["rate"] for point in points]
    for name in ("p50_ms", "p90_ms", "p99_ms"):
        _line(latency, rates, [point[name] for point in points], "o", name.removesuffix("_ms"))
    for axes in (latency, goodput):
        axes.set(xlabel="offered [1/s]", xscale="log", yscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    latency.axhline(figures["plan"]["slo_ms"], linestyle=":", color="gray", label="SLO")
    latency.set(title="Latency of good answers", ylabel="ms")
    _line(goodput, rates, [point["goodput"] for point in points], "o", "good answers")
    goodput.plot(rates, rates, linestyle=":", color="gray", label="all that is offered")
    goodput.axhline(figures["capacity"]["per_second"], linestyle="--", color="tab:green", label="C")
    goodput.set(title="Goodput", ylabel="1/s")


def _points(figures: Figures) -> list[Figures]:
    loads = [figures[run][part] for run in ("2C", "10C") if run in figures for part in ("before", "during")]
    return [*figures["capacity"]["probes"], *({**load, "rate": load["offered_rate"]} for load in loads)]


def _timeline(title: str) -> Draw:
    def draw_on(picture: Figure, run: Figures) -> None:
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

    return draw_on


def _soak(picture: Figure, run: Figures) -> None:
    axes = picture.subplots()
    axes.plot(run["at_s"], run["rss_mb"], label="resident memory")
    axes.set(title="Soak", xlabel="s", ylabel="MB")


def _line(axes: Axes, at: Sequence[float], values: Sequence[float | None], style: str, label: str) -> None:
    known = [(x, y) for x, y in zip(at, values, strict=True) if y]
    axes.plot([x for x, _ in known], [y for _, y in known], style, markersize=3, label=label)
