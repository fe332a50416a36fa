"""Loads the towers of a version, and its reranker if it has one: of a two-tower, or of a corpus with towers.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.cores import cores
from models.evaluate import BUNDLE_EVALUATIONS, evaluate, evaluate_bundle, evaluate_retrieval, evaluate_windows
from models.registry import manifest
from models.registry.card import CARD_FILE, BadCard, Card, rounded
from models.registry.checkpoint import (
    GOLDEN_FILE,
    GRAPH_FILE,
    WEIGHTS_FILE,
    BadCheckpoint,
    Checkpoint,
    parse_checkpoint,
)
from models.registry.registry import Version
from models.retrieval.corpus import Corpus, HalfVectors, MappedCorpus
from models.retrieval.index import BadIndex, FlatIndex
from models.retrieval.payload import PayloadTower
from models.retrieval.reranker import NEIGHBOUR_COUNT, RERANKER_FILE, BadReranker, Reranker
from models.retrieval.retriever import Retriever, Search, build_retriever
from models.retrieval.towers import (
    PAYLOAD_CONFIG,
    PAYLOAD_FILE,
    PAYLOAD_LISTS_FILE,
    TOWER_INDEX_FILE,
    Towers,
    write_tower_index,
)
from models.runtimes import Runtime, open_runtime
from models.training import indexing, neighbours
from models.training.indexing import CachedSteps
from models.training.neighbours import exact_neighbours, listed_neighbours
from models.training.publish_corpus import CorpusDraft
from models.training.work_cache import Arrays, digest
from models.vectors import Floats, normalise
from models.windows import (
    DrawnWindows,
    StoredCorpus,
    Windows,
    compact_windows,
    require_windows,
    scored_windows,
    window_starts,
)

TOWERS = (WEIGHTS_FILE, GRAPH_FILE, GOLDEN_FILE, PAYLOAD_FILE)
LIMITS = (
    "Goes by how passages lie to the context and to each other, learned in corpora of some 6,000 chunks: with many "
    "more, or much less alike, measure it first.",
)
_PASSAGE_WINDOWS = 2000


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
        self.query = open_runtime(self.checkpoint, "cpu", cores())
        self._passage = PayloadTower(files[PAYLOAD_FILE], self.card.dim)
        self.reranker: Reranker | None = None
        if RERANKER_FILE in files:
            self.reranker = Reranker.from_bytes(files[RERANKER_FILE], self.card.context_length)

    def with_reranker(self, reranker: Reranker | None) -> LoadedTowers:
        """Return the same towers with another reranker, or with none."""
        other = copy(self)
        other.reranker = reranker
        return other

    @property
    def runtime(self) -> str:
        """The name of the query tower's runtime."""
        return self.query.name

    def payload(self, vectors: Floats) -> Floats:
        """Map unit vectors of passages `(N, D)` to payload vectors `(N, D)`, rounded to float16 as in an index."""
        return normalise(self._passage.run(vectors).astype(np.float16))

    def retriever_over(self, corpus: Corpus) -> Retriever:
        """Return a retriever that searches `corpus` in memory."""
        index = FlatIndex(self.payload(corpus.vectors))
        name, _, version = self.id.rpartition("/")
        by_towers = Towers(name, version, self.query, index, exact_neighbours(corpus.vectors))
        return Retriever("", "", self.card, corpus, FlatIndex(corpus.vectors), by_towers, self.reranker)

    def held_out_score(self, data: Windows) -> float:
        """Return the MRR of the towers alone among the chunks of the windows' articles, without the contexts."""
        data = compact_windows(data)
        found = evaluate_windows(self.query.run, data, self.payload(np.asarray(data.vectors)))
        return float(np.mean(1 / found.ranks_without))

    def passage_cosine(self, corpus: Corpus) -> float:
        """Return the mean cosine of queries and the true next passages, both as the towers place them.

        Of many windows, 2,000 that are spread over the corpus count.
        """
        data = require_windows(corpus, self.card.context_length)
        spread = data.take(np.unique(np.linspace(0, len(data) - 1, _PASSAGE_WINDOWS).astype(int)))
        cosines = np.vecdot(self.query.run(spread.contexts()), self.payload(spread.targets()))
        return float(cosines.mean())

    def score(self, corpus: Corpus, train: Corpus | StoredCorpus | None = None) -> dict[str, Any]:
        """Return the scores of the query tower on `corpus`, as `evaluate` does, and the `passage_cosine`.

        With a reranker the retrieval scores are those after reranking, and "towers alone" is one of the baselines.
        """
        bank = self.payload(corpus.vectors)
        by_towers = evaluate(QueryTower(self.query), corpus, self.card.context_length, train, bank)
        by_towers["passage_cosine"] = self.passage_cosine(corpus)
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
        mapped = manifest.map_files(version.path)
        # a bundle has files of gigabytes that are not needed here
        needed = [name for name in (CARD_FILE, *TOWERS, RERANKER_FILE) if name in mapped]
        return LoadedTowers(version.id, {name: mapped[name][:] for name in needed})
    except (manifest.Corrupt, BadReranker) as error:
        raise BadCheckpoint(f"{version.id}: {error}") from error


ListBuilder = Callable[[MappedCorpus, Card, list[Search], CachedSteps], indexing.MeasuredLists]


class BundleParts:
    """The towers of `maker`, and their reranker if there is one, with which a corpus is published as a bundle."""

    def __init__(
        self, maker: LoadedTowers, reranker: Version | None = None, build_lists: ListBuilder = indexing.build
    ) -> None:
        self._maker = maker
        self._build_lists = build_lists
        self._files = dict(maker.files)
        self._config = dict(maker.config)
        if reranker:
            self._files[RERANKER_FILE] = _reranker_file(reranker, maker.id)
            self._config["reranker"] = reranker.id

    def count_steps(self, rows: int, is_listed: bool) -> int:
        """Return the number of steps of `add_to` for a corpus of `rows` chunks, on disk with lists or in memory."""
        lists = indexing.count_steps(rows) + neighbours.count_steps(rows, indexing.count_lists(rows))
        return indexing.count_blocks(rows) + (lists if is_listed else 1) + BUNDLE_EVALUATIONS

    def check(self, card: Card, dim: int) -> None:
        """Raise `BadCheckpoint` if the towers read other vectors than the corpus has."""
        ours = self._maker.card
        if (dim, card.encoder) != (ours.dim, ours.encoder):
            expected = f"D = {ours.dim}, {ours.encoder}"
            raise BadCheckpoint(f"the corpus has D = {dim}, {card.encoder}; the towers read {expected}")

    def add_to(self, draft: CorpusDraft, steps: CachedSteps) -> CorpusDraft:
        """Return the draft with towers, what they make of its vectors, and the scores of the bundle on its corpus."""
        draft = replace(draft, card=replace(draft.card, context_length=self._maker.card.context_length))
        draft = draft.with_files(self._files).with_card(self._config, *(LIMITS if RERANKER_FILE in self._files else ()))
        payload = self._payload(draft, steps)
        near, recall = _neighbours(draft, steps)
        write_tower_index(draft.directory / TOWER_INDEX_FILE, self._files[PAYLOAD_FILE], payload.halves, near)
        draft = draft.with_files({TOWER_INDEX_FILE: draft.directory / TOWER_INDEX_FILE}).with_card(recall)
        draft = self._with_payload_lists(draft, payload, steps) if draft.lists else draft
        draft = _scored(draft, self._maker, steps)
        steps.counter.finish()
        return draft

    def _payload(self, draft: CorpusDraft, steps: CachedSteps) -> HalfVectors:
        """Return the vectors that the passage tower makes of the corpus, in a file."""
        shape = len(draft.corpus), draft.corpus.dim
        halves = np.lib.format.open_memmap(draft.directory / "payload.npy", "w+", np.float16, shape)
        for row, vectors in draft.corpus.blocks():
            step = partial(self._payload_of, vectors)
            halves[row : row + len(vectors)] = steps.run(step, f"payload {row}", self._files[PAYLOAD_FILE])["halves"]
        return HalfVectors(halves)

    def _payload_of(self, vectors: Floats) -> Arrays:
        return {"halves": self._maker.payload(vectors).astype(np.float16)}

    def _with_payload_lists(self, draft: CorpusDraft, payload: HalfVectors, steps: CachedSteps) -> CorpusDraft:
        """Return the draft with lists of the payload, tuned by queries that the query tower makes.

        Towers that were hardly trained make queries that are near no payload. No lists find enough for them, so the
        payload is then searched exactly, in memory.
        """
        assert isinstance(draft.corpus, MappedCorpus)
        rows = indexing.draw_contexts(draft.corpus, draft.card.context_length)
        queries = self._maker.query.run(draft.corpus.vectors_at(rows))
        searches = [
            Search(query, indexing.K, exclude_vectors=payload.vectors_at(context))
            for query, context in zip(queries, rows, strict=True)
        ]
        space = replace(draft.corpus, halves=payload.halves)
        steps = steps.reading(digest(steps.inputs, self._files[PAYLOAD_FILE]))
        try:
            made = self._build_lists(space, draft.card, searches, steps)
        except BadIndex as error:
            return draft.with_card({}, f"Search by context is exact and holds all payload vectors in memory ({error}).")
        draft = draft.with_files({PAYLOAD_LISTS_FILE: made.lists.to_bytes()})
        return draft.with_card({PAYLOAD_CONFIG: dict(made.config)}, made.limit("Search by context"))


def _reranker_file(version: Version, towers_id: str) -> bytes:
    try:
        files = manifest.read_files(version.path)
        card = Card.from_markdown(files[CARD_FILE].decode())
        if card.config["towers"] != towers_id:
            raise BadCheckpoint(f"{version.id} was trained on results of {card.config['towers']}, not of {towers_id}")
        return files[RERANKER_FILE]
    except (manifest.Corrupt, BadCard, KeyError) as error:
        raise BadCheckpoint(f"{version.id} is not a reranker: {error}") from error


def _neighbours(draft: CorpusDraft, steps: CachedSteps) -> tuple[Floats, dict[str, float]]:
    """Return the neighbours of each chunk, and their recall for the card if they are not exact."""
    if draft.lists:
        assert isinstance(draft.corpus, MappedCorpus)
        found, recall = listed_neighbours(draft.corpus, draft.lists, steps)
        return found, {f"neighbours_recall@{NEIGHBOUR_COUNT}": round(recall, 4)}
    vectors = draft.vectors
    return steps.run(lambda: {"cosines": exact_neighbours(vectors)}, "neighbours")["cosines"], {}


def _scored(draft: CorpusDraft, maker: LoadedTowers, steps: CachedSteps) -> CorpusDraft:
    """Return the draft with the scores of the bundle on its corpus; raises if it could not be served."""
    files = {name: manifest.map_file(data) if isinstance(data, Path) else data for name, data in draft.files.items()}
    files[CARD_FILE] = draft.card.to_markdown().encode()
    retriever = build_retriever("draft", "", files, cores())
    data = scored_windows(draft.corpus, draft.card.context_length)
    total = len(window_starts(draft.corpus, data.length))
    if len(data) < total:
        draft = draft.with_card({}, f"The scores are those of {len(data):,} windows, drawn from {total:,}.")
    if isinstance(data, DrawnWindows):
        scores = evaluate_bundle(retriever, data, steps.counter.count)
    else:
        assert isinstance(draft.corpus, Corpus)
        scores = maker.with_reranker(retriever.reranker).score(draft.corpus)
    return replace(draft, card=replace(draft.card, scores={draft.card.name: rounded(scores)}))
