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


def places() -> dict[str, Path]:
    """Return every file of the console by the path it is served at."""
    files = [file for file in sorted(CONSOLE.iterdir()) if file.suffix in TYPES]
    return {"/" if file.name == "index.html" else f"/console/{file.name}": file for file in files}


class StaticFile(NamedTuple):
    """A file as it is served."""

    body: bytes
    etag: str
    media_type: str


def add_routes(app: FastAPI) -> None:
    """Add the console to `app`."""
    for path, file in places().items():
        app.add_route(path, _answerer(read_file(file)), methods=["GET"], include_in_schema=False)


def read_file(path: Path) -> StaticFile:
    """Read a file; raises `OSError`."""
    body = path.read_bytes()
    return StaticFile(body, f'"{sha256(body).hexdigest()[:32]}"', TYPES[path.suffix])


def respond(request: Request, file: StaticFile) -> Response:
    """Return a file, or 304 if the caller knows its ETag."""
    headers = {**HEADERS, "etag": file.etag}
    if has_tag(request.headers.get("if-none-match", "").encode("latin-1"), file.etag.encode()):
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)


def _answerer(file: StaticFile) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return respond(request, file)

    return answer
