"""ASGI, in both directions: the gateway as an application below another server, and an application as a handler.

Another server is Ray Serve's, or a test's; the application is FastAPI's, with all routes that are not hot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote, unquote

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from lvm.errors import Invalid, ServiceError
from service.http.gateway import Gateway
from service.http.headers import combine, path_of
from service.http.messages import (
    CLOSE,
    MAX_DIGITS,
    ClientDisconnected,
    Headers,
    Request,
    Response,
    problem,
    problem_of,
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

REPLACED = (b"content-type", b"content-length")  # which the gateway adds
REASONS = {401: "unauthorised", 404: "unknown_route", 405: "method_not_allowed", 500: "internal", 503: "unavailable"}


class AsgiRequest(Request):
    """A request that another server received."""

    is_ready = False

    def __init__(self, scope: Scope, receive: Receive) -> None:
        client, *_ = scope.get("client") or ("",)
        headers = combine(scope["headers"])
        length = headers.get(b"content-length", b"")
        declared = int(length) if length.isdigit() and len(length) <= MAX_DIGITS else 0
        super().__init__(scope["method"].encode(), _path(scope), scope["query_string"], headers, client, declared)
        self._receive = receive

    async def read(self) -> None:
        """Wait until the body is complete; raises as `Request.read`."""
        while not self.is_ready:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            self.add(message.get("body", b""))
            self.is_ready = not message.get("more_body", False)


async def serve(gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request of another server."""
    try:
        response = await gateway.handle(AsgiRequest(scope, receive))
    except ClientDisconnected:
        return
    headers = [*response.all_headers(), *([CLOSE] if response.closes else [])]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


class AsgiHandler:
    """A handler that answers by an ASGI application, whose responses are short and are collected whole.

    Args:
        application: raises what it cannot answer: see `reraise`.
        methods_of: returns the methods that the path of a scope allows.
        explain: returns why a path is unknown, if there is more to say.
    """

    def __init__(
        self,
        application: Application,
        methods_of: Callable[[Scope], set[str]],
        explain: Callable[[str], str | None] = lambda path: None,
    ) -> None:
        self._application = application
        self._methods_of = methods_of
        self._explain = explain

    async def __call__(self, request: Request) -> Response:
        """Return the application's response; raises what the application raises, `Invalid` for a bad parameter."""
        scope, exchange = _scope(request), _Exchange(request)
        try:
            # In a task of its own: what FastAPI runs in threads needs one of asyncio's.
            await asyncio.ensure_future(self._application(scope, exchange.receive, exchange.send))
        except ServiceError as error:
            response = problem_of(error.with_traceback(None), request)
            response.outcome = _outcome(error.status)
            return response
        except HTTPException as error:
            return self._refuse(error, request, scope)
        except RequestValidationError as error:
            faults = error.errors()
            detail = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in faults)
            raise Invalid(detail, pointer=f"/{faults[0]['loc'][-1]}") from None
        return exchange.response()

    def _refuse(self, error: HTTPException, request: Request, scope: Scope) -> Response:
        headers: Headers = []
        if error.status_code == 405:
            headers = [(b"allow", ", ".join(sorted(self._methods_of(scope))).encode())]
        detail = (self._explain(request.path) if error.status_code == 404 else None) or error.detail
        return problem(request, error.status_code, _outcome(error.status_code), detail, headers)


async def reraise(_: object, error: Exception) -> Any:
    """Raise an exception: as a handler of exceptions of FastAPI, it leaves them to `AsgiHandler`."""
    raise error


class _Exchange:
    """What an application reads and sends."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._is_read = False
        self._status = 500
        self._headers: dict[bytes, bytes] = {}
        self._others: Headers = []
        self._body = b""

    async def receive(self) -> Message:
        """Return the body, which is read at the first call."""
        request = self._request
        if self._is_read:
            return {"type": "http.disconnect"}
        request.check_size(max(request.declared, len(request.body)))
        await request.read()
        self._is_read = True
        return {"type": "http.request", "body": bytes(request.body), "more_body": False}

    async def send(self, message: Message) -> None:
        """Collect a part of the response."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._others = [header for header in message["headers"] if header[0] not in REPLACED]
            self._headers = dict(message["headers"])
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")

    def response(self) -> Response:
        """Return what was collected."""
        media_type = self._headers.get(b"content-type", b"")
        return Response(self._body, media_type, self._others, self._status, _outcome(self._status))


def _outcome(status: int) -> str:
    """Return how a response of the application is counted."""
    return "ok" if status < 400 else REASONS.get(status, "other")


def _path(scope: Scope) -> str:
    """Return the path of a scope; a slash that was percent-encoded separates nothing, if the server kept it."""
    raw_path = scope.get("raw_path") or b""
    path: str = scope["path"]
    return path_of(raw_path) if b"%" in raw_path and unquote(raw_path) == path else path


def _scope(request: Request) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET" if request.method == b"HEAD" else request.method.decode("latin-1"),
        "scheme": "http",
        "path": request.path,
        "raw_path": quote(request.path).encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers.items()),
        "client": None,
        "server": None,
    }
