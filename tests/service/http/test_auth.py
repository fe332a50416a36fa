"""Who may call, and what an answer gives away: tokens, the address listened on, headers that browsers heed."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from lvm.errors import Unauthorised
from service.app import create_app
from service.http.auth import PROBES, Tokens, read_tokens
from service.processes.sockets import CannotListen, check_exposure
from service.settings import BadSettings, Settings
from tests.conftest import PATIENCE_S, Running, until
from tests.fakes import FakeLoader, Gate, contexts, registry_of

Serve = Callable[..., Running]
ALICE, BOB = "alices-token-0123456789", "bobs.token~+/-_0123456789=="
HOT = ("/predict", "/retrieve", "/embed", "/v1/embeddings")
WRONG = (
    None, "", "Bearer", f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}", f"Bearer {ALICE.upper()}", ALICE,
    f"Basic {ALICE}", f"Bearer {ALICE} {BOB}", "Bearer alice", f"Bearer alice:{ALICE}", "Bearer \xff",
)  # fmt: skip


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def routes_of(server: Running) -> list[tuple[str, str]]:
    found = [route for route in server.app.routes if isinstance(route, Route)]
    return [(method, route.path) for route in found for method in route.methods or () if method != "HEAD"]


def test_every_route_except_probes_and_console_requires_a_token(serve: Serve) -> None:
    server = serve(tokens=ALICE)
    known = [*routes_of(server), ("OPTIONS", "/predict"), ("GET", "/nothing"), ("POST", "/%70redict")]
    assert {path for _, path in known} > PROBES | {"/"}
    for method, path in known:
        answer = server.http.request(method, path.replace("{", "").replace("}", ""))
        is_page = path == "/" or path.startswith(("/console/", "/docs"))
        assert (answer.status_code == 401) is not (path in PROBES or is_page), (method, path)
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["type"] == "urn:lvm:problem:unauthorised"
            assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/predict"), ("GET", "/models")])
def test_rejects_and_counts_wrong_tokens(serve: Serve, method: str, path: str) -> None:
    server = serve(tokens=f"alice:{ALICE},{BOB}")
    for given in WRONG:
        headers = [] if given is None else [(b"authorization", given.encode("latin-1"))]
        assert server.http.request(method, path, headers=headers).status_code == 401, given
    assert server.metric("lvm_requests_total", route=path, outcome="unauthorised") == len(WRONG)


@pytest.mark.parametrize("given", [f"Bearer {ALICE}", f"BEARER  {BOB}"])
def test_accepts_every_known_token_on_every_kind_of_route(serve: Serve, given: str) -> None:
    server = serve(tokens=f"alice:{ALICE},{BOB}")
    server.http.headers["authorization"] = given
    context = contexts()
    assert server.http.post("/predict", json={"context": context[0].tolist()}).status_code == 200
    tensor = {"name": "context", "datatype": "FP32", "shape": list(context.shape), "data": context.ravel().tolist()}
    assert server.http.post("/v2/models/primary/infer", json={"inputs": [tensor]}).status_code == 200
    assert all(server.http.get(path).status_code == 200 for path in ("/models", "/metrics", "/v2", "/openapi.json"))
    assert server.http.options("/predict").status_code == 405


def test_requires_no_token_if_none_is_set(serve: Serve) -> None:
    server = serve()
    assert server.http.get("/models").status_code == 200
    assert server.http.get("/models", headers=bearer("whatever-it-may-be")).status_code == 200


def test_rejects_an_unauthenticated_caller_before_its_body_and_closes(serve: Serve) -> None:
    host, port = serve(tokens=ALICE).url.removeprefix("http://").split(":")
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9999999\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nconnection: close\r\n" in received


@pytest.mark.parametrize("path", ["/predict", "/v2/models/amn/infer", "/models"])
def test_rejects_an_unauthenticated_caller_before_its_body_under_asgi(tmp_path: Path, path: str) -> None:
    app = create_app(Settings(registry=registry_of(tmp_path).root, tokens=ALICE), FakeLoader())  # type: ignore[arg-type]
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401
    assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]
    assert ("error" in json.loads(sent[1]["body"])) is path.startswith("/v2")  # what Triton's clients read


def test_tokens_are_never_shown(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(BOB)
    server = serve(tokens=f"alice:{ALICE}", tokens_file=file)
    server.http.headers.update(bearer(ALICE))
    settings = server.app.state.settings
    told = [repr(settings), str(settings), settings.model_dump_json(), repr(vars(server.app.tokens))]
    told += [server.http.get(path).text for path in ("/models", "/metrics", "/openapi.json", "/nothing")]
    assert not any(secret in text for secret in (ALICE, BOB) for text in told)


# ---- what is configured


def settings_of(tokens: str = "", file: Path | None = None) -> Settings:
    return Settings(tokens=tokens, tokens_file=file)  # type: ignore[arg-type]


def test_a_token_names_its_client_or_its_position(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"carol:{'c' * 16}\n{'d' * 16}\n")
    tokens = read_tokens(settings_of(f"alice:{ALICE}, {BOB}", file))
    clients = [
        tokens.client_of({b"authorization": b"Bearer " + token.encode()}) for token in (ALICE, BOB, "c" * 16, "d" * 16)
    ]
    assert clients == ["alice", "token-2", "carol", "token-4"]
    with pytest.raises(Unauthorised):
        tokens.client_of({})


@pytest.mark.parametrize("entry", ["short", "a:short", "b ad:" + ALICE, "a:b:" + ALICE, ALICE + "\xe4", "a:"])
def test_rejects_a_malformed_entry_without_echoing_it(entry: str) -> None:
    with pytest.raises(BadSettings, match=r"LVM_TOKENS: entry \d") as refusal:
        read_tokens(settings_of(f"{ALICE[::-1]},{entry}"))
    assert entry not in str(refusal.value)


def test_rejects_a_duplicate_token() -> None:
    with pytest.raises(BadSettings, match="duplicate token"):
        read_tokens(settings_of(f"alice:{ALICE},bob:{ALICE}"))


def test_rejects_a_tokens_file_that_is_missing_empty_or_binary(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    for content, reason in ((None, "No such file"), (b"\n", "the file holds no token"), (b"\xff", "not UTF-8")):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(BadSettings, match=f"LVM_TOKENS_FILE: {reason}"):
            read_tokens(settings_of(file=file))


# ---- where it listens


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1"])
def test_loopback_requires_no_token(address: str) -> None:
    check_exposure(address, Tokens({}), insecure=False)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.2", "8.8.8.8", "fe80::1%eth0", "2001:db8::1"])
def test_a_reachable_address_requires_a_token_or_insecure(address: str) -> None:
    with pytest.raises(CannotListen, match=r"LVM_TOKENS .* 127\.0\.0\.1, .* --insecure \(LVM_INSECURE=true\)"):
        check_exposure(address, Tokens({}), insecure=False)
    check_exposure(address, Tokens({ALICE: "alice"}), insecure=False)
    check_exposure(address, Tokens({}), insecure=True)


# ---- what browsers heed


def test_responses_forbid_browsers_to_sniff_store_or_frame_them(serve: Serve) -> None:
    server = serve()
    for method, path in [*routes_of(server), ("GET", "/nothing"), ("OPTIONS", "/predict")]:
        headers = server.http.request(method, path).headers
        assert headers["x-content-type-options"] == "nosniff"
        if not (path in HOT or path.endswith("/infer")) or method != "POST":
            assert headers["cache-control"] == ("no-cache" if "etag" in headers else "no-store")
            policy = headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(policy)


def test_allows_no_other_origin_and_reveals_no_server(serve: Serve) -> None:
    server = serve()
    given = {"origin": "https://evil.example", "host": "evil.example", "x-forwarded-host": "evil.example"}
    preflight = given | {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert server.http.options("/predict", headers=preflight).status_code == 405
    for method, path in [*routes_of(server), ("GET", "/predict/"), ("GET", "//evil.example/"), ("OPTIONS", "/predict")]:
        answer = server.http.request(method, path, headers=preflight)
        names = set(answer.headers)
        assert not {"server", "x-powered-by", "location"} & names
        assert not any(name.startswith("access-control-") for name in names)
        assert "evil" not in str(answer.headers) + answer.text


def test_fairness_identifies_a_client_by_its_tokens_name(serve: Callable[..., Running]) -> None:
    gate = Gate()
    service = serve(amn=gate, tokens="ann:" + "a" * 16 + ",bob:" + "b" * 16)
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(
                httpx.post,
                f"{service.url}/predict",
                json={"context": contexts()[0].tolist()},
                headers={"authorization": f"Bearer {letter * 16}"},
                timeout=PATIENCE_S,
            )
            for letter in "ab"
        ]
        until(lambda: len(service.app.state.admission.clients) == 2, "both to be inside")
        assert set(service.app.state.admission.clients) == {"ann", "bob"}
        gate.opened.set()
        assert [future.result().status_code for future in asked] == [200, 200]
    assert not service.app.state.admission.clients
