"""From the figures to report.md: tables only, no figure that report.json lacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.metrics import STAGES
from bench.nets import BATCHES
from loadtest.tables import Column, Figures, at, number, table, tabulate

VERDICTS = {True: "met", False: "**not met**", None: "not measured"}
RATIOS = {"per_second": "throughput", "p50_ms": "p50", "p99_ms": "p99"}
TIMES = {"p50 ms": "p50_ms", "p95 ms": "p95_ms", "p99 ms": "p99_ms"}
CELL = {"wire": "wire", "connections": "connections"}


def write(directory: Path, figures: Figures, markdown: Callable[[Figures], str]) -> None:
    """Write report.json and report.md into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(markdown(figures), encoding="utf-8")


def to_markdown(figures: Figures) -> str:
    """Return the report of `lvm bench`."""
    intro = "All figures are from this one run; medians over interleaved rounds, least and largest in brackets."
    failures = [f"**{name} failed, its figures are left out:** {why}\n" for name, why in figures["failures"].items()]
    parts = ["# Benchmark", "", intro, "", *facts(figures), "", *failures, targets(figures["targets"])]
    parts += [section(figures[name]) for name, section in SECTIONS.items() if name in figures]
    return "\n".join([*parts, pictures(figures)])


def facts(figures: Figures) -> list[str]:
    """Return a line for everything that is known of the machine and the options of the run."""
    return [f"- {name}: {value}" for name, value in {**figures["machine"], **figures["plan"]}.items()]


def pictures(figures: Figures) -> str:
    """Return the pictures that were drawn."""
    return "\n".join(f"![{name}]({name}.png)\n" for name in figures.get("plots", ()))


def targets(rows: Sequence[Figures]) -> str:
    """Return the section that compares figures with their limits."""
    columns: dict[str, Column] = {
        "figure": "name",
        "limit": lambda row: f"{row['sense']} {number(row['limit'])} {row['unit']}",
        "measured": "value",
        "": lambda row: VERDICTS[row["is_met"]],
    }
    return "## Targets\n\n" + tabulate(rows, columns)


def _nets(nets: Figures) -> str:
    net = {"net": "net", "runtime": "runtime"}
    query = {**net, "mean ms": "mean_ms", **TIMES, "predictions/s": "per_second", "difference to torch": "apart"}
    batch: dict[str, Column] = {**net, **{f"batch {size}": _batch_column(str(size)) for size in BATCHES}}
    size = {**net, "parameters": "parameters", "weights MB": "weights_mb", "memory grown MB": "grown_mb",
            "load s": "load_s", "disk MB": "disk_mb"}  # fmt: skip
    return "\n".join([
        "## Tables 1 and 2: one query at a time, 200 after a warm-up\n", tabulate(nets["query"], query),
        "## Table 4: ms per sample by batch, and how much faster than one at a time\n", tabulate(nets["batch"], batch),
        "## Table 5: size (10^6 bytes)\n", tabulate(nets["size"], size),
    ])  # fmt: skip


def _batch_column(size: str) -> Column:
    return lambda row: f"{number(row['ms_per_sample'][size])} ({number(row['speed_up'][size])}x)"


def _closed(section: Figures) -> str:
    title = f"## Service beside the others, closed loop ({section['generator']})\n"
    note = (
        "naive is the better of two: as people write it, and tuned (torch on one thread, endpoints in the loop). So is "
        "every other with variants, in each figure.\n"
    )
    return "\n".join([title, note, _ratios(section), _absolutes(section), _stages(section["stages"])])


def _peers(section: Figures) -> str:
    rows = [(name, *peer) for name, peer in section["measured"].items()]
    left_out = [f"- left out: {name}, which {reason}" for name, reason in section["left_out"].items()]
    note = "Each serves the same version in onnxruntime, from an environment of its own.\n"
    how = table(("name", "package", "how"), rows)
    return "\n".join(["## Other model servers\n", note, how, *left_out, ""])


def _many_rows(section: Figures) -> str:
    return "\n".join(["## 64 rows per octet request, closed loop\n", _ratios(section), _absolutes(section)])


def _ratios(section: Figures) -> str:
    others = [peer for peer in section["cells"][0]["ratios"] if peer != "naive"]
    shown = [*(("naive", figure) for figure in RATIOS), *((peer, "per_second") for peer in others)]
    columns = {f"{RATIOS[figure]} / {peer}": f"ratios.{peer}.{figure}" for peer, figure in shown}
    return tabulate(section["cells"], CELL | columns)


def _absolutes(section: Figures) -> str:
    times = {head: f"{figure}.median" for head, figure in TIMES.items()}
    columns: dict[str, Column] = {
        **CELL,
        "server": "server",
        "requests/s": "per_second",
        "rows/s": lambda row: number(row["rows"] * row["per_second"]["median"]),
        **times,
    }
    rows = [{**cell, "server": name, **its} for cell in section["cells"] for name, its in cell["servers"].items()]
    return tabulate(rows, columns)


def _stages(rows: Sequence[Figures]) -> str:
    names = (*STAGES, "rest", "outside", "client", "cpu")
    columns = {**CELL, **{f"{name} ms": name for name in names}, "rows per batch": "batch_rows"}
    note = (
        "Means per request from the service's histograms. rest: total less its stages (event loop, routing, headers, "
        "write). outside: what the client saw beyond the total (kernel, sockets, parsing, waiting to be read). "
        "cpu: processor time of the process, all threads.\n"
    )
    return "\n".join(["## Cost per request by stage\n", note, tabulate(rows, columns)])


def _open(rows: Sequence[Figures]) -> str:
    columns = {"wire": "wire", "server": "server", "offered/s": "rate", "p50 ms": "p50_ms", "p99 ms": "p99_ms",
               "p99 / p50": "p99_by_p50", "generator lag p99 ms": "lag_p99_ms"}  # fmt: skip
    note = "Latency from the intended start; the generator is `python -m loadtest` and shares the cores.\n"
    return "\n".join(["## Open loop at half of its own capacity\n", note, tabulate(rows, columns)])


def _budget(rows: Sequence[Figures]) -> str:
    known = {**CELL, "token and trace": "token_and_trace"}
    columns = {**known, "bare": "bare", "service": "total", "bare / service": "ratio"}
    parts: dict[str, Column] = {part: _part_column(part) for part in rows[0]["parts"]}
    note = (
        "Microseconds of processor time, the least of many runs. Service and bare peer run in one process, without "
        "sockets. The parts are shares of samples of the stack.\n"
    )
    return "\n".join([f"## Budget of a request\n\n{note}", tabulate(rows, columns), tabulate(rows, known | parts)])


def _part_column(part: str) -> Column:
    return lambda row: number(row["parts"][part])


def _retrieval(rows: Sequence[Figures]) -> str:
    columns = {"wire": "wire", "/predict p50 ms": "predict_p50_ms", "/retrieve p50 ms": "retrieve_p50_ms",
               "ratio": "ratio"}  # fmt: skip
    return "\n".join(["## /retrieve beside /predict, what ships, one connection\n", tabulate(rows, columns)])


def _start(figures: Figures) -> str:
    columns = {"ready, files not cached s": "cold_s", "ready, cached s": "warm_s", "resident at idle MB": "rss_mb"}
    return "\n".join(["## Start\n", tabulate([figures], columns)])


SECTIONS: dict[str, Callable[[Any], str]] = {
    "nets": _nets,
    "peers": _peers,
    "closed": _closed,
    "rows": _many_rows,
    "open": _open,
    "budget": _budget,
    "retrieval": _retrieval,
    "start": _start,
}


FIGURES_INTRO = """# Figures

All from this one run, by the open-loop driver (`python -m loadtest`): Poisson arrivals, latency from the intended
start, a service as it ships on a core of its own and its clients, each a process, on the others. C is the highest
rate that holds: errors below 0.1 %, p99 within the SLO. What could not be offered in full is not measured, not met.
Promotions move the alias in the registry (`Registry.point`), without the checks of `lvm promote`, which take seconds.
"""


def figures_to_markdown(figures: Figures) -> str:
    """Return the report of `python -m bench.contract`."""
    c = f"- C: {number(at(figures, 'capacity', 'per_second'))} requests/s\n"
    judged = targets(figures["targets"])
    return "\n".join([FIGURES_INTRO, *facts(figures), c, judged, _runs(figures), pictures(figures)])


def _runs(figures: Figures) -> str:
    named = [("2C", "before"), ("2C", "during"), ("10C", "before"), ("10C", "during"), ("promotions",)]
    named += [("fairness", "greedy"), ("fairness", "modest")]
    names = [path[-1] if path[0] == "fairness" else ", ".join(path) for path in named]
    loads = [{**load, "run": name} for name, path in zip(names, named, strict=True) if (load := at(figures, *path))]
    columns: dict[str, Column] = {
        "run": "run", "intended /s": "intended_rate", "offered /s": "offered_rate", "good /s": "goodput",
        "p50 ms": "p50_ms", "p90 ms": "p90_ms", "p99 ms": "p99_ms",
        "outcomes": lambda run: ", ".join(f"{status}: {count}" for status, count in run["statuses"].items()),
    }  # fmt: skip
    return "## Runs\n\n" + tabulate(loads, columns)
