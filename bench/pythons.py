"""The service on several Pythons: requests per second of processor time, as ratios to the first from one run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from subprocess import run
from typing import get_args

from bench import machine
from bench.load import Workload, generator, keep
from bench.options import SHIPPED
from bench.servers import Launch, launched, service
from bench.stats import ratios
from bench.untrained import draw_contexts
from loadtest.plan import Wire
from loadtest.tables import table
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry

CONNECTIONS = (1, 32)
# Requests per second of processor time, by wire and connections.
Round = Mapping[tuple[str, int], float]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.pythons", description=__doc__, allow_abbrev=False)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="interpreters that have what serving needs")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement, default 3")
    parser.add_argument("--rounds", type=int, default=5, help="of all Pythons in turn, default 5")
    parser.add_argument("--out", type=Path, default=Path("runs/pythons"), help="logs; default runs/pythons")
    options = parser.parse_args(argv)
    print(machine.describe()["processor"], generator(), f"{options.rounds} x {options.seconds:g} s", sep="; ")
    print(to_markdown(compare(options)))


def compare(options: argparse.Namespace) -> Mapping[str, Sequence[Round]]:
    """Return the rounds of each Python by its version; raises `WrongAnswers`."""
    dim = load_checkpoint(Registry(SHIPPED).resolve("primary").path).card.dim
    traffic = keep(options.out / "traffic", draw_contexts(64, dim))
    rounds: dict[str, list[Round]] = {}
    with ExitStack() as stack:
        servers = [stack.enter_context(launched(launch(python), options.out / "logs")) for python in options.pythons]
        for _ in range(options.rounds):
            for server in servers:
                workloads = [Workload(server, wire, traffic) for wire in get_args(Wire)]
                rounds.setdefault(server.name, []).append(_round(workloads, options.seconds))
    return rounds


def launch(python: str) -> Launch:
    """Return how to start the service on a Python; its name is that of its version."""
    told = run((python, "-c", "import platform; print(platform.python_version())"), capture_output=True, check=True)
    return replace(service(SHIPPED, told.stdout.decode().strip()), command=(python, "-m", "lvm", "serve"))


def _round(workloads: Sequence[Workload], seconds: float) -> Round:
    return {(each.wire, count): _rate(each, count, seconds) for each in workloads for count in CONNECTIONS}


def _rate(workload: Workload, connections: int, seconds: float) -> float:
    before = sum(machine.processor_s(workload.server.pid))
    requests: int = workload.measure(connections, seconds)["requests"]
    return requests / (sum(machine.processor_s(workload.server.pid)) - before)


def to_markdown(rounds: Mapping[str, Sequence[Round]]) -> str:
    """Return a table, a row per Python: medians of ratios within a round, then least and most."""
    base = next(iter(rounds.values()))
    heads = ("Python", *(f"{wire}, {count} connection{'s' * (count > 1)}" for wire, count in base[0]))
    return table(heads, [(python, *(_cell(ours, base, key) for key in base[0])) for python, ours in rounds.items()])


def _cell(ours: Sequence[Round], base: Sequence[Round], key: tuple[str, int]) -> str:
    found = ratios([each[key] for each in ours], [each[key] for each in base])
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


if __name__ == "__main__":
    main()
