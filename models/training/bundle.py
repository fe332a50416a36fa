"""Two-towers and bundles as versions: towers alone, and a corpus as they see it, with a reranker where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_tensors
from safetensors.torch import load as load_torch
from torch import nn

from models.evaluate import evaluate, evaluate_retrieval, evaluate_windows
from models.nets.two_tower import Payload, TwoTower
from models.registry import manifest
from models.registry.card import CARD_FILE, BadCard, Card
from models.registry.checkpoint import (
    GOLDEN_FILE,
    GRAPH_FILE,
    WEIGHTS_FILE,
    BadCheckpoint,
    Checkpoint,
    parse_checkpoint,
)
from models.registry.registry import Registry, Version
from models.retrieval.corpus import (
    CORPUS_FILES,
    Corpus,
    parse_corpus,
)
from models.retrieval.index import FlatIndex
from models.retrieval.reranker import NEIGHBOUR_COUNT, RERANKER_FILE, BadReranker, Reranker
from models.retrieval.retriever import Retriever, build_retriever
from models.retrieval.towers import PAYLOAD_FILE, TOWER_INDEX_FILE, Towers, tower_index_bytes
from models.runtimes import open_runtime
from models.runtimes.torch import run_net, state_arrays
from models.training.publish import compare, facts, net_files, rounded
from models.vectors import Floats, normalise
from models.windows import Windows, compact_windows, require_windows

TOWERS = (WEIGHTS_FILE, GRAPH_FILE, GOLDEN_FILE, PAYLOAD_FILE)
LIMITS = (
    "Goes by how passages lie to the context and to each other, learned in corpora of some 6,000 chunks: with many "
    "more, or much less alike, measure it first.",
)
_BLOCK = 1024  # rows, or windows, at a time


def publish_towers(
    registry: Registry,
    net: nn.Module,
    card: Card,
    golden: Floats,
    data: Mapping[str, Corpus],
    train: Corpus | None = None,
    held_out: tuple[Windows, float] | None = None,
) -> Version:
    """Store the towers of `net` as a new version: the query tower as any net is stored, the payload tower beside it.

    Its card has the scores on every corpus of `data`, its queries searching what the payload tower makes of it.

    Raises:
        BadCheckpoint: the exported query tower does not answer as the torch net does.
        NotAsTrained: its MRR on `held_out`, as it will be served, is not what training found.
    """
    assert isinstance(net, TwoTower)
    files = {**net_files(net.query, golden), PAYLOAD_FILE: bytes(save_tensors(state_arrays(net.payload.state_dict())))}
    parameters = sum(parameter.numel() for parameter in net.parameters())
    card = replace(card, **{**facts(net.query), "kind": "two_tower", "parameters": parameters})
    made = Made("draft", {**files, CARD_FILE: card.to_markdown().encode()})
    if held_out:
        compare(made.mrr(compact_windows(held_out[0])), held_out[1])
    scores = {name: rounded(made.score(corpus, train)) for name, corpus in data.items()}
    return registry.add(card.name, {**files, CARD_FILE: replace(card, scores=scores).to_markdown().encode()})


class Made:
    """The towers, and the reranker where there is one, that files hold: of a two-tower, or of a bundle.

    Raises:
        BadCheckpoint: they hold no towers, or such as must not be served.
    """

    def __init__(self, identity: str, files: Mapping[str, bytes]) -> None:
        missing = [name for name in TOWERS if name not in files]
        if missing:
            raise BadCheckpoint(f"{identity} holds no towers: it lacks {', '.join(missing)}")
        self.files = {name: files[name] for name in (*TOWERS, RERANKER_FILE) if name in files}
        self.checkpoint: Checkpoint = parse_checkpoint(identity, files)
        self.card = self.checkpoint.card
        self.parts = dict(self.card.config) if self.card.kind == "corpus" else {"towers": identity}
        self.id = str(self.parts["towers"])
        self.query = open_runtime(self.checkpoint, "cpu", torch.get_num_threads())
        self.reranker: Reranker | None = None
        if RERANKER_FILE in files:
            self.reranker = Reranker.from_bytes(files[RERANKER_FILE], self.card.context_length)

    @property
    def runtime(self) -> str:
        """The name of what runs the query tower."""
        return self.query.name

    def payload(self, vectors: Floats) -> Floats:
        """Return what the payload tower makes of unit vectors `(N, D)`, rounded as an index keeps it."""
        tower = Payload(self.card.dim)
        tower.load_state_dict(load_torch(self.files[PAYLOAD_FILE]))
        return normalise(run_net(tower, vectors).astype(np.float16))

    def over(self, corpus: Corpus) -> Retriever:
        """Return the retriever of `corpus` in memory."""
        index = FlatIndex(self.payload(corpus.vectors))
        name, _, version = self.id.rpartition("/")
        seen = Towers(name, version, self.query, index, neighbours_of(corpus.vectors))
        return Retriever("", "", self.card, corpus, FlatIndex(corpus.vectors), seen, self.reranker)

    def mrr(self, data: Windows) -> float:
        """Return the MRR of the towers alone among the chunks of `data`, contexts left out."""
        found = evaluate_windows(self.query.run, data, self.payload(data.vectors))
        return float(np.mean(1 / found.ranks_without))

    def score(self, corpus: Corpus, train: Corpus | None = None) -> dict[str, Any]:
        """Return the scores of the query tower on `corpus`, as `evaluate` does; reranked ones where it can.

        What the towers score alone is among the baselines then.
        """
        bank = self.payload(corpus.vectors)
        by_towers = evaluate(Query(self.query), corpus, self.card.context_length, train, bank)
        if self.reranker is None:
            return by_towers
        figures = {name: by_towers[name] for name in ("cosine", "margin", "retrieval")}
        data = require_windows(corpus, self.card.context_length)
        baselines = {"towers alone": figures, **by_towers["baselines"]}
        return {**by_towers, "retrieval": evaluate_retrieval(self.over(corpus), data), "baselines": baselines}


class Query:
    """A query tower as something to evaluate."""

    def __init__(self, runtime: Any) -> None:
        self.predict_batch = runtime.run


def read(version: Version) -> Made:
    """Return the towers of a version; raises `BadCheckpoint`."""
    try:
        return Made(version.id, manifest.read_files(version.path))
    except (manifest.Corrupt, BadReranker) as error:
        raise BadCheckpoint(f"{version.id}: {error}") from error


def publish_bundle(registry: Registry, directory: Path, card: Card, made: Made, reranker: Version | None) -> Version:
    """Store the corpus in `directory`, its index and what makes and serves it as one version of `card.name`.

    Its card has the retrieval scores of the bundle on its own corpus, found by the serving retriever.

    Raises:
        BadCorpus: the corpus cannot be read.
        BadCheckpoint: the corpus is of another space than the towers, or the reranker is none, or of other towers.
    """
    files = {name: (directory / name).read_bytes() for name in CORPUS_FILES} | made.files
    config = dict(made.parts)
    if reranker:
        files[RERANKER_FILE] = _reranker_file(reranker, made.id)
        config["reranker"] = reranker.id
    corpus = parse_corpus(files)
    if (corpus.dim, card.encoder) != (made.card.dim, made.card.encoder):
        theirs = f"D = {made.card.dim}, {made.card.encoder}"
        raise BadCheckpoint(f"a corpus of D = {corpus.dim}, {card.encoder}, for towers of {theirs}")
    index = tower_index_bytes(files[PAYLOAD_FILE], made.payload(corpus.vectors), neighbours_of(corpus.vectors))
    files[TOWER_INDEX_FILE] = index
    counts = {"chunks": len(corpus), "articles": len(corpus.articles)}
    sizes: dict[str, Any] = {"dim": corpus.dim, "context_length": made.card.context_length}
    limits = LIMITS if "reranker" in config else ()
    card = replace(card, **sizes, config=config, data={**card.data, **counts}, limits=limits)
    draft = {**files, CARD_FILE: card.to_markdown().encode()}
    build_retriever("draft", "", draft)
    card = replace(card, scores={card.name: rounded(Made(made.id, draft).score(corpus))})
    return registry.add(card.name, {**files, CARD_FILE: card.to_markdown().encode()})


def _reranker_file(version: Version, made_by: str) -> bytes:
    try:
        files = manifest.read_files(version.path)
        card = Card.from_markdown(files[CARD_FILE].decode())
        if card.config["towers"] != made_by:
            raise BadCheckpoint(f"{version.id} was trained on what {card.config['towers']} finds, not {made_by}")
        return files[RERANKER_FILE]
    except (manifest.Corrupt, BadCard, KeyError) as error:
        raise BadCheckpoint(f"{version.id} is no reranker: {error}") from error


def neighbours_of(vectors: Floats) -> Floats:
    """Return each row's largest cosines to other rows, falling, `(N, NEIGHBOURS)`; -1 where there are no more."""
    count = min(NEIGHBOUR_COUNT, len(vectors) - 1)
    found = np.full((len(vectors), NEIGHBOUR_COUNT), -1, np.float32)
    for first in range(0, len(vectors), _BLOCK):
        cosines = vectors[first : first + _BLOCK] @ vectors.T
        np.fill_diagonal(cosines[:, first:], -1)
        found[first : first + _BLOCK, :count] = -np.sort(np.partition(-cosines, count - 1, axis=1)[:, :count], axis=1)
    return found
