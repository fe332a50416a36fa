"""Measure everything side by side, section by section, and write one report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from bench import machine, nets, openloop, plot, protocol, report, service, shipped, targets
from bench.load import WrongAnswers
from bench.plan import ROOT, Plan
from bench.servers import SERVICE, Server, describe, field, joined, peers
from bench.versions import registry_of
from models.training.parts import Parts, sources

ROOMS = ("bench", "loadtest", "models", "service")


def run(
    plan: Plan,
    only: Sequence[str],
    environment: Path | None,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
    parts: Parts,
) -> dict[str, Any]:
    """Measure the sections `only`, the peers of `environment` among them, and write the report; return its figures.

    A section is kept in `parts` as it ends: its ratios are of one run. `failures` says which section had a wrong
    answer, and which peer did not start; `progress` is called with (sections done, sections in all).
    """
    figures: dict[str, Any] = {"machine": machine.describe(), "plan": {**asdict(plan), "out": str(plan.out)}}
    figures["failures"] = {}
    if environment:
        figures["peers"] = describe(environment)
    known = repr((plan, environment, figures.get("peers"))), *(sources(ROOT / room) for room in ROOMS)
    with ExitStack() as stack:
        for done, (name, section) in enumerate(_sections(plan, environment, figures, stack, only).items()):
            progress(done, len(only))
            began = perf_counter()
            measure(name, section, figures, parts, known)
            say(f"{name} took {perf_counter() - began:.0f} s")
    figures["machine"]["load average at the end"] = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    figures["targets"] = targets.judge(figures)
    figures["plots"] = plot.draw(plan.out, figures)
    report.write(plan.out, figures)
    return figures


def measure(
    name: str, section: Callable[[], Any], figures: dict[str, Any], parts: Parts, known: tuple[str, ...]
) -> None:
    """Put a section into `figures`, or why it failed; peers that do not start fail while one is measured."""
    try:
        kept = parts.figures(lambda: {"figures": section(), "failures": figures["failures"]}, name, *known)
    except WrongAnswers as error:
        figures["failures"][name] = str(error)
    else:
        figures[name] = kept["figures"]
        figures["failures"].update(kept["failures"])


def _sections(
    plan: Plan, environment: Path | None, figures: dict[str, Any], stack: ExitStack, only: Sequence[str]
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

    every = {
        "nets": lambda: nets.tables(plan, registry),
        "closed": closed,
        "rows": lambda: service.many_rows(plan, registry, servers()),
        "open": lambda: openloop.open_loop(plan, figures.get("closed") or closed(), servers()),
        "protocol": lambda: protocol.same_answers(ours(), plan.dim),
        "retrieval": lambda: shipped.retrieval(plan),
        "start": lambda: shipped.start(plan),
    }
    return {name: section for name, section in every.items() if name in only}
