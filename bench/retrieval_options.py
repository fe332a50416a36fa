"""What the options of /retrieve cost and gain on a data set: `python -m bench.retrieval_options VERSION --data DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import NamedTuple

import numpy as np

from models.evaluate import rank_metrics
from models.registry.registry import Registry
from models.retrieval.corpus import read_corpus
from models.retrieval.retriever import Hit, Retriever, Search, load_retriever
from models.vectors import Floats
from models.windows import Windows, require_windows

MANY = 64
Option = Callable[[Search, int], Search]


class Measured(NamedTuple):
    """An option: processor milliseconds of a search, recall and rank of the next chunk, and how alike results are."""

    name: str
    ms: float
    recall: float
    mrr: float
    cosine: float
    articles: float


def measure(retriever: Retriever, data: Windows, options: dict[str, Option]) -> list[Measured]:
    """Return what each option does to the ten results for each window."""
    searches = [Search(None, 10, (), context, context) for context in data.contexts()]
    found: dict[str, list[list[Hit]]] = {name: [] for name in options}
    seconds: dict[str, list[float]] = {name: [] for name in options}
    for at, search in enumerate(searches):
        for name, option in options.items():
            changed = option(search, int(data.article[at]))
            began = process_time()
            found[name] += retriever.search_batch([changed])
            seconds[name].append(process_time() - began)
    return [_measured(name, retriever, data, found[name], seconds[name]) for name in options]


def _measured(name: str, retriever: Retriever, data: Windows, found: list[list[Hit]], seconds: list[float]) -> Measured:
    rows = [np.array([hit.row for hit in hits], np.int64) for hits in found]
    places = (np.flatnonzero(each == target) for each, target in zip(rows, data.target, strict=True))
    metrics = rank_metrics(np.array([1.0 + place[0] if len(place) else np.inf for place in places]))
    cosines = [_mean_cosine(retriever.corpus.vectors_at(each)) for each in rows if len(each) > 1]
    articles = [len({hit.chunk.article for hit in hits}) for hits in found]
    cosine, number = float(np.mean(cosines)), float(np.mean(articles))
    return Measured(name, 1e3 * median(seconds), metrics["R@5"], metrics["MRR"], cosine, number)


def _mean_cosine(vectors: Floats) -> float:
    """Return the mean cosine of different vectors among `vectors` `(K, D)`."""
    return float((vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)].mean())


def options_of(retriever: Retriever) -> dict[str, Option]:
    """Return the options to measure; filters keep one article in eight, half of them, or all."""
    known = np.unique(retriever.corpus.article)

    def filtered(step: int) -> Option:
        return lambda search, own: replace(search, filter={"article": [*known[::step].tolist(), own]})

    def diverse(weight: float, rerank: bool) -> Option:
        return lambda search, own: replace(search, mmr=weight, rerank=rerank)

    return {
        "none": lambda search, own: search,
        "`rerank` false": lambda search, own: replace(search, rerank=False),
        **{f"`mmr` {weight}": diverse(weight, True) for weight in (0.9, 0.7, 0.5)},
        **{f"`mmr` {weight}, `rerank` false": diverse(weight, False) for weight in (0.9, 0.7, 0.5)},
        "`filter`: the right article": lambda search, own: replace(search, filter={"article": [own]}),
        "`filter`: an eighth of the articles and the right one": filtered(8),
        "`filter`: half of the articles": filtered(2),
        "`filter`: all articles": filtered(1),
    }


def many(retriever: Retriever, data: Windows) -> float:
    """Return the milliseconds of processor time of one of `MANY` searches that run together."""
    searches = [Search(None, 10, (), context, context) for context in data.contexts()]
    times = []
    for at in range(0, len(searches) - MANY + 1, MANY):
        began = process_time()
        retriever.search_batch(searches[at : at + MANY])
        times.append((process_time() - began) / MANY)
    return 1e3 * median(times)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="A corpus with towers: an alias, or NAME/VERSION.")
    parser.add_argument("--data", type=Path, required=True, help="The data set that the corpus was made of.")
    parser.add_argument("--registry", type=Path, default=Path("artifacts/lvm"))
    parser.add_argument("--windows", type=int, default=1000, help="Windows, evenly spread.")
    asked = parser.parse_args()
    retriever = load_retriever(Registry(asked.registry).find(asked.version).path)
    data = require_windows(read_corpus(asked.data), retriever.card.context_length)
    data = data.take(np.linspace(0, len(data) - 1, min(asked.windows, len(data))).astype(np.int64))
    print("| option | ms of processor | R@5 | MRR | cosine of results | articles in 10 |\n|---|---|---|---|---|---|")
    for row in measure(retriever, data, options_of(retriever)):
        print(
            f"| {row.name} | {row.ms:.2f} | {row.recall:.3f} | {row.mrr:.3f} | {row.cosine:.2f} | {row.articles:.1f} |"
        )
    print(f"\n{MANY} contexts in one batch: {many(retriever, data):.2f} ms each")


if __name__ == "__main__":
    main()
