"""The tail of latency at half of capacity, while the service is scraped, its log rotated and a version promoted."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np

from bench import machine
from bench.load import LoadTest, Workload, keep
from bench.metrics import reloads, scrape
from bench.options import SHIPPED
from bench.servers import Launch, RunningServer, launched, service
from bench.untrained import draw_contexts, second_version
from loadtest.plan import Wire
from loadtest.samples import Samples
from loadtest.tables import number, table
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry, Version

WIRES: tuple[Wire, ...] = ("octet", "json")
CONNECTIONS, CAPACITY_S, SETTLE_S = 32, 5.0, 3.0
# Of an event, besides the time that it takes: what it delays arrives until then.
AFTER_S = 0.1
EVERY_S = 1.0
# Share of the requests that must have been sent in time, else the generator was measured.
MIN_OFFERED = 0.95
LIMIT = 4.0
ALIAS = "primary"
# From, until; seconds of time.monotonic().
Window = tuple[float, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a ratio is over the limit or was not measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.tails", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load for each wire, default 60")
    parser.add_argument("--rate", type=float, help="requests per second, default half of what 32 connections get")
    parser.add_argument("--out", type=Path, default=Path("runs/tails"), help="registry, logs and records")
    options = parser.parse_args(argv)
    described = machine.describe()
    print(described["processor"], described["date"], f"{options.seconds:g} s of Poisson arrivals a wire", sep="; ")
    found = measure(options)
    print(to_markdown(found))
    return 0 if all(each["ratio"] is not None and each["ratio"] <= LIMIT for each in found) else 1


def measure(options: argparse.Namespace) -> list[Mapping[str, Any]]:
    """Return the figures of each wire; the service has the first core, the load the others."""
    shutil.rmtree(options.out / "registry", ignore_errors=True)
    registry = Registry(Path(shutil.copytree(SHIPPED, options.out / "registry", symlinks=True)))
    one = registry.resolve(ALIAS)
    versions = second_version(registry, one), one
    directory = keep(options.out / "traffic", draw_contexts(64, load_checkpoint(one.path).card.dim))
    with launched(_launch(registry.root), options.out / "logs") as server:
        if machine.can_pin():
            os.sched_setaffinity(0, machine.cores()[1:])
        return [_one(options, Workload(server, wire, directory), registry, versions) for wire in WIRES]


def _launch(registry: Path) -> Launch:
    plain = service(registry).having(LVM_ACCESS_LOG="0.1")
    return plain.on(machine.cores()[:1]) if machine.can_pin() else plain


def _one(
    options: argparse.Namespace, workload: Workload, registry: Registry, versions: Sequence[Version]
) -> Mapping[str, Any]:
    workload.warm_up(CONNECTIONS)
    rate = options.rate or workload.measure(CONNECTIONS, CAPACITY_S)["per_second"] / 2
    given = {"wire": workload.wire, "rate": f"{rate:.1f}", "seconds": options.seconds + SETTLE_S}
    load = LoadTest(workload.server.url, workload.wire, options.out / "records", arrivals="poisson", **given)
    sleep(SETTLE_S)
    log = options.out / "logs" / f"{workload.server.name}.log"
    windows = happenings(events(workload.server, log, registry, versions), monotonic() + options.seconds)
    return {"wire": workload.wire, **figures(load.samples(), windows)}


def events(
    server: RunningServer, log: Path, registry: Registry, versions: Sequence[Version]
) -> Mapping[str, Callable[[int], object]]:
    """Return what happens during the load, by name; each gets the number of the round."""

    def promote(number: int) -> None:
        before = reloads(server.url, ALIAS)
        registry.point(ALIAS, versions[number % 2], why="to be measured")
        while reloads(server.url, ALIAS) == before:
            sleep(0.2)

    return {
        "nothing": lambda _: None,
        "scrape": lambda _: [*scrape(server.url)],
        "rotation of the log": lambda _: os.truncate(log, 0),
        "promotion": promote,
    }


def happenings(
    named: Mapping[str, Callable[[int], object]], end: float, every_s: float = EVERY_S
) -> Mapping[str, list[Window]]:
    """Let each event happen in turn until `end`; return the windows of each, seconds of `time.monotonic()`."""
    windows: dict[str, list[Window]] = {name: [] for name in named}
    for turn, name in ((turn, name) for turn in count() for name in named):
        began = monotonic()
        if began >= end:
            break
        named[name](turn)
        windows[name].append((began, monotonic() + AFTER_S))
        sleep(every_s)
    return windows


def figures(samples: Samples, windows: Mapping[str, Iterable[Window]]) -> Mapping[str, Any]:
    """Return rate, p50, p99 and their ratio, and p99 by event over the p99 of all; None if the load was not sent."""
    intended, sent = samples.offered(float(samples.intended[0]), float(samples.intended[-1]))
    p50, p99 = samples.p_ms(50), samples.p_ms(99)
    found = {name: _within(samples, each).p_ms(99) for name, each in windows.items()}
    is_offered = bool(p50 and p99 and sent >= MIN_OFFERED * intended)
    return {
        "rate": intended,
        "p50_ms": p50,
        "p99_ms": p99,
        "ratio": p99 / p50 if is_offered and p50 and p99 else None,
        "events": {name: each / p99 if is_offered and each and p99 else None for name, each in found.items()},
    }


def _within(samples: Samples, windows: Iterable[Window]) -> Samples:
    chosen = np.zeros(len(samples), bool)
    for begin, end in windows:
        chosen |= (samples.intended < end) & (samples.done >= begin)
    return samples.select(chosen)


def to_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a table, a row per wire."""
    events = found[0]["events"]
    heads = ("wire", "requests/s", "p50 ms", "p99 ms", "p99 / p50", *(f"p99 at {name} / p99" for name in events))
    keys = ("rate", "p50_ms", "p99_ms", "ratio")
    cells = [[*(each[key] for key in keys), *each["events"].values()] for each in found]
    return table(heads, [(each["wire"], *map(number, row)) for each, row in zip(found, cells, strict=True)])


if __name__ == "__main__":
    raise SystemExit(main())
