"""Finds the runtime that is fastest for a net on this machine, among those that give its answers. No torch.

A choice belongs to a version and a machine. It is kept in a directory of the machine, not in the version, which others
serve too.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile
from time import perf_counter, thread_time
from typing import Any

import numpy as np

from models.cores import cores
from models.evaluate import find_on_card, mean_cosine, window_counts
from models.registry.alias import Alias
from models.registry.card import Card
from models.registry.checkpoint import Checkpoint
from models.registry.manifest import digest
from models.registry.registry import Registry, UnknownVersion, Version
from models.retrieval.corpus import BadCorpus, read_corpus
from models.runtimes import Runtime, open_for_trial
from models.vectors import Floats
from models.windows import NoWindows, Windows, require_windows

# As `open_runtime` takes them. The first is the reference, and serves if no other is faster. The last is tried only if
# all between are rejected: the same library takes longer for it.
TRIED = ("float32", "openvino-bf16", "openvino-int8", "openvino-float32")
# A runtime is as fast as the mean of its ratios to the reference at these numbers of rows; less gain is noise.
ROWS = (1, 32)
MIN_GAIN = 0.05
# Rounds of timings: at least and, within these seconds, at most. The least times count.
LEAST_ROUNDS, MOST_ROUNDS, TIMING_S = 3, 50, 0.5
# Runs in succession, since callers of one net find its weights in the cache.
RUNS = 3
# The most that the mean cosine to the true next vectors may change, on so many windows of a corpus that is not larger.
MAX_SCORE_CHANGE = 0.0005
SCORED_WINDOWS = 128
MAX_CORPUS_BYTES = 256_000_000
# of LVM_CACHE, which has one subdirectory per object store too
CHOICES_DIRECTORY = "precision"
PACKAGES = ("numpy", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Tried:
    """One runtime of a trial: seconds of the processor by rows, change of the score, or why it was rejected."""

    precision: str
    seconds: dict[str, float] = field(default_factory=dict)
    score_change: float | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Choice:
    """The precision to serve with, as `open_runtime` takes it, and what was tried; the first is the reference."""

    precision: str
    tried: tuple[Tried, ...]


def choose(
    names: Sequence[str],
    open_one: Callable[[str], Runtime],
    contexts: Floats,
    score: Callable[[Runtime], float] | None,
    clock: Callable[[], float] = thread_time,
) -> Choice:
    """Try the runtimes `names` on `contexts`; return the fastest whose score is that of the first, the reference.

    A runtime that cannot be opened, or whose score differs, is rejected. Raises what opening the reference raises.
    """
    opened = {names[0]: open_one(names[0])}
    scores = {names[0]: score(opened[names[0]])} if score else {}
    rejected: dict[str, str] = {}
    for name in names[1:]:
        if name == names[-1] and len(opened) > 1:
            rejected[name] = f"not tried: {', '.join(list(opened)[1:])} is accepted"
            continue
        try:
            made = open_one(name)
            if score:
                scores[name] = score(made)
                _check_score(scores[name] - scores[names[0]])
            opened[name] = made
        except Exception as error:
            # whatever is wrong with it, the reference can serve
            rejected[name] = str(error)
    seconds = _least_seconds(opened, contexts, clock)
    gains = {name: prod(found[rows] / seconds[names[0]][rows] for rows in found) for name, found in seconds.items()}
    best = min(gains, key=lambda name: gains[name])
    is_faster = gains[best] < (1 - MIN_GAIN) ** len(ROWS)
    tried = (
        Tried(
            name,
            {str(rows): found for rows, found in seconds.get(name, {}).items()},
            scores[name] - scores[names[0]] if name in scores else None,
            rejected.get(name),
        )
        for name in names
    )
    return Choice(best if is_faster else names[0], tuple(tried))


def _check_score(change: float) -> None:
    if not abs(change) <= MAX_SCORE_CHANGE:
        raise ValueError(f"changes the score by {change:+.4f}; allowed: {MAX_SCORE_CHANGE}")


def _least_seconds(
    opened: dict[str, Runtime], contexts: Floats, clock: Callable[[], float]
) -> dict[str, dict[int, float]]:
    """Return the least seconds of each runtime by rows, measured in turns."""
    found = {name: dict.fromkeys(ROWS, float("inf")) for name in opened}
    until = perf_counter() + TIMING_S
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and perf_counter() > until:
            break
        for name, runtime in opened.items():
            for rows in ROWS:
                taken = [_seconds(runtime, contexts[:rows], clock) for _ in range(RUNS)]
                found[name][rows] = min(found[name][rows], *taken)
    return found


def _seconds(runtime: Runtime, contexts: Floats, clock: Callable[[], float]) -> float:
    began = clock()
    runtime.run(contexts)
    return clock() - began


def choose_for(version: Version, checkpoint: Checkpoint, directory: Path) -> tuple[Choice, bool]:
    """Return the choice for a version of a net on this machine, and whether it was just made by a trial.

    Choices are kept in `directory`. If it cannot be written, the next process makes a trial of its own. Of processes
    that try at the same time, the first one decides for all.
    """
    path = directory / f"{version.name}-{version.version}-{_machine()}.json"
    if known := _read(path):
        return known, False
    data = _known_windows(version, checkpoint.card)
    score = (lambda runtime: mean_cosine(runtime.run, data)) if data else None
    contexts = np.resize(checkpoint.golden_context, (max(ROWS), *checkpoint.golden_context.shape[1:]))
    made = choose(TRIED, lambda name: open_for_trial(checkpoint, name, ROWS), contexts, score)
    with suppress(OSError):
        _write_new(path, made)
    return _read(path) or made, True


def _known_windows(version: Version, card: Card) -> Windows | None:
    """Return windows of the corpus beside a version, if the card has a score on that corpus."""
    try:
        target = Registry(version.path.parents[2]).resolve(Alias.RETRIEVER)
        if sum(path.stat().st_size for path in target.path.iterdir()) > MAX_CORPUS_BYTES:
            return None
        data = require_windows(read_corpus(target.path), card.context_length)
    except (UnknownVersion, BadCorpus, NoWindows, OSError):
        return None
    if data.vectors.shape[1] != card.dim or find_on_card(card, window_counts(data)) is None:
        return None
    return data.take(np.unique(np.linspace(0, len(data) - 1, SCORED_WINDOWS).astype(np.int64)))


def _machine() -> str:
    """Return a digest of what decides which runtime is fastest: processor, cores and package versions."""
    processor = {platform.machine(), platform.processor()}
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor |= {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    known = sorted(processor), cores(), [_version_of(package) for package in PACKAGES]
    return digest(repr(known).encode())[:12]


def _version_of(package: str) -> str | None:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> Choice | None:
    """Return the choice in a file, or None if the file is missing or cannot be read."""
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        choice = Choice(stored["precision"], tuple(Tried(**each) for each in stored["tried"]))
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return choice if choice.precision in TRIED else None


def _write_new(path: Path, choice: Choice) -> None:
    """Write a choice unless there is one that can be read; raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent, suffix=".tmp") as file:
        json.dump(asdict(choice), file)
        file.flush()
        if path.exists() and not _read(path):
            path.unlink()
        with suppress(FileExistsError):
            os.link(file.name, path)
