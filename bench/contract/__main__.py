"""Measure the contract's figures and write one report; exit 1 if one is not met or could not be measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from bench import machine, plot, report
from bench.contract import runs, targets
from bench.contract.capacity_search import NoCapacity
from bench.contract.harness import (
    WORKLOAD,
    ContractOptions,
    Harness,
    leave_service_core,
    make_fixtures,
    running,
)
from bench.contract.measures import Figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if every figure is met, 1 if one is not or was not measured, 2 for a usage error."""
    given = _parser().parse_args(argv)
    began = perf_counter()
    options = ContractOptions(given.out, given.slo_ms, given.rows, given.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    described = {**asdict(options), "out": str(options.out), "workload": f"{WORKLOAD}, {options.rows} rows"}
    figures: dict[str, Any] = {"machine": machine.describe(), "plan": described}
    stolen, began_s = machine.stolen_s()
    try:
        for name, run in _measure(options, given.only, given.capacity):
            figures[name] = run
            print(f"figures: {name} is done, {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    except NoCapacity as error:
        print(f"figures: {error}", file=sys.stderr)
    taken, ended_s = machine.stolen_s()
    figures["machine"]["taken by other guests of the host"] = f"{(taken - stolen) / (ended_s - began_s):.1%}"
    figures["machine"]["load average at the end"] = machine.load_average()
    figures["targets"] = targets.results(figures, given.only)
    figures["plots"] = plot.draw_contract(options.out, figures)
    report.write(options.out, figures, report.figures_to_markdown)
    print(report.targets(figures["targets"]), options.out / "report.md", sep="\n")
    return 0 if all(row["is_met"] for row in figures["targets"]) else 1


def _measure(options: ContractOptions, only: Sequence[str], c: float | None) -> Iterator[tuple[str, Figures]]:
    """Yield every run's name and figures; from here on this process, too, stays off the service's core."""
    fixtures = make_fixtures(options.out)
    leave_service_core()
    with running(options, fixtures) as harness:
        found: Figures = {"per_second": c, "probes": []} if c else runs.find_capacity(harness)
        yield "capacity", found
        c = float(found["per_second"])
        for name, run in _loads(harness, c).items():
            if name in only:
                yield name, runs.reconciled(harness, run)
    if "life" in only:
        yield "life", runs.life(options, fixtures, c)


def _loads(harness: Harness, c: float) -> dict[str, Callable[[], Figures]]:
    return {
        "2C": lambda: runs.overload(harness, c, 2, 60),
        "10C": lambda: runs.overload(harness, c, 10, 60),
        "promotions": lambda: runs.promotions(harness, c),
        "fairness": lambda: runs.fairness(harness, c),
        "soak": lambda: runs.soak(harness, c),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.contract", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/figures"), help="default runs/figures")
    parser.add_argument("--slo-ms", type=_positive, default=100.0, help="p99 that C has to hold [ms], default 100")
    parser.add_argument("--rows", type=int, default=8, help="contexts of a request, default 8")
    parser.add_argument("--minutes", type=_positive, default=2.0, help="of the soak, default 2")
    parser.add_argument("--capacity", type=_positive, metavar="C", help="requests/s, instead of looking for it")
    parser.add_argument("--only", nargs="+", choices=targets.BY_RUN, default=tuple(targets.BY_RUN), metavar="RUN",
                        help=", ".join(targets.BY_RUN))  # fmt: skip
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(main())
