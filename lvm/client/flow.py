"""The flow of one call, without sockets or event loops: its requests, their deadline, retries and pauses.

A flow is a generator of `Steps`: it yields what to do next, a request or a pause, receives what came of it, and returns
the answer. `Client` and `AsyncClient` only perform the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from enum import Enum
from random import getrandbits, random
from time import monotonic
from typing import NamedTuple, TypeVar

import httpx

from lvm.client.failures import Outcome, error_from, is_retryable
from lvm.client.requests import GRACE_S, HttpRequest, parse_count, parse_timeout, trace_headers
from lvm.errors import Expired, ServiceError

T = TypeVar("T")
# The first pause is at most this long; the limit doubles with each retry.
BACKOFF_S = 0.05
# If the service asks for a longer pause, the request is not repeated.
MAX_PAUSE_S = 60.0
# the longest deadline that the service accepts
MAX_TIMEOUT_MS = 3_600_000.0


class Default(Enum):
    """Stands for an argument that the client was made with."""

    TIMEOUT = "the timeout of the client"


class Pause(NamedTuple):
    """Seconds to wait before the next try."""

    seconds: float


# yields the next action, receives its outcome, returns the result
Steps = Generator[HttpRequest | Pause, Outcome, T]


@dataclass
class RequestFlow:
    """Begins calls. The arguments are those of `Client`; `route` is the address of the service, for error messages.

    Raises:
        ValueError: one of these is out of range.
    """

    timeout: float | None = 5.0
    retries: int = 3
    rows: int = 512
    clock: Callable[[], float] = monotonic
    draw: Callable[[], float] = random
    route: str = ""

    def __post_init__(self) -> None:
        self._seconds = parse_timeout(self.timeout)
        self.retries = parse_count("retries", self.retries, 0)
        self.rows = parse_count("rows", self.rows, 1)

    def begin(self, timeout: float | Default | None = Default.TIMEOUT, traceparent: str | None = None) -> Call:
        """Return a call that begins now; raises `ValueError` if the timeout is not a number of seconds above 0."""
        seconds = self._seconds if isinstance(timeout, Default) else parse_timeout(timeout)
        request_id = f"{getrandbits(64):016x}"
        headers = {"x-request-id": request_id, **trace_headers(traceparent)}
        return Call(self, self.clock() + seconds, request_id, headers)


@dataclass(frozen=True)
class Call:
    """A call on its way: its deadline in monotonic seconds, and the id and headers of all its requests."""

    flow: RequestFlow
    deadline: float
    request_id: str
    headers: Mapping[str, str]

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - self.flow.clock()

    def send(self, ask: HttpRequest, read: Callable[[httpx.Response], T]) -> Steps[T]:
        """Send a request, again if that may help, and return what `read` makes of the response.

        Raises:
            ServiceError: the last try failed, or `read` raised it; with the id of the request.
        """
        for retry in range(self.flow.retries + 1):
            try:
                return (yield from self.send_once(ask, read))
            except ServiceError as error:
                pause = self._pause(error, retry)
                if retry == self.flow.retries or pause > MAX_PAUSE_S or not is_retryable(error):
                    raise
                if pause >= self.seconds_left():
                    raise
            yield Pause(pause)
        raise AssertionError("the last try returns or raises")

    def send_once(self, ask: HttpRequest, read: Callable[[httpx.Response], T], seconds: float = math.inf) -> Steps[T]:
        """As `send`, with one try of `seconds` at most."""
        outcome = yield self._with_deadline(ask, seconds)
        try:
            if not isinstance(outcome, httpx.Response) or outcome.status_code != 200:
                raise error_from(outcome, f" for {ask.method} {ask.url}{self.flow.route}")
            outcome.headers.setdefault("x-request-id", self.request_id)
            return read(outcome)
        except ServiceError as error:
            error.request_id = error.request_id or self.request_id
            raise

    def _with_deadline(self, ask: HttpRequest, seconds: float) -> HttpRequest:
        left = min(self.seconds_left(), seconds)
        if left <= 0:
            raise Expired("the deadline passed before the request was sent")
        milliseconds = min(max(left * 1e3, 0.001), MAX_TIMEOUT_MS)
        headers = {**ask.headers, **self.headers, "x-request-timeout-ms": f"{milliseconds:.3f}"}
        return ask._replace(headers=headers, timeout=left + GRACE_S)

    def _pause(self, error: ServiceError, retry: int) -> float:
        """Return seconds to wait: the service's Retry-After, plus exponential back-off with full jitter.

        Brooker, Exponential Backoff And Jitter, 2015.
        """
        return (error.retry_after or 0) + self.flow.draw() * BACKOFF_S * float(2**retry)
