"""/v1/embeddings: OpenAI's own client works against it unchanged, and what it cannot have is an error it can show."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.conftest import Running
from tests.fakes import D, HashEncoder

Serve = Callable[..., Running]
Connect = Callable[..., openai.OpenAI]
TEXTS = ["hares", "rabbits", "hares and rabbits"]
VECTORS = np.stack([HashEncoder().vector(text) for text in TEXTS])


@pytest.fixture
def connect(serve: Serve) -> Iterator[Connect]:
    opened: list[openai.OpenAI] = []

    def start(key: str = "none", **settings: Any) -> openai.OpenAI:
        server = serve(**{"text": HashEncoder(), **settings})
        http = httpx.Client(trust_env=False)
        opened.append(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, http_client=http))
        return opened[-1]

    yield start
    for client in opened:
        client.close()


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"dimensions": D}, {"user": "somebody"}])
def test_many_texts_get_their_vectors_in_order(connect: Connect, encoding: Any) -> None:
    found = connect().embeddings.create(model="fake", input=TEXTS, **encoding)
    np.testing.assert_allclose([each.embedding for each in found.data], VECTORS, atol=1e-6)
    assert [each.index for each in found.data] == [0, 1, 2]
    assert (found.model, found.usage.prompt_tokens, found.usage.total_tokens) == ("fake", 5, 5)


def test_one_text_gets_one_vector(connect: Connect) -> None:
    (one,) = connect().embeddings.create(model="primary", input=TEXTS[0]).data
    np.testing.assert_allclose(one.embedding, VECTORS[0], atol=1e-6)


def test_base64_is_that_of_little_endian_float32(connect: Connect) -> None:
    (one,) = connect().embeddings.create(model="fake", input=TEXTS[0], encoding_format="base64").data
    assert isinstance(one.embedding, str)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(one.embedding), "<f4"), VECTORS[0])


def test_lists_the_encoder(connect: Connect) -> None:
    client = connect()
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").object == "model"
    with pytest.raises(openai.NotFoundError, match="available: fake"):
        client.models.retrieve("nobody")


def test_lists_nothing_without_an_encoder(connect: Connect) -> None:
    assert list(connect(text=None).models.list()) == []


@pytest.mark.parametrize(
    ("body", "kind", "param", "message"),
    [
        ({"model": "nobody"}, openai.NotFoundError, None, 'unknown model "nobody"; available: amn, '),
        ({"dimensions": D - 1}, openai.UnprocessableEntityError, "dimensions", f"expected {D}: "),
        ({"input": [1, 2, 3]}, openai.UnprocessableEntityError, "input", "arrays of tokens"),
        ({"input": [[1, 2], [3]]}, openai.UnprocessableEntityError, "input", "arrays of tokens"),
        ({"input": ""}, openai.UnprocessableEntityError, "input", "not blank"),
        ({"input": []}, openai.UnprocessableEntityError, "input", "not empty"),
        ({"input": ["one", " "]}, openai.UnprocessableEntityError, "input/1", "not blank"),
        ({"input": ["one", "? ?"]}, openai.UnprocessableEntityError, "input/1", "unknown to the encoder"),
        ({"input": ["one"] * 21}, openai.APIStatusError, "input", "21 texts; expected at most 20"),
        ({"encoding_format": "int8"}, openai.UnprocessableEntityError, "encoding_format", "float, base64"),
        ({"extra_body": {"truncate": True}}, openai.UnprocessableEntityError, "truncate", "unknown field"),
    ],
)
def test_an_error_says_what_and_where(connect: Connect, body: Any, kind: Any, param: str | None, message: str) -> None:
    with pytest.raises(kind) as raised:
        connect(max_rows=20).embeddings.create(**{"model": "fake", "input": "text", **body})
    error = raised.value
    assert message in error.body["message"]
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert message.replace('"', "") in str(error).replace('"', "")
    assert error.request_id == error.response.headers["x-request-id"]


def test_a_model_must_be_named(serve: Serve) -> None:
    answer = serve(text=HashEncoder()).http.post("/v1/embeddings", json={"input": "text"})
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/model")


def test_errors_are_problems_with_an_error_object_beside_their_fields(serve: Serve) -> None:
    server = serve(text=None)
    answer = server.http.post("/v1/embeddings", json={"input": "text", "model": "primary"})
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (body["status"], body["type"], body["pointer"]) == (422, "urn:lvm:problem:no_encoder", "/input")
    assert body["error"] == {
        "message": body["detail"],
        "type": "invalid_request_error",
        "param": "input",
        "code": "no_encoder",
    }
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "unknown_route"
    assert "error" not in server.http.get("/v10").json()


def test_the_key_is_a_token_of_the_service(connect: Connect) -> None:
    token = "t" * 20
    assert connect(token, tokens=token).embeddings.create(model="fake", input=TEXTS).data
    with pytest.raises(openai.AuthenticationError, match="token"):
        connect("w" * 20, tokens=token).embeddings.create(model="fake", input=TEXTS)


def test_counts_its_requests_as_a_route_of_its_own(serve: Serve) -> None:
    server = serve(text=HashEncoder())
    server.http.post("/v1/embeddings", json={"input": "text", "model": "fake"})
    assert server.metric("lvm_requests_total", route="/v1/embeddings", outcome="ok") == 1
    assert server.metric("lvm_request_seconds_count", route="/v1/embeddings", stage="embed") == 1
