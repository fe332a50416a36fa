"""POST /embed: texts become the vectors that nets and corpora read, each by itself or as the chunks of a passage."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from lvm.errors import Unavailable
from models.text.chunks import chunk
from models.text.encoder import MAX_WORD_PIECES
from models.vectors import Floats
from service.engines.text import MAX_BATCH, EmbedInput
from service.http.routes.embed import encoder_of
from tests.conftest import Running, until
from tests.fakes import D, HashEncoder, T, prose, words

Serve = Callable[..., Running]
TEXTS = ["hares", "rabbits", "hares and rabbits"]
PASSAGE = prose([60] * 40)


def vectors_of(texts: Sequence[str]) -> Floats:
    return np.stack([HashEncoder().vector(text) for text in texts])


def embed(server: Running, body: Any, **headers: str) -> httpx.Response:
    return server.http.post("/embed", json=body, headers=headers)


def test_gives_each_text_the_vector_of_the_encoder(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    answer = embed(server, {"texts": TEXTS})
    body = answer.json()
    np.testing.assert_allclose(body["vectors"], vectors_of(TEXTS), atol=1e-6)
    assert (body["encoder"], body["dimensions"]) == ("fake", D)
    assert (body["truncated"], body["unread"]) == ([False] * 3, [0.0] * 3)
    assert "chunks" not in body
    assert set(body["timing_ms"]) == {"decode", "queue", "embed"}
    assert answer.headers["x-model"] == "fake"
    assert "embed;dur=" in answer.headers["server-timing"]


def test_one_text_gets_a_list_of_one_vector(serve: Serve) -> None:
    body = embed(serve(text=HashEncoder()), {"text": PASSAGE}).json()
    np.testing.assert_allclose(body["vectors"], vectors_of([PASSAGE]), atol=1e-6)
    assert body["truncated"] == [True]


def test_the_chunks_of_a_passage_are_those_of_training(serve: Serve) -> None:
    body = embed(serve(text=HashEncoder()), {"text": PASSAGE, "chunks": True}).json()
    assert body["chunks"] == chunk(PASSAGE, words)
    assert len(body["chunks"]) > MAX_BATCH
    np.testing.assert_allclose(body["vectors"], vectors_of(body["chunks"]), atol=1e-6)


def test_a_passage_that_is_too_short_for_a_chunk_is_one(serve: Serve) -> None:
    body = embed(serve(text=HashEncoder()), {"text": "hares", "chunks": True}).json()
    assert (body["chunks"], len(body["vectors"])) == (["hares"], 1)


def test_every_encoding_gives_the_same_vectors(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    coded = embed(server, {"texts": TEXTS, "encoding": "base64"}, accept="application/octet-stream").json()["vectors"]
    raw = embed(server, {"texts": TEXTS}, accept="application/octet-stream")
    half = embed(server, {"texts": TEXTS}, accept="application/octet-stream; dtype=float16")
    expected = vectors_of(TEXTS)
    np.testing.assert_array_equal([np.frombuffer(base64.b64decode(text), "<f4") for text in coded], expected)
    np.testing.assert_array_equal(np.frombuffer(raw.content, "<f4").reshape(3, D), expected)
    np.testing.assert_allclose(np.frombuffer(half.content, "<f2").reshape(3, D), expected, atol=1e-3)
    assert raw.headers["content-type"] == f"application/octet-stream; dtype=float32; shape=3x{D}"


def test_the_vectors_are_a_context_of_predict(serve: Serve) -> None:
    server, texts = serve(text=HashEncoder()), [f"chunk {at}" for at in range(T)]
    context = embed(server, {"texts": texts, "encoding": "base64"}).json()["vectors"]
    joined = base64.b64encode(b"".join(map(base64.b64decode, context))).decode()
    by_vectors = server.http.post("/predict", json={"context": joined}).json()["vector"]
    assert by_vectors == server.http.post("/predict", json={"texts": texts}).json()["vector"]


def test_says_which_texts_were_not_read_to_their_end(serve: Serve) -> None:
    long = " ".join(["word"] * MAX_WORD_PIECES)
    answer = embed(serve(text=HashEncoder()), {"texts": ["one", long, "? two three four"]})
    assert answer.json()["truncated"] == [False, True, False]
    assert answer.json()["unread"] == [0.0, 0.0, 0.25]
    assert (answer.headers["x-truncated"], answer.headers["x-unread"]) == ("1", "2")


def test_headers_stay_short_if_many_texts_are_truncated(serve: Serve) -> None:
    long = " ".join(["w"] * MAX_WORD_PIECES)
    answer = embed(serve(text=HashEncoder(), max_text=10_000), {"texts": [long] * 300})
    assert sum(answer.json()["truncated"]) == 300
    assert answer.headers["x-truncated"] == ", ".join(map(str, range(100)))


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        ({}, 422, ""),
        ({"text": "a", "texts": ["a"]}, 422, ""),
        ({"texts": []}, 422, "/texts"),
        ({"texts": "one"}, 422, "/texts"),
        ({"texts": ["a", " \n"]}, 422, "/texts/1"),
        ({"texts": ["a", 5]}, 422, "/texts/1"),
        ({"texts": ["a", "half \ud800"]}, 422, "/texts/1"),
        ({"texts": ["a", "? ?"]}, 422, "/texts/1"),
        ({"texts": ["a"] * MAX_BATCH + ["? ?"]}, 422, f"/texts/{MAX_BATCH}"),
        ({"text": "? ?"}, 422, "/text"),
        ({"text": f"{PASSAGE} {'?x ' * 100}.", "chunks": True}, 422, "/text"),
        ({"texts": ["a"], "chunks": True}, 422, "/chunks"),
        ({"text": "a", "chunks": 1}, 422, "/chunks"),
        ({"texts": ["a"], "encoding": "hex"}, 422, "/encoding"),
        ({"texts": ["a"], "k": 1}, 422, "/k"),
        ({"context": []}, 422, "/context"),
        ({"texts": ["a"], "model": "nobody"}, 404, None),
        ({"texts": ["a"] * 21}, 413, "/texts"),
        ({"texts": ["a", "x" * 20_001]}, 413, "/texts/1"),
        ({"texts": ["x" * 11_000] * 2}, 413, "/texts"),
    ],
)
def test_rejects_what_is_no_text_with_its_place(serve: Serve, body: Any, status: int, pointer: str | None) -> None:
    server = serve(text=HashEncoder(), max_rows=20, max_text=20_000)
    answer = server.http.post("/embed", content=json.dumps(body), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json().get("pointer")) == (status, pointer), answer.text


def test_half_of_a_surrogate_pair_is_named_not_called_blank(serve: Serve) -> None:
    headers = {"content-type": "application/json"}
    answer = serve(text=HashEncoder()).http.post("/embed", content=b'{"text": "half \\ud800"}', headers=headers)
    assert answer.json()["detail"] == "half of a surrogate pair; expected valid Unicode"


def test_names_the_chunk_that_cannot_be_read(serve: Serve) -> None:
    text = f"{PASSAGE} {'?x ' * 100}."
    count = len(chunk(text, words))
    detail = embed(serve(text=HashEncoder()), {"text": text, "chunks": True}).json()["detail"]
    assert f"chunk {count} of {count}: " in detail


def test_takes_json_only(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    answer = server.http.post("/embed", content=b"text", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert server.http.get("/embed").headers["allow"] == "POST"


def test_options_may_stand_in_the_query_string(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    body = server.http.post("/embed?chunks=true&encoding=base64", json={"text": PASSAGE}).json()
    assert len(body["chunks"]) == len(body["vectors"]) > 1
    assert isinstance(body["vectors"][0], str)


@pytest.mark.parametrize("name", ["fake", "some/place/fake", "primary", "amn", "gru", "retriever", "corpus"])
def test_the_model_is_an_encoder_or_one_that_reads_its_vectors(serve: Serve, name: str) -> None:
    assert embed(serve(text=HashEncoder()), {"texts": TEXTS, "model": name}).status_code == 200


def test_a_name_is_unavailable_not_unknown_while_no_net_is_loaded() -> None:
    corpus = SimpleNamespace(info=SimpleNamespace(alias="retriever", name="corpus", encoder="fake"))
    deployments: Any = SimpleNamespace(
        encoder=SimpleNamespace(engine=None), slots={"retriever": SimpleNamespace(engine=corpus)}
    )
    router: Any = SimpleNamespace(engines={})
    with pytest.raises(Unavailable):
        encoder_of("primary", router, deployments, "/text")


def test_lists_the_models_if_one_is_unknown(serve: Serve) -> None:
    detail = embed(serve(text=HashEncoder()), {"texts": TEXTS, "model": "nobody"}).json()["detail"]
    assert detail == 'unknown model "nobody"; available: amn, corpus, fake, fallback, gru, primary, retriever'


@pytest.mark.parametrize("more", [{}, {"model": "primary"}])
def test_rejects_text_if_no_model_reads_vectors_of_the_encoder(serve: Serve, more: dict[str, str]) -> None:
    class Other(HashEncoder):
        name = "another"

    server = serve(text=Other())
    problem = embed(server, {"texts": TEXTS, **more}).json()
    assert (problem["type"], problem["pointer"]) == ("urn:lvm:problem:no_encoder", "/texts")
    assert "reads vectors of fake, and this service encodes with another" in problem["detail"]
    assert embed(server, {"texts": TEXTS, "model": "another"}).status_code == 200


def test_says_what_to_install_without_an_encoder(serve: Serve) -> None:
    problem = embed(serve(text=None), {"texts": TEXTS}).json()
    assert (problem["type"], problem["detail"]) == ("urn:lvm:problem:no_encoder", "install what encodes text")


class Recorder(HashEncoder):
    """An encoder that remembers its batches, and waits while it is closed."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered, self.opened = threading.Event(), threading.Event()

    def encode(self, texts: Sequence[str], *_: Any) -> Floats:
        self.batches.append(list(texts))
        self.entered.set()
        self.opened.wait(30)
        return vectors_of(texts)


def test_many_texts_run_in_parts_between_which_other_clients_have_their_turn(serve: Serve) -> None:
    recorder = Recorder()
    tokens = {name: {"authorization": f"Bearer {name[0] * 20}"} for name in ("many", "one")}
    server = serve(text=recorder, timeout_ms=60_000, tokens=f"many:{'m' * 20},one:{'o' * 20}")
    many = [f"text {at}" for at in range(10 * MAX_BATCH)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(embed, server, {"texts": many}, **tokens["many"])
        assert recorder.entered.wait(30)
        second = pool.submit(embed, server, {"texts": ["one"]}, **tokens["one"])
        until(lambda: server.app.state.deployments.encoder.engine.batcher.pending_rows > len(many), "both to wait")
        recorder.opened.set()
        answers = [each.result() for each in (first, second)]
    np.testing.assert_allclose(answers[0].json()["vectors"], vectors_of(many), atol=1e-6)
    assert max(map(len, recorder.batches)) <= MAX_BATCH + 1
    assert next(at for at, batch in enumerate(recorder.batches) if "one" in batch) <= 2


def test_waiting_requests_run_as_one_batch(serve: Serve) -> None:
    recorder = Recorder()
    server = serve(text=recorder, timeout_ms=60_000)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(embed, server, {"texts": ["first"]})
        assert recorder.entered.wait(30)
        rest = [pool.submit(embed, server, {"texts": [f"text {at}"]}) for at in range(4)]
        until(lambda: server.app.state.deployments.encoder.engine.batcher.pending_rows == 5, "all to wait")
        recorder.opened.set()
        assert [each.result().status_code for each in (first, *rest)] == [200] * 5
    assert len(recorder.batches[1]) > 1


def test_a_large_request_leaves_room_for_predictions(serve: Serve) -> None:
    recorder = Recorder()
    server = serve(text=recorder, timeout_ms=60_000, concurrency=64)
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(embed, server, {"texts": [f"text {at}" for at in range(500)]})
        assert recorder.entered.wait(30)
        context = np.ones((T, D)).tolist()
        assert server.http.post("/predict", json={"context": context}).status_code == 200
        recorder.opened.set()
        assert large.result().status_code == 200


def test_long_texts_do_not_share_a_part() -> None:
    assert EmbedInput(["x" * 5000] * 3, ["/texts"] * 3).rows == 3 + 15
    assert EmbedInput("x" * 4000, ["/text"]).rows == 1 + 10 + 4


def test_counts_and_times_its_requests(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    embed(server, {"texts": TEXTS})
    embed(server, {"texts": [5]})
    assert server.metric("lvm_requests_total", route="/embed", outcome="ok") == 1
    assert server.metric("lvm_requests_total", route="/embed", outcome="invalid") == 1
    for stage in ("decode", "queue", "embed", "encode", "total_text"):
        assert server.metric("lvm_request_seconds_count", route="/embed", stage=stage) == 1


def test_punctuation_in_long_texts_is_no_structure(serve: Serve) -> None:
    texts = ['one, two: [three] {four} \\ "five"' * 30] * 100
    assert embed(serve(text=HashEncoder()), {"texts": texts}).status_code == 200


def test_rejects_a_long_body_of_many_values(serve: Serve) -> None:
    answer = embed(serve(text=HashEncoder()), {"texts": [1] * 30_000})
    assert answer.status_code == 422
    assert "values and names" in answer.json()["detail"]


def test_other_sizes_of_vectors_are_reported(serve: Serve) -> None:
    class Wide(HashEncoder):
        name, dim = "wide", 2 * D

    body = embed(serve(text=Wide()), {"texts": TEXTS, "model": "wide"}).json()
    assert (body["dimensions"], len(body["vectors"][0])) == (2 * D, 2 * D)
