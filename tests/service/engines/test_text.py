"""Text: chunks, or a passage cut as in training, become the vectors that the net reads, or are rejected."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.registry.registry import Version
from models.retrieval.retriever import Retriever
from models.text.chunks import chunk
from models.text.encoder import EncoderError
from models.vectors import Floats, normalise
from service.app import create_app
from service.engines.text import character_cost_rows
from service.settings import Settings
from tests.conftest import Running, running, until
from tests.fakes import (
    D,
    FakeLoader,
    FakePredictor,
    HashEncoder,
    T,
    bundle,
    card,
    mean_of,
    prose,
    raises,
    registry_of,
    retriever,
    words,
)

Serve = Callable[..., Running]
CHUNKS = [f"chunk {n}" for n in range(T)]
PASSAGE = prose([60] * (T + 3))


class Recorder(HashEncoder):
    """An encoder that remembers its batches, and waits while it is closed."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def encode(self, texts: Sequence[str], *_: Any) -> Floats:
        self.batches.append(list(texts))
        self.entered.set()
        self.opened.wait(30)
        return np.stack([self.vector(text) for text in texts]) if texts else np.empty((0, self.dim), np.float32)


def vectors_of(texts: Sequence[str]) -> Floats:
    return np.stack([HashEncoder().vector(text) for text in texts])


def post(server: Running, path: str, body: Any, **headers: str) -> httpx.Response:
    return server.http.post(path, json=body, headers=headers)


def test_chunks_give_the_prediction_of_their_vectors(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    said = post(server, "/predict", {"texts": CHUNKS, "model": "primary"})
    given = post(server, "/predict", {"context": vectors_of(CHUNKS).tolist()}).json()
    body = said.json()
    np.testing.assert_allclose(body["vector"], given["vector"], atol=1e-6)
    assert (body["read_as"], body["model"], body["served_by"]) == ("context", "amn", "primary")
    assert "chunks" not in body
    assert set(body["timing_ms"]) == {"decode", "queue", "infer", "embed"}
    assert "embed;dur=" in said.headers["server-timing"]
    assert not {"read_as", "chunks"} & given.keys()


def test_cuts_a_passage_as_in_training_and_uses_its_last_chunks(serve: Serve) -> None:
    body = post(serve(text=HashEncoder()), "/predict", {"text": PASSAGE}).json()
    assert body["chunks"] == chunk(PASSAGE, words)[-T:]
    np.testing.assert_allclose(body["vector"], mean_of(vectors_of(body["chunks"])[None])[0], atol=1e-6)


@pytest.mark.parametrize("corpus", [retriever, bundle])
def test_retrieves_for_a_long_text_as_a_context_and_a_short_one_as_a_query(
    serve: Serve, corpus: Callable[[], Retriever]
) -> None:
    server = serve(text=HashEncoder(), corpus=corpus)
    for body, read_as, given in (
        ({"texts": CHUNKS}, "context", {"context": vectors_of(CHUNKS).tolist()}),
        ({"text": PASSAGE}, "context", {"context": vectors_of(chunk(PASSAGE, words)[-T:]).tolist()}),
        ({"text": "hares and rabbits"}, "query", {"query": vectors_of(["hares and rabbits"])[0].tolist()}),
    ):
        said, known = (post(server, "/retrieve", each).json() for each in (body, given))
        assert said["read_as"] == read_as
        assert [hit["id"] for hit in said["results"]] == [hit["id"] for hit in known["results"]]
        assert (said.get("model"), said["reranked"]) == (known.get("model"), known["reranked"])
        assert ("chunks" in said) is ("text" in body)
        assert "embed" in said["timing_ms"]


@pytest.mark.parametrize(
    ("path", "body", "status", "pointer"),
    [
        ("/predict", {"texts": CHUNKS[:1]}, 422, "/texts"),
        ("/retrieve", {"texts": [*CHUNKS, "one more"]}, 422, "/texts"),
        ("/predict", {"texts": []}, 422, "/texts"),
        ("/predict", {"texts": "one"}, 422, "/texts"),
        ("/predict", {"texts": [*CHUNKS[:-1], " \n"]}, 422, "/texts/4"),
        ("/predict", {"texts": [*CHUNKS[:-1], 5]}, 422, "/texts/4"),
        ("/predict", {"text": ""}, 422, "/text"),
        ("/predict", {"text": "half a character \ud800"}, 422, "/text"),
        ("/predict", {"text": CHUNKS}, 422, "/text"),
        ("/predict", {"text": prose([60])}, 422, "/text"),
        ("/retrieve", {"texts": CHUNKS, "read_as": "context"}, 422, "/read_as"),
        ("/retrieve", {"query": [0.0] * D, "read_as": "query"}, 422, "/read_as"),
        ("/retrieve", {"texts": CHUNKS, "read_as": "query", "exclude_context": True}, 422, "/exclude_context"),
        ("/retrieve", {"texts": CHUNKS, "read_as": "query", "model": "amn"}, 422, "/model"),
        ("/retrieve", {"texts": CHUNKS, "read_as": "query", "rerank": True}, 422, "/rerank"),
        ("/retrieve", {"texts": [*CHUNKS, "? ?"], "read_as": "query"}, 422, f"/texts/{T}"),
        ("/retrieve", {"texts": ["a"] * 60, "read_as": "query", "k": 1000}, 413, "/k"),
        ("/retrieve", {"texts": ["a"] * 1025, "read_as": "query", "k": 1}, 413, "/texts"),
        ("/predict", {"texts": CHUNKS, "read_as": "query"}, 422, "/read_as"),
        ("/predict", {"text": "x" * 501}, 413, "/text"),
        ("/predict", {"texts": ["x" * 101] * T}, 413, "/texts"),
        ("/predict", {"text": "a", "texts": CHUNKS}, 422, ""),
        ("/predict", {"text": "a", "context": []}, 422, ""),
        ("/predict", {"texts": CHUNKS, "model": "nobody"}, 404, None),
        ("/retrieve", {"text": "a query", "rerank": True}, 422, "/rerank"),
    ],
)
def test_rejects_a_text_that_is_not_a_context_with_its_place(
    serve: Serve, path: str, body: Any, status: int, pointer: str | None
) -> None:
    limit = 500 if status == 413 else 50_000
    content = json.dumps(body)
    answer = serve(text=HashEncoder(), max_text=limit).http.post(
        path, content=content, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json().get("pointer")) == (status, pointer)


def test_says_how_many_chunks_a_short_text_makes(serve: Serve) -> None:
    detail = post(serve(text=HashEncoder()), "/predict", {"text": prose([60])}).json()["detail"]
    assert "makes 1 chunks; expected at least 2, or 5 for a whole context" in detail


@pytest.mark.parametrize("count", range(2, T))
@pytest.mark.parametrize("corpus", [retriever, bundle])
def test_answers_fewer_chunks_than_a_context_by_those_and_their_mean(
    serve: Serve, corpus: Callable[[], Retriever], count: int
) -> None:
    server = serve(text=HashEncoder(), corpus=corpus)
    sizes = [140, 140] if count == 2 else [90] * count
    passage = prose(sizes)
    chunks = chunk(passage, words)
    assert len(chunks) == count
    vectors = vectors_of(chunks)
    context = [*[normalise(vectors.mean(0))] * (T - count), *vectors]
    given = {"context": np.array(context).tolist()}
    for path in ("/predict", "/retrieve"):
        known = post(server, path, given).json()
        for body in ({"text": passage}, {"texts": chunks}):
            said = post(server, path, body).json()
            assert (said["read_as"], said.get("chunks")) == ("partial_context", chunks if "text" in body else None)
            if path == "/retrieve":
                assert [hit["id"] for hit in said["results"]] == [hit["id"] for hit in known["results"]]
            else:
                np.testing.assert_allclose(said["vector"], known["vector"], atol=1e-5)


def test_names_the_chunk_of_a_partial_context_that_cannot_be_read(serve: Serve) -> None:
    text = f"{prose([100] * 2)} {UNREADABLE_CHUNK}"
    assert "chunk 3 of the last 3: 100%" in post(serve(text=HashEncoder()), "/predict", {"text": text}).text


def test_retrieves_for_many_texts_each_as_a_query(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    texts = ["hares", "? two three four", "word " * 261]
    answer = post(server, "/retrieve", {"texts": texts, "read_as": "query", "k": 3})
    said = answer.json()
    known = post(server, "/retrieve", {"queries": vectors_of(texts).tolist(), "k": 3}).json()
    assert [[hit["id"] for hit in hits] for hits in said["results"]] == [
        [hit["id"] for hit in hits] for hits in known["results"]
    ]
    assert (said["read_as"], "chunks" in said) == ("query", False)
    assert said["truncated"] == [{"index": 2, "word_pieces": 261, "read": 254}]
    assert said["unread"] == [{"index": 1, "share": 0.25}]
    assert answer.headers["x-truncated"] == "2"
    (one,) = post(server, "/retrieve", {"texts": texts[:1], "read_as": "query", "k": 3}).json()["results"]
    assert [hit["id"] for hit in one] == [hit["id"] for hit in said["results"][0]]


def test_a_text_of_any_length_is_a_query_if_asked_for(serve: Serve) -> None:
    said = post(serve(text=HashEncoder()), "/retrieve?read_as=query", {"text": PASSAGE}).json()
    known = post(serve(text=HashEncoder()), "/retrieve", {"query": vectors_of([PASSAGE])[0].tolist()}).json()
    assert [hit["id"] for hit in said["results"]] == [hit["id"] for hit in known["results"]]
    assert (said["read_as"], said["chunks"], len(said["truncated"])) == ("query", [PASSAGE], 1)


UNREADABLE = "? ?? ???"
UNREADABLE_CHUNK = "?x " * 60


@pytest.mark.parametrize(
    ("path", "body", "pointer"),
    [
        ("/predict", {"texts": [*CHUNKS[:3], UNREADABLE, UNREADABLE]}, "/texts/3"),
        ("/retrieve", {"texts": [UNREADABLE, *CHUNKS[1:]]}, "/texts/0"),
        ("/predict", {"text": UNREADABLE}, "/text"),
        ("/retrieve", {"text": UNREADABLE}, "/text"),
        ("/predict", {"text": f"{PASSAGE} {UNREADABLE_CHUNK}"}, "/text"),
        ("/retrieve", {"text": f"{PASSAGE} {UNREADABLE_CHUNK}"}, "/text"),
    ],
)
def test_rejects_a_text_that_the_encoder_cannot_read(serve: Serve, path: str, body: Any, pointer: str) -> None:
    problem = post(serve(text=HashEncoder()), path, body).json()
    assert (problem["status"], problem["type"]) == (422, "urn:lvm:problem:invalid")
    assert problem["pointer"] == pointer
    assert "in words unknown to the encoder" in problem["detail"]


def test_says_which_chunk_of_a_passage_cannot_be_read(serve: Serve) -> None:
    text = f"{PASSAGE} {UNREADABLE_CHUNK}"
    assert f"chunk {T} of the last {T}: 100%" in post(serve(text=HashEncoder()), "/predict", {"text": text}).text


def test_says_which_texts_were_read_in_part(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    texts = ["word " * 261, *CHUNKS[1:-1], "one ? word"]
    for path in ("/predict", "/retrieve"):
        answer = post(server, path, {"texts": texts})
        body = answer.json()
        assert body["truncated"] == [{"index": 0, "word_pieces": 261, "read": 254}]
        assert body["unread"] == [{"index": T - 1, "share": 0.333}]
        assert (answer.headers["x-truncated"], answer.headers["x-unread"]) == ("0", f"{T - 1}")
    raw = post(server, "/predict", {"texts": texts}, accept="application/octet-stream")
    assert (raw.headers["x-truncated"], raw.headers["x-unread"]) == ("0", f"{T - 1}")
    query = post(server, "/retrieve", {"text": "hares ?"}).json()
    assert query["unread"] == [{"index": 0, "share": 0.5}]


def test_has_no_such_fields_if_texts_were_read_whole(serve: Serve) -> None:
    answer = post(serve(text=HashEncoder()), "/predict", {"texts": ["word " * 254, *CHUNKS[1:]]})
    assert not {"truncated", "unread"} & answer.json().keys()
    assert not {"x-truncated", "x-unread"} & answer.headers.keys()


def test_rejects_text_for_a_net_of_another_encoder_with_both_names(serve: Serve) -> None:
    other = HashEncoder()
    other.name = "/models/other"  # type: ignore[misc]
    server = serve(text=other)
    for path in ("/predict", "/retrieve"):
        answer = post(server, path, {"texts": CHUNKS})
        problem = answer.json()
        assert (answer.status_code, problem["type"], problem["pointer"]) == (
            422,
            "urn:lvm:problem:no_encoder",
            "/texts",
        )
        assert "reads vectors of fake" in problem["detail"]
        assert problem["detail"].endswith("encodes with other")


def test_does_not_fall_back_to_a_net_of_another_encoder(tmp_path: Path) -> None:
    class Mixed(FakeLoader):
        def load_predictor(self, version: Version) -> FakePredictor:
            made = super().load_predictor(version)
            made.card = card(version.name, encoder="other" if version.name == "gru" else "fake")
            return made

    known = Settings(registry=registry_of(tmp_path, primary="amn", fallback="gru").root)
    with running(create_app(known, Mixed(text=HashEncoder(), amn=raises, gru=mean_of)), known) as server:
        assert post(server, "/predict", {"texts": CHUNKS}).json()["type"] == "urn:lvm:problem:model_failed"
        pinned = post(server, "/predict", {"texts": CHUNKS, "model": "gru"}).json()
        assert "reads vectors of other" in pinned["detail"]
        assert post(server, "/predict", {"context": vectors_of(CHUNKS).tolist()}).json()["model"] == "gru"


def test_a_norm_policy_does_not_apply_to_text(serve: Serve) -> None:
    for policy in ("normalise", "refuse"):
        assert post(serve(text=HashEncoder(), norm_policy=policy), "/predict", {"texts": CHUNKS}).status_code == 200


def test_serves_vectors_without_an_encoder_and_says_what_is_missing(serve: Serve) -> None:
    server = serve(text=None)
    problem = post(server, "/predict", {"text": PASSAGE}).json()
    assert (problem["type"], problem["detail"]) == ("urn:lvm:problem:no_encoder", "install what encodes text")
    assert post(server, "/predict", {"context": vectors_of(CHUNKS).tolist()}).status_code == 200
    assert server.http.get("/models").json()["encoder"] == {"name": None, "missing": "install what encodes text"}
    assert server.metric("lvm_requests_total", route="/predict", outcome="no_encoder") == 1


def test_passes_on_why_an_encoder_cannot_be_opened(serve: Serve) -> None:
    class Altered(HashEncoder):
        def encode(self, texts: Sequence[str], *_: Any) -> Floats:
            raise EncoderError("the weights are others")

    answer = post(serve(text=Altered()), "/predict", {"texts": CHUNKS})
    assert (answer.status_code, answer.json()["detail"]) == (422, "the weights are others")


@pytest.mark.parametrize("answer", [np.nan, "raises"])
def test_is_unavailable_if_the_encoder_fails(serve: Serve, answer: Any) -> None:
    class Broken(HashEncoder):
        def encode(self, texts: Sequence[str], *_: Any) -> Floats:
            return np.full((len(texts), self.dim), float(answer), np.float32)  # float("raises") raises

    problem = post(serve(text=Broken()), "/predict", {"texts": CHUNKS}).json()
    assert (problem["status"], problem["type"]) == (503, "urn:lvm:problem:model_failed")


def test_encodes_waiting_texts_together_and_fails_only_the_bad_one(serve: Serve) -> None:
    recorder = Recorder()
    server = serve(text=recorder, timeout_ms=60_000)
    other = ["other", *CHUNKS[1:]]
    recorder.opened.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, server, "/predict", {"texts": CHUNKS})
        assert recorder.entered.wait(30)
        bodies: list[Any] = [{"texts": other}, {"text": "too short a passage"}, {"texts": CHUNKS}]
        rest = [pool.submit(post, server, "/predict", body) for body in bodies]
        until(lambda: _pending_rows(server) == 4 * T, "all to queue up")
        recorder.opened.set()
        answers = [each.result() for each in (first, *rest)]
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200]
    for answer, said in zip([answers[0], answers[1], answers[3]], [CHUNKS, other, CHUNKS], strict=True):
        np.testing.assert_allclose(answer.json()["vector"], mean_of(vectors_of(said)[None])[0], atol=1e-6)
    assert sorted(map(len, recorder.batches)) == [T, 2 * T]


def test_expires_a_text_that_waits_too_long_and_rejects_if_the_queue_is_full(serve: Serve) -> None:
    recorder = Recorder()
    server = serve(text=recorder, max_queue=2 * T, timeout_ms=60_000)
    recorder.opened.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server, "/predict", {"texts": CHUNKS})
        assert recorder.entered.wait(30)
        assert post(server, "/predict", {"texts": CHUNKS}, **{"x-request-timeout-ms": "20"}).status_code == 504
        second = pool.submit(post, server, "/predict", {"texts": CHUNKS})
        until(lambda: _pending_rows(server) == 2 * T, "the second to queue up")
        full = post(server, "/predict", {"texts": CHUNKS})
        assert (full.status_code, full.json()["type"]) == (503, "urn:lvm:problem:overloaded")
        recorder.opened.set()
        assert [each.result().status_code for each in (first, second)] == [200, 200]
    assert len(recorder.batches) == 2  # what expired was never encoded


def test_counts_the_time_of_text_apart_from_that_of_vectors(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    post(server, "/predict", {"texts": CHUNKS})
    post(server, "/predict", {"context": vectors_of(CHUNKS).tolist()})
    post(server, "/retrieve", {"text": "a query"})
    count = "lvm_request_seconds_count"
    for route in ("/predict", "/retrieve"):
        assert server.metric(count, route=route, stage="total_text") == 1
        assert server.metric(count, route=route, stage="embed") == 1
    assert server.metric(count, route="/predict", stage="total") == 1
    assert "encoder" in server.http.get("/metrics").text


def test_answers_text_in_octets(serve: Serve) -> None:
    raw = post(serve(text=HashEncoder()), "/predict", {"texts": CHUNKS}, accept="application/octet-stream")
    np.testing.assert_allclose(np.frombuffer(raw.content, "<f4"), normalise(vectors_of(CHUNKS).mean(0)), atol=1e-6)


class Slow(HashEncoder):
    """An encoder that is slow at each sentence of a passage in capitals, until a test lets it hurry."""

    def __init__(self) -> None:
        self.entered, self.hurries = threading.Event(), threading.Event()

    def count_tokens(self, text: str) -> int:
        if text.startswith("W"):
            self.entered.set()
            self.hurries.wait(0.02)
        return words(text)


HOG, OTHER = ({"authorization": f"Bearer {token * 20}"} for token in "ho")
TWO_CLIENTS = f"hog:{'h' * 20},other:{'o' * 20}"


def test_encodes_a_short_text_of_another_client_while_a_long_one_is_cut(serve: Serve) -> None:
    slow = Slow()
    server = serve(text=slow, tokens=TWO_CLIENTS, timeout_ms=120_000, max_text=500_000)
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(post, server, "/predict", {"text": prose([20] * 2000)}, **HOG)
        assert slow.entered.wait(30)
        for _ in range(3):
            assert post(server, "/predict", {"texts": CHUNKS}, **OTHER).status_code == 200
        assert not long.done()
        slow.hurries.set()
        assert long.result().json()["chunks"] == chunk(prose([20] * 2000), words)[-T:]


def test_clients_take_turns_in_the_queue(serve: Serve) -> None:
    recorder = Recorder()
    server = serve(text=recorder, max_queue=4 * T, tokens=TWO_CLIENTS, timeout_ms=60_000)
    recorder.opened.clear()
    with ThreadPoolExecutor(8) as pool:
        hog = [pool.submit(post, server, "/predict", {"texts": CHUNKS}, **HOG)]
        assert recorder.entered.wait(30)
        hog += [pool.submit(post, server, "/predict", {"texts": CHUNKS}, **HOG) for _ in range(2)]
        until(lambda: _pending_rows(server) == 3 * T, "the hog's texts to queue up")
        other = pool.submit(post, server, "/predict", {"texts": ["other", *CHUNKS[1:]]}, **OTHER)
        until(lambda: _pending_rows(server) == 4 * T, "the other's to queue up")
        recorder.opened.set()
        assert [each.result().status_code for each in (*hog, other)] == [200] * 4
    order = [text for batch in recorder.batches for text in batch]
    assert order.index("other") <= 2 * T  # behind one of the hog's at most, and the one that ran


def test_a_long_text_costs_more_rows_than_a_short_one() -> None:
    assert character_cost_rows(CHUNKS) == 0
    assert character_cost_rows("x" * 50_000) == character_cost_rows(["x" * 10_000] * 5) == 50


def test_rejects_a_client_with_too_many_long_texts_waiting(serve: Serve) -> None:
    slow = Slow()
    server = serve(text=slow, tokens=TWO_CLIENTS, timeout_ms=120_000)
    passage = {"text": prose([20] * 400)}  # some 40,000 characters
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, server, "/predict", passage, **HOG) for _ in range(2)]
        until(lambda: server.app.state.admission.rows > 2 * character_cost_rows(passage["text"]), "both to wait")
        assert post(server, "/predict", passage, **HOG).json()["type"] == "urn:lvm:problem:overloaded"
        assert post(server, "/predict", {"texts": CHUNKS}, **OTHER).status_code == 200
        slow.hurries.set()
        assert [each.result().status_code for each in waiting] == [200, 200]


def _pending_rows(server: Any) -> int:
    rows: int = server.app.state.deployments.encoder.engine.batcher.pending_rows
    return rows
