"""What workers gain, and an owner of their nets: ratios of throughput and processor time from one interleaved run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.load import Workload, generator, keep
from bench.machine import processor_s
from bench.options import SHIPPED
from bench.servers import Launch, launched, service
from bench.stats import ratios
from bench.untrained import draw_contexts
from loadtest.tables import table
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.torch import build_net, run_net

CASES = {"1 worker": (1, "off"), "2 workers": (2, "off"), "1 + owner": (1, "on"), "2 + owner": (2, "on")}
BASE = next(iter(CASES))
ROLES = {b"own": "owner", b"work": "worker"}
CONTEXTS = 64
# With at least so many cores, the clients have one of their own.
CORES = 4
# What was measured, by case.
Round = Mapping[str, Mapping[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.workers", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement, default 3")
    parser.add_argument("--rounds", type=int, default=5, help="of all four cases in turn, default 5")
    parser.add_argument("--connections", type=int, default=32, help="default 32")
    parser.add_argument("--wire", choices=("octet", "json"), default="octet", help="default octet")
    parser.add_argument("--out", type=Path, default=Path("runs/workers"), help="logs; default runs/workers")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    described = machine.describe()
    load = f"{generator()}, {options.connections} connections, {options.wire}, {options.rounds} x {options.seconds:g} s"
    print(described["processor"], described["date"], load, sep="; ")
    print(to_markdown(compare(options)))


def compare(options: argparse.Namespace) -> list[Round]:
    """Return the rounds, each of every case in turn; raises `WrongAnswers`."""
    version = load_checkpoint(Registry(SHIPPED).resolve("primary").path)
    given = draw_contexts(CONTEXTS, version.card.dim)
    traffic = keep(options.out / "traffic", given, run_net(build_net(version), given))
    with ExitStack() as stack:
        servers = [stack.enter_context(launched(launch(case), options.out / "logs")) for case in CASES]
        if machine.can_pin(CORES):
            os.sched_setaffinity(0, machine.cores()[-1:])
        workloads = {server.name: Workload(server, options.wire, traffic) for server in servers}
        for workload in workloads.values():
            workload.warm_up(options.connections)
        return [{case: _one(options, workloads[case]) for case in CASES} for _ in range(options.rounds)]


def launch(case: str) -> Launch:
    """Return how to start a case, on all cores but the clients'."""
    workers, owner = CASES[case]
    plain = service(SHIPPED, case).having(LVM_WORKERS=str(workers), LVM_OWNER=owner)
    return plain.on(machine.cores()[:-1]) if machine.can_pin(CORES) else plain


def processes(pid: int) -> dict[int, str]:
    """Return the role of a server's process and of each child, by process id. Linux only."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    words = {child: Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0") for child in children}
    roles = {child: next((ROLES[word] for word in given if word in ROLES), "") for child, given in words.items()}
    return {pid: "supervisor" if children else "service", **roles}


def to_markdown(rounds: Sequence[Round]) -> str:
    """Return a table, a row per case: medians over rounds, of ratios within a round.

    The clients use the same cores if there are few. "With a core each" is what processor time says of workers that have
    a core of their own, as the worker that they are compared with.
    """
    heads = ("case", "throughput", "least to most", "with a core each", "µs of processor a request", "of these")
    return table(heads, [(case, *_cells(rounds, case)) for case in rounds[0]])


def _cells(rounds: Sequence[Round], case: str) -> tuple[str, ...]:
    ratio = ratios([one[case]["per_second"] for one in rounds], [one[BASE]["per_second"] for one in rounds])
    spent = [median(each) for each in zip(*(one[case]["us"] for one in rounds), strict=True)]
    parts = ", ".join(f"{role} {us:.0f}" for role, us in zip(rounds[0][case]["roles"], spent, strict=True))
    alone = _with_a_core_each(rounds, case)
    return f"{ratio['median']:.2f}", f"{ratio['min']:.2f} to {ratio['max']:.2f}", alone, f"{sum(spent):.0f}", parts


def _with_a_core_each(rounds: Sequence[Round], case: str) -> str:
    workers, owner = CASES[case]
    if owner == "on":
        return "-"
    ours, base = ([sum(one[each]["us"]) for one in rounds] for each in (case, BASE))
    return f"{workers * ratios(base, ours)['median']:.2f}"


def _one(options: argparse.Namespace, workload: Workload) -> Mapping[str, Any]:
    roles = processes(workload.server.pid)
    before = {pid: sum(processor_s(pid)) for pid in roles}
    figures = workload.measure(options.connections, options.seconds)
    spent = [(sum(processor_s(pid)) - before[pid]) / figures["requests"] * 1e6 for pid in roles]
    return {"per_second": figures["per_second"], "roles": list(roles.values()), "us": spent}


if __name__ == "__main__":
    main()
