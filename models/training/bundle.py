"""Loads the towers of a version, and its reranker if it has one: of a two-tower, or of a corpus with towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_torch

from models.evaluate import evaluate, evaluate_retrieval, evaluate_windows
from models.nets.two_tower import blank_passage_tower
from models.registry import manifest
from models.registry.checkpoint import (
    GOLDEN_FILE,
    GRAPH_FILE,
    WEIGHTS_FILE,
    BadCheckpoint,
    Checkpoint,
    parse_checkpoint,
)
from models.registry.registry import Version
from models.retrieval.corpus import Corpus
from models.retrieval.index import FlatIndex
from models.retrieval.reranker import NEIGHBOUR_COUNT, RERANKER_FILE, BadReranker, Reranker
from models.retrieval.retriever import Retriever
from models.retrieval.towers import PAYLOAD_FILE, Towers
from models.runtimes import Runtime, open_runtime
from models.runtimes.torch import run_net
from models.vectors import Floats, normalise
from models.windows import Windows, compact_windows, require_windows

TOWERS = (WEIGHTS_FILE, GRAPH_FILE, GOLDEN_FILE, PAYLOAD_FILE)
LIMITS = (
    "Goes by how passages lie to the context and to each other, learned in corpora of some 6,000 chunks: with many "
    "more, or much less alike, measure it first.",
)
_BLOCK = 1024  # rows, or windows, at a time


class LoadedTowers:
    """The query tower as it is served, the payload tower, and the reranker if there is one.

    `id` is the two-tower's version, `config` what the card of a bundle says about its parts.

    Raises:
        BadCheckpoint: the files hold no towers, or towers that must not be served.
    """

    def __init__(self, identity: str, files: Mapping[str, bytes]) -> None:
        missing = [name for name in TOWERS if name not in files]
        if missing:
            raise BadCheckpoint(f"{identity} holds no towers: it lacks {', '.join(missing)}")
        self.files = {name: files[name] for name in (*TOWERS, RERANKER_FILE) if name in files}
        self.checkpoint: Checkpoint = parse_checkpoint(identity, files)
        self.card = self.checkpoint.card
        self.config = dict(self.card.config) if self.card.kind == "corpus" else {"towers": identity}
        self.id = str(self.config["towers"])
        self.query = open_runtime(self.checkpoint, "cpu", torch.get_num_threads())
        self.reranker: Reranker | None = None
        if RERANKER_FILE in files:
            self.reranker = Reranker.from_bytes(files[RERANKER_FILE], self.card.context_length)

    @property
    def runtime(self) -> str:
        """The name of the query tower's runtime."""
        return self.query.name

    def payload(self, vectors: Floats) -> Floats:
        """Map unit vectors of passages `(N, D)` to payload vectors `(N, D)`, rounded to float16 as in an index."""
        state = load_torch(self.files[PAYLOAD_FILE])
        tower = blank_passage_tower(state, self.card.dim)
        tower.load_state_dict(state)
        return normalise(run_net(tower, vectors).astype(np.float16))

    def retriever_over(self, corpus: Corpus) -> Retriever:
        """Return a retriever that searches `corpus` in memory."""
        index = FlatIndex(self.payload(corpus.vectors))
        name, _, version = self.id.rpartition("/")
        by_towers = Towers(name, version, self.query, index, neighbours_of(corpus.vectors))
        return Retriever("", "", self.card, corpus, FlatIndex(corpus.vectors), by_towers, self.reranker)

    def held_out_score(self, data: Windows) -> float:
        """Return the MRR of the towers alone among the chunks of the windows' articles, without the contexts."""
        data = compact_windows(data)
        found = evaluate_windows(self.query.run, data, self.payload(data.vectors))
        return float(np.mean(1 / found.ranks_without))

    def score(self, corpus: Corpus, train: Corpus | None = None) -> dict[str, Any]:
        """Return the scores of the query tower on `corpus`, as `evaluate` does.

        With a reranker the retrieval scores are those after reranking, and "towers alone" is one of the baselines.
        """
        bank = self.payload(corpus.vectors)
        by_towers = evaluate(QueryTower(self.query), corpus, self.card.context_length, train, bank)
        if self.reranker is None:
            return by_towers
        figures = {name: by_towers[name] for name in ("cosine", "cosine_std", "margin", "retrieval")}
        data = require_windows(corpus, self.card.context_length)
        baselines = {"towers alone": figures, **by_towers["baselines"]}
        return {**by_towers, "retrieval": evaluate_retrieval(self.retriever_over(corpus), data), "baselines": baselines}


class QueryTower:
    """A query tower in the form that `evaluate` scores."""

    def __init__(self, runtime: Runtime) -> None:
        self.predict_batch = runtime.run


def read(version: Version) -> LoadedTowers:
    """Return the towers of a version; raises `BadCheckpoint`."""
    try:
        return LoadedTowers(version.id, manifest.read_files(version.path))
    except (manifest.Corrupt, BadReranker) as error:
        raise BadCheckpoint(f"{version.id}: {error}") from error


def neighbours_of(vectors: Floats) -> Floats:
    """Return each row's largest cosines to other rows, descending, `(N, NEIGHBOURS)`; -1 if there are no more rows."""
    count = min(NEIGHBOUR_COUNT, len(vectors) - 1)
    found = np.full((len(vectors), NEIGHBOUR_COUNT), -1, np.float32)
    for first in range(0, len(vectors), _BLOCK):
        cosines = vectors[first : first + _BLOCK] @ vectors.T
        np.fill_diagonal(cosines[:, first:], -1)
        found[first : first + _BLOCK, :count] = -np.sort(np.partition(-cosines, count - 1, axis=1)[:, :count], axis=1)
    return found
