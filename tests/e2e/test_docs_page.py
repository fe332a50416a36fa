"""The page /docs in a real browser: Swagger UI shows the operations and calls them, below a prefix and with a token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser import CHROMIUM, Browser, browsing
from tests.conftest import PATIENCE_S, Process, Running
from tests.fakes import HashEncoder

Serve = Callable[..., Running]
PREDICT = "#operations-default-predict"
TOKEN = "t" * 20


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("wants Chromium (make console-check)")
    with browsing(tmp_path / "chromium") as browser:
        browser.size(1280, 900)
        yield browser
        assert browser.complaints == []


class Proxy(BaseHTTPRequestHandler):
    """Forwards to `upstream` what is below /lvm, without that prefix."""

    upstream = ""

    def do_GET(self) -> None:
        self._forward(b"")

    def do_POST(self) -> None:
        self._forward(self.rfile.read(int(self.headers["Content-Length"])))

    def _forward(self, body: bytes) -> None:
        url = self.upstream + self.path.removeprefix("/lvm") if self.path.startswith("/lvm/") else f"{self.upstream}/no"
        passed = {name: self.headers[name] for name in ("Content-Type", "Authorization") if name in self.headers}
        answer = httpx.request(self.command, url, content=body, headers=passed, timeout=PATIENCE_S)
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def prefixed(upstream: str) -> Iterator[str]:
    """Serve `upstream` below a prefix until the block ends."""
    handler = type("Handler", (Proxy,), {"upstream": upstream})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}/lvm"
        proxy.shutdown()


def call_predict(page: Browser) -> str:
    """Call /predict with the example that the page offers; return what the page shows of the answer."""
    page.until(f"document.querySelector('{PREDICT} .opblock-summary-control')")
    page.click(f"{PREDICT} .opblock-summary-control")
    page.until(f"document.querySelector('{PREDICT} .try-out__btn')")
    page.click(f"{PREDICT} .try-out__btn")
    page.until(f"document.querySelector('{PREDICT} .execute')")
    page.click(f"{PREDICT} .execute")
    page.until(f"document.querySelector('{PREDICT} .live-responses-table .response-col_status')")
    return page.text(f"{PREDICT} .live-responses-table")


def test_shows_every_operation_and_calls_it(page: Browser, serve: Serve) -> None:
    server = serve(text=HashEncoder())
    page.open(f"{server.url}/docs")
    answer = call_predict(page)
    assert "200" in answer
    assert '"read_as": "context"' in answer
    operations = server.http.get("/openapi.json").json()["paths"].values()
    assert page.run("document.querySelectorAll('.opblock').length") == sum(map(len, operations))
    assert not page.run("Boolean(document.querySelector('.authorize'))")


@pytest.mark.browser
def test_asks_for_the_token_and_works_below_a_prefix(page: Browser, serve: Serve) -> None:
    server = serve(text=HashEncoder(), tokens=TOKEN)
    with prefixed(server.url) as url:
        page.open(f"{url}/docs")
        page.until("!document.querySelector('#token-form').hidden")
        assert page.text("#message") == "This service needs a token."
        page.type(TOKEN)
        page.press("Enter")
        assert "200" in call_predict(page)
        assert page.run("Boolean(document.querySelector('.authorize'))")
        page.open(f"{url}/docs")
        assert "200" in call_predict(page)
        assert page.run("document.querySelector('#token-form').hidden")
    # of openapi.json without a token
    assert [complaint for complaint in page.complaints if "401" not in complaint] == []
    page.complaints.clear()


@pytest.mark.browser
def test_says_that_a_token_is_unknown(page: Browser, serve: Serve) -> None:
    server = serve(tokens=TOKEN)
    page.open(f"{server.url}/docs")
    page.until("!document.querySelector('#token-form').hidden")
    page.type("wrong")
    page.press("Enter")
    page.until("document.querySelector('#message').textContent === 'The token is unknown to this service.'")
    page.complaints.clear()


def test_the_service_of_what_ships_answers_every_example(process: Callable[..., Process]) -> None:
    with httpx.Client(base_url=process(LVM_TIMEOUT_MS="60000").url, timeout=PATIENCE_S) as client:
        paths = client.get("/openapi.json").json()["paths"]
        posts = [(path, item["post"]["requestBody"]["content"]) for path, item in paths.items() if "post" in item]
        examples = [(path, body["value"]) for path, content in posts for body in _examples(content)]
        assert {path for path, _ in examples} >= {"/predict", "/retrieve", "/embed", "/v1/embeddings"}
        for path, body in examples:
            assert client.post(path, json=body).status_code == 200, (path, body)
        (model,) = paths["/v1/models/{model}"]["get"]["parameters"]
        (name,) = [example["value"] for example in model["examples"].values()]
        assert client.get(f"/v1/models/{name}").json()["id"] == name


def _examples(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [*content["application/json"].get("examples", {}).values()]
