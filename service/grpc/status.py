"""Responses as gRPC has them: the status of an outcome, the text of an error, and trailing metadata."""

from __future__ import annotations

from collections.abc import Mapping

from grpc import StatusCode

from lvm.errors import ServiceError
from service.http.messages import Headers, Request, Response

# By the status of the same answer over HTTP.
CODES: Mapping[int, StatusCode] = {
    200: StatusCode.OK,
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    422: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    500: StatusCode.INTERNAL,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
# The outcome of calls of a method that is not served.
UNKNOWN_ROUTE = "unknown_route"
# Headers that mean something over gRPC, beside those that begin with x-.
SENT = frozenset({b"server-timing", b"retry-after", b"grpc-retry-pushback-ms"})
FOR_BROWSERS = b"x-content-type-options"
Metadata = tuple[tuple[str, str], ...]


def status_of(error: ServiceError, request: Request) -> Response:
    """Return the response to an error: its text and pointer; reason and seconds to wait as metadata.

    A client with a retry policy waits as long as grpc-retry-pushback-ms says (gRFC A6).
    """
    headers: Headers = [(b"x-reason", error.reason.encode())]
    if error.retry_after:
        headers.append((b"retry-after", b"%d" % error.retry_after))
        headers.append((b"grpc-retry-pushback-ms", b"%d" % (1000 * error.retry_after)))
    text = f"{error.detail} (at {error.pointer})" if error.pointer else error.detail
    return Response(text.encode(), b"", headers, error.status, error.reason)


def code_of(response: Response) -> StatusCode:
    """Return the status of a response."""
    if response.outcome == UNKNOWN_ROUTE:
        return StatusCode.UNIMPLEMENTED
    return CODES.get(response.status, StatusCode.INTERNAL)


def trailing_metadata(response: Response) -> Metadata:
    """Return the headers of a response that are sent over gRPC."""
    return tuple(
        (name.decode("ascii"), value.decode("latin-1"))
        for name, value in response.all_headers()
        if name in SENT or (name.startswith(b"x-") and name != FOR_BROWSERS)
    )
