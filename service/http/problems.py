"""The body of an error: RFC 9457, with what clients of the Open Inference Protocol read."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import orjson

PROBLEM = b"application/problem+json"


def problem(
    status: int, reason: str, detail: str, request_id: str, *, path: str = "", pointer: str | None = None
) -> bytes:
    """Return the body of an RFC 9457 problem that answers a request for `path`, with a JSON pointer if there is one.

    Below /v2, `error` repeats the detail: clients of the Open Inference Protocol read that member only.
    """
    body: dict[str, Any] = {
        "type": f"urn:lvm:problem:{reason}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }
    if path == "/v2" or path.startswith("/v2/"):
        body["error"] = detail
    return orjson.dumps(body if pointer is None else body | {"pointer": pointer})
