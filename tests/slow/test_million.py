"""A million passages are stored, promoted and served by the real commands, from disk, on an ordinary machine.

The corpus is made of the one that ships (or of the one in LVM_MILLION_FROM: more real articles are
more like a real million): the articles themselves, then variants of them until there are a million
chunks. A variant moves each chunk 30 to 50 % of the way towards one of its eight nearest neighbours and adds 0.55
times the difference of two random chunks, which is noise of the corpus's own shape. So a variant has topics,
order and neighbours as articles have, and the cosines of near neighbours stay those of the real ones. Run by
`pytest -m soak -s tests/slow`, which prints the figures.
"""

import http.client
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from models.registry.registry import Registry
from models.retrieval.corpus import (
    VECTORS_FILE,
    Corpus,
    read_corpus,
    write_corpus,
)
from models.retrieval.filters import RowSet
from models.retrieval.index import VectorIndex
from models.retrieval.retriever import load_retriever
from models.vectors import Floats, normalise
from tests.conftest import LVM, SHIPPED, Process

ROWS, BLOCK, QUERIES = 1_000_000, 50_000, 300
SHARES = (0.0001, 0.001, 0.01, 0.02, 0.1, 0.5, 0.79, 0.9, 1.0)
pytestmark = pytest.mark.soak


def variants(vectors: Floats, count: int) -> Iterator[Floats]:
    """Yield the vectors, then variants of them, `count` rows in all."""
    near = np.vstack([neighbours(vectors[row : row + 256], vectors) for row in range(0, len(vectors), 256)])
    random, rows = np.random.default_rng(0), np.arange(len(vectors))
    yield vectors[:count]
    for made in range(len(vectors), count, len(vectors)):
        other = vectors[near[rows, random.integers(0, 8, len(rows))]]
        share = random.uniform(0.3, 0.5, (len(rows), 1)).astype(np.float32)
        noise = vectors[random.permutation(rows)] - vectors[random.permutation(rows)]
        moved = normalise(normalise((1 - share) * vectors + share * other) + 0.55 * noise)
        yield moved[: count - made]


def neighbours(some: Floats, vectors: Floats) -> Any:
    """Return the rows of the eight best of `vectors` for each of `some`, itself left out."""
    similarity = some @ vectors.T
    similarity[similarity > 0.999] = 0
    return np.argpartition(similarity, -8, axis=1)[:, -8:]


def lines(corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Yield articles without end: those of the corpus, again and again, under new numbers."""
    number = 0
    while True:
        for article in corpus.articles.values():
            yield {**article, "article_id": number, "title": f"{article['title']} {number}"}
            number += 1


def write_million(source: Path, target: Path) -> None:
    """Write a corpus of `ROWS` chunks made of the one in `source`."""
    corpus = read_corpus(source)
    articles, left = [], ROWS
    for article in lines(corpus):
        articles.append({**article, "chunks": article["chunks"][:left]})
        left -= len(articles[-1]["chunks"])
        if not left:
            break
    halves = np.vstack([vectors.astype(np.float16) for vectors in variants(corpus.vectors, ROWS)])
    write_corpus(target, halves, articles)  # type: ignore[arg-type]  # float32 would take twice the memory


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The million chunks; LVM_MILLION names a corpus that is there already."""
    known = os.environ.get("LVM_MILLION")
    target = Path(known) if known else tmp_path_factory.mktemp("million") / "data"
    if not target.exists():
        write_million(Path(os.environ.get("LVM_MILLION_FROM", str(SHIPPED / "retriever"))), target)
    return target


def test_a_million_passages_are_stored_promoted_and_served(
    million: Path, shipped: Path, process: Callable[..., Process]
) -> None:
    version, built = stored(million, shipped)
    card = json.loads(lvm("models", "--json", registry=shipped))
    promoted = timed(lambda: lvm("promote", "retriever", version, registry=shipped))
    began = time.perf_counter()
    server = process()
    ready = time.perf_counter() - began
    idle = memory(server.popen.pid)
    corpus = Registry(shipped).resolve("retriever").path
    assert corpus.name == version
    halves = np.load(corpus / VECTORS_FILE, mmap_mode="r")
    contexts = [normalise(halves[row : row + 5]) for row in np.random.default_rng(1).choice(ROWS - 5, QUERIES, False)]
    with closing(Connection(server.url)) as connection:
        answers = connection.ask(contexts)
    vectors = np.array([answer["vector"] for answer, _, _ in answers], np.float32)
    recall = found([[hit["id"] for hit in hits] for _, hits, _ in answers], exact(halves, vectors, contexts))
    times = [1e3 * seconds for _, _, seconds in answers]
    report = {
        "build": built,
        "files_MB": {path.name: round(path.stat().st_size / 1e6, 1) for path in sorted(corpus.iterdir())},
        "promote_s": promoted,
        "ready_s": round(ready, 2),
        "memory_idle_MB": idle,
        "memory_after_MB": memory(server.popen.pid),
        "retrieve_p50_ms": round(float(np.median(times)), 2),
        "retrieve_p99_ms": round(float(np.percentile(times, 99)), 2),
        "recall@10": recall,
        "filtered": filtered(corpus, normalise(np.stack(contexts).mean(axis=1))),
        "limits": next(known["limits"] for known in card["versions"] if known["version"] == version),
    }
    print(json.dumps(report, indent=2))
    assert recall >= 0.99
    assert idle["RssAnon"] < 500


def filtered(corpus: Path, queries: Floats) -> dict[float, float]:
    """Return, by the share of passages that a filter keeps, the time of a search beside that without a filter."""
    index = load_retriever(corpus).index
    sets = {share: RowSet(np.random.default_rng(2).random(ROWS) < share) for share in SHARES}
    alone = typical(index, queries, None)
    return {share: round(typical(index, queries, kept) / alone, 2) for share, kept in sets.items()}


def typical(index: VectorIndex, queries: Floats, kept: RowSet | None) -> float:
    """Return the median processor time of a search for fifteen passages, after all were made once."""
    times = []
    for query in [*queries, *queries]:
        began = time.thread_time()
        index.search(query[None], 15, kept)
        times.append(time.thread_time() - began)
    return float(np.median(times[len(queries) :]))


def stored(data: Path, registry: Path) -> tuple[str, dict[str, float]]:
    """Run `lvm corpus`; return the version, the seconds it took and the most memory it held, in MB."""
    began, peak = time.perf_counter(), 0
    command = [LVM, "corpus", "million", "--data", str(data), "--json"]
    with subprocess.Popen(command, env={**os.environ, "LVM_REGISTRY": str(registry)}, stdout=subprocess.PIPE) as popen:
        while popen.poll() is None:
            with suppress(FileNotFoundError, KeyError):  # it ends, or has ended, meanwhile
                peak = max(peak, memory(popen.pid)["VmHWM"])
            time.sleep(0.1)
        assert popen.stdout is not None
        said = json.load(popen.stdout)
    return said["version"], {"seconds": round(time.perf_counter() - began, 1), "peak_MB": peak}


def lvm(*words: str, registry: Path) -> str:
    done = subprocess.run(
        [LVM, *words], env={**os.environ, "LVM_REGISTRY": str(registry)}, check=True, capture_output=True
    )
    return done.stdout.decode()


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return round(time.perf_counter() - began, 2)


def memory(pid: int) -> dict[str, int]:
    """Return the resident memory of a process in MB: its own, and pages of files that the system may take back."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) // 1024 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


class Connection:
    """One connection to the server that is kept."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._http = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)

    def close(self) -> None:
        self._http.close()

    def post(self, path: str, body: bytes, media_type: str) -> Any:
        self._http.request("POST", path, body, {"content-type": media_type})
        answer = self._http.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return json.loads(body)

    def ask(self, contexts: list[Floats]) -> list[tuple[Any, Any, float]]:
        """Return for each context the vector predicted, the hits, and the seconds /retrieve took."""
        answers = []
        for context in contexts:
            predicted = self.post("/predict", json.dumps({"context": context.tolist()}).encode(), "application/json")
            began = time.perf_counter()
            answer = self.post("/retrieve?k=10", context.tobytes(), "application/octet-stream")
            answers.append((predicted, answer["results"], time.perf_counter() - began))
            assert answer["is_exact"] is False
        return answers


def exact(halves: Any, queries: Floats, contexts: list[Floats]) -> list[list[int]]:
    """Return the ten best rows of each query by brute force, those of its own context left out."""
    scores = np.vstack([normalise(halves[row : row + BLOCK]) @ queries.T for row in range(0, ROWS, BLOCK)])
    truth = []
    for column, own in zip(scores.T, contexts, strict=True):
        rows = np.argpartition(column, -100)[-100:]
        rows = rows[np.argsort(-column[rows])]
        others = rows[(normalise(halves[rows]) @ own.T).max(axis=1) < 0.999]
        truth.append(others[:10].tolist())
    return truth


def found(rows: list[list[int]], truth: list[list[int]]) -> float:
    return round(float(np.mean([len(set(some) & set(best)) / 10 for some, best in zip(rows, truth, strict=True)])), 4)
