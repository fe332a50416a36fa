"""The console's files: a closed list, read once at start, each a route of its own under a strict policy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request, Response

from service.http.headers import has_tag

CONSOLE = Path(__file__).parents[2] / "console"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{directive} {sources}" for directive, sources in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask each time, by the ETag: an upgrade shows at once
}


class Page(NamedTuple):
    """One file as it is sent."""

    body: bytes
    media_type: str
    etag: str

    def answer(self, known: str) -> Response:
        """Return the file, or 304 if its ETag is among those `known` to the caller."""
        headers = {**HEADERS, "etag": self.etag}
        if has_tag(known.encode("latin-1"), self.etag.encode()):
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.media_type)


def places() -> dict[str, Path]:
    """Return every file of the console by the path it is served at."""
    files = [file for file in sorted(CONSOLE.iterdir()) if file.suffix in TYPES]
    return {_place(file): file for file in files}


def read() -> dict[str, Page]:
    """Return the files as they are sent, by path."""
    return {path: _page(file) for path, file in places().items()}


def _place(file: Path) -> str:
    return "/" if file.name == "index.html" else f"/console/{file.name}"


def _page(file: Path) -> Page:
    body = file.read_bytes()
    return Page(body, TYPES[file.suffix], f'"{sha256(body).hexdigest()[:32]}"')


def add_routes(app: FastAPI) -> None:
    """Add the console to `app`."""
    for path, page in read().items():
        app.add_route(path, _answerer(page), methods=["GET"], include_in_schema=False)


def _answerer(page: Page) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return page.answer(request.headers.get("if-none-match", ""))

    return answer
