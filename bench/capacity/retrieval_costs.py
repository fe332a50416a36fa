"""What retrieval costs: both kinds of index alone on one core, then `/retrieve` of the corpus that ships."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time

import numpy as np

from bench import metrics
from bench.capacity.costs import Line, SearchCosts
from bench.contract import harness
from bench.load import Workload, keep
from bench.machine import processor_s
from bench.options import SHIPPED
from bench.servers import launched
from loadtest import contexts
from models.registry.card import Card
from models.retrieval.corpus import MappedCorpus, read_corpus
from models.retrieval.index import FlatIndex, IvfIndex, VectorIndex
from models.training import indexing
from models.training.work_cache import WorkCache
from models.vectors import Floats, normalise

# Ten results, and five for the chunks that the caller has.
QUERIES, K = 200, 15
# Vectors of an exact index, of those that ship, and of an approximate one, made of them.
EXACT = (1500, 3000, 6000)
APPROXIMATE = (25_000, 100_000)
CONNECTIONS = 16


def measure_retrieval(out: Path, seconds: float) -> SearchCosts:
    """Return the costs of retrieval on this machine."""
    vectors = read_corpus(SHIPPED / "retriever").vectors
    exact = Line.through({rows: _query_s(FlatIndex(vectors[:rows]), vectors) for rows in EXACT})
    found = {rows: _approximate(vectors, rows) for rows in APPROXIMATE}
    dim = vectors.shape[1]
    return SearchCosts(
        dim=dim,
        request_s=_request_s(out, seconds) - exact.at(len(vectors)),
        exact=exact,
        approximate=Line.through({rows**0.5: taken for rows, (taken, _) in found.items()}),
        measured=[*EXACT, *APPROXIMATE],
        exact_bytes=5 * dim,
        approximate_bytes=max(size for _, size in found.values()),
        disk_bytes=2 * dim,
    )


def _approximate(vectors: Floats, rows: int) -> tuple[float, float]:
    """Return the seconds of a query, tuned as `lvm corpus` tunes it, and the bytes in memory of a vector."""
    halves = _variants(vectors, rows).astype(np.float16)
    corpus = MappedCorpus(halves, np.zeros((rows, 2), np.int32), np.zeros((rows, 4), np.int64), b"")
    card = Card("capacity", "corpus", vectors.shape[1], encoder="", license="", attribution="")
    with TemporaryDirectory() as place:
        counter = indexing.Counter(indexing.count_steps(rows), lambda done, total: None)
        steps = indexing.CachedSteps(WorkCache(Path(place)), "", counter)
        built = indexing.build(corpus, card, indexing.mean_searches(corpus, card.context_length), steps)
    lists = built.lists
    index = IvfIndex(lists, corpus.vectors_at, built.config["nprobe"], built.config["pool"])
    return _query_s(index, vectors), lists.codes.shape[1] + 8 + lists.centroids.nbytes / rows


def _variants(vectors: Floats, rows: int) -> Floats:
    """Return vectors `(rows, D)`: those given, then some between neighbouring chunks with the corpus's own noise."""
    random = np.random.default_rng(0)
    some = random.integers(0, len(vectors) - 1, (3, max(rows - len(vectors), 0)))
    share = random.uniform(0.3, 0.5, (some.shape[1], 1)).astype(np.float32)
    between = normalise((1 - share) * vectors[some[0]] + share * vectors[some[0] + 1])
    return np.vstack([vectors[:rows], normalise(between + 0.55 * (vectors[some[1]] - vectors[some[2]]))])


def _query_s(index: VectorIndex, vectors: Floats) -> float:
    """Return the median seconds of a search for what lies between two neighbouring chunks."""
    times = []
    for row in np.random.default_rng(0).integers(0, len(vectors) - 1, QUERIES).tolist():
        query = normalise(vectors[row : row + 2].mean(axis=0, keepdims=True))
        began = process_time()
        index.search(query, K)
        times.append(process_time() - began)
    return median(times)


def _request_s(out: Path, seconds: float) -> float:
    """Return what a `/retrieve` of a query costs the service on its core."""
    # As many octets as a query has.
    traffic = keep(out / "traffic" / "retrieve", contexts.load()[:, :1])
    with launched(harness.launch(SHIPPED), out / "logs") as server:
        workload = Workload(server, "octet", traffic, route="retrieve")
        workload.warm_up(CONNECTIONS)
        before = metrics.counters(server.url, "/retrieve")
        began = sum(processor_s(server.pid))
        workload.measure(CONNECTIONS, seconds)
        grown = metrics.growth(before, metrics.counters(server.url, "/retrieve"))
        return (sum(processor_s(server.pid)) - began) / grown["requests"]
