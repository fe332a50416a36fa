"""Every error a caller can meet, as a tree; the status lives on the class. Answers are RFC 9457.

ServiceError
├── Malformed 400            the bytes are not what their media type says
├── Invalid 422              well-formed, but not a context, query or option; `pointer` says where
│   └── NoEncoder            text, and nothing here makes of it the vectors that the net reads
├── Unauthorised 401         a token is wanted, and is missing or unknown
├── UnknownModel 404         UnknownArticle 404
├── TooSlow 408              TooLarge 413, UnsupportedMediaType 415, HeadersTooLarge 431
│   └── UnsupportedCoding    a Content-Encoding other than gzip; carries Accept-Encoding
├── UnknownExpectation 417   UnknownHttpVersion 505
├── ClientLimit 429          the client holds its share; carries Retry-After
├── Expired 504              the deadline passed
└── Unavailable 503          carries Retry-After
    ├── Overloaded           the queue is full, or there are too many rows or bytes in flight
    ├── Draining             the process is on its way out
    ├── BreakerOpen          the primary is not trusted right now
    └── ModelFailed          the net raised or answered non-finite, and nothing could stand in
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar


class ServiceError(Exception):
    """An answer other than 200: `detail` for people, `reason` for labels and the problem's type."""

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"
    headers: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()

    def __init__(self, detail: str, *, pointer: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail, self.pointer, self.retry_after = detail, pointer, retry_after
        self.request_id: str | None = None  # known to callers

    def __str__(self) -> str:
        """What happened, and where a pointer and a request id are known, these."""
        known = {"at": self.pointer, "request": self.request_id}
        more = ", ".join(f"{name} {value}" for name, value in known.items() if value)
        return f"{self.detail} ({more})" if more else self.detail

    @property
    def title(self) -> str:
        """The status in words."""
        return HTTPStatus(self.status).phrase


class Malformed(ServiceError):
    """Bytes that are not what their media type says."""

    status, reason = 400, "malformed"


class Unauthorised(ServiceError):
    """A token is wanted, and is missing or unknown."""

    status, reason = 401, "unauthorised"
    headers = ((b"www-authenticate", b"Bearer"),)


class UnknownModel(ServiceError):
    """No alias that is served, and no model behind one, has that name."""

    status, reason = 404, "unknown_model"


class UnknownArticle(ServiceError):
    """The corpus has no such article."""

    status, reason = 404, "unknown_article"


class TooSlow(ServiceError):
    """Headers or a body that did not arrive in time."""

    status, reason = 408, "too_slow"


class HeadersTooLarge(ServiceError):
    """Headers over the limit."""

    status, reason = 431, "headers_too_large"


class TooLarge(ServiceError):
    """A body over the limit."""

    status, reason = 413, "too_large"


class UnsupportedMediaType(ServiceError):
    """A media type that the route does not read."""

    status, reason = 415, "unsupported_media_type"


class UnsupportedCoding(UnsupportedMediaType):
    """A Content-Encoding that is not decoded."""

    reason = "unsupported_coding"
    headers = ((b"accept-encoding", b"gzip"),)


class UnknownExpectation(ServiceError):
    """An Expect header that asks for something other than 100-continue."""

    status, reason = 417, "unknown_expectation"


class UnknownHttpVersion(ServiceError):
    """A version of HTTP other than 1.1 and 1.0."""

    status, reason = 505, "unknown_http_version"


class Invalid(ServiceError):
    """Well-formed, but not a context, query or option; never echoes a value."""

    status, reason = 422, "invalid"


class NoEncoder(Invalid):
    """Text, where no encoder is, or another than the one on the card of the net that would answer."""

    reason = "no_encoder"


class ClientLimit(ServiceError):
    """The client holds its share of what may be in flight, and others want theirs; carries Retry-After."""

    status, reason = 429, "client_limit"


class Expired(ServiceError):
    """The deadline passed, in the queue or in the net."""

    status, reason = 504, "expired"


class Unavailable(ServiceError):
    """Nothing wrong with the request; try again later, in a second where nothing better is known."""

    status, reason = 503, "unavailable"

    def __init__(self, detail: str, *, pointer: str | None = None, retry_after: int = 1) -> None:
        super().__init__(detail, pointer=pointer, retry_after=retry_after)


class Overloaded(Unavailable):
    """The queue is full, or there are too many rows or bytes in flight."""

    reason = "overloaded"


class Draining(Unavailable):
    """The process, or this engine, is on its way out."""

    reason = "draining"


class BreakerOpen(Unavailable):
    """Too many recent failures; the engine is left alone for a while."""

    reason = "breaker_open"


class ModelFailed(Unavailable):
    """The net raised, or answered something that is not a finite vector.

    `alone` where others in the same batch got their answer: it says more about the row than the net.
    """

    reason = "model_failed"
    alone = False
