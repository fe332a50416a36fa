"""LEADERBOARD.md from the figures: the customer's tables, and a recommendation by rules that anyone can check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.report import number, table

Figures = Mapping[str, Any]
TOKENS = 100  # of a chunk, as the customer counts
BATCH = "128"
BATCH_MS = 1.0  # a sample, for batch work
RANKS = ("R@1", "R@3", "R@5", "R@10", "R@20", "R@50", "MRR")


def to_markdown(figures: Figures) -> str:
    """Return the whole leaderboard."""
    parts = [_opening(figures), _recommendations(figures), _accuracy(figures), _beyond(figures), _speed(figures)]
    parts += [_efficiency(figures), _batch(figures), _resources(figures)]
    parts += [_retrieval(figures, data) for data in figures["scores"]]
    return "\n".join([*parts, "![Accuracy and time](leaderboard.png)\n"])


def recommend(figures: Figures) -> list[tuple[str, str, str]]:
    """Return (use, rule, choice) for every use; a choice is the best of those the rule admits."""
    inside, outside = figures["scores"]
    fit = [name for name in figures["nets"] if all(_beats(figures, data, name) for data in (inside, outside))]
    swift = [name for name in fit if figures["speed"][name]["batch"][BATCH] <= BATCH_MS]
    return [
        ("Real time", "least p95 of one query, among nets that beat the weighted mean on both sets",
         _best(fit, lambda name: -figures["speed"][name]["query"]["p95_ms"])),
        ("Accuracy", f"highest cosine on {inside}", _best(figures["nets"], _cosine(figures, inside))),
        ("Other domains", f"highest cosine on {outside}", _best(figures["nets"], _cosine(figures, outside))),
        ("Batch work", f"highest cosine on {inside}, among those of the first rule that take at most "
         f"{number(BATCH_MS)} ms a sample in batches of {BATCH}", _best(swift, _cosine(figures, inside))),
        ("Efficiency", f"highest cosine on {inside} per millisecond",
         _best(figures["nets"], lambda name: efficiency(figures, name))),
        *_retriever_rule(figures, inside),
    ]  # fmt: skip


def efficiency(figures: Figures, name: str) -> float:
    """Return the customer's efficiency: cosine per millisecond of one query, times 1000."""
    inside = next(iter(figures["scores"]))
    return float(figures["scores"][inside][name]["cosine"] / figures["speed"][name]["query"]["mean_ms"] * 1000)


def _retriever_rule(figures: Figures, inside: str) -> list[tuple[str, str, str]]:
    found = figures["scores"][inside]
    rule = f"highest MRR on {inside} without the context's own chunks, of all that can be asked"
    return [("Retrieval", rule, _best(found, lambda name: found[name]["retrieval"]["without_context"]["MRR"]))]


def _best(names: Iterable[str], value: Callable[[str], float]) -> str:
    return max(names, key=value, default="none")


def _cosine(figures: Figures, data: str) -> Callable[[str], float]:
    return lambda name: float(figures["scores"][data][name]["cosine"])


def _beats(figures: Figures, data: str, name: str) -> bool:
    return bool(figures["scores"][data][name]["beyond"]["interval"][0] > 0)


def _opening(figures: Figures) -> str:
    sets = [
        f"- {name}: {counts['windows']:,} windows of {counts['articles']} articles, {counts['chunks']:,} chunks"
        for name, counts in figures["data"].items()
    ]
    facts = [f"- {name}: {value}" for name, value in figures["machine"].items()]
    inside, outside = figures["scores"]
    trained = ", ".join(sorted({str(net["trained_on"]) for net in figures["nets"].values()}))
    return "\n".join([
        "# Leaderboard", "",
        f"Every net of this registry, as it is served ({figures['runtime']}), beside the baselines. Made by",
        f"`{figures['command']}`.", "",
        f"In-distribution is {inside}, out of distribution {outside}; nets were trained on {trained}.",
        "Intervals hold 95 % of 2,000 bootstrap draws of whole articles. A margin is the cosine to the next vector",
        "less that to the last one: near or below zero a net says what the article is about, not where it goes.", "",
        *sets, *facts, "",
    ])  # fmt: skip


def _recommendations(figures: Figures) -> str:
    rows = [(use, f"**{choice}**", rule) for use, rule, choice in recommend(figures)]
    return "## Which to use\n\n" + table(("for", "choose", "rule"), rows)


def _ranked(figures: Figures, data: str) -> list[str]:
    found = figures["scores"][data]
    return sorted((name for name in found if "cosine" in found[name]), key=lambda name: -found[name]["cosine"])


def _accuracy(figures: Figures) -> str:
    inside = next(iter(figures["scores"]))
    rows = [(str(place), *_accuracy_row(figures, inside, who)) for place, who in enumerate(_ranked(figures, inside), 1)]
    heads = ("", "system", "cosine", "95 %", "margin", "ms/query", "predictions/s", "est. tokens/s", "parameters")
    return f"## 1 Accuracy and latency, {inside}\n\n{table(heads, rows)}\nA chunk counts {TOKENS} tokens.\n"


def _accuracy_row(figures: Figures, data: str, name: str) -> Sequence[str]:
    score = figures["scores"][data][name]
    known = (name, f"{score['cosine']:.4f}", _interval(score.get("interval")), f"{score['margin']:+.4f}")
    if name not in figures["nets"]:
        return (*known, "-", "-", "-", "-")
    mean_ms, parameters = figures["speed"][name]["query"]["mean_ms"], figures["nets"][name]["parameters"]
    return (*known, number(mean_ms), number(1e3 / mean_ms), number(TOKENS * 1e3 / mean_ms), f"{parameters:,}")


def _beyond(figures: Figures) -> str:
    inside, outside = figures["scores"]
    rows = [
        (name, *_generalises(figures["scores"][inside][name], figures["scores"][outside][name]))
        for name in _ranked(figures, outside)
    ]
    heads = ("system", inside, "beyond weighted mean", outside, "95 %", "beyond weighted mean", "difference")
    return "## In and out of distribution\n\n" + table(heads, rows)


def _generalises(inside: Figures, outside: Figures) -> Sequence[str]:
    return (
        f"{inside['cosine']:.4f}",
        _above(inside),
        f"{outside['cosine']:.4f}",
        _interval(outside.get("interval")),
        _above(outside),
        f"{outside['cosine'] - inside['cosine']:+.4f}",
    )


def _above(score: Figures) -> str:
    if "beyond" not in score:
        return "-"
    low, high = score["beyond"]["interval"]
    return f"{score['beyond']['mean']:+.4f} ({low:+.4f} to {high:+.4f})"


def _interval(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.4f}-{interval[1]:.4f}" if interval else "-"


def _speed(figures: Figures) -> str:
    speed = {name: each["query"] for name, each in figures["speed"].items()}
    times = ("mean_ms", "p50_ms", "p95_ms", "p99_ms")
    rows = [
        (name, *(number(speed[name][time]) for time in times), number(1e3 / speed[name]["mean_ms"]))
        for name in sorted(speed, key=lambda name: speed[name]["mean_ms"])
    ]
    return "## 2 Speed, 200 single queries [ms]\n\n" + table(
        ("net", "mean", "p50", "p95", "p99", "predictions/s"), rows
    )


def _efficiency(figures: Figures) -> str:
    inside = next(iter(figures["scores"]))
    rows = [
        (name, number(efficiency(figures, name)), f"{figures['scores'][inside][name]['cosine']:.4f}",
         number(figures["speed"][name]["query"]["mean_ms"]), number(figures["size"][name]["grown_mb"]))
        for name in sorted(figures["nets"], key=lambda name: -efficiency(figures, name))
    ]  # fmt: skip
    heads = ("net", "efficiency", "cosine", "ms/query", "memory [MB]")
    return f"## 3 Efficiency: cosine / ms x 1000, {inside}\n\n" + table(heads, rows)


def _batch(figures: Figures) -> str:
    sizes = list(next(iter(figures["speed"].values()))["batch"])
    rows = [
        (name, *(number(each["batch"][size]) for size in sizes), f"{each['batch']['1'] / each['batch'][BATCH]:.1f}x")
        for name, each in figures["speed"].items()
    ]
    heads = ("net", *(f"batch {size}" for size in sizes), f"{BATCH} beside 1")
    return "## 4 Batches [ms per sample]\n\n" + table(heads, rows)


def _resources(figures: Figures) -> str:
    costs = ("parameters", "grown_mb", "load_s", "disk_mb")
    rows = [(name, *(number(size[cost]) for cost in costs)) for name, size in figures["size"].items()]
    heads = ("net", "parameters", "memory [MB]", "load [s]", "disk [MB]")
    return "## 5 Resources\n\n" + table(heads, rows)


def _retrieval(figures: Figures, data: str) -> str:
    found = figures["scores"][data]
    parts = [f"## Retrieval, {data}: rank of the true next chunk among all of the set\n"]
    for protocol in ("without_context", "with_context"):
        names = sorted(found, key=lambda name, p=protocol: -found[name]["retrieval"][p]["MRR"])  # type: ignore[misc]
        rows = [(name, *_recalls(found[name]["retrieval"][protocol])) for name in names]
        parts.append(f"`{protocol}`\n\n" + table(("system", *RANKS), rows))
    return "\n".join(parts)


def _recalls(ranking: Mapping[str, float]) -> Sequence[str]:
    return [f"{ranking[rank]:.3f}" if rank == "MRR" else f"{100 * ranking[rank]:.1f} %" for rank in RANKS]
