"""From the figures to report.md: tables only, no figure that report.json lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.nets import BATCHES
from bench.stages import STAGES

Report = Mapping[str, Any]
Rows = Iterable[Sequence[str]]
FIGURES = {"per_second": "throughput", "p50_ms": "p50", "p99_ms": "p99"}
MEASURED = {True: "met", False: "**not met**", None: "not measured"}


def write(directory: Path, report: Report) -> None:
    """Write report.json and report.md into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(to_markdown(report), encoding="utf-8")


def to_markdown(report: Report) -> str:
    """Return the whole report."""
    parts = [_opening(report), *(_failure(*item) for item in report["failures"].items()), targets(report["targets"])]
    for name, section in SECTIONS.items():
        if name in report:
            parts.append(section(report[name]))
    pictures = "\n".join(f"![{name}]({name}.png)\n" for name in report.get("plots", ()))
    return "\n".join([*parts, pictures])


def table(heads: Sequence[str], rows: Rows) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None) -> str:
    """Return three significant digits, thousands with commas, a dash for nothing."""
    if value is None or math.isnan(value):
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ranged(spread: Mapping[str, float] | None) -> str:
    """Return a median with its least and largest value."""
    if not spread:
        return "-"
    return f"{number(spread['median'])} ({number(spread['min'])}-{number(spread['max'])})"


def _opening(report: Report) -> str:
    facts = [f"- {name}: {value}" for name, value in {**report["machine"], **report["plan"]}.items()]
    intro = "All figures are from this one run; medians over interleaved rounds, least and largest in brackets."
    return "\n".join(["# Benchmark", "", intro, "", *facts, ""])


def _failure(name: str, reason: str) -> str:
    return f"**{name} failed, its figures are left out:** {reason}\n"


def targets(rows: Sequence[Report]) -> str:
    """Return the section that holds figures against their limits."""
    cells = [
        (row["name"], f"{row['sense']} {number(row['limit'])} {row['unit']}", number(row["value"]), _verdict(row))
        for row in rows
    ]
    return "## Targets\n\n" + table(("figure", "limit", "measured", ""), cells)


def _verdict(row: Report) -> str:
    return MEASURED[row["is_met"]]


def _nets(nets: Report) -> str:
    query = [
        (row["net"], row["runtime"], *(number(row[k]) for k in ("mean_ms", "p50_ms", "p95_ms", "p99_ms")),
         number(row["per_second"]), number(row["apart"]))
        for row in nets["query"]
    ]  # fmt: skip
    batch = [
        (row["net"], row["runtime"],
         *(f"{number(row['ms_per_sample'][str(n)])} ({number(row['speed_up'][str(n)])}x)" for n in BATCHES))
        for row in nets["batch"]
    ]  # fmt: skip
    size = [
        (row["net"], row["runtime"], f"{row['parameters']:,}",
         *(number(row[k]) for k in ("weights_mb", "grown_mb", "load_s", "disk_mb")))
        for row in nets["size"]
    ]  # fmt: skip
    times = ("net", "runtime", "mean ms", "p50 ms", "p95 ms", "p99 ms", "predictions/s", "difference to torch")
    sizes = ("net", "runtime", "parameters", "weights MB", "memory grown MB", "load s", "disk MB")
    per_sample = ("net", "runtime", *(f"batch {n}" for n in BATCHES))
    return "\n".join([
        "## Tables 1 and 2: one query at a time, 200 after a warm-up\n", table(times, query),
        "## Table 4: ms per sample by batch, and how much faster than one at a time\n", table(per_sample, batch),
        "## Table 5: size (10^6 bytes)\n", table(sizes, size),
    ])  # fmt: skip


def _closed(section: Report) -> str:
    title = f"## Service beside the others, closed loop ({section['generator']})\n"
    note = (
        "naive is the better of two: as people write it, and tuned (torch on one thread, endpoints in the loop). So is "
        "every other with variants, in each figure.\n"
    )
    return "\n".join([title, note, _ratios(section), _absolutes(section), _stages(section["stages"])])


def _peers(section: Report) -> str:
    rows = [(name, *peer) for name, peer in section["measured"].items()]
    left_out = [f"- left out: {name}, which {reason}" for name, reason in section["left_out"].items()]
    note = "Each serves the same version in onnxruntime, from an environment of its own.\n"
    how = table(("name", "package", "how"), rows)
    return "\n".join(["## Other model servers\n", note, how, *left_out, ""])


def _many_rows(section: Report) -> str:
    return "\n".join(["## 64 rows per octet request, closed loop\n", _ratios(section), _absolutes(section)])


def _ratios(section: Report) -> str:
    others = [rival for rival in section["cells"][0]["ratios"] if rival != "naive"]
    shown = [
        ("naive", "per_second"),
        ("naive", "p50_ms"),
        ("naive", "p99_ms"),
        *((name, "per_second") for name in others),
    ]
    heads = ("wire", "connections", *(f"{FIGURES[figure]} / {rival}" for rival, figure in shown))
    rows = [
        (cell["wire"], str(cell["connections"]), *(ranged(cell["ratios"][rival][figure]) for rival, figure in shown))
        for cell in section["cells"]
    ]
    return table(heads, rows)


def _absolutes(section: Report) -> str:
    heads = ("wire", "connections", "server", "requests/s", "rows/s", "p50 ms", "p95 ms", "p99 ms")
    rows = [
        (cell["wire"], str(cell["connections"]), name, ranged(figures["per_second"]),
         number(cell["rows"] * figures["per_second"]["median"]),
         *(number(figures[figure]["median"]) for figure in ("p50_ms", "p95_ms", "p99_ms")))
        for cell in section["cells"] for name, figures in cell["servers"].items()
    ]  # fmt: skip
    return table(heads, rows)


def _stages(rows: Sequence[Report]) -> str:
    names = (*STAGES, "rest", "outside", "client", "cpu")
    heads = ("wire", "connections", *(f"{name} ms" for name in names), "rows per batch")
    cells = [
        (row["wire"], str(row["connections"]), *(number(row[name]) for name in (*names, "batch_rows"))) for row in rows
    ]
    note = (
        "Means per request from the service's histograms. rest: total less its stages (event loop, routing, headers, "
        "write). outside: what the client saw beyond the total (kernel, sockets, parsing, waiting to be read). "
        "cpu: processor time of the process, all threads.\n"
    )
    return "\n".join(["## Cost per request by stage\n", note, table(heads, cells)])


def _open(rows: Sequence[Report]) -> str:
    heads = ("wire", "server", "offered/s", "p50 ms", "p99 ms", "p99 / p50", "generator lag p99 ms")
    names = ("rate", "p50_ms", "p99_ms", "p99_by_p50", "lag_p99_ms")
    cells = [(row["wire"], row["server"], *(ranged(row[name]) for name in names)) for row in rows]
    note = "Latency from the intended start; the generator is `python -m loadtest` and shares the cores.\n"
    return "\n".join(["## Open loop at half of its own capacity\n", note, table(heads, cells)])


def _retrieval(rows: Sequence[Report]) -> str:
    heads = ("wire", "/predict p50 ms", "/retrieve p50 ms", "ratio")
    cells = [(r["wire"], *(ranged(r[k]) for k in ("predict_p50_ms", "retrieve_p50_ms", "ratio"))) for r in rows]
    return "\n".join(["## /retrieve beside /predict, what ships, one connection\n", table(heads, cells)])


def _start(figures: Report) -> str:
    heads = ("ready, files not cached s", "ready, cached s", "resident at idle MB")
    return "\n".join(["## Start\n", table(heads, [[ranged(figures[k]) for k in ("cold_s", "warm_s", "rss_mb")]])])


SECTIONS: dict[str, Callable[[Any], str]] = {
    "nets": _nets,
    "peers": _peers,
    "closed": _closed,
    "rows": _many_rows,
    "open": _open,
    "retrieval": _retrieval,
    "start": _start,
}
