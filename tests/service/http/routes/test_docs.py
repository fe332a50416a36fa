"""The files of the page /docs: a closed list, under the policy of the console; the description names a token."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from service.app import create_app
from service.http.routes import console, docs
from service.settings import Settings
from tests.conftest import Running

Serve = Callable[..., Running]
TOKEN = "t" * 20


@pytest.mark.parametrize("tokens", ["", TOKEN])
def test_every_file_comes_with_its_type_and_the_policy_and_needs_no_token(serve: Serve, tokens: str) -> None:
    server = serve(tokens=tokens)
    assert len(docs.places()) == 5
    for path, file in docs.places().items():
        answer = server.http.get(path)
        assert (answer.status_code, answer.content) == (200, file.read_bytes()), path
        assert answer.headers["content-type"].removesuffix("; charset=utf-8") == console.TYPES[file.suffix]
        assert answer.headers["content-security-policy"] == console.HEADERS["content-security-policy"]
        again = server.http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/docs/", "/docs/index.html", "/docs/redoc.standalone.js", "/docs/..%2fapp.py"])
def test_nothing_else_is_served(serve: Serve, path: str) -> None:
    assert serve().http.get(path).status_code == 404


def test_the_own_files_hold_nothing_that_the_policy_forbids() -> None:
    for file in docs.PAGE.iterdir():
        text = file.read_text()
        assert not re.search(r"https?://|<script>|<style>|\son\w+=|style=|innerHTML|\beval\(", text), file


def test_says_what_to_install_without_the_package() -> None:
    assert docs.places("no_such_package") == {}
    assert "pip install 'lvm-serve[serve]'" in (docs.missing("/docs") or "")
    assert docs.missing("/other") is None


def test_the_description_requires_a_token_only_if_the_service_does() -> None:
    without = create_app(Settings()).openapi()
    assert "security" not in without
    assert "securitySchemes" not in without["components"]
    document = create_app(Settings(tokens=TOKEN)).openapi()
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    unprotected = {path for path, item in document["paths"].items() if item.get("get", {}).get("security") == []}
    assert unprotected == {"/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready"}
