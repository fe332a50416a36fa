"""Measure everything side by side and write one report; exits 1 where an answer was wrong or a peer did not start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from bench import machine, nets, openloop, plot, protocol, report, service, shipped, targets
from bench.load import WrongAnswers
from bench.plan import Plan
from bench.servers import SERVICE, Server, describe, field, joined, peers
from bench.versions import registry_of

SECTIONS = ("nets", "closed", "rows", "open", "protocol", "retrieval", "start")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if every answer was right and every peer started, 1 if not, 2 for a usage error."""
    options = _parser().parse_args(argv)
    plan = Plan(options.seconds, options.rounds, options.dim, options.out)
    figures: dict[str, Any] = {"machine": machine.describe(), "plan": {**asdict(plan), "out": str(plan.out)}}
    figures["failures"] = {}
    if options.peers:
        figures["peers"] = describe(options.peers)
    _measure(plan, options.only, options.peers, figures)
    figures["machine"]["load average at the end"] = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    figures["targets"] = targets.judge(figures)
    figures["plots"] = plot.draw(plan.out, figures)
    report.write(plan.out, figures)
    print(plan.out / "report.md")
    return 1 if figures["failures"] else 0


def _measure(plan: Plan, only: Sequence[str], environment: Path | None, figures: dict[str, Any]) -> None:
    """Put each section into `figures`, and why some failed."""
    with ExitStack() as stack:
        for name, section in _sections(plan, environment, figures, stack).items():
            if name not in only:
                continue
            began = perf_counter()
            try:
                figures[name] = section()
            except WrongAnswers as error:
                figures["failures"][name] = str(error)
            print(f"bench: {name} took {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def _sections(
    plan: Plan, environment: Path | None, figures: dict[str, Any], stack: ExitStack
) -> dict[str, Callable[[], Any]]:
    registry = registry_of(plan.out, plan.dim)

    @cache
    def servers() -> list[Server]:
        logs = plan.out / "logs"
        known = stack.enter_context(field(registry, plan.dim, logs))
        others = peers(environment, registry.resolve("primary").path) if environment else ()
        return known + stack.enter_context(joined(others, plan.dim, logs, figures["failures"]))

    def ours() -> Server:
        return next(server for server in servers() if server.name == SERVICE)

    def closed() -> dict[str, Any]:
        return service.closed_loop(plan, registry, servers())

    return {
        "nets": lambda: nets.tables(plan, registry),
        "closed": closed,
        "rows": lambda: service.many_rows(plan, registry, servers()),
        "open": lambda: openloop.open_loop(plan, figures.get("closed") or closed(), servers()),
        "protocol": lambda: protocol.same_answers(ours(), plan.dim),
        "retrieval": lambda: shipped.retrieval(plan),
        "start": lambda: shipped.start(plan),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=_positive, default=3.0, help="of one measurement [s], default 3")
    parser.add_argument("--rounds", type=_whole, default=5, help="of each measurement, default 5")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="default runs/bench")
    parser.add_argument("--dim", type=_whole, default=768, help="D of the nets, default 768")
    parser.add_argument(
        "--peers", type=_environment, metavar="DIR", help="measure the peers, too: a virtual environment that has them"
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS)
    )
    return parser


def _environment(text: str) -> Path:
    if not (Path(text) / "bin" / "python").exists():
        raise ValueError
    return Path(text)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(main())
