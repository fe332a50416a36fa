"""Milvus over the real wire: milvus-lite's server, pushed to, searched, killed, stopped and started."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.registry.registry import Registry
from models.retrieval.corpus import write_corpus
from models.retrieval.index import FlatIndex
from models.retrieval.milvus import (
    BadCollection,
    IndexUnavailable,
    MilvusCollection,
    MilvusIndex,
    MilvusPush,
    NotPushed,
    alias_of,
    connect,
)
from models.retrieval.retriever import Retriever, Search, load_retriever
from models.vectors import normalise
from tests.conftest import LVM, SHIPPED, Process, until

pytestmark = [pytest.mark.milvus, pytest.mark.filterwarnings("default")]  # pymilvus and grpc have warnings of their own
QUERIES, PATIENCE_S = 1000, 60.0
Serve = Callable[..., Process]


class Milvus:
    """milvus-lite's server, on a port and a directory that outlive it."""

    def __init__(self, data: Path) -> None:
        self._data = data
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it; wait until it answers."""
        server = Path(sys.executable).with_name("milvus-lite")
        command = [server, "server", "--data-dir", self._data, "--host", "127.0.0.1", "--port", str(self._port)]
        with self._data.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, "milvus-lite")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; reap it where that was its end."""
        self._process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._process.wait()

    def client(self) -> Any:
        """Return a client."""
        return connect(self.uri, "", PATIENCE_S)

    def _answers(self) -> bool:
        try:
            self.client().close()
        except IndexUnavailable:
            return False
        return True


@pytest.fixture
def milvus(tmp_path: Path) -> Iterator[Milvus]:
    made = Milvus(tmp_path / "milvus")
    made.start()
    yield made
    made.signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def shipped_corpus() -> Retriever:
    return load_retriever(Registry(SHIPPED).resolve("retriever").path)


def push(milvus: Milvus, corpus: Retriever, kind: Any = "flat", progress: Any = lambda done, total: None) -> Any:
    order = MilvusPush(milvus.uri, "", corpus.sha256, corpus.indexes, kind)
    return order.run(alias_of(corpus.name), progress)


def build_of(milvus: Milvus, corpus: Retriever) -> MilvusCollection:
    build = MilvusCollection(milvus.uri, "", corpus.sha256, len(corpus.corpus))
    build.set_timeout(PATIENCE_S)
    return build


def through(milvus: Milvus, corpus: Retriever) -> Retriever:
    build = build_of(milvus, corpus)
    return corpus.with_indexes({name: MilvusIndex(build, name, index) for name, index in corpus.indexes.items()})


def lvm(*words: str, registry: Path = SHIPPED) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LVM_REGISTRY": str(registry)}
    return subprocess.run([LVM, *words], env=env, capture_output=True, text=True, check=False)


def recall(ours: Any, theirs: Any) -> float:
    return sum(len(set(a) & set(b)) for a, b in zip(ours, theirs, strict=True)) / theirs.size


def in_parts(index: Any, queries: Any, k: int, build: MilvusCollection | None = None) -> tuple[Any, Any]:
    parts = []
    for first in range(0, len(queries), 50):
        if build:
            build.set_timeout(PATIENCE_S)
        parts.append(index.search(queries[first : first + 50], k))
    return np.concatenate([scores for scores, _ in parts]), np.concatenate([rows for _, rows in parts])


def test_a_thousand_queries_find_over_the_wire_what_the_exact_index_finds(
    milvus: Milvus, shipped_corpus: Retriever
) -> None:
    """The same ten, in the same order, with the same scores to the bit; half of the queries are passages themselves."""
    push(milvus, shipped_corpus)
    rng = np.random.default_rng(0)
    for name, local in shipped_corpus.indexes.items():
        some = rng.choice(len(local), QUERIES, replace=False)
        noise = rng.standard_normal((QUERIES, 384)) * np.repeat([0, 0.05], QUERIES // 2)[:, None]
        queries = (local.vectors_at(some) + noise).astype(np.float32)
        build = build_of(milvus, shipped_corpus)
        scores, rows = in_parts(MilvusIndex(build, name, local), queries, 10, build)
        expected = local.search(queries, 10)
        print(f"\n{name}: recall@10 {recall(rows, expected[1]):.4f} of {QUERIES} queries among {len(local):,}")
        assert np.array_equal(rows, expected[1])
        assert np.array_equal(scores, expected[0])


def test_contexts_with_exclusions_get_the_passages_that_they_get_here(
    milvus: Milvus, shipped_corpus: Retriever
) -> None:
    """Reranked, their own chunks and excluded ids left out by the store."""
    push(milvus, shipped_corpus)
    remote = through(milvus, shipped_corpus)
    contexts = [shipped_corpus.corpus.vectors_at(np.arange(5) + 40 * number) for number in range(8)]
    searches = [Search(None, 10, range(7 * n), context, context) for n, context in enumerate(contexts)]
    assert remote.search_batch(searches) == shipped_corpus.search_batch(searches)


def test_a_push_that_was_stopped_goes_on_and_is_not_searched_before(milvus: Milvus, shipped_corpus: Retriever) -> None:
    """Half a collection is none; the second push inserts the rest, the third nothing."""

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stopped

    with pytest.raises(IndexUnavailable, match="Stopped"):
        push(milvus, shipped_corpus, progress=stop)
    with pytest.raises(NotPushed):
        build_of(milvus, shipped_corpus).open()
    milvus.signal(signal.SIGKILL)
    milvus.start()
    second, third = push(milvus, shipped_corpus), push(milvus, shipped_corpus)
    assert 0 < second.inserted < second.rows
    assert third.inserted == 0
    build_of(milvus, shipped_corpus).open()
    with pytest.raises(BadCollection, match=r"lvm\.index"):
        push(milvus, shipped_corpus, "hnsw")


def test_the_alias_stands_for_one_collection_or_the_other_at_every_moment(
    milvus: Milvus, shipped_corpus: Retriever
) -> None:
    """A hundred switches while somebody looks; old collections stay, so those who search them lose nothing."""
    few = FlatIndex(shipped_corpus.corpus.vectors_at(np.arange(100)))
    orders = [MilvusPush(milvus.uri, "", digit * 64, {"encoded": few}, "flat") for digit in "ab"]
    names = [order.run("lvm_few", lambda done, total: None).collection for order in orders]
    seen, done = Counter[str](), threading.Event()

    def look() -> None:
        client = milvus.client()
        while not done.is_set():
            seen[client.describe_alias("lvm_few")["collection_name"]] += 1

    looker = threading.Thread(target=look)
    looker.start()
    switched = [orders[turn % 2].run("lvm_few", lambda done, total: None) for turn in range(100)]
    done.set()
    looker.join()
    print(f"\nalias looked at {sum(seen.values())} times in 100 switches: {dict(seen)}")
    assert set(seen) == set(names)
    assert [told.was for told in switched] == [names[(turn + 1) % 2] for turn in range(100)]
    build = MilvusCollection(milvus.uri, "", "a" * 64, 100)
    build.set_timeout(PATIENCE_S)
    assert build.find("encoded", few.vectors_at(np.arange(3)), 1) == [[0], [1], [2]]


def test_an_approximate_index_finds_nearly_the_same(milvus: Milvus, shipped_corpus: Retriever) -> None:
    """HNSW, and it says that it is not exact."""
    push(milvus, shipped_corpus, "hnsw")
    build, local = build_of(milvus, shipped_corpus), shipped_corpus.index
    index = MilvusIndex(build, "encoded", local)
    queries = local.vectors_at(np.arange(0, 6000, 30))
    found = recall(in_parts(index, queries, 10, build)[1], local.search(queries, 10)[1])
    print(f"\nHNSW: recall@10 {found:.4f}")
    assert found >= 0.99
    assert not index.is_exact


def test_a_hundred_thousand_clustered_vectors(milvus: Milvus) -> None:
    """The store's own arithmetic is exact enough where neighbours are close: recall >= 0.99 of 200 queries."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((1000, 64))
    vectors = normalise(np.repeat(centres, 100, axis=0) + 0.2 * rng.standard_normal((100_000, 64)))
    local, build = FlatIndex(vectors), MilvusCollection(milvus.uri, "", "c" * 64, len(vectors))
    MilvusPush(milvus.uri, "", "c" * 64, {"encoded": local}, "flat").run("lvm_many", lambda done, total: None)
    queries = normalise(vectors[::500] + 0.05 * rng.standard_normal((200, 64)))
    rows = in_parts(MilvusIndex(build, "encoded", local), queries, 10, build)[1]
    found = recall(rows, local.search(queries, 10)[1])
    print(f"\nrecall@10 {found:.4f} of 200 queries among {len(local):,} clustered vectors")
    assert found >= 0.99


class Callers:
    """Threads that ask /retrieve for passages until they are told to stop."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.answers: list[tuple[float, int, str | None, float]] = []  # when, status, marked, seconds
        self._body = json.loads((SHIPPED.parent.parent / "examples" / "context.json").read_text())
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url,)) for _ in range(count)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, url: str) -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
            while not self._done.is_set():
                began = time.monotonic()
                answer = http.post("/retrieve", json=self._body)
                marked = answer.headers.get("x-fallback-reason")
                self.answers.append((began, answer.status_code, marked, time.monotonic() - began))
                time.sleep(0.01)

    def since(self, moment: float, marked: str | None) -> list[tuple[float, int, str | None, float]]:
        """Return the answers to what was asked after `moment` that are marked so."""
        return [answer for answer in self.answers if answer[0] > moment and answer[2] == marked]


def serving(process: Serve, milvus: Milvus) -> Process:
    return process(LVM_MILVUS_URI=milvus.uri, LVM_MILVUS_TIMEOUT_MS="1000", LVM_BREAKER_HOLD_S="0.5")


@pytest.mark.parametrize(
    ("trouble", "end"), [(signal.SIGKILL, None), (signal.SIGSTOP, signal.SIGCONT)], ids=["killed", "hangs"]
)
def test_nobody_meets_an_error_while_the_store_is_away_and_it_is_asked_again_once_back(
    milvus: Milvus, shipped_corpus: Retriever, process: Serve, trouble: signal.Signals, end: signal.Signals | None
) -> None:
    """Every answer is a 200, marked while it is away; the service is not restarted."""
    push(milvus, shipped_corpus)
    server = serving(process, milvus)
    with Callers(server.url) as callers:
        until(lambda: len(callers.since(0, None)) > 50, "answers by the store")
        milvus.signal(trouble)
        gone = time.monotonic()
        until(lambda: len(callers.since(gone, "index_away")) > 300, "answers from here")
        mended = time.monotonic()
        milvus.signal(end) if end else milvus.start()
        back = time.monotonic()
        until(lambda: len(callers.since(back, None)) > 50, "answers by the store")
    answers = callers.answers
    again_s = callers.since(back, None)[0][0] - back
    by, here = (statistics.median(a[3] for a in answers if a[2] == marked) for marked in (None, "index_away"))
    print(
        f"\n{trouble.name}: {len(answers)} answers, statuses {dict(Counter(a[1] for a in answers))}, "
        f"marked {dict(Counter(a[2] for a in answers))}; asked again {again_s:.2f} s after "
        f"it was back; median of the store / of here = {by / here:.1f}, slowest {max(a[3] for a in answers):.2f} s"
    )
    assert {status for _, status, _, _ in answers} == {200}
    assert {marked for _, _, marked, _ in answers} == {None, "index_away"}
    assert all(asked > mended - 2 for asked, *_ in callers.since(gone, None))  # none lives longer than its deadline
    counted = server_metric(server, 'lvm_fallbacks_total{reason="index_away"}')
    assert counted == sum(marked is not None for _, _, marked, _ in answers)


def server_metric(server: Process, sample: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(sample))


def test_a_version_that_was_not_pushed_is_searched_here_until_it_is(
    milvus: Milvus, process: Serve, tmp_path: Path, shipped_corpus: Retriever
) -> None:
    """By `lvm index push`, while it serves; the rows of another version are never taken for its own."""
    server = serving(process, milvus)
    context = shipped_corpus.corpus.vectors_at(np.arange(5))
    body = {"context": context.tolist()}

    def reason() -> Any:
        answer = httpx.post(f"{server.url}/retrieve", json=body, timeout=PATIENCE_S)
        assert answer.status_code == 200
        return answer.json()["fallback_reason"]

    assert reason() == "index_stale"
    write_corpus(
        tmp_path / "other",
        shipped_corpus.corpus.vectors_at(np.arange(50)),
        [{"article_id": 1, "title": "", "chunks": [""] * 50}],
    )
    root = server.registry.root
    made = lvm("corpus", "wiki-val", "--data", str(tmp_path / "other"), registry=root)
    other = lvm("index", "push", made.stdout.strip(), "--uri", milvus.uri, "--json", registry=root)
    assert json.loads(other.stdout)["rows"] == 50, other.stderr
    assert reason() == "index_stale"
    ours = lvm("index", "push", "--uri", milvus.uri, "--json", registry=root)
    assert json.loads(ours.stdout)["was"] == json.loads(other.stdout)["collection"]
    until(lambda: reason() is None, "the store to be asked")


def test_a_push_to_nobody_says_what_to_do_next() -> None:
    """In two lines, with an exit status."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = lvm("index", "push", "--uri", f"http://127.0.0.1:{port}")
    assert (told.returncode, told.stderr.count("\n")) == (1, 2)
    assert "next: " in told.stderr
