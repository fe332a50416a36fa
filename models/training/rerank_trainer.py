"""Training of a reranker on what its towers find in articles that were held out from their training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.evaluate import window_searches
from models.nets import BadConfig
from models.nets.reranker import RerankerNet
from models.registry.card import Card
from models.registry.checkpoint import BadCheckpoint
from models.retrieval.corpus import Corpus
from models.retrieval.reranker import RERANK_DEPTH, Reranker
from models.training.bundle import LoadedTowers
from models.training.train import Trainer
from models.training.work_cache import Arrays, WorkCache, arrays_digest, source_digest
from models.vectors import Floats
from models.windows import NoWindows, Rows, StoredCorpus, Windows, compact_windows, hold_out, require_windows

ARTICLES = 118  # articles in a bank; the features depend on how many chunks there are to choose from


@dataclass(frozen=True)
class CandidateLists(Windows):
    """Windows, each with the list of C chunks that the towers found for it.

    `features` `(W, C, F)` are what the reranker reads, `truth` `(W,)` is the true next chunk's place in the list.
    """

    features: Floats
    truth: Rows


class RerankTrainer(Trainer):
    """Trains a reranker to put the true next chunk first; the score of an epoch is the MRR in held-out lists."""

    measure = "MRR in lists"
    loss_is_per_dimension = False
    net: RerankerNet
    windows: CandidateLists

    def make_net(self) -> RerankerNet:
        """Return the untrained net, standardised to the training lists; raises `BadConfig`."""
        features = self.windows.features.reshape(-1, self.windows.features.shape[2])
        mean, scale = (torch.from_numpy(part(features, axis=0, dtype=np.float64)).float() for part in (np.mean, np.std))
        try:
            return RerankerNet(mean, scale, **self.config)
        except TypeError as error:
            raise BadConfig(f"reranker: {error}") from error

    def loss(self, start: Tensor) -> Tensor:
        """Return the cross-entropy of the true next chunk within its list."""
        which = np.searchsorted(self.windows.start, start.numpy())
        features, truth = self.windows.features[which], self.windows.truth[which]
        return cross_entropy(self.net(torch.from_numpy(features)), torch.from_numpy(truth))

    @torch.no_grad()
    def score(self, data: Windows) -> float:
        """Return the MRR of the true next chunks within the lists of `data`."""
        assert isinstance(data, CandidateLists)
        scores = self.net(torch.from_numpy(data.features)).numpy()
        true = np.take_along_axis(scores, data.truth[:, None], 1)
        return float(np.mean(1 / (scores >= true).sum(axis=1)))


def held_out_banks(card: Card, corpus: Corpus | StoredCorpus) -> list[Windows]:
    """Return the windows of the articles that towers held out in training, in banks of equally many articles.

    Raises:
        BadCheckpoint: the card does not say what was held out, or the corpus is not what the towers were trained on.
        NoWindows: the articles make fewer than two banks.
    """
    try:
        share, seed = float(card.data["held_out"]), int(card.data["seed"])
        used = float(card.data.get("used", 1))
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"the card does not say what the towers held out: {error}") from error
    rest, data = hold_out(require_windows(corpus, card.context_length), share, seed, used)
    trained = card.data.get("windows", len(rest))
    if trained != len(rest):
        raise BadCheckpoint(
            f"the towers were trained on {trained} windows; of this data it would have been {len(rest)}: "
            "give the data sets of the towers, in the same order"
        )
    articles = np.unique(data.article)
    np.random.default_rng(seed).shuffle(articles)
    count = min(max(round(len(articles) / ARTICLES), 2), len(articles))
    if count < 2:
        raise NoWindows("the towers held out one article; a reranker needs at least two")
    return [data.take(np.isin(data.article, part)) for part in np.array_split(articles, count)]


def find_candidate_lists(towers: LoadedTowers, bank: Windows, cache: WorkCache) -> CandidateLists:
    """Return what the towers find for each window among the chunks of a bank, if the true chunk is found at all."""
    found = cache.get_arrays(lambda: _find(towers, bank), source_digest(), towers.id, arrays_digest(bank))
    part = bank.take(found["kept"])
    return CandidateLists(part.vectors, part.start, part.article, part.length, found["features"], found["truth"])


def _find(towers: LoadedTowers, bank: Windows) -> Arrays:
    """Return which windows `(K,)` of a bank are `kept`, and their `features` and `truth` as in `CandidateLists`."""
    data = compact_windows(bank)
    position = np.arange(len(data.vectors), dtype=np.int32)
    retriever = towers.retriever_over(Corpus(np.asarray(data.vectors), np.zeros_like(position), position, {}))
    queries = window_searches(data, exclude_context=True, k=RERANK_DEPTH)
    found = [retriever.find_candidates([query])[0] for query in queries]
    width = min(len(rows) for _, rows in found)
    rows = np.array([rows[:width] for _, rows in found])
    is_true = rows == data.target[:, None]
    kept = np.flatnonzero(is_true.any(axis=1))
    contexts = data.contexts()
    features = np.array([retriever.candidate_features(contexts[n], found[n][0][:width], rows[n]) for n in kept])
    return {"kept": kept, "features": features, "truth": is_true[kept].argmax(axis=1)}


def joined(lists: list[CandidateLists]) -> CandidateLists:
    """Return the lists of several banks as one, cut to the shortest list, ordered by row."""
    width = min(part.features.shape[1] for part in lists)
    parts = [_cut(part, width) for part in lists]
    start, article, features, truth = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "article", "features", "truth")
    )
    order = np.argsort(start)
    first = parts[0]
    return CandidateLists(first.vectors, start[order], article[order], first.length, features[order], truth[order])


def _cut(lists: CandidateLists, width: int) -> CandidateLists:
    kept = lists.truth < width
    part = lists.take(kept)
    features, truth = lists.features[kept, :width], lists.truth[kept]
    return CandidateLists(part.vectors, part.start, part.article, part.length, features, truth)


def served(net: RerankerNet) -> Reranker:
    """Return the reranker for serving that orders as `net` does."""
    return Reranker(*(part.detach().numpy() for part in net.folded()))
