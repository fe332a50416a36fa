"""What becomes of a request that was not answered with 200: the error of the service as its class, or one of these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpcore
import httpx

from lvm.errors import Expired, ServiceError

TIMEOUTS = (httpx.TimeoutException, httpcore.TimeoutException, TimeoutError)
NOT_CONNECTED = (httpx.ConnectTimeout, httpcore.ConnectTimeout)
NOT_SENT = (httpx.LocalProtocolError, httpcore.LocalProtocolError, UnicodeEncodeError)
# characters of what a response says, in an error
MAX_REQUEST_ID = 200
MAX_DETAIL = 2_000

Outcome = httpx.Response | Exception | None


class Unreachable(ServiceError):
    """The connection failed, or broke before the response was complete."""

    status = 502
    reason = "unreachable"


class BadAnswer(ServiceError):
    """The response does not match the request: wrong shape, not finite, incomplete or too large."""

    status = 502
    reason = "bad_answer"


class UnknownRoute(ServiceError):
    """The address has no such route: it is not that of the service, or the service is older than the client."""

    status = 404
    reason = "unknown_route"


def is_retryable(error: ServiceError) -> bool:
    """Return whether the same request may succeed later."""
    return isinstance(error, Unreachable) or error.status in (429, 503)


def error_from(response: Outcome, route: str = "") -> ServiceError:
    """Return the error of a response as the class that the service raised; add `route` if the service sent no detail.

    Raises:
        ValueError: the request could not be sent as it was given.
    """
    if not isinstance(response, httpx.Response):
        return _transport_error(response, route)
    if response.status_code < 400:
        return BadAnswer(f"response has status {response.status_code}; expected 200{route}")
    problem = _read_problem(response)
    kind = _error_class(problem.get("type", ""), response.status_code)
    detail = _short_text(problem.get("detail"), MAX_DETAIL)
    if not detail or kind is UnknownRoute:
        detail = (detail or f"status {response.status_code} {response.reason_phrase}".strip()) + route
    error = kind(detail)
    retry_after = response.headers.get("retry-after", "")
    error.pointer = _short_text(problem.get("pointer"), MAX_DETAIL)
    error.request_id = request_id_of(response) or _short_text(problem.get("request_id"))
    is_seconds = retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10
    error.retry_after = int(retry_after) if is_seconds else None
    return error


def request_id_of(response: httpx.Response) -> str | None:
    """Return the id that the service gave to a request, None if the response has none."""
    return _short_text(response.headers.get("x-request-id"))


def _short_text(given: Any, most: int = MAX_REQUEST_ID) -> str | None:
    """Return a text as a message may hold it, without control characters; None if it is empty or no text."""
    if not isinstance(given, str):
        return None
    return "".join(each if each.isprintable() else " " for each in given[:most]) or None


def _transport_error(failed: Exception | None, route: str) -> ServiceError:
    if isinstance(failed, ServiceError):
        return failed
    if isinstance(failed, NOT_SENT):
        raise ValueError(f"the request cannot be sent: {failed}") from failed
    error: ServiceError = Unreachable(f"{type(failed).__name__}: {failed}{route}")
    if isinstance(failed, TIMEOUTS) and not isinstance(failed, NOT_CONNECTED):
        error = Expired(f"the deadline passed before the response was complete{route}")
    elif isinstance(failed, httpx.DecodingError):
        error = BadAnswer(f"response does not match its Content-Encoding{route}")
    error.__cause__ = failed
    return error


def _read_problem(response: httpx.Response) -> dict[str, Any]:
    try:
        problem = response.json()
    # sent by a proxy rather than by the service
    except (ValueError, RecursionError):
        return {}
    return problem if isinstance(problem, dict) else {}


def _error_class(kind: Any, status: int) -> type[ServiceError]:
    """Return the error class of a problem type, or the most general one of the status, or a new class."""
    known: list[type[ServiceError]] = [UnknownRoute, ServiceError, *_subclasses(ServiceError)]
    for error in known:
        if kind == f"urn:lvm:problem:{error.reason}":
            return error
    for error in known:
        if error.status == status:
            return error
    return type("ServiceError", (ServiceError,), {"status": status, "reason": "other"})


def _subclasses(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
