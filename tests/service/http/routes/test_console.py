"""The console's files: a closed list, under a strict policy, asked for anew only when they changed."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import lvm.errors
from lvm.errors import ServiceError
from service.http import asgi
from service.http.routes import console
from tests.conftest import Running

Serve = Callable[..., Running]


def test_every_file_comes_with_its_type_and_the_policy(serve: Serve) -> None:
    server = serve()
    assert {"/", "/console/console.css", "/console/console.js", "/console/plot.js"} <= console.places().keys()
    for path, file in console.places().items():
        answer = server.http.get(path)
        assert (answer.status_code, answer.content) == (200, file.read_bytes()), path
        assert answer.headers["content-type"].removesuffix("; charset=utf-8") == console.TYPES[file.suffix]
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_file_that_the_caller_has_is_not_sent_again(serve: Serve) -> None:
    server = serve()
    first = server.http.get("/")
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = server.http.get("/", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert server.http.get("/", headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/console", "/console/", "/console/nothing.js", "/console/index.html", "/index.html"),
        *("/console/..%2fapp.py", "/console/%2e%2e/app.py", "/console/console.js%00", "/console//etc/passwd"),
    ],
)
def test_nothing_else_is_served(serve: Serve, path: str) -> None:
    answer = serve().http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_only_reading_is_allowed(serve: Serve) -> None:
    server = serve()
    assert server.http.head("/").content == b""
    assert server.http.post("/").status_code == 405


def test_the_files_name_no_other_host_and_nothing_that_the_policy_forbids() -> None:
    for path, file in console.places().items():
        text = file.read_text()
        assert set(re.findall(r"(?:https?:)?//[a-z][\w.-]*\.[a-z]+", text)) <= {"http://www.w3.org"}, path
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\son\w+=|style=", text
        ), path


def statuses() -> dict[str, int]:
    """Return the status of every reason for which a request is not answered."""
    known = [each for each in vars(lvm.errors).values() if isinstance(each, type) and issubclass(each, ServiceError)]
    return {reason: status for status, reason in asgi.REASONS.items()} | {each.reason: each.status for each in known}


def test_the_console_counts_mistakes_of_callers_apart_from_overload_and_failures() -> None:
    text = (console.CONSOLE / "outcomes.js").read_text()
    lists = {
        name: set(re.findall(r'"(\w+)"', body)) for name, body in re.findall(r"const (\w+) = \[(.*?)\]", text, re.S)
    }
    mistakes = {reason for reason, status in statuses().items() if 400 <= status < 500}
    assert lists["REJECTED"] == mistakes - lists["OVERLOAD"]
    assert {statuses()[reason] for reason in lists["OVERLOAD"]} == {429, 503}
