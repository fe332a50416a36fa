"""Measure everything side by side, section by section, and write one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from bench import budget, compare, machine, nets, plot, protocol, report, shipped, targets
from bench.load import WrongAnswers
from bench.options import ROOT, BenchOptions
from bench.servers import SERVICE, RunningServer, compared, describe, peers, responding
from bench.untrained import registry_of
from models.training.work_cache import WorkCache, source_digest

PACKAGES = ("bench", "loadtest", "models", "service")


def run(
    options: BenchOptions,
    only: Sequence[str],
    environment: Path | None,
    log: Callable[[str], None],
    progress: Callable[[int, int], None],
    cache: WorkCache,
) -> dict[str, Any]:
    """Measure the sections `only`, the peers of `environment` among them, and write the report; return its figures.

    A section is kept in `cache` when it ends, so that its ratios are of one run. `failures` names the sections with a
    wrong answer and the peers that did not start; `progress` is called with (sections done, sections in all).
    """
    figures: dict[str, Any] = {"machine": machine.describe(), "plan": {**asdict(options), "out": str(options.out)}}
    figures["failures"] = {}
    if environment:
        figures["peers"] = describe(environment)
    known = repr((options, environment, figures.get("peers"))), *(source_digest(ROOT / package) for package in PACKAGES)
    with ExitStack() as stack:
        for done, (name, section) in enumerate(_sections(options, environment, figures, stack, only).items()):
            progress(done, len(only))
            began = perf_counter()
            measure(name, section, figures, cache, known)
            log(f"{name} took {perf_counter() - began:.0f} s")
    figures["machine"]["load average at the end"] = machine.load_average()
    figures["targets"] = [target.judge(figures) for target in targets.TARGETS]
    figures["plots"] = plot.draw_bench(options.out, figures)
    report.write(options.out, figures, report.to_markdown)
    return figures


def measure(
    name: str, section: Callable[[], Any], figures: dict[str, Any], cache: WorkCache, known: tuple[str, ...]
) -> None:
    """Put a section into `figures`, or the reason of its failure; a section can add peers that did not start."""
    try:
        kept = cache.get_json(lambda: {"figures": section(), "failures": figures["failures"]}, name, *known)
    except WrongAnswers as error:
        figures["failures"][name] = str(error)
    else:
        figures[name] = kept["figures"]
        figures["failures"].update(kept["failures"])


def _sections(
    options: BenchOptions, environment: Path | None, figures: dict[str, Any], stack: ExitStack, only: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    registry = registry_of(options.out, options.dim)

    @cache
    def servers() -> list[RunningServer]:
        logs = options.out / "logs"
        known = stack.enter_context(compared(registry, options.dim, logs))
        others = peers(environment, registry.resolve("primary").path) if environment else ()
        return known + stack.enter_context(responding(others, options.dim, logs, figures["failures"]))

    def ours() -> RunningServer:
        return next(server for server in servers() if server.name == SERVICE)

    def closed() -> dict[str, Any]:
        return compare.closed_loop(options, registry, servers())

    every = {
        "nets": lambda: nets.tables(options, registry),
        "closed": closed,
        "rows": lambda: compare.many_rows(options, registry, servers()),
        "open": lambda: compare.open_loop(options, figures.get("closed") or closed(), servers()),
        "budget": lambda: budget.measure(options, registry),
        "protocol": lambda: protocol.same_answers(ours(), options.dim),
        "retrieval": lambda: shipped.retrieval(options),
        "start": lambda: shipped.start(options),
    }
    return {name: section for name, section in every.items() if name in only}
