"""How well fewer chunks than a context has find the next one, by how the missing ones are made up.

`python -m bench.partial_contexts VERSION --data DIR --net NET`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.evaluate import BatchPredictor, rank_metrics
from models.predictor import load_predictor
from models.registry.registry import Registry
from models.retrieval.corpus import read_corpus
from models.retrieval.retriever import Hit, Retriever, Search, load_retriever
from models.vectors import Floats, normalise
from models.windows import Windows, require_windows

RESULTS = 50
Pad = Callable[[Floats, int], Floats]


class Found(NamedTuple):
    """A way to search with `chunks` chunks, and how well it finds the next one among `RESULTS`."""

    chunks: int
    way: str
    recall: float
    mrr: float


class Predicted(NamedTuple):
    """A way to predict from `chunks` chunks, and the mean cosine to the true next vector."""

    chunks: int
    way: str
    cosine: float


def mean_of(parts: Floats) -> Floats:
    """Return the mean `(W, D)` of chunks `(W, n, D)`, as unit vectors."""
    return normalise(parts.mean(axis=1))


def pad_with(first: Callable[[Floats], Floats]) -> Pad:
    """Return what puts `first(parts)` `(W, D)` before chunks `(W, n, D)`, until there are T."""
    return lambda parts, length: np.concatenate(
        [np.repeat(first(parts)[:, None], length - parts.shape[1], axis=1), parts], axis=1
    )


def spread(parts: Floats, length: int) -> Floats:
    """Repeat each of the chunks `(W, n, D)` about equally often, until there are T."""
    return parts[:, np.arange(length) * parts.shape[1] // length]


PADS: dict[str, Pad] = {
    "the first chunk, repeated": pad_with(lambda parts: parts[:, 0]),
    "the mean of the chunks": pad_with(mean_of),
    "each chunk, repeated": spread,
}
QUERIES: dict[str, Callable[[Floats], Floats]] = {
    "no context: the last chunk as a query": lambda parts: parts[:, -1],
    "no context: the mean as a query": mean_of,
}


def retrieve(retriever: Retriever, data: Windows) -> Iterator[Found]:
    """Yield what each way finds with 1 to T - 1 chunks, and what the whole context finds."""
    contexts = data.contexts()
    for chunks in range(1, data.length):
        parts = contexts[:, -chunks:]
        for way, pad in PADS.items():
            padded = pad(parts, data.length)
            yield _found(chunks, way, retriever, data, [_by_context(*pair) for pair in zip(padded, parts, strict=True)])
        for way, query in QUERIES.items():
            searches = [Search(each, RESULTS, (), own) for each, own in zip(query(parts), parts, strict=True)]
            yield _found(chunks, way, retriever, data, searches)
    whole = [_by_context(context, context) for context in contexts]
    yield _found(data.length, "the whole context", retriever, data, whole)


def predict(net: BatchPredictor, data: Windows) -> Iterator[Predicted]:
    """Yield what a net makes of each padding of 1 to T - 1 chunks, of the whole context, and what copies score."""
    contexts, targets = data.contexts(), data.targets()

    def scored(chunks: int, way: str, vectors: Floats) -> Predicted:
        return Predicted(chunks, way, float(np.vecdot(vectors, targets).mean()))

    for chunks in range(1, data.length):
        parts = contexts[:, -chunks:]
        for way, pad in PADS.items():
            yield scored(chunks, way, net.predict_batch(pad(parts, data.length)))
        for way, query in QUERIES.items():
            yield scored(chunks, way.replace(" as a query", "").replace("context", "net"), query(parts))
    yield scored(data.length, "the whole context", net.predict_batch(contexts))
    yield scored(data.length, "no net: the mean", mean_of(contexts))


def _by_context(padded: Floats, parts: Floats) -> Search:
    return Search(None, RESULTS, (), parts, padded)


def _found(chunks: int, way: str, retriever: Retriever, data: Windows, searches: list[Search]) -> Found:
    found = [hits for search in searches for hits in retriever.search_batch([search])]
    metrics = rank_metrics(np.array([_rank(hits, target) for hits, target in zip(found, data.target, strict=True)]))
    return Found(chunks, way, metrics["R@5"], metrics["MRR"])


def _rank(hits: list[Hit], target: int) -> float:
    return next((1.0 + at for at, hit in enumerate(hits) if hit.row == target), np.inf)


def main() -> None:
    """Print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="A corpus with towers: an alias, or NAME/VERSION.")
    parser.add_argument("--data", type=Path, required=True, help="The data set that the corpus was made of.")
    parser.add_argument("--net", default="primary", help="An alias, or NAME/VERSION.")
    parser.add_argument("--registry", type=Path, default=Path("artifacts/lvm"))
    parser.add_argument("--windows", type=int, default=1000, help="Windows, evenly spread.")
    asked = parser.parse_args()
    registry = Registry(asked.registry)
    retriever = load_retriever(registry.find(asked.version).path)
    data = require_windows(read_corpus(asked.data), retriever.card.context_length)
    data = data.take(np.linspace(0, len(data) - 1, min(asked.windows, len(data))).astype(np.int64))
    print("| chunks | missing ones are | R@5 | MRR |\n|---|---|---|---|")
    for found in retrieve(retriever, data):
        print(f"| {found.chunks} | {found.way} | {found.recall:.3f} | {found.mrr:.3f} |")
    print("\n| chunks | missing ones are | cosine |\n|---|---|---|")
    for made in predict(load_predictor(registry.find(asked.net).path), data):
        print(f"| {made.chunks} | {made.way} | {made.cosine:.4f} |")


if __name__ == "__main__":
    main()
