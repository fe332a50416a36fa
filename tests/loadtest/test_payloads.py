"""Requests follow the API byte for byte; only a body of the right shape with finite numbers is valid."""

import json

import numpy as np
import pytest

from loadtest.contexts import Vectors
from loadtest.payloads import Exchange, encode

CONTEXTS: Vectors = (np.arange(24).reshape(2, 3, 4) / 7).astype(np.float32)


def test_json_carries_the_float32_values_exactly() -> None:
    body = json.loads(Exchange("predict", "json", 1, 4).bodies(CONTEXTS)[1])
    assert body.keys() == {"context"}
    np.testing.assert_array_equal(np.array(body["context"], dtype=np.float32), CONTEXTS[1])


def test_many_contexts_go_under_their_own_key_and_wrap_around() -> None:
    body = json.loads(Exchange("predict", "json", 3, 4).bodies(CONTEXTS)[1])
    sent = np.array(body["contexts"], dtype=np.float32)
    np.testing.assert_array_equal(sent, CONTEXTS[[1, 0, 1]])


def test_octet_bodies_are_little_endian_rows() -> None:
    body = Exchange("predict", "octet", 2, 4).bodies(CONTEXTS)[0]
    np.testing.assert_array_equal(np.frombuffer(body, "<f4").reshape(2, 3, 4), CONTEXTS)


@pytest.mark.parametrize(
    ("exchange", "media_type"),
    [
        (Exchange("predict", "octet", 2, 4), "application/octet-stream; shape=2x3x4"),
        (Exchange("predict", "octet", 1, 4), "application/octet-stream"),
        (Exchange("predict", "json", 2, 4), "application/json"),
    ],
)
def test_octets_of_several_contexts_carry_their_shape(exchange: Exchange, media_type: str) -> None:
    request = encode(exchange, "http://host", (), CONTEXTS)[0]
    assert f"Content-Type: {media_type}\r\n".encode() in request


def test_retrieve_sends_k_in_the_body_or_in_the_query() -> None:
    assert json.loads(Exchange("retrieve", "json", 1, 4).bodies(CONTEXTS)[0])["k"] == 10
    assert Exchange("retrieve", "json", 1, 4).path == "/retrieve"
    assert Exchange("retrieve", "octet", 1, 4).path == "/retrieve?k=10"
    assert Exchange("retrieve", "octet", 1, 4).headers["Accept"] == "application/json"


def test_request_is_whole_http() -> None:
    exchange = Exchange("predict", "octet", 1, 4)
    request = encode(exchange, "http://user:secret@host:81/", [("X-A", "b")], CONTEXTS)[0]
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /predict HTTP/1.1",
        b"Host: host:81",
        b"User-Agent: lvm-loadtest",
        b"Content-Type: application/octet-stream",
        b"Accept: application/octet-stream",
        b"X-A: b",
        b"Content-Length: 48",
    ]
    assert body == CONTEXTS[0].tobytes()


@pytest.mark.parametrize(
    ("exchange", "body", "whole"),
    [
        (Exchange("predict", "octet", 1, 2), b"\0" * 8, True),
        (Exchange("predict", "octet", 2, 2), b"\0" * 8, False),
        (Exchange("predict", "octet", 1, 2), b"\0\0\0\0\0\0\x80\x7f", False),
        (Exchange("predict", "json", 1, 2), b'{"vector": [1, 2.5]}', True),
        (Exchange("predict", "json", 1, 2), b'{"vector": [1, Infinity]}', False),
        (Exchange("predict", "json", 1, 2), b'{"vector": [1, null]}', False),
        (Exchange("predict", "json", 1, 2), b'{"vectors": [[1, 2]]}', False),
        (Exchange("predict", "json", 2, 2), b'{"vectors": [[1, 2], [3, 4]]}', True),
        (Exchange("predict", "json", 2, 2), b'{"vectors": [[1, 2]]}', False),
        (Exchange("predict", "json", 1, 2), b"[1, 2]", False),
        (Exchange("predict", "json", 1, 2), b"\xff", False),
        (Exchange("retrieve", "octet", 1, 2), b'{"results": []}', True),
        (Exchange("retrieve", "json", 1, 2), b'{"results": [{"score": 0.1}]}', True),
        (Exchange("retrieve", "json", 1, 2), b'{"results": [{"score": NaN}]}', False),
        (Exchange("retrieve", "json", 1, 2), b'{"results": null}', False),
    ],
)
def test_accepts_only_finite_numbers_of_the_expected_shape(exchange: Exchange, body: bytes, whole: bool) -> None:
    assert exchange.is_whole(body) is whole
