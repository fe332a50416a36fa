"""The smoke test: a sound service passes every check, and each check sees the fault that it is there for."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from lvm.cli.smoke import ERRORS, Pairs, Smoke
from models.registry.registry import Registry
from tests.conftest import LVM, PATIENCE_S, Running, until
from tests.fakes import contexts, mean_of

Spoil = Callable[[bytes], bytes]
CHECKS = ["probes", "models", "predict: primary", "predict: fallback", "retrieve", *map("error: {}".format, ERRORS)]
CHECKS.append("metrics")


class Spoiled(httpx.BaseTransport):
    """A way to a sound service on which the answers to one method, path and status are spoiled."""

    def __init__(self, where: str, spoil: Spoil = lambda body: body, **changes: Any) -> None:
        self._where, self._spoil, self._changes, self._way = where, spoil, changes, httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._way.handle_request(request)
        body = answer.read()
        kind = request.headers.get("content-type", "").partition(";")[0].rpartition("/")[2]
        if re.fullmatch(self._where, f"{request.method} {request.url.path} {answer.status_code} {kind}".strip()):
            headers = {**answer.headers, **self._changes.get("headers", {})}
            status = self._changes.get("status", answer.status_code)
            return httpx.Response(status, headers=drop_length(headers), content=self._spoil(body))
        return httpx.Response(answer.status_code, headers=answer.headers, content=body)

    def close(self) -> None:
        self._way.close()


def drop_length(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name != "content-length"}


def golden(served: str) -> Pairs:
    return contexts(3), mean_of(contexts(3))


def edit(**members: Any) -> Spoil:
    """Return what overwrites members of a JSON object."""
    return lambda body: json.dumps({**json.loads(body), **members}).encode()


def swap(old: bytes, new: bytes) -> Spoil:
    def spoil(body: bytes) -> bytes:
        assert old in body
        return body.replace(old, new)

    return spoil


@pytest.fixture
def server(serve: Callable[..., Running]) -> Running:
    return serve()


def outcomes(server: Running, transport: httpx.BaseTransport | None = None, **options: Any) -> dict[str, str]:
    with httpx.Client(base_url=server.url, transport=transport, timeout=PATIENCE_S) as client:
        return {r.check: r.outcome for r in Smoke(client, options.pop("golden", golden), **options).run()}


def test_checks_each_further_fallback(server: Running) -> None:
    registry = Registry(Path(server.app.state.settings.registry))
    registry.point("fallback-2", registry.resolve("primary"))
    until(lambda: "fallback-2" in server.app.state.deployments.engines, "the alias to serve")
    assert outcomes(server)["predict: fallback-2"] == "ok"


def test_a_sound_service_passes_every_check(server: Running) -> None:
    assert outcomes(server) == dict.fromkeys(CHECKS, "ok")
    primary = server.app.state.deployments.slots["primary"].deployed.version
    assert outcomes(server, version=primary, golden=lambda served: None) == dict.fromkeys(CHECKS, "ok")


SPOILED: dict[str, tuple[str, Spoiled]] = {
    "a probe says no": ("probes", Spoiled("GET /healthz .*", status=503)),
    "no request id": ("probes", Spoiled("GET /livez .*", headers={"x-request-id": "mine"})),
    "another version in the body": ("predict: .*", Spoiled("POST /predict 200 json", edit(version="other"))),
    "another version in the headers": (
        "predict: .*|metrics",
        Spoiled("POST /predict 200 .*", headers={"x-model-version": "other"}),
    ),
    "the other net answered": ("predict: .*", Spoiled("POST /predict 200 json", edit(served_by="candidate"))),
    "octets differ": ("predict: .*", Spoiled("POST /predict 200 octet-stream", lambda body: body[4:] + body[:4])),
    "octets are cut": ("predict: .*|metrics", Spoiled("POST /predict 200 octet-stream", lambda body: body[:-4])),
    "another protocol is broken": (
        "predict: fallback",
        Spoiled("POST /v2/models/fallback/.*", edit(outputs=[])),
    ),
    "no passages": ("retrieve", Spoiled("POST /retrieve 200 .*", edit(results=[]))),
    "another corpus": ("retrieve", Spoiled("POST /retrieve 200 .*", edit(corpus_version="other"))),
    "a fault is an accident": ("error: malformed", Spoiled("POST /predict 400 .*", status=500)),
    "a fault is no problem": (
        "error: wrong shape",
        Spoiled("POST /predict 422 .*", headers={"content-type": "application/json"}),
    ),
    "a fault has no place": ("error: wrong shape", Spoiled("POST /predict 422 .*", edit(pointer=""))),
    "a fault has another id": ("error: wrong media type", Spoiled("POST /predict 415 .*", edit(request_id="x"))),
    "no word of what is allowed": ("error: wrong method", Spoiled("GET /predict 405", headers={"allow": ""})),
    "a page for a route": ("error: no such route", Spoiled("GET /no-such-route 404", lambda body: b"<html>")),
    "a model for none": ("error: no such model", Spoiled("GET /v2/models/no-such-model 404", status=200)),
    "nothing is counted": ("metrics", Spoiled("GET /metrics 200", swap(b'{route="/predict"', b'{route="/other"'))),
    "no metrics": ("metrics", Spoiled("GET /metrics 200", lambda body: b"lvm_requests_total{route=} 1\n")),
}


@pytest.mark.parametrize(("faulty", "transport"), SPOILED.values(), ids=SPOILED)
def test_each_check_sees_its_fault_and_no_other(server: Running, faulty: str, transport: Spoiled) -> None:
    found = outcomes(server, transport)
    assert {check for check, outcome in found.items() if outcome == "failed"} == {
        check for check in CHECKS if re.fullmatch(faulty, check)
    }


def test_fails_for_another_version_or_other_golden_vectors(server: Running) -> None:
    assert outcomes(server, version="amn/other")["models"] == "failed"
    wrong = outcomes(server, golden=lambda served: (contexts(3), -mean_of(contexts(3))))
    assert [check for check, outcome in wrong.items() if outcome == "failed"] == CHECKS[2:4]


def test_skips_what_is_not_served(serve: Callable[..., Running]) -> None:
    assert outcomes(serve(retriever=False))["retrieve"] == "skipped"


def test_the_exit_code_is_the_outcome(server: Running, tmp_path: Path) -> None:
    def smoke(*words: str) -> tuple[int, Any]:
        env = {**os.environ, "LVM_REGISTRY": str(tmp_path / "none")}
        done = subprocess.run([LVM, "smoke", *words, "--json"], capture_output=True, text=True, env=env)
        assert done.stderr.startswith("next: ") is bool(done.returncode)
        return done.returncode, json.loads(done.stdout)

    code, said = smoke(server.url, "--token", "secret")
    assert (code, said["ok"], [check["check"] for check in said["checks"]]) == (0, True, CHECKS)
    code, said = smoke("http://127.0.0.1:9")
    assert (code, [(check["check"], check["outcome"]) for check in said["checks"]]) == (1, [("probes", "failed")])
