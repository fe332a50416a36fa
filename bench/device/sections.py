"""The sections of the check of a device: each yields rows, and a row that fails has an `error` instead of figures."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bench import machine
from bench.load import Workload, keep
from bench.nets import time_batch
from bench.servers import Launch, launched, service
from bench.untrained import draw_contexts
from loadtest.plan import Wire
from models.recipe import Recipe, TrainingPrecision
from models.registry.card import read_card
from models.registry.checkpoint import Checkpoint, load_checkpoint
from models.registry.registry import Registry
from models.runtimes import Runtime, open_runtime, worst_cosine
from models.runtimes.torch import TorchRuntime, build_net, run_net
from models.training.train import Trainer
from models.vectors import normalise
from models.windows import Windows

Row = dict[str, Any]
Load = tuple[Wire, int, int]  # wire, rows of a request, connections
# What the service on the CPU is measured by as well.
BOTH: Sequence[Load] = (("octet", 1, 32), ("octet", 64, 32))
PRECISIONS: Sequence[TrainingPrecision] = ("float32", "bf16")
TRAINED = ("amn", "gmn", "lstm", "gru", "transformer")
LENGTH, DIM, CHUNKS = 5, 384, 60  # T, D, and chunks of an article


@dataclass(frozen=True)
class Plan:
    """On which device and nets a section is measured, and by how much; `scratch` is a directory for its files."""

    device: str
    registry: Registry
    scratch: Path
    is_tiny: bool

    @property
    def batches(self) -> Sequence[int]:
        """Batch sizes."""
        return (1, 4) if self.is_tiny else tuple(2**power for power in range(11))

    @property
    def loads(self) -> Sequence[Load]:
        """What the service on the device is measured by."""
        if self.is_tiny:
            return (("octet", 1, 2), ("json", 4, 1))
        octets: list[Load] = [("octet", 1, connections) for connections in (1, 8, 32, 128, 512)]
        return (*octets, ("json", 1, 1), ("json", 1, 32), *BOTH)

    @property
    def seconds(self) -> float:
        """Seconds of one load."""
        return 0.2 if self.is_tiny else 1.5

    @property
    def trained(self) -> Sequence[str]:
        """The nets that are trained."""
        return TRAINED[:1] if self.is_tiny else TRAINED

    @property
    def windows(self) -> int:
        """Windows of an epoch of training."""
        return 110 if self.is_tiny else 68_750

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Yield every net of the registry, the smallest first."""
        found = [version for version in self.registry.versions() if read_card(version.path).kind == "net"]
        for version in sorted(found, key=lambda each: read_card(each.path).parameters):
            yield load_checkpoint(version.path)


def of_machine(plan: Plan) -> Iterator[Row]:
    """Yield what this machine is."""
    yield {**machine.describe(), "device": plan.device, "python": platform.python_version()}
    if plan.device == "cuda":
        known = torch.cuda.get_device_properties(0)
        yield {"gpu": known.name, "memory_gb": known.total_memory / 1e9, "cuda": torch.version.cuda}


def golden(plan: Plan) -> Iterator[Row]:
    """Yield how near each net comes to its golden vectors, and to torch on the CPU, in each precision."""
    for checkpoint, precision in product(plan.checkpoints(), PRECISIONS):
        about = {"net": checkpoint.card.name, "precision": precision}
        yield _row(about, partial(_nearness, plan, checkpoint, precision))


def _nearness(plan: Plan, checkpoint: Checkpoint, precision: str) -> Row:
    began = perf_counter()
    runtime = open_runtime(checkpoint, plan.device, 1, precision)
    open_s = perf_counter() - began
    given = draw_contexts(96, checkpoint.card.dim)
    right = run_net(build_net(checkpoint), given)
    # other rows of a batch, and what an earlier batch left in a graph, must not change an answer
    alone = np.concatenate([runtime.run(context[None]) for context in given[:8]])
    return {
        "runtime": runtime.name,
        "open_s": round(open_s, 3),
        "golden_cosine": worst_cosine(runtime.run(checkpoint.golden_context), checkpoint.golden_vector),
        "torch_difference": float(np.abs(runtime.run(given) - right).max()),
        "alone_difference": float(np.abs(alone - right[:8]).max()),
    }


def batches(plan: Plan) -> Iterator[Row]:
    """Yield the milliseconds of one batch of every size, for each net, as it is served and in plain torch."""
    for checkpoint in plan.checkpoints():
        ways: list[Callable[[], Runtime]] = [
            *(partial(open_runtime, checkpoint, plan.device, 1, precision) for precision in PRECISIONS),
            partial(TorchRuntime, checkpoint, plan.device),
        ]
        for name, open_one in zip((*PRECISIONS, "plain torch"), ways, strict=True):
            yield _row({"net": checkpoint.card.name, "run": name}, partial(_times, plan, open_one, checkpoint.card.dim))


def _times(plan: Plan, open_one: Callable[[], Runtime], dim: int) -> Row:
    runtime, largest = open_one(), max(plan.batches)
    given = draw_contexts(largest, dim)
    times = {size: round(time_batch(runtime, given[:size]) * size, 4) for size in plan.batches}
    return {"runtime": runtime.name, "rows_per_second": round(1e3 * largest / times[largest]), "ms": times}


def served(plan: Plan) -> Iterator[Row]:
    """Yield throughput and latency of a device worker with two HTTP workers, and of two workers on the CPU."""
    checkpoint = load_checkpoint(plan.registry.resolve("primary").path)
    given = draw_contexts(64, checkpoint.card.dim)
    traffic = keep(plan.scratch / "traffic", given, run_net(build_net(checkpoint), given))
    root = plan.registry.root
    on_device = service(root, "device").having(LVM_DEVICE=plan.device, LVM_WORKERS="2", LVM_OWNER="on")
    yield from _loads(plan, on_device, plan.loads, traffic)
    on_cpu = service(root, "cpu").having(LVM_DEVICE="cpu", LVM_WORKERS="2", LVM_OWNER="off")
    yield from _loads(plan, on_cpu, plan.loads[:1] if plan.is_tiny else BOTH, traffic)


def _loads(plan: Plan, launch: Launch, loads: Sequence[Load], traffic: Path) -> Iterator[Row]:
    with launched(launch, plan.scratch / "logs") as server:
        yield {"service": launch.name, "ready_s": round(server.ready_s, 2)}
        for wire, rows, connections in loads:
            workload = Workload(server, wire, traffic, rows)
            about = {"service": launch.name, "wire": wire, "rows": rows, "connections": connections}
            yield _row(about, partial(_load, plan, workload, connections))


def _load(plan: Plan, workload: Workload, connections: int) -> Row:
    workload.warm_up(connections)
    found = workload.measure(connections, plan.seconds)
    return {name: round(found[name], 3) for name in ("per_second", "p50_ms", "p99_ms")}


def training(plan: Plan) -> Iterator[Row]:
    """Yield windows per second of one epoch of each net, on vectors made here, in each precision."""
    data = _windows(plan.windows)
    for net, precision in product(plan.trained, PRECISIONS):
        recipe = Recipe(epochs=1, batch_size=256, precision=precision)
        yield _row({"net": net, "precision": precision}, partial(_epoch, plan, net, recipe, data))


def _epoch(plan: Plan, net: str, recipe: Recipe, data: Windows) -> Row:
    trainer = Trainer(net, {"dim": DIM}, recipe, data, plan.device)
    held_out = data.take(np.arange(min(len(data), 256)))
    began = perf_counter()
    trainer.run(held_out, plan.scratch / "state.pt", lambda epoch: None)
    seconds = perf_counter() - began
    loss = round(trainer.history[0].loss, 4)
    return {"windows": len(data), "seconds": round(seconds, 2), "per_second": round(len(data) / seconds), "loss": loss}


def _windows(count: int) -> Windows:
    """Return windows of articles whose chunks drift around a topic, as those of real ones do."""
    articles = -(-count // (CHUNKS - LENGTH))
    draw = np.random.default_rng(0)
    topics = draw.standard_normal((articles, 1, DIM), np.float32)
    drift = np.cumsum(0.3 * draw.standard_normal((articles, CHUNKS, DIM), np.float32), axis=1)
    start = (np.arange(articles)[:, None] * CHUNKS + np.arange(CHUNKS - LENGTH)).ravel()
    article = np.repeat(np.arange(articles, dtype=np.int32), CHUNKS - LENGTH)
    return Windows(normalise((topics + drift).reshape(-1, DIM)), start, article, LENGTH)


SECTIONS: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "machine": of_machine,
    "golden": golden,
    "batches": batches,
    "service": served,
    "training": training,
}


def _row(about: Row, measure: Callable[[], Row]) -> Row:
    """Return a row with its figures, or with the error that `measure` raised."""
    try:
        return {**about, **measure()}
    except Exception as error:
        # one net, precision or load that fails must not hide the others
        return {**about, "error": f"{type(error).__name__}: {error}"[-1000:]}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows of one section as lines of JSON."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.device.sections", allow_abbrev=False)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("device")
    parser.add_argument("registry", type=Path)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(argv)
    # SIGTERM as an exception, so that a server that was started is stopped
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"stopped by signal {number}"))
    with TemporaryDirectory(prefix="lvm-device-") as scratch:
        plan = Plan(given.device, Registry(given.registry), Path(scratch), given.tiny)
        for row in SECTIONS[given.section](plan):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
