"""The leaderboard: every net of a registry, timed and scored as it serves, beside the baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import machine, nets
from bench.nets import RunMode
from models.bootstrap import interval
from models.cores import cores
from models.evaluate import COUNTS, WindowScores, baselines, evaluate_retrieval, evaluate_windows, window_counts
from models.registry.card import read_card
from models.registry.checkpoint import BadCheckpoint, Checkpoint, load_checkpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import Corpus
from models.runtimes import Runtime
from models.training import bundle
from models.training.work_cache import Arrays, WorkCache, arrays_digest, source_digest
from models.vectors import Floats
from models.windows import Windows, check_dim, require_windows

# The baseline that a net has to beat.
STANDARD = "weighted_mean"
# The largest batch that is timed.
CONTEXTS = 128

Predict = Callable[[Floats], Floats]


class NothingToRank(ValueError):
    """The registry has no net that reads vectors of the data's dimension."""


def measure(
    registry: Registry,
    data: Mapping[str, Corpus],
    train: Corpus | None,
    rounds: int,
    log: Callable[[str], None],
    cache: WorkCache,
) -> dict[str, Any]:
    """Return every figure of the leaderboard, ready for JSON.

    `data` are the data sets by name, the first in-distribution, the second out of it; the ridge baseline is fitted on
    `train`, or taken from a card that has it for the same data. Scores are kept in `cache`; times are all of one run.

    Raises:
        NothingToRank: no version is a net of the data's D.
        OtherDimension: the data sets differ in D.
        BadCheckpoint: a version must not be served.
        NoWindows: no article of a data set is longer than T chunks.
    """
    dim = next(iter(data.values())).dim
    for name, corpus in (*data.items(), *([("the training set", train)] if train else [])):
        check_dim(name, corpus.dim, dim)
    versions, length = _nets(registry, dim, log)
    loaded = {name: load_checkpoint(version.path) for name, version in versions.items()}
    sets = {name: require_windows(corpus, length) for name, corpus in data.items()}
    mode = RunMode("onnxruntime", "cpu", cores())
    runs = {name: mode.open(checkpoint) for name, checkpoint in loaded.items()}
    predictors = {**baselines(length, train), **{name: run.run for name, run in runs.items()}}
    known = {name: version.id for name, version in versions.items()} | {"ridge": arrays_digest(train) if train else ""}
    scores = {name: _scores(predictors, known, windows, log, cache) for name, windows in sets.items()}
    if train is None:
        _add_carded(scores, sets, "ridge", loaded.values())
    towers = _towers(registry, dim, length)
    for name, corpus in data.items():
        scores[name].update(_retrieved(towers, corpus, sets[name], log, cache))
    log("timing")
    first = next(iter(sets.values()))
    contexts = first.take(np.arange(min(CONTEXTS, len(first)))).contexts()
    two_towers = {name: made for name, (_, made) in towers.items() if made.card.kind == "two_tower"}
    runs |= {name: mode.open(made.checkpoint) for name, made in two_towers.items()}
    checkpoints = {**loaded, **{name: made.checkpoint for name, made in two_towers.items()}}
    versions |= {name: towers[name][0] for name in two_towers}
    return {
        "machine": machine.describe(),
        "runtime": mode.label,
        "rounds": rounds,
        "data": {name: window_counts(windows) for name, windows in sets.items()},
        "nets": {name: _facts(versions[name], checkpoint) for name, checkpoint in loaded.items()},
        "towers": {name: _training(versions[name], made) for name, made in two_towers.items()},
        "speed": _speed(rounds, mode, runs, contexts),
        "size": {
            name: nets.footprint(mode, checkpoint, versions[name].path) for name, checkpoint in checkpoints.items()
        },
        "scores": scores,
    }


def _nets(registry: Registry, dim: int, log: Callable[[str], None]) -> tuple[dict[str, Version], int]:
    """Return the nets that read vectors of `dim` in contexts of the length that most of them read, and that length.

    A net is named by its name, or by name and version if there are several.
    """
    cards = {version: read_card(version.path) for version in registry.versions()}
    found = {version: card.context_length for version, card in cards.items() if (card.kind, card.dim) == ("net", dim)}
    if not found:
        raise NothingToRank(f"no version in {registry.root} is a net of D = {dim}")
    ((length, _),) = Counter(found.values()).most_common(1)
    for version, other in found.items():
        if other != length:
            log(f"left out {version.id}, whose contexts have T = {other}, not {length}")
    kept = [version for version, other in found.items() if other == length]
    names = Counter(version.name for version in kept)
    return {version.name if names[version.name] == 1 else version.id: version for version in kept}, length


def _scores(
    predictors: Mapping[str, Predict],
    known: Mapping[str, str],
    data: Windows,
    log: Callable[[str], None],
    cache: WorkCache,
) -> dict[str, Any]:
    """Return the scores of each predictor; its name and what is `known` of it are its identity in `cache`."""
    found: dict[str, WindowScores] = {}
    for name, predict in predictors.items():
        log(f"scoring {name}")
        inputs = name, known.get(name, ""), arrays_digest(data), source_digest()
        found[name] = WindowScores(**cache.get_arrays(partial(_outcomes, predict, data), *inputs))
    standard = found[STANDARD].cosine
    return {name: {**one.summary(), **_certainty(one, standard)} for name, one in found.items()}


def _outcomes(predict: Predict, data: Windows) -> Arrays:
    return vars(evaluate_windows(predict, data))


def _certainty(one: WindowScores, standard: NDArray[Any]) -> dict[str, Any]:
    """Return 95 % intervals: of the cosine, and of its distance to that of `STANDARD` on the same articles."""
    beyond = one.cosine - standard
    return {
        "interval": interval(one.cosine, one.article),
        "beyond": {"mean": float(beyond.mean()), "interval": interval(beyond, one.article)},
    }


def _add_carded(
    scores: dict[str, Any], sets: Mapping[str, Windows], baseline: str, loaded: Iterable[Checkpoint]
) -> None:
    """Add the scores of `baseline` that a card has for the same data, recognised by its counts."""
    carded = [each for checkpoint in loaded for each in checkpoint.card.scores.values()]
    for name, windows in sets.items():
        known = window_counts(windows)
        same = (each["baselines"] for each in carded if all(each.get(count) == known[count] for count in COUNTS))
        found = next((beside[baseline] for beside in same if baseline in beside), None)
        if found:
            scores[name][baseline] = found


def _towers(registry: Registry, dim: int, length: int) -> dict[str, tuple[Version, bundle.LoadedTowers]]:
    """Return every version with towers for contexts `(length, dim)`, by its name, or by its id if there are several."""
    found, versions = [], registry.versions()
    for version in versions:
        card = read_card(version.path)
        if card.kind in ("corpus", "two_tower") and (card.context_length, card.dim) == (length, dim):
            # A corpus may have no towers.
            with suppress(BadCheckpoint):
                found.append((version, bundle.read(version)))
    names = Counter(version.name for version in versions)
    return {version.name if names[version.name] == 1 else version.id: (version, made) for version, made in found}


def _retrieved(
    towers: Mapping[str, tuple[Version, bundle.LoadedTowers]],
    corpus: Corpus,
    data: Windows,
    log: Callable[[str], None],
    cache: WorkCache,
) -> dict[str, Any]:
    """Return the figures of every version with towers, alone and reranked, over the chunks of `corpus`."""
    found: dict[str, Any] = {}
    for name, (version, made) in towers.items():
        log(f"retrieving by {name}")
        inputs = name, version.id, arrays_digest(data), source_digest()
        found.update(cache.get_json(partial(_by_towers, name, made, corpus, data), *inputs))
    return found


def _by_towers(name: str, made: bundle.LoadedTowers, corpus: Corpus, data: Windows) -> dict[str, Any]:
    bank = made.payload(corpus.vectors)
    alone = evaluate_windows(made.query.run, data, bank).summary()
    found = {f"{name}, towers alone": {"retrieval": alone["retrieval"], **_payload_cosine(made, data, bank)}}
    if made.reranker:
        found[f"{name}, reranked"] = {"retrieval": evaluate_retrieval(made.retriever_over(corpus), data)}
    return found


def _payload_cosine(made: bundle.LoadedTowers, data: Windows, bank: Floats) -> dict[str, float]:
    """Return mean and standard deviation of the cosine of the query and the true next chunk, both by the towers."""
    parts = np.array_split(np.arange(len(data)), len(data) // CONTEXTS + 1)
    cosines = [np.vecdot(made.query.run(part.contexts()), bank[part.target]) for part in map(data.take, parts)]
    every = np.concatenate(cosines)
    return {"tower_cosine": float(every.mean()), "tower_cosine_std": float(every.std())}


def _training(version: Version, made: bundle.LoadedTowers) -> dict[str, Any]:
    """Return what the card of a two-tower says of its training: ours, or what its file stated."""
    data = made.card.data
    stated = data.get("stated", {})
    metrics = stated.get("metrics")
    known = {**stated, **(metrics if isinstance(metrics, Mapping) else {})}
    return {
        "version": version.id,
        "parameters": made.card.parameters,
        "trained_on": data.get("train", data.get("file", "unknown")),
        "held_out_MRR": data.get("held_out_MRR"),
        **{key: value for key, value in known.items() if isinstance(value, int | float | str)},
    }


def _facts(version: Version, checkpoint: Checkpoint) -> dict[str, Any]:
    card = checkpoint.card
    known = {"version": version.id, "architecture": card.architecture, "parameters": card.parameters}
    return {**known, "trained_on": card.data.get("train", "unknown")}


def _speed(rounds: int, mode: RunMode, runs: Mapping[str, Runtime], contexts: Floats) -> dict[str, Any]:
    queries, batches = nets.time_in_rounds(rounds, runs, contexts)
    return {name: {"query": queries[name], "batch": batches[name]} for name in runs}
