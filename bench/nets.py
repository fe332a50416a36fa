"""The nets without HTTP: Tables 1, 2, 4 and 5, every net on every runtime of this machine, in rounds."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch

from bench.load import WrongAnswers
from bench.machine import rss_mb
from bench.options import BenchOptions
from bench.stats import TOLERANCE, max_difference, times_ms, typical
from bench.untrained import NETS, by_name, draw_contexts
from models.cores import cores
from models.registry.checkpoint import Checkpoint, load_checkpoint
from models.registry.registry import Registry
from models.runtimes import MIN_PARITY, PRECISIONS, Runtime, UnfitRuntime, open_runtime
from models.runtimes.torch import TorchRuntime, build_net, run_net
from models.vectors import Floats

QUERIES, WARM_UP = 200, 20
# Single queries before the memory of a loaded version is measured.
LOAD_QUERIES = 3
BATCHES = (1, 8, 32, 128)
# Seconds, and least and most repetitions, of one batch size in one round.
BATCH_S, LEAST, MOST = 0.1, 5, 1000
# Beyond it a float32 answer is wrong on any device; TOLERANCE is the target for the CPU.
WRONG = 1e-3
# The most that one component of an answer can differ if its cosine is the least that is served.
REDUCED = (2 * (1 - MIN_PARITY)) ** 0.5

Figures = dict[str, float]
Key = TypeVar("Key")


@dataclass(frozen=True)
class RunMode:
    """How to run a net: library, device, threads (0: as the library chooses) and precision."""

    library: str
    device: str
    threads: int = 0
    precision: str = "float32"

    @property
    def label(self) -> str:
        """The name in tables, on the CPU with the number of threads."""
        threads = self.threads or torch.get_num_threads()
        reduced = f" {self.precision}" if self.is_reduced else ""
        return f"{self.library}{reduced} {self.device}" + (f" x{threads}" if self.device == "cpu" else "")

    @property
    def is_reduced(self) -> bool:
        """Whether it computes in less than float32."""
        return self.precision != "float32"

    def open(self, checkpoint: Checkpoint) -> Runtime:
        """Return the net, ready to run; its golden vectors are checked if the service would check them.

        Raises:
            UnfitRuntime: its answers differ too much to be served.
        """
        if self.library == "torch":
            return TorchRuntime(checkpoint, self.device, self.precision)
        library = "openvino-" if self.library == "openvino" else ""
        return open_runtime(checkpoint, self.device, self.threads or 1, library + self.precision)


def run_modes() -> list[RunMode]:
    """Return every mode that this machine has."""
    threads = tuple(dict.fromkeys((1, cores())))
    found = [RunMode("onnxruntime", "cpu", n) for n in threads]
    found.append(RunMode("torch", "cpu"))
    if find_spec("openvino"):
        from models.runtimes.openvino import supports_precision

        found += [
            RunMode("openvino", "cpu", n, precision)
            for precision in PRECISIONS
            if supports_precision(precision)
            for n in threads
        ]
    if torch.cuda.is_available():
        found += [
            RunMode("torch", "cuda"),
            RunMode("cuda-graphs", "cuda"),
            RunMode("cuda-graphs", "cuda", precision="bf16"),
        ]
    if torch.backends.mps.is_available():
        found += [RunMode("torch", "mps"), RunMode("torch", "mps", precision="bf16")]
    return found


def open_all(loaded: Mapping[str, Checkpoint], modes: Sequence[RunMode]) -> dict[tuple[str, RunMode], Runtime]:
    """Return every net in every mode, without those whose precision is too low for the net to be served."""
    runs = {}
    for (net, checkpoint), mode in product(loaded.items(), modes):
        try:
            runs[net, mode] = mode.open(checkpoint)
        except UnfitRuntime as error:
            if not mode.is_reduced:
                raise
            print(f"bench: {net} is left out on {mode.label}: {error}", file=sys.stderr, flush=True)
    return runs


def tables(options: BenchOptions, registry: Registry) -> dict[str, Any]:
    """Return the three tables as rows.

    Raises:
        WrongAnswers: a runtime does not answer as torch does.
    """
    versions = by_name(registry)
    loaded = {net: load_checkpoint(versions[net].path) for net in NETS}
    runs = open_all(loaded, run_modes())
    contexts = draw_contexts(max(BATCHES), options.dim)
    distances = {
        (net, mode): checked_difference(runtime, loaded[net], contexts, REDUCED if mode.is_reduced else WRONG)
        for (net, mode), runtime in runs.items()
    }
    queries, batches = time_in_rounds(options.rounds, runs, contexts)
    return {
        "query": [_query_row(*key, queries[key], distances[key]) for key in runs],
        "batch": [_batch_row(*key, batches[key]) for key in runs],
        "size": [
            {"net": net, "runtime": mode.label, **footprint(mode, loaded[net], versions[net].path)}
            for net, mode in runs
        ],
    }


def time_in_rounds(
    rounds: int, runs: Mapping[Key, Runtime], contexts: Floats
) -> tuple[dict[Key, Figures], dict[Key, Figures]]:
    """Return, for each of `runs` in turn, figures of single queries and milliseconds a sample by batch size."""
    queries: dict[Key, list[Figures]] = {key: [] for key in runs}
    batches: dict[Key, list[Figures]] = {key: [] for key in runs}
    for _ in range(rounds):
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


def checked_difference(runtime: Runtime, checkpoint: Checkpoint, contexts: Floats, limit: float = WRONG) -> float:
    """Return the largest difference of one component to torch's answers, alone and in a batch.

    Raises:
        WrongAnswers: it is more than `limit`.
    """
    right = run_net(build_net(checkpoint), contexts)
    singles = np.concatenate([runtime.run(context[None]) for context in contexts[:16]])
    worst = max(max_difference(runtime.run(contexts), right), max_difference(singles, right[:16]))
    if not worst <= limit:
        raise WrongAnswers(f"{checkpoint.card.name} on {runtime.name}: {worst:g} from torch's answer")
    return worst


def _query_row(net: str, mode: RunMode, figures: Figures, difference: float) -> dict[str, Any]:
    named = _named(net, mode)
    return {**named, **figures, "per_second": 1e3 / figures["mean_ms"], "apart": difference, "limit": TOLERANCE}


def _batch_row(net: str, mode: RunMode, figures: Figures) -> dict[str, Any]:
    speed_up = {size: figures["1"] / figures[size] for size in figures}
    return {**_named(net, mode), "ms_per_sample": figures, "speed_up": speed_up}


def _named(net: str, mode: RunMode) -> dict[str, Any]:
    return {"net": net, "runtime": mode.label, "device": mode.device, "precision": mode.precision}


def footprint(mode: RunMode, checkpoint: Checkpoint, directory: Path) -> Figures:
    """Return parameters, megabytes and seconds to load of a version, measured in a process of its own."""
    return {
        "parameters": checkpoint.card.parameters,
        "weights_mb": sum(tensor.nbytes for tensor in checkpoint.weights.values()) / 1e6,
        "disk_mb": sum(path.stat().st_size for path in directory.iterdir()) / 1e6,
        **loading(directory, mode),
    }


def loading(directory: Path, mode: RunMode) -> Figures:
    """Return the seconds that loading a version takes a new process, `load_s`, and by what it grows, `grown_mb`."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_load, directory, mode).result()


def _load(directory: Path, mode: RunMode) -> Figures:
    """Load a version (read, verify, open) and send it queries; the libraries are loaded before."""
    import_module(f"models.runtimes.{'openvino' if mode.library == 'openvino' else 'onnx'}")
    if mode.device != "cpu":
        torch.zeros(1, device=mode.device)
    before = rss_mb(os.getpid())
    began = perf_counter()
    checkpoint = load_checkpoint(directory)
    runtime = mode.open(checkpoint)
    load_s = perf_counter() - began
    for _ in range(LOAD_QUERIES):
        runtime.run(checkpoint.golden_context[:1])
    gc.collect()
    return {"load_s": load_s, "grown_mb": rss_mb(os.getpid()) - before}
