"""The page /docs: Swagger UI, whose files a package carries, over /openapi.json. Nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from service.http.routes import console

PACKAGE = "fastapi_offline"
PAGE = Path(__file__).parents[2] / "swagger"
BUNDLE = ("swagger-ui-bundle.js", "swagger-ui.css")


def places(package: str = PACKAGE) -> dict[str, Path]:
    """Return every file of the page by the path it is served at; none if the package is not installed."""
    found = find_spec(package)
    if found is None or found.origin is None:
        return {}
    bundle = Path(found.origin).with_name("static")
    files = [PAGE / "start.js", PAGE / "page.css", *(bundle / name for name in BUNDLE)]
    return {"/docs": PAGE / "index.html"} | {f"/docs/{file.name}": file for file in files}


def missing(path: str) -> str | None:
    """Return why the page is not there, if that is the path."""
    if path != "/docs":
        return None
    return "the page requires Swagger UI: pip install 'lvm-serve[serve]'; /openapi.json describes the API"


def add_routes(app: FastAPI) -> None:
    """Add the OpenAPI document to `app`, and the page, if the package with Swagger UI is installed."""
    app.add_route("/openapi.json", _describer(app), methods=["GET"], include_in_schema=False)
    for path, file in places().items():
        app.add_route(path, _answerer(file), methods=["GET"], include_in_schema=False)


def _describer(app: FastAPI) -> Callable[[Request], Response]:
    """Return what answers with the OpenAPI document, in a thread: to make it takes a tenth of a second, once."""
    make, lock = cache(lambda: bytes(JSONResponse(app.openapi()).body)), Lock()

    def answer(_: Request) -> Response:
        with lock:
            return Response(make(), media_type="application/json")

    return answer


def _answerer(path: Path) -> Callable[[Request], Response]:
    """Return what answers with a file, in a thread: it is read when it is first asked for, as it may be large."""
    read = cache(console.read_file)

    def answer(request: Request) -> Response:
        return console.respond(request, read(path))

    return answer
