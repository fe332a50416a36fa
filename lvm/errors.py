"""Every error of the service, as a tree; the class has the status. Responses are problems of RFC 9457.

ServiceError
├── Malformed 400            the body does not match its media type, or a name or an option is given twice
├── Invalid 422              well-formed, but not a valid context, query or option; `pointer` says where
│   └── NoEncoder            text, but no encoder here makes the vectors that the net reads
├── Unauthorised 401         a token is required, and is missing or unknown
├── UnknownModel 404         UnknownArticle 404
├── TooSlow 408              TooLarge 413, UnsupportedMediaType 415, HeadersTooLarge 431
│   └── UnsupportedCoding    a Content-Encoding other than gzip; carries Accept-Encoding
├── UnknownExpectation 417   UnknownHttpVersion 505
├── ClientLimit 429          the client has used its share; with Retry-After
├── Expired 504              the deadline passed
└── Unavailable 503          with Retry-After
    ├── Overloaded           the queue is full, or too many rows or bytes are in flight
    ├── Draining             the process is shutting down
    ├── BreakerOpen          the circuit breaker of the engine is open
    └── ModelFailed          the net raised or returned non-finite vectors, and there is no fallback
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar


class ServiceError(Exception):
    """A response other than 200: `detail` for people; `reason` for labels and the type of the problem."""

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"
    headers: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()

    def __init__(self, detail: str, *, pointer: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer
        self.retry_after = retry_after
        # set by the client
        self.request_id: str | None = None

    def __str__(self) -> str:
        """The detail; with the pointer and the request id if they are known."""
        known = {"at": self.pointer, "request": self.request_id}
        more = ", ".join(f"{name} {value}" for name, value in known.items() if value)
        return f"{self.detail} ({more})" if more else self.detail

    @property
    def title(self) -> str:
        """The status in words."""
        return HTTPStatus(self.status).phrase


class Malformed(ServiceError):
    """The body does not match its media type, or a name or an option is given twice."""

    status = 400
    reason = "malformed"


class Unauthorised(ServiceError):
    """A token is required, and is missing or unknown."""

    status = 401
    reason = "unauthorised"
    headers = ((b"www-authenticate", b"Bearer"),)


class UnknownModel(ServiceError):
    """No alias that is served, and no model behind one, has this name."""

    status = 404
    reason = "unknown_model"


class UnknownArticle(ServiceError):
    """The corpus has no such article."""

    status = 404
    reason = "unknown_article"


class TooSlow(ServiceError):
    """The headers or the body did not arrive in time."""

    status = 408
    reason = "too_slow"


class HeadersTooLarge(ServiceError):
    """The headers exceed the limit."""

    status = 431
    reason = "headers_too_large"


class TooLarge(ServiceError):
    """The body exceeds the limit."""

    status = 413
    reason = "too_large"


class UnsupportedMediaType(ServiceError):
    """The route does not accept this media type."""

    status = 415
    reason = "unsupported_media_type"


class UnsupportedCoding(UnsupportedMediaType):
    """The service does not decode this Content-Encoding."""

    reason = "unsupported_coding"
    headers = ((b"accept-encoding", b"gzip"),)


class UnknownExpectation(ServiceError):
    """The Expect header has a value other than 100-continue."""

    status = 417
    reason = "unknown_expectation"


class UnknownHttpVersion(ServiceError):
    """The version of HTTP is neither 1.1 nor 1.0."""

    status = 505
    reason = "unknown_http_version"


class Invalid(ServiceError):
    """The request is well-formed, but has an invalid context, query or option; the detail never echoes a value."""

    status = 422
    reason = "invalid"


class NoEncoder(Invalid):
    """The request has text, but there is no encoder, or not the one on the card of the net."""

    reason = "no_encoder"


class ClientLimit(ServiceError):
    """The client has used its share of the limit while other clients wait; with Retry-After."""

    status = 429
    reason = "client_limit"


class Expired(ServiceError):
    """The deadline passed, in the queue or in the net."""

    status = 504
    reason = "expired"


class Unavailable(ServiceError):
    """The request is valid, but cannot be served now; retry later, by default after a second."""

    status = 503
    reason = "unavailable"

    def __init__(self, detail: str, *, pointer: str | None = None, retry_after: int = 1) -> None:
        super().__init__(detail, pointer=pointer, retry_after=retry_after)


class Overloaded(Unavailable):
    """The queue is full, or too many rows or bytes are in flight."""

    reason = "overloaded"


class Draining(Unavailable):
    """The process, or this engine, is shutting down."""

    reason = "draining"


class BreakerOpen(Unavailable):
    """The engine failed too often recently and gets no requests for a while."""

    reason = "breaker_open"


class ModelFailed(Unavailable):
    """The net raised, or returned vectors that are not finite.

    `alone` means that other rows of the batch were answered, so the row is the likely cause.
    """

    reason = "model_failed"
    alone = False
