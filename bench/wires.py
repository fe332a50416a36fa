"""HTTP beside gRPC: throughput, latency and processor time of one context a request, and of HTTP with gRPC idle."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import grpc
import numpy as np

from bench import machine
from bench.load import Workload, WrongAnswers, generator, keep
from bench.machine import processor_s
from bench.options import SHIPPED
from bench.servers import RunningServer, free_port, launched, service
from bench.stats import TOLERANCE, max_difference
from bench.untrained import draw_contexts
from loadtest.tables import table
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.torch import build_net, run_net
from models.vectors import Floats
from service.grpc.messages import message_type

OFF, IDLE, GRPC = CASES = ("HTTP, no gRPC", "HTTP, gRPC idle", "gRPC")
INFER = "/inference.GRPCInferenceService/ModelInfer"
MANY = 64
WARM_UP_S = 0.5
# What was measured, by case and number of connections.
Round = Mapping[tuple[str, int], Mapping[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.wires", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement, default 2")
    parser.add_argument("--rounds", type=int, default=3, help="of all cases in turn, default 3")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32], help="default 1 8 32")
    parser.add_argument("--out", type=Path, default=Path("runs/wires"), help="logs; default runs/wires")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    described = machine.describe()
    load = f"HTTP by {generator()}, gRPC by grpc.aio, {options.rounds} x {options.seconds:g} s, medians"
    print(described["processor"], described["date"], load, sep="; ")
    print(to_markdown(compare(options)))


def compare(options: argparse.Namespace) -> list[Round]:
    """Return the rounds, each of every case in turn; raises `WrongAnswers`."""
    version = load_checkpoint(Registry(SHIPPED).resolve("primary").path)
    given = draw_contexts(MANY, version.card.dim)
    answers = run_net(build_net(version), given)
    traffic = keep(options.out / "traffic", given, answers)
    port = free_port()
    plain = service(SHIPPED, "plain")
    both = service(SHIPPED, "both").having(LVM_GRPC_PORT=str(port))
    pinned = [launch.on(machine.cores()[:1]) if machine.can_pin() else launch for launch in (plain, both)]
    with ExitStack() as stack:
        off, on = (stack.enter_context(launched(launch, options.out / "logs")) for launch in pinned)
        if machine.can_pin():
            os.sched_setaffinity(0, machine.cores()[1:])
        loads = {
            OFF: Workload(off, "octet", traffic),
            IDLE: Workload(on, "octet", traffic),
            GRPC: Calls(port, given, answers),
        }
        return [_round(options, loads, {OFF: off, IDLE: on, GRPC: on}) for _ in range(options.rounds)]


def to_markdown(rounds: Sequence[Round]) -> str:
    """Return a table, a row per case and number of connections: medians over rounds."""
    heads = ("connections", "wire", "requests/s", "p50 ms", "p99 ms", "µs of the server's processor a request")
    return table(heads, [(str(key[1]), key[0], *_cells(rounds, key)) for key in rounds[0]])


def _cells(rounds: Sequence[Round], key: tuple[str, int]) -> tuple[str, ...]:
    middle = {name: median(one[key][name] for one in rounds) for name in ("per_second", "p50", "p99", "us")}
    return f"{middle['per_second']:.0f}", f"{middle['p50']:.2f}", f"{middle['p99']:.2f}", f"{middle['us']:.0f}"


def _round(options: argparse.Namespace, loads: Mapping[str, Any], servers: Mapping[str, RunningServer]) -> Round:
    found = {}
    for connections in options.connections:
        for case in CASES:
            pid = servers[case].pid
            loads[case].warm_up(connections)
            before = sum(processor_s(pid))
            figures = loads[case].measure(connections, options.seconds)
            spent = (sum(processor_s(pid)) - before) / figures["requests"] * 1e6
            times = {"p50": figures["p50_ms"], "p99": figures["p99_ms"]}
            found[case, connections] = {"per_second": figures["per_second"], "us": spent, **times}
    return found


@dataclass(frozen=True)
class Calls:
    """Closed loops of calls of ModelInfer, as `Workload` has of requests: a connection each, one call at a time."""

    port: int
    contexts: Floats
    answers: Floats

    def warm_up(self, connections: int) -> None:
        """Call for half a second; raises `WrongAnswers` if an answer is wrong."""
        asyncio.run(self._check())
        self.measure(connections, WARM_UP_S)

    def measure(self, connections: int, seconds: float) -> dict[str, Any]:
        """Return requests, `per_second` and latencies (ms); raises `grpc.RpcError`."""
        latencies, elapsed = asyncio.run(self._run(connections, seconds))
        middle, slow = np.percentile(np.array(latencies) * 1e3, (50, 99))
        return {
            "requests": len(latencies),
            "per_second": len(latencies) / elapsed,
            "p50_ms": float(middle),
            "p99_ms": float(slow),
        }

    async def _run(self, connections: int, seconds: float) -> tuple[list[float], float]:
        bodies = [_request(context) for context in self.contexts]
        latencies: list[float] = []
        began = perf_counter()

        async def loop(first: int) -> None:
            async with self._channel() as channel:
                ask = channel.unary_unary(INFER)
                for at in count(first):
                    sent = perf_counter()
                    if sent - began > seconds:
                        return
                    await ask(bodies[at % len(bodies)])
                    latencies.append(perf_counter() - sent)

        await asyncio.gather(*map(loop, range(connections)))
        return latencies, perf_counter() - began

    async def _check(self) -> None:
        async with self._channel() as channel:
            data = await channel.unary_unary(INFER)(_request(self.contexts))
        (raw,) = message_type("ModelInferResponse").FromString(data).raw_output_contents
        difference = max_difference(np.frombuffer(raw, "<f4").reshape(self.answers.shape), self.answers)
        if difference > TOLERANCE:
            raise WrongAnswers(f"gRPC: {difference}")

    def _channel(self) -> Any:
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", [("grpc.use_local_subchannel_pool", 1)])


def _request(contexts: Floats) -> bytes:
    """Return the message that asks for the next vectors of contexts `(n, T, D)`, or of one `(T, D)`."""
    rows = contexts if contexts.ndim == 3 else contexts[None]
    tensor = {"name": "context", "datatype": "FP32", "shape": rows.shape}
    message = message_type("ModelInferRequest")(
        model_name="primary", inputs=[tensor], raw_input_contents=[rows.astype("<f4").tobytes()]
    )
    body: bytes = message.SerializeToString()
    return body


if __name__ == "__main__":
    main()
