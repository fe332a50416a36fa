"""Scores of predictors, retrievers and baselines on a corpus. No torch.

The README's table uses these measures. Every score is a mean over the stride-1 windows of the corpus. Retrieval ranks
the true next chunk among all chunks of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.registry.card import Card
from models.retrieval.corpus import (
    Corpus,
)
from models.retrieval.reranker import RERANK_DEPTH
from models.retrieval.retriever import Retriever, Search
from models.vectors import Floats, normalise
from models.windows import StoredCorpus, Windows, require_windows, windows

COUNTS = ("windows", "articles", "chunks")
RANKS = (1, 3, 5, 10, 20, 50)
# of the exponentially weighted mean
DECAY = 0.7
# lambda of the ridge regression
RIDGE = 30.0
RIDGE_WINDOWS = 100_000
# parts of `evaluate_bundle`: the bundle, its towers alone, and three baselines
BUNDLE_EVALUATIONS = 5
# A score may differ from the card by this.
TOLERANCE = 0.001
_BLOCK_WINDOWS = 512


class BatchPredictor(Protocol):
    """Anything that predicts next vectors in batches."""

    def predict_batch(self, contexts: Floats) -> Floats:
        """Map contexts `(B, T, D)` to unit next vectors `(B, D)`."""
        ...


def evaluate(
    predictor: BatchPredictor,
    corpus: Corpus,
    length: int,
    train: Corpus | StoredCorpus | None = None,
    bank: Floats | None = None,
) -> dict[str, Any]:
    """Return the scores of `predictor` and of every baseline on `corpus`, for JSON.

    `length` is T. The ridge baseline needs the corpus `train`. If answers search other vectors than those of the
    corpus, `bank` `(N, D)` holds these vectors.

    Raises:
        NoWindows: no article of the corpus is longer than T chunks.
        ValueError: an answer is not finite.
    """
    data = require_windows(corpus, length)
    scores = evaluate_windows(predictor.predict_batch, data, bank).summary()
    known = baselines(length, train)
    baseline = {name: evaluate_windows(predict, data).summary() for name, predict in known.items()}
    return {**scores, "baselines": baseline, **window_counts(data)}


def window_counts(data: Windows) -> dict[str, int]:
    """Return the counts that identify a data set."""
    return {"windows": len(data), "articles": len(np.unique(data.article)), "chunks": len(data.vectors)}


def compare_with_card(scores: Mapping[str, Any], card: Card) -> dict[str, Any] | None:
    """Compare `scores` with the card's cosine on the same data set, found by its counts; None if the card lacks it.

    `is_worse` means that the cosine is lower by more than `TOLERANCE`.
    """
    name = find_on_card(card, scores)
    if name is None:
        return None
    cosine = card.scores[name]["cosine"]
    difference = scores["cosine"] - cosine
    known = {"data": name, "cosine": cosine, "difference": difference}
    return {**known, "tolerance": TOLERANCE, "is_worse": difference < -TOLERANCE}


def find_on_card(card: Card, found: Mapping[str, Any]) -> str | None:
    """Return the name on the card of the data set with these counts, None if the card lacks it."""
    names = (name for name, score in card.scores.items() if all(score.get(count) == found[count] for count in COUNTS))
    return next(names, None)


def baseline_scores(data: Windows) -> dict[str, float]:
    """Return the mean cosine of every baseline that needs no fitting."""
    return {name: mean_cosine(predict, data) for name, predict in baselines(data.length, None).items()}


def mean_cosine(predict: Callable[[Floats], Floats], data: Windows) -> float:
    """Return the mean cosine of the predictions and the true next vectors."""
    blocks = (data.take(rows) for rows in _blocks(len(data)))
    return sum(float(np.sum(predict(block.contexts()) * block.targets())) for block in blocks) / len(data)


def baselines(length: int, train: Corpus | StoredCorpus | None) -> dict[str, Callable[[Floats], Floats]]:
    """Return every baseline by name; the ridge regression only if there is a corpus `train` to fit it."""
    weights = DECAY ** np.arange(length - 1, -1, -1, dtype=np.float32)
    found: dict[str, Callable[[Floats], Floats]] = {
        "persistence": lambda contexts: contexts[:, -1],
        "mean": lambda contexts: normalise(contexts.mean(axis=1)),
        "weighted_mean": lambda contexts: normalise(weights @ contexts),
    }
    if train is not None:
        found["ridge"] = ridge(windows(train, length))
    return found


def ridge(train: Windows) -> Callable[[Floats], Floats]:
    """Fit a ridge regression from the concatenated context on `train`; return its prediction.

    Of more than 100,000 windows, as many that are spread over `train` count.
    """
    train = train.take(np.unique(np.linspace(0, len(train) - 1, RIDGE_WINDOWS).astype(int)))
    width = train.length * train.vectors.shape[1]
    gram, moment = np.zeros((width, width)), np.zeros((width, train.vectors.shape[1]))
    for block in np.array_split(np.arange(len(train)), len(train) // 8192 + 1):
        contexts = train.vectors[train.rows()[block]].reshape(-1, width)
        gram += contexts.T @ contexts
        moment += contexts.T @ train.vectors[train.target[block]]
    weights = np.linalg.solve(gram + RIDGE * np.eye(width), moment).astype(np.float32)
    return lambda contexts: normalise(contexts.reshape(-1, width) @ weights)


@dataclass(frozen=True)
class WindowScores:
    """Scores by window, `(W,)` each: article, cosine, margin, and the rank of the true next chunk.

    `ranks` counts the chunks of the context, `ranks_without` does not.
    """

    article: NDArray[np.int32]
    cosine: Floats
    margin: Floats
    ranks: NDArray[Any]
    ranks_without: NDArray[Any]

    def summary(self) -> dict[str, Any]:
        """Return the means, for JSON."""
        return {
            "cosine": float(self.cosine.mean()),
            "cosine_std": float(self.cosine.std()),
            "margin": float(self.margin.mean()),
            "retrieval": {
                "with_context": rank_metrics(self.ranks),
                "without_context": rank_metrics(self.ranks_without),
            },
        }


def evaluate_windows(predict: Callable[[Floats], Floats], data: Windows, bank: Floats | None = None) -> WindowScores:
    """Return the scores of `predict` by window; `bank` `(N, D)` is searched instead of the corpus, if given.

    Raises:
        ValueError: an answer is not finite.
    """
    bank = np.asarray(data.vectors) if bank is None else bank
    parts = [_score_block(predict, data, rows, bank) for rows in _blocks(len(data))]
    found = WindowScores(data.article, *(np.concatenate(part) for part in zip(*parts, strict=True)))
    if not np.isfinite(found.cosine).all():
        raise ValueError("an answer is not finite")
    return found


def _blocks(count: int) -> list[NDArray[np.int64]]:
    return np.array_split(np.arange(count), count // _BLOCK_WINDOWS + 1)


def _score_block(
    predict: Callable[[Floats], Floats], data: Windows, rows: NDArray[np.int64], bank: Floats
) -> tuple[NDArray[Any], ...]:
    context_rows, target = data.rows()[rows], data.target[rows]
    contexts, truth = data.vectors[context_rows], data.vectors[target]
    vectors = predict(contexts)
    cosine = np.sum(vectors * truth, axis=1)
    margin = cosine - np.sum(vectors * contexts[:, -1], axis=1)
    return cosine, margin, *ranks(vectors, bank, context_rows, target)


def ranks(
    queries: Floats, bank: Floats, context: NDArray[np.int64], target: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ranks `(B,)` of the rows `target` in a bank `(N, D)`, with and without the rows `context` `(B, T)`."""
    similarity = queries @ bank.T  # (B, N)
    true = np.take_along_axis(similarity, target[:, None], 1)
    earlier_tie = (similarity == true) & (np.arange(len(bank)) < target[:, None])
    better = (similarity > true) | earlier_tie
    rank = 1 + better.sum(axis=1)
    return rank, rank - np.take_along_axis(better, context, 1).sum(axis=1)


def rank_metrics(found: NDArray[Any]) -> dict[str, float]:
    """Return recall and mean reciprocal rank of ranks `(W,)`; a rank is infinite if the true chunk was not found."""
    recall = {f"R@{k}": float(np.mean(found <= k)) for k in RANKS}
    return {**recall, "Contain@50": recall["R@50"], "MRR": float(np.mean(1.0 / found))}


def window_searches(data: Windows, exclude_context: bool, k: int, queries: Floats | None = None) -> list[Search]:
    """Return one search per window, for its next chunk: by the towers, or by `queries` `(W, D)`."""
    contexts = data.contexts()
    known = [None] * len(data) if queries is None else list(queries)
    return [
        Search(query, k, (), context if exclude_context else None, context)
        for query, context in zip(known, contexts, strict=True)
    ]


def evaluate_retrieval(
    retriever: Retriever, data: Windows, queries: Floats | None = None
) -> dict[str, dict[str, float]]:
    """Return the retrieval scores of a retriever on the windows of `data`, with and without the context's chunks.

    The towers make the queries, or they are given as `queries` `(W, D)`. Ranks beyond `RERANK_DEPTH` count as infinite.
    """
    return {
        "with_context": rank_metrics(retrieval_ranks(retriever, data, False, queries)),
        "without_context": rank_metrics(retrieval_ranks(retriever, data, True, queries)),
    }


def retrieval_ranks(
    retriever: Retriever, data: Windows, exclude_context: bool, queries: Floats | None = None
) -> Floats:
    """Return the rank of the true next chunk of every window `(W,)`, infinite if it was not found."""
    found = np.full(len(data), np.inf, np.float32)
    searches = window_searches(data, exclude_context, RERANK_DEPTH, queries)
    for number, (search, target) in enumerate(zip(searches, data.target_in_corpus.tolist(), strict=True)):
        rows = [hit.row for hit in retriever.search_batch([search])[0]]
        if target in rows:
            found[number] = 1 + rows.index(target)
    return found


def evaluate_bundle(retriever: Retriever, data: Windows, progress: Callable[[], None]) -> dict[str, Any]:
    """Return the scores of a bundle on windows of its own corpus, by searches as they are served.

    The form is that of `evaluate`. With a reranker the retrieval scores are those after reranking, and "towers alone"
    is one of the baselines. `progress` is called after each of `BUNDLE_EVALUATIONS` parts, or fewer.
    """
    assert retriever.towers
    contexts = data.contexts()

    def figures(answers: Floats, searcher: Retriever, queries: Floats | None) -> dict[str, Any]:
        cosine = np.vecdot(answers, data.targets())
        margin = cosine - np.vecdot(answers, contexts[:, -1])
        retrieval = evaluate_retrieval(searcher, data, queries)
        progress()
        return {"cosine": float(cosine.mean()), "margin": float(margin.mean()), "retrieval": retrieval}

    known = {name: predict(contexts) for name, predict in baselines(data.length, None).items()}
    beside = {name: figures(answers, retriever, answers) for name, answers in known.items()}
    made = retriever.towers.query.run(contexts)
    if retriever.reranks:
        beside = {"towers alone": figures(made, retriever.without_reranker(), None), **beside}
    return {**figures(made, retriever, None), "baselines": beside, **window_counts(data)}
