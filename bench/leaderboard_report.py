"""LEADERBOARD.md from the figures: tables, and recommendations by rules that anyone can check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from loadtest.tables import Column, Figures, at, cell, number, table, tabulate

# Tokens of a chunk, as the customer counts them.
TOKENS = 100
BATCH = "128"
# Most milliseconds of a sample, for batch work.
BATCH_MS = 1.0
# What a retrieval has to reach.
TARGETS = {"R@5": 0.30, "Contain@50": 0.82, "MRR": 0.20}
RANKS = ("R@1", "R@3", "R@5", "R@10", "R@20", "R@50", "MRR")
Rows = list[dict[str, Any]]


def to_markdown(figures: Figures) -> str:
    """Return the whole leaderboard."""
    inside, outside = figures["scores"]
    systems = _systems(figures)
    nets = [row for row in systems if row["system"] in figures["nets"]]
    parts = [_opening(figures, inside, outside), _recommendations(figures), _accuracy(systems, inside),
             _generalisation(systems, inside, outside), _speed(nets), _efficiency(nets, inside), _batch(figures),
             _resources(figures), *_two_towers(figures, inside, outside)]  # fmt: skip
    parts += [_retrieval(figures, data) for data in figures["scores"]]
    return "\n".join([*parts, "![Accuracy and time](leaderboard.png)\n"])


def recommend(figures: Figures) -> list[tuple[str, str, str]]:
    """Return (use, rule, choice) for every use; the choice is the best of those that the rule admits.

    If a baseline has a higher cosine than the choice on the set that the rule is about, the choice says so.
    """
    inside, outside = figures["scores"].values()
    home, away = figures["scores"]
    nets = figures["nets"]
    speed = figures["speed"]
    fit = [name for name in nets if all(scores[name]["beyond"]["interval"][0] > 0 for scores in (inside, outside))]
    swift = [name for name in fit if speed[name]["batch"][BATCH] <= BATCH_MS]
    choices = [
        ("Real time", inside, "least p95 of one query, among nets that beat the weighted mean on both sets",
         _best(fit, lambda name: -speed[name]["query"]["p95_ms"])),
        ("Accuracy", inside, f"highest cosine on {home}", _best(nets, lambda name: inside[name]["cosine"])),
        ("Other domains", outside, f"highest cosine on {away}", _best(nets, lambda name: outside[name]["cosine"])),
        ("Batch work", inside, f"highest cosine on {home}, among those of the first rule that take at most "
         f"{number(BATCH_MS)} ms a sample in batches of {BATCH}", _best(swift, lambda name: inside[name]["cosine"])),
        ("Efficiency", inside, f"highest cosine on {home} per millisecond",
         _best(nets, lambda name: efficiency(figures, name))),
        ("Retrieval", inside, f"highest MRR on {home} without the context's own chunks, of all that can be asked",
         _best(inside, lambda name: inside[name]["retrieval"]["without_context"]["MRR"])),
    ]  # fmt: skip
    return [(use, rule, choice + _caution(choice, nets, scores)) for use, scores, rule, choice in choices]


def _caution(choice: str, nets: Iterable[str], scores: Figures) -> str:
    """Return a remark if a baseline has a higher cosine than the net that was chosen, or nothing."""
    baselines = {name: score["cosine"] for name, score in scores.items() if "cosine" in score and name not in nets}
    best = _best(baselines, lambda name: baselines[name])
    if choice not in nets or best == "none" or baselines[best] <= scores[choice]["cosine"]:
        return ""
    return f" (below the baseline {best}: cosine {scores[choice]['cosine']:.4f}, not {baselines[best]:.4f})"


def efficiency(figures: Figures, name: str) -> float:
    """Return the customer's efficiency: cosine per millisecond of one query, times 1000."""
    inside = next(iter(figures["scores"].values()))
    return float(inside[name]["cosine"] / figures["speed"][name]["query"]["mean_ms"] * 1000)


def _best(names: Iterable[str], value: Callable[[str], float]) -> str:
    return max(names, key=value, default="none")


def _systems(figures: Figures) -> Rows:
    """Return a row for every net and baseline, with all that is known of it."""
    inside, outside = figures["scores"].values()
    return [
        {"system": name, "inside": score, "outside": outside.get(name), **_costs(figures, name)}
        for name, score in inside.items()
        if "cosine" in score
    ]


def _costs(figures: Figures, name: str) -> dict[str, Any]:
    """Return what is known of a net beyond its scores, nothing of a baseline."""
    if name not in figures["nets"]:
        return {}
    query = figures["speed"][name]["query"]
    per_second = 1e3 / query["mean_ms"]
    return {
        **query,
        "per_second": per_second,
        "tokens": TOKENS * per_second,
        "parameters": figures["nets"][name]["parameters"],
        "efficiency": efficiency(figures, name),
        "grown_mb": figures["size"][name]["grown_mb"],
    }


def _sorted(rows: Rows, *path: str, rising: bool = False) -> Rows:
    return sorted(rows, key=lambda row: float(at(row, *path)), reverse=not rising)


def _opening(figures: Figures, inside: str, outside: str) -> str:
    sets = [
        f"- {name}: {counts['windows']:,} windows of {counts['articles']} articles, {counts['chunks']:,} chunks"
        for name, counts in figures["data"].items()
    ]
    facts = [f"- {name}: {value}" for name, value in figures["machine"].items()]
    trained = ", ".join(sorted({str(net["trained_on"]) for net in figures["nets"].values()}))
    return "\n".join([
        "# Leaderboard", "",
        f"Every net of this registry, as it is served ({figures['runtime']}), beside the baselines. Made by",
        f"`{figures['command']}`.", "",
        f"In-distribution is {inside}, out of distribution {outside}; nets were trained on {trained}.",
        "Intervals hold 95 % of 2,000 bootstrap draws of whole articles. A margin is the cosine to the next vector",
        "minus the cosine to the last one. Near or below zero, a net predicts the topic, not what comes next.", "",
        *sets, *facts, "",
    ])  # fmt: skip


def _recommendations(figures: Figures) -> str:
    rows = [(use, f"**{choice}**", rule) for use, rule, choice in recommend(figures)]
    return "## Which to use\n\n" + table(("for", "choose", "rule"), rows)


def _accuracy(systems: Rows, inside: str) -> str:
    columns: dict[str, Column] = {
        "": "place", "system": "system", "cosine": "inside.cosine:.4f", "95 %": _interval("inside"),
        "margin": "inside.margin:+.4f", "ms/query": "mean_ms", "predictions/s": "per_second",
        "est. tokens/s": "tokens", "parameters": "parameters:,",
    }  # fmt: skip
    rows = [{"place": place, **row} for place, row in enumerate(_sorted(systems, "inside", "cosine"), 1)]
    return f"## 1 Accuracy and latency, {inside}\n\n{tabulate(rows, columns)}\nA chunk counts {TOKENS} tokens.\n"


def _generalisation(systems: Rows, inside: str, outside: str) -> str:
    heads = ("system", inside, "beyond weighted mean", outside, "95 %", "beyond weighted mean", "difference")
    columns: tuple[Column, ...] = (
        "system", "inside.cosine:.4f", _beyond("inside"), "outside.cosine:.4f", _interval("outside"),
        _beyond("outside"), lambda row: f"{row['outside']['cosine'] - row['inside']['cosine']:+.4f}",
    )  # fmt: skip
    rows = _sorted([row for row in systems if row["outside"]], "outside", "cosine")
    cells = [[cell(row, column) for column in columns] for row in rows]
    return "## In and out of distribution\n\n" + table(heads, cells)


def _interval(data: str) -> Column:
    def show(row: Figures) -> str:
        interval = row[data].get("interval")
        return f"{interval[0]:.4f}-{interval[1]:.4f}" if interval else "-"

    return show


def _beyond(data: str) -> Column:
    def show(row: Figures) -> str:
        if "beyond" not in row[data]:
            return "-"
        low, high = row[data]["beyond"]["interval"]
        return f"{row[data]['beyond']['mean']:+.4f} ({low:+.4f} to {high:+.4f})"

    return show


def _speed(nets: Rows) -> str:
    columns = {"net": "system", "mean": "mean_ms", "p50": "p50_ms", "p95": "p95_ms", "p99": "p99_ms",
               "predictions/s": "per_second"}  # fmt: skip
    return "## 2 Speed, 200 single queries [ms]\n\n" + tabulate(_sorted(nets, "mean_ms", rising=True), columns)


def _efficiency(nets: Rows, inside: str) -> str:
    columns = {"net": "system", "efficiency": "efficiency", "cosine": "inside.cosine:.4f", "ms/query": "mean_ms",
               "memory [MB]": "grown_mb"}  # fmt: skip
    rows = _sorted(nets, "efficiency")
    return f"## 3 Efficiency: cosine / ms x 1000, {inside}\n\n" + tabulate(rows, columns)


def _batch(figures: Figures) -> str:
    rows = [{"net": name, **each["batch"]} for name, each in figures["speed"].items()]
    columns: dict[str, Column] = {"net": "net", **{f"batch {size}": size for size in rows[0] if size != "net"}}
    columns[f"{BATCH} beside 1"] = lambda row: f"{row['1'] / row[BATCH]:.1f}x"
    return "## 4 Batches [ms per sample]\n\n" + tabulate(rows, columns)


def _resources(figures: Figures) -> str:
    rows = [{"net": name, **size, "least_mb": 4 * size["parameters"] / 1e6} for name, size in figures["size"].items()]
    columns = {"net": "net", "parameters": "parameters", "parameters x 4 bytes [MB]": "least_mb",
               "memory [MB]": "grown_mb", "load [s]": "load_s", "disk [MB]": "disk_mb"}  # fmt: skip
    return "## 5 Resources\n\n" + tabulate(rows, columns)


def _two_towers(figures: Figures, inside: str, outside: str) -> list[str]:
    """Return the tables of the two-towers, and of their training as it is known; none without a two-tower."""
    towers = figures.get("towers", {})
    rows = [
        {"system": name, **known, **figures["speed"][name]["query"], "size": figures["size"][name],
         "inside": figures["scores"][inside][f"{name}, towers alone"],
         "outside": figures["scores"][outside][f"{name}, towers alone"]}
        for name, known in towers.items()
    ]  # fmt: skip
    serving: dict[str, Column] = {
        "two-tower": "version", f"cosine, {inside}": _deviating("inside"), f"cosine, {outside}": _deviating("outside"),
        "ms/query": "mean_ms", "p95": "p95_ms", "parameters": "parameters:,", "memory [MB]": "size.grown_mb",
        "disk [MB]": "size.disk_mb",
    }  # fmt: skip
    training: dict[str, Column] = {
        "two-tower": "version", "trained on": "trained_on", "epoch": "epoch", "train loss": "train_loss",
        "val cosine": "val_cosine", "std": "val_cosine_std", "negatives/sample": "negs_per_sample",
        "held-out MRR": "held_out_MRR",
    }  # fmt: skip
    if not rows:
        return []
    return [
        "## Two-towers\n\nThe cosine is that of the query and of what the payload tower makes of the true next "
        "chunk.\n\n" + tabulate(rows, serving),
        "## Training of the two-towers\n\nAs their cards have it; of an imported one, what its file states.\n\n"
        + tabulate(rows, training),
    ]


def _deviating(data: str) -> Column:
    return lambda row: f"{row[data]['tower_cosine']:.4f} ± {row[data]['tower_cosine_std']:.4f}"


def _retrieval(figures: Figures, data: str) -> str:
    columns: dict[str, Column] = {
        "system": "system",
        **{rank: _rank_column(rank) for rank in RANKS},
        "targets": _targets,
    }
    parts = [
        f"## Retrieval, {data}: rank of the true next chunk among all of the set\n",
        f"Targets: {', '.join(map(_target, TARGETS))}. R@50 is Contain@50.\n",
    ]
    for protocol in ("without_context", "with_context"):
        rows = [{"system": name, **found["retrieval"][protocol]} for name, found in figures["scores"][data].items()]
        parts.append(f"`{protocol}`\n\n" + tabulate(_sorted(rows, "MRR"), columns))
    return "\n".join(parts)


def _target(name: str) -> str:
    least = TARGETS[name]
    return f"{name} >= {least:g}" if name == "MRR" else f"{name} >= {100 * least:g} %"


def _targets(row: Figures) -> str:
    missed = [name for name, least in TARGETS.items() if row[name] < least]
    return f"not met: {', '.join(missed)}" if missed else "met"


def _rank_column(rank: str) -> Column:
    return "MRR:.3f" if rank == "MRR" else lambda row: f"{100 * row[rank]:.1f} %"
