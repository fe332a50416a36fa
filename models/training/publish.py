"""Publishes a net, a two-tower, or a corpus with towers as a version: exported, scored as served, with a card."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from models.diagnose import card_diagnosis
from models.evaluate import TOLERANCE, evaluate, mean_cosine
from models.nets import architecture_of, config_dict
from models.nets.two_tower import TwoTower
from models.predictor import build_predictor
from models.registry.card import CARD_FILE, Card, CardVectorStats, rounded
from models.registry.checkpoint import BadCheckpoint, parse_checkpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import BLOCK_ROWS, Corpus
from models.training.bundle import LoadedTowers
from models.training.export import net_files
from models.training.stated import comparisons, sentences
from models.vectors import Floats, normalise
from models.windows import NoWindows, StoredCorpus, Windows, windows

GOLDEN = 64  # golden contexts in a version; fewer would describe its space too coarsely


class NotAsTrained(BadCheckpoint):
    """The net as served does not score what it scored in training; the message has both scores."""


class Draft(Protocol):
    """A draft of a version, loaded as it will be served."""

    def held_out_score(self, data: Windows) -> float:
        """Return the score by which training chose the epoch."""
        ...

    def score(self, corpus: Corpus, train: Corpus | StoredCorpus | None = None) -> dict[str, Any]:
        """Return the scores on a corpus and those of the baselines, as `evaluate` does."""
        ...


class NetDraft:
    """A net that predicts, loaded as it will be served."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        draft = parse_checkpoint("draft", files)
        self._predictor = build_predictor(draft, device="cpu", threads=torch.get_num_threads())

    def held_out_score(self, data: Windows) -> float:
        """Return the mean cosine."""
        return mean_cosine(self._predictor.predict_batch, data)

    def score(self, corpus: Corpus, train: Corpus | StoredCorpus | None = None) -> dict[str, Any]:
        """Return the scores on a corpus, those of the baselines, and a diagnosis if articles are long enough."""
        predictor = self._predictor
        length = predictor.card.context_length
        scores = evaluate(predictor, corpus, length, train)
        with suppress(NoWindows):
            scores["diagnosis"] = card_diagnosis(predictor.predict_batch, corpus, length)
        return scores


def publish(
    registry: Registry,
    net: nn.Module,
    card: Card,
    golden: Floats,
    data: Mapping[str, Corpus],
    train: Corpus | StoredCorpus | None = None,
    held_out: tuple[Windows, float] | None = None,
) -> Version:
    """Store a net, or a two-tower, as a new version of `card.name`.

    Args:
        registry: where the version is stored.
        net: the trained net; the card's sizes are read from it.
        card: everything else that the card says.
        golden: contexts `(G, T, D)` for the golden vectors.
        data: corpora, by name, on which the card has the scores of the served version.
        train: the training set, to fit the ridge baseline.
        held_out: windows, and what the net scored on them in training.

    Raises:
        BadConfig: `net` is not of a known class.
        BadCheckpoint: the exported net does not answer as the torch net does.
        NotAsTrained: the served version does not score on `held_out` what training did.
    """
    return publish_files(registry, replace(card, **facts(net)), net_files(net, golden), data, train, held_out)


def publish_files(
    registry: Registry,
    card: Card,
    files: Mapping[str, bytes],
    data: Mapping[str, Corpus],
    train: Corpus | StoredCorpus | None = None,
    held_out: tuple[Windows, float] | None = None,
) -> Version:
    """Store the files of a net, or of a two-tower, as a new version of `card.name`; see `publish`.

    If the card has a cosine that a file stated, it gets a sentence that compares it with the one on each data set.

    Raises:
        BadCheckpoint: the files cannot be served, or do not answer as their golden vectors say.
        NotAsTrained: as `publish`.
    """
    served = _load_draft(card, files)
    if held_out:
        _compare(served.held_out_score(held_out[0]), held_out[1])
    scores = {name: rounded(served.score(corpus, train)) for name, corpus in data.items()}
    limits = _better_baselines(scores) if card.kind == "net" else ()
    compared = sentences(comparisons(card, scores))
    return _add(registry, replace(card, scores=scores, limits=(*card.limits, *compared, *limits)), files)


def _load_draft(card: Card, files: Mapping[str, bytes]) -> Draft:
    draft = {**files, CARD_FILE: card.to_markdown().encode()}
    return NetDraft(draft) if card.kind == "net" else LoadedTowers("draft", draft)


def _add(registry: Registry, card: Card, files: Mapping[str, bytes]) -> Version:
    return registry.add(card.name, {**files, CARD_FILE: card.to_markdown().encode()})


def _compare(served: float, trained: float) -> None:
    if not abs(served - trained) <= TOLERANCE:
        raise NotAsTrained(f"the net scores {served:.4f} as served; it scored {trained:.4f} in training")


def _better_baselines(scores: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each data set on which a baseline has a higher cosine than the net."""
    sentences = []
    for data, score in scores.items():
        name, best = max(score["baselines"].items(), key=lambda item: item[1]["cosine"])
        if best["cosine"] > score["cosine"]:
            sentences.append(
                f"On {data} the baseline {name} scores {best['cosine']:.4f}, this net {score['cosine']:.4f}."
            )
    return sentences


def facts(net: nn.Module) -> dict[str, Any]:
    """Return what can be read from a net for its card: kind, architecture, sizes and number of parameters.

    A two-tower has the architecture and sizes of its query tower, and the parameters of both.
    """
    query = net.query if isinstance(net, TwoTower) else net
    config = config_dict(query)
    return {
        "kind": "two_tower" if isinstance(net, TwoTower) else "net",
        "architecture": architecture_of(query),
        "config": config,
        "dim": config["dim"],
        "context_length": config["context_length"],
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
    }


def golden_contexts(corpus: Corpus | StoredCorpus | None, dim: int, length: int) -> Floats:
    """Return contexts `(G, T, D)` spread over the corpus; without a corpus, seeded random ones of unit length."""
    if corpus is None:
        noise = np.random.default_rng(0).standard_normal((GOLDEN, length, dim))
        return normalise(noise + noise.mean(axis=1, keepdims=True))
    data = windows(corpus, length)
    pick = np.linspace(0, len(data) - 1, min(GOLDEN, len(data))).astype(int)
    contexts: Floats = data.vectors[data.rows()[pick]]
    return contexts


def reference_of(corpus: Corpus | StoredCorpus) -> CardVectorStats:
    """Return the reference statistics of a corpus's vectors: norm, and cosine of neighbours."""
    norms, cosines = zip(
        *(_norms_and_cosines(corpus, first) for first in range(0, len(corpus), BLOCK_ROWS)), strict=True
    )
    neighbours = np.diff(corpus.position) == 1
    return CardVectorStats(_mean_std(np.concatenate(norms)), _mean_std(np.concatenate(cosines)[neighbours]))


def _norms_and_cosines(corpus: Corpus | StoredCorpus, first: int) -> tuple[Floats, Floats]:
    """Return the norms of a block of rows, and the cosine of each of them to the row after it, if there is one."""
    vectors = corpus.vectors[first : first + BLOCK_ROWS + 1]
    return np.linalg.norm(vectors[:BLOCK_ROWS], axis=1), np.sum(vectors[1:] * vectors[:-1], axis=1)


def _mean_std(values: Floats) -> tuple[float, float]:
    return round(float(values.mean()), 6), round(float(values.std()), 6)


def today() -> str:
    """Return today's date in UTC, in the form that version names begin with."""
    return f"{datetime.now(UTC):%Y-%m-%d}"
