"""What workers bring, and an owner of their nets: ratios of throughput and processor time from one interleaved run."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.capacity.processor import processor_s
from bench.figures import ratios
from bench.load import generator, measure, warm_up
from bench.plan import SHIPPED
from bench.servers import Launch, Server, launched, service
from bench.traffic import Traffic, exchange_of, prepare
from bench.versions import draw
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.torch import build_net, run_net
from models.vectors import Floats

CASES = {"1 worker": (1, "off"), "2 workers": (2, "off"), "1 + owner": (1, "on"), "2 + owner": (2, "on")}
BASE = next(iter(CASES))
ROLES = {b"own": "owner", b"work": "worker"}
CONTEXTS = 64
SPARE = 4  # cores from which on the clients have one of their own
Round = Mapping[str, Mapping[str, Any]]  # what was measured, by case


def main(argv: Sequence[str] | None = None) -> None:
    """Print where it was measured, and the table."""
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
    print(table(compare(options)))


def compare(options: argparse.Namespace) -> list[Round]:
    """Return the rounds, each of every case in turn; raises `WrongAnswers`."""
    version = load_checkpoint(Registry(SHIPPED).resolve("primary").path)
    contexts = draw(CONTEXTS, version.card.dim)
    right = run_net(build_net(version), contexts)
    with ExitStack() as stack:
        servers = [stack.enter_context(launched(launch(case), options.out / "logs")) for case in CASES]
        if is_pinned():
            os.sched_setaffinity(0, cores()[-1:])
        traffic = {server.name: _traffic(options, server, contexts, right) for server in servers}
        for server in servers:
            warm_up(server, traffic[server.name], options.connections)
        return [
            {server.name: _one(options, server, traffic[server.name]) for server in servers}
            for _ in range(options.rounds)
        ]


def launch(case: str) -> Launch:
    """Return how to start a case, on all cores but the clients'."""
    workers, owner = CASES[case]
    plain = service(SHIPPED, case)
    pinned = ("taskset", "-c", ",".join(map(str, cores()[:-1]))) if is_pinned() else ()
    settings = {"LVM_WORKERS": str(workers), "LVM_OWNER": owner}
    return replace(plain, command=(*pinned, *plain.command), environment={**plain.environment, **settings})


def cores() -> list[int]:
    """Return the cores that there are for this process."""
    return sorted(os.sched_getaffinity(0))


def is_pinned() -> bool:
    """Return whether the clients have a core of their own."""
    return len(cores()) >= SPARE and shutil.which("taskset") is not None


def processes(pid: int) -> dict[int, str]:
    """Return a server's process and its children, by what they are; Linux."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    words = {child: Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0") for child in children}
    roles = {child: next((ROLES[word] for word in said if word in ROLES), "") for child, said in words.items()}
    return {pid: "supervisor" if children else "service", **roles}


def table(rounds: Sequence[Round]) -> str:
    """Return a table in Markdown, a row per case: medians over rounds, of ratios within a round."""
    lines = ["| case | throughput | least to most | µs of processor a request | of these |", "|---|---|---|---|---|"]
    for case in rounds[0]:
        rates = [[one[name]["per_second"] for one in rounds] for name in (case, BASE)]
        ratio = ratios(*rates)
        spent = [median(each) for each in zip(*(one[case]["us"] for one in rounds), strict=True)]
        parts = ", ".join(f"{role} {us:.0f}" for role, us in zip(rounds[0][case]["roles"], spent, strict=True))
        spread = f"{ratio['min']:.2f} to {ratio['max']:.2f}"
        lines.append(f"| {case} | {ratio['median']:.2f} | {spread} | {sum(spent):.0f} | {parts} |")
    return "\n".join(lines)


def _traffic(options: argparse.Namespace, server: Server, contexts: Floats, right: Floats) -> Traffic:
    return prepare(options.out / "traffic", server, exchange_of(options.wire, right.shape[1]), contexts, right)


def _one(options: argparse.Namespace, server: Server, traffic: Traffic) -> Mapping[str, Any]:
    roles = processes(server.pid)
    before = {pid: sum(processor_s(pid)) for pid in roles}
    figures = measure(server, traffic, options.connections, options.seconds)
    spent = [(sum(processor_s(pid)) - before[pid]) / figures["requests"] * 1e6 for pid in roles]
    return {"per_second": figures["per_second"], "roles": list(roles.values()), "us": spent}


if __name__ == "__main__":
    main()
