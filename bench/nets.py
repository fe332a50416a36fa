"""The nets without HTTP: the customer's Tables 1, 2, 4 and 5, every net on every runtime present, in rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bench.answers import TOLERANCE, Floats, apart
from bench.figures import times_ms, typical
from bench.load import WrongAnswers
from bench.plan import ROOT, Plan
from bench.versions import NETS, by_name, draw
from models import checkpoint as checkpoints
from models.checkpoint import Checkpoint
from models.registry import Registry
from models.runtimes import Runtime, open_runtime
from models.runtimes.torch import TorchRuntime, answer_of, build_net

QUERIES, WARM_UP = 200, 20
BATCHES = (1, 8, 32, 128)
BATCH_S, LEAST, MOST = 0.1, 5, 1000  # seconds and repetitions of one batch size in one round
WRONG = 1e-3  # beyond it an answer is wrong on any device, TOLERANCE is the target for the CPU

Figures = dict[str, float]


@dataclass(frozen=True)
class How:
    """A way to run a net: the library's name, the device, and threads (0: as the library chooses)."""

    library: str
    device: str
    threads: int = 0

    @property
    def label(self) -> str:
        """Name in tables; on the CPU with the number of threads."""
        threads = self.threads or torch.get_num_threads()
        return f"{self.library} {self.device}" + (f" x{threads}" if self.device == "cpu" else "")

    def open(self, checkpoint: Checkpoint) -> Runtime:
        """Return the net, ready to run and held to its golden vectors where the service would hold it."""
        if self.device == "cpu" and self.library == "torch":
            return TorchRuntime(checkpoint, "cpu")
        return open_runtime(checkpoint, self.device, self.threads or 1)


def ways() -> list[How]:
    """Return every way that there is on this machine."""
    cores = os.cpu_count() or 1
    found = [How("onnxruntime", "cpu", threads) for threads in dict.fromkeys((1, cores))]
    found.append(How("torch", "cpu"))
    if torch.cuda.is_available():
        found.append(How("torch", "cuda"))
    return found


def tables(plan: Plan, registry: Registry) -> dict[str, Any]:
    """Return the three tables as rows; raises `WrongAnswers` where a runtime does not answer as torch does."""
    versions = by_name(registry)
    loaded = {net: checkpoints.load(versions[net].path) for net in NETS}
    runs = {(net, how): how.open(loaded[net]) for net, how in product(NETS, ways())}
    contexts = draw(max(BATCHES), plan.dim)
    distances = {key: _distance(runtime, loaded[key[0]], contexts) for key, runtime in runs.items()}
    queries, batches = _rounds(plan, runs, contexts)
    return {
        "query": [_query_row(*key, queries[key], distances[key]) for key in runs],
        "batch": [_batch_row(*key, batches[key]) for key in runs],
        "size": [_size_row(*key, loaded[key[0]], versions[key[0]].path) for key in runs],
    }


def _rounds(
    plan: Plan, runs: Mapping[tuple[str, How], Runtime], contexts: Floats
) -> tuple[dict[tuple[str, How], Figures], dict[tuple[str, How], Figures]]:
    queries: dict[tuple[str, How], list[Figures]] = {key: [] for key in runs}
    batches: dict[tuple[str, How], list[Figures]] = {key: [] for key in runs}
    for _ in range(plan.rounds):
        for key, runtime in runs.items():
            queries[key].append(time_queries(runtime, contexts, QUERIES))
            batches[key].append({str(size): time_batch(runtime, contexts[:size]) for size in BATCHES})
    return {key: typical(each) for key, each in queries.items()}, {key: typical(each) for key, each in batches.items()}


def time_queries(runtime: Runtime, contexts: Floats, count: int) -> Figures:
    """Return mean and percentiles (ms) of `count` single queries after a warm-up."""
    seconds = [_seconds(runtime, contexts[n % len(contexts)][None]) for n in range(WARM_UP + count)]
    return times_ms(seconds[WARM_UP:])


def time_batch(runtime: Runtime, contexts: Floats) -> float:
    """Return milliseconds per context of one batch, the median of several."""
    runtime.run(contexts)
    seconds: list[float] = []
    began = perf_counter()
    while len(seconds) < LEAST or (perf_counter() - began < BATCH_S and len(seconds) < MOST):
        seconds.append(_seconds(runtime, contexts))
    return float(np.median(seconds)) / len(contexts) * 1e3


def _seconds(runtime: Runtime, contexts: Floats) -> float:
    began = perf_counter()
    runtime.run(contexts)
    return perf_counter() - began


def _distance(runtime: Runtime, checkpoint: Checkpoint, contexts: Floats) -> float:
    right = answer_of(build_net(checkpoint), contexts)
    singles = np.concatenate([runtime.run(context[None]) for context in contexts[:16]])
    worst = max(apart(runtime.run(contexts), right), apart(singles, right[:16]))
    if not worst <= WRONG:
        raise WrongAnswers(f"{checkpoint.card.name} on {runtime.name}: {worst:g} from torch's answer")
    return worst


def _query_row(net: str, how: How, figures: Figures, distance: float) -> dict[str, Any]:
    named = {"net": net, "runtime": how.label, "device": how.device}
    return {**named, **figures, "per_second": 1e3 / figures["mean_ms"], "apart": distance, "limit": TOLERANCE}


def _batch_row(net: str, how: How, figures: Figures) -> dict[str, Any]:
    speed_up = {size: figures["1"] / figures[size] for size in figures}
    return {"net": net, "runtime": how.label, "device": how.device, "ms_per_sample": figures, "speed_up": speed_up}


def _size_row(net: str, how: How, checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """Load once more, in a process of its own that has nothing else to weigh."""
    command = [sys.executable, "-m", "bench.footprint", str(directory.absolute())]
    command += [how.library, how.device, str(how.threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    weights = sum(tensor.nbytes for tensor in checkpoint.weights.values())
    return {
        "net": net,
        "runtime": how.label,
        "parameters": checkpoint.card.parameters,
        "weights_mb": weights / 1e6,
        "disk_mb": sum(path.stat().st_size for path in directory.iterdir()) / 1e6,
        **json.loads(done.stdout),
    }
