"""A client for Python: arrays in, arrays out, over the binary format.

    client = Client("http://127.0.0.1:8000")
    client.predict(contexts).vectors

Errors are the classes of the service (`lvm.errors`), so `except Overloaded` works here too. A request that cannot be
sent is a `ValueError`. The service only computes, so a request may be repeated: the client retries after rejections
with Retry-After, and after broken connections.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import random
from time import monotonic, sleep
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import httpcore
import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lvm.errors import Expired, ServiceError
from lvm.transport import LIMITS, MAX_TIMEOUT_S, Transport, deadline_at, proxy_of

Floats = NDArray[np.float32]
# for `article` or a metadata field, the values of which a passage must have one
Filter = Mapping[str, str | float | bool | Iterable[str | float | bool]]
T = TypeVar("T")
OCTETS = "application/octet-stream"
# accepted codings of responses; the decoded size of others cannot be bounded
CODINGS = ("identity", "gzip", "deflate")
# headers that describe a body in transfer
FRAMING_HEADERS = (b"content-encoding", b"content-length", b"transfer-encoding")
TIMEOUTS = (httpx.TimeoutException, httpcore.TimeoutException, TimeoutError)
NOT_CONNECTED = (httpx.ConnectTimeout, httpcore.ConnectTimeout)
NOT_SENT = (httpx.LocalProtocolError, httpcore.LocalProtocolError, UnicodeEncodeError)
# The first pause is at most this long; the limit doubles with each retry.
BACKOFF_S = 0.05
# time after the deadline in which the service can respond that the deadline passed
GRACE_S = 0.25
# If the service asks for a longer pause, the request is not repeated.
MAX_PAUSE_S = 60.0
# the longest deadline that the service accepts
MAX_TIMEOUT_MS = 3_600_000.0
# of options in a query string; the service accepts 16 KiB of headers
MAX_QUERY_CHARACTERS = 4_000
# of all queries of a request: hits, and ids to exclude
MAX_FOUND = 50_000
# decoded bytes of a response, in addition to the size of the request
MAX_ANSWER_BYTES = 64 << 20


class Unreachable(ServiceError):
    """The connection failed, or broke before the response was complete."""

    status = 502
    reason = "unreachable"


class BadAnswer(ServiceError):
    """The response does not match the request: wrong shape, not finite, incomplete or too large."""

    status = 502
    reason = "bad_answer"


class MadeBy(NamedTuple):
    """What made a response: model, version, the alias that served it, and the reason if it was a fallback."""

    model: str
    version: str
    served_by: str
    fallback_reason: str | None


class Prediction(NamedTuple):
    """Next vectors: `(D,)` for one context, `(n, D)` for n. `made_by` has one entry; more if a version was swapped."""

    vectors: Floats
    made_by: tuple[MadeBy, ...]


class Passage(NamedTuple):
    """A passage that was found; `text`, `source_id` and `metadata` are None if the corpus has none."""

    id: int
    score: float
    article: int
    title: str
    position: int
    text: str | None
    source_id: str | None = None
    metadata: Mapping[str, Any] | None = None


class HttpRequest(NamedTuple):
    """A POST, with the names of httpx for its parts; `timeout` is in seconds, or inf."""

    url: str
    content: bytes
    headers: dict[str, str]
    params: dict[str, str]
    timeout: float = math.inf

    @property
    def limit(self) -> float | None:
        """Seconds, or None if there is no limit."""
        return self.timeout if self.timeout < MAX_TIMEOUT_S else None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of httpx; connecting times out early enough to be reported as such."""
        connect = self.limit and self.limit - GRACE_S
        return {**self._asdict(), "timeout": httpx.Timeout(self.limit, connect=connect)}


class Pause(NamedTuple):
    """Seconds to wait before the next try."""

    seconds: float


Outcome = httpx.Response | Exception | None
# yields the next action, receives its outcome, returns the result
Steps = Generator[HttpRequest | Pause, Outcome, T]


@dataclass(kw_only=True)
class RequestFlow:
    """Makes requests of arguments and results of responses, without sockets or event loops.

    Args:
        timeout: seconds for a whole call with all tries and pauses; None or inf: no limit.
        retries: how often a request is repeated at most.
        rows: contexts in one request; more contexts are sent in several requests.
        clock: monotonic seconds.
        draw: random numbers in [0, 1), for the pauses.
        route: the address of the service, and the proxy, for error messages.

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
        self._seconds = _parse_timeout(self.timeout)
        self.retries = _parse_count("retries", self.retries, 0)
        self.rows = _parse_count("rows", self.rows, 1)

    def predict(self, contexts: ArrayLike, options: Mapping[str, Any], traceparent: str | None) -> Steps[Prediction]:
        """Request the next vectors of contexts `(n, T, D)`, or of one `(T, D)`."""
        rows = _to_floats(contexts, "contexts", {2: "(T, D)", 3: "(n, T, D)"})
        parts = [rows] if rows.ndim == 2 else [rows[at : at + self.rows] for at in range(0, len(rows), self.rows)]
        params, trace, deadline = _params(_to_json_options(options)), trace_headers(traceparent), self._deadline()
        vectors: list[Floats] = []
        made_by: dict[MadeBy, None] = {}
        for part in parts:
            headers = {**_octet_headers(part), "accept": OCTETS, **trace}
            response = yield from self._send(HttpRequest("/predict", part.tobytes(), headers, params), deadline)
            vectors.append(_read_vectors(response, (*part.shape[:-2], part.shape[-1])))
            made_by[_read_made_by(response.headers)] = None
        if rows.ndim == 2:
            return Prediction(vectors[0], tuple(made_by))
        return Prediction(np.concatenate([np.empty((0, rows.shape[-1]), np.float32), *vectors]), tuple(made_by))

    def retrieve(self, asked: ArrayLike, options: Mapping[str, Any], traceparent: str | None) -> Steps[list[Passage]]:
        """Request the passages nearest to a query `(D,)`, or to the prediction of a context `(T, D)`."""
        rows = _to_floats(asked, "a query or a context", {1: "(D,)", 2: "(T, D)"})
        given, trace = _to_json_options(options), trace_headers(traceparent)
        ask = _retrieve_request("query" if rows.ndim == 1 else "context", rows, given, trace)
        response = yield from self._send(ask, self._deadline())
        return _read_passages(_read_results(response), given.get("k"))

    def retrieve_many(
        self, asked: ArrayLike, options: Mapping[str, Any], traceparent: str | None
    ) -> Steps[list[list[Passage]]]:
        """Request the passages nearest to each of many queries `(n, D)`, or contexts `(n, T, D)`."""
        rows = _to_floats(asked, "queries or contexts", {2: "(n, D)", 3: "(n, T, D)"})
        field = "queries" if rows.ndim == 2 else "contexts"
        given, trace, deadline = _to_json_options(options), trace_headers(traceparent), self._deadline()
        size = _rows_of_a_part(given, self.rows)
        found: list[list[Passage]] = []
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            response = yield from self._send(_retrieve_request(field, part, given, trace), deadline)
            found += _read_each(_read_results(response), len(part), given.get("k"))
        return found

    def _deadline(self) -> float:
        return self.clock() + self._seconds

    def _send(self, ask: HttpRequest, deadline: float) -> Steps[httpx.Response]:
        for retry in range(self.retries + 1):
            response = yield self._with_deadline(ask, deadline)
            if isinstance(response, httpx.Response) and response.status_code == 200:
                return response
            error = error_from(response, self.route)
            pause = self._pause(error, retry)
            is_last = retry == self.retries or pause > MAX_PAUSE_S or self.clock() + pause >= deadline
            if is_last or not is_retryable(error):
                raise error
            yield Pause(pause)
        raise AssertionError("the last try returns or raises")

    def _with_deadline(self, ask: HttpRequest, deadline: float) -> HttpRequest:
        left = deadline - self.clock()
        if left <= 0:
            raise Expired("the deadline passed before the request was sent")
        headers = {**ask.headers, "x-request-timeout-ms": f"{min(max(left * 1e3, 0.001), MAX_TIMEOUT_MS):.3f}"}
        return ask._replace(headers=headers, timeout=left + GRACE_S)

    def _pause(self, error: ServiceError, retry: int) -> float:
        """Return seconds to wait: the service's Retry-After, plus exponential back-off with full jitter.

        Brooker, Exponential Backoff And Jitter, 2015.
        """
        return (error.retry_after or 0) + self.draw() * BACKOFF_S * float(2**retry)


class ResponseBody:
    """Collects the decoded body of a response, up to a size and a deadline in monotonic seconds.

    Raises:
        BadAnswer: the client did not accept this Content-Encoding.
    """

    def __init__(self, response: httpx.Response, ask: HttpRequest, deadline: float) -> None:
        self._answer = response
        self._deadline = deadline
        self._parts: list[bytes] = []
        self._left = MAX_ANSWER_BYTES + len(ask.content)
        if response.headers.get("content-encoding", "identity").strip().lower() not in CODINGS:
            raise BadAnswer(f"response has an unknown Content-Encoding; expected {', '.join(CODINGS)}")

    def add(self, part: bytes) -> None:
        """Add the next part.

        Raises:
            BadAnswer: the response is larger than the limit.
            Expired: the deadline passed.
        """
        self._left -= len(part)
        if self._left < 0:
            raise BadAnswer(f"response has more than {MAX_ANSWER_BYTES} decoded bytes")
        if monotonic() > self._deadline:
            raise Expired("the deadline passed before the response was complete")
        self._parts.append(part)

    def whole(self) -> httpx.Response:
        """Return the response with its decoded body."""
        headers = [(name, value) for name, value in self._answer.headers.raw if name.lower() not in FRAMING_HEADERS]
        return httpx.Response(self._answer.status_code, headers=headers, content=b"".join(self._parts))


class _Caller:
    """What both clients share: the flow of requests, and how they reach the service."""

    def __init__(self, url: str, token: str | None, policy: dict[str, Any], *, is_direct: bool) -> None:
        if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable()):
            raise ValueError("token: expected printable ASCII")
        base = _parse_url(url)
        self._proxy = None if is_direct else proxy_of(base)
        self._through = f" through the proxy {_without_password(self._proxy.url)}" if self._proxy else ""
        self._flow = RequestFlow(route=f" ({_without_password(base)}{self._through})", **policy)
        headers = {"accept-encoding": "identity", **auth_headers(token)}
        self._options: dict[str, Any] = {"base_url": base, "headers": headers}

    def _connect(self, open_transport: Callable[[httpx.Proxy | None], T]) -> T:
        try:
            return open_transport(self._proxy)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot connect{self._through}: {error}") from error


class Client(_Caller):
    """Calls one service over persistent connections; safe to share between threads.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     client.predict(contexts).vectors

    Args:
        url: address of the service; its path is a prefix of every route.
        token: bearer token, if the service requires one.
        transport: replaces the network in tests; then the deadline is checked only between the parts of a response.
        policy: `timeout`, `retries` and `rows` of `RequestFlow`.

    Raises:
        ValueError: the URL, the token, the policy or the proxy of the environment is invalid.
    """

    def __init__(
        self, url: str, *, token: str | None = None, transport: httpx.BaseTransport | None = None, **policy: Any
    ) -> None:
        super().__init__(url, token, policy, is_direct=transport is not None)
        self._http = httpx.Client(transport=transport or self._connect(Transport), **self._options)

    def predict(
        self,
        contexts: ArrayLike,
        *,
        model: str | None = None,
        profile: str | None = None,
        traceparent: str | None = None,
    ) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`, or of one `(T, D)`.

        The request belongs to the trace `traceparent`; without it, to the current trace of OpenTelemetry, if any.

        Raises:
            ValueError: the array has a wrong number of dimensions or no numbers, or the client is closed.
            ServiceError: the error of the service as a class of `lvm.errors`, or `Unreachable` or `BadAnswer`.
        """
        return self._run(self._flow.predict(contexts, {"model": model, "profile": profile}, traceparent))

    def retrieve(
        self,
        query_or_context: ArrayLike,
        *,
        k: int = 10,
        filter: Filter | None = None,
        mmr: float | None = None,
        traceparent: str | None = None,
        **options: Any,
    ) -> list[Passage]:
        """Return the `k` passages nearest to a query `(D,)`, or to the prediction of a context `(T, D)`.

        `filter` maps `article` or a metadata field to the value, or values, that a passage must have. `mmr` from 0 to 1
        weighs relevance against being unlike the passages before. `options` are the others of the route: `exclude`,
        `exclude_context`, `rerank`, `model`. Raises as `predict`.
        """
        given = {"k": k, "filter": filter, "mmr": mmr, **options}
        return self._run(self._flow.retrieve(query_or_context, given, traceparent))

    def retrieve_many(
        self,
        queries_or_contexts: ArrayLike,
        *,
        k: int = 10,
        filter: Filter | None = None,
        mmr: float | None = None,
        traceparent: str | None = None,
        **options: Any,
    ) -> list[list[Passage]]:
        """Return the passages of each of many queries `(n, D)`, or contexts `(n, T, D)`; arguments as of `retrieve`.

        More than `rows` are sent in several requests; `timeout` is that of all.
        """
        given = {"k": k, "filter": filter, "mmr": mmr, **options}
        return self._run(self._flow.retrieve_many(queries_or_contexts, given, traceparent))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = self._perform(step)

    def _perform(self, step: HttpRequest | Pause) -> Outcome:
        if isinstance(step, Pause):
            sleep(step.seconds)
            return None
        _check_open(self._http)
        deadline = monotonic() + step.timeout
        try:
            with deadline_at(deadline), self._http.stream("POST", **step.arguments()) as response:
                body = ResponseBody(response, step, deadline)
                for part in response.iter_bytes():
                    body.add(part)
                return body.whole()
        except Exception as error:
            return error


class AsyncClient(_Caller):
    """`Client` for asyncio: the same calls, awaited, in one event loop."""

    def __init__(
        self, url: str, *, token: str | None = None, transport: httpx.AsyncBaseTransport | None = None, **policy: Any
    ) -> None:
        super().__init__(url, token, policy, is_direct=transport is not None)
        transport = transport or self._connect(lambda proxy: httpx.AsyncHTTPTransport(proxy=proxy, limits=LIMITS))
        self._http = httpx.AsyncClient(transport=transport, **self._options)

    async def predict(
        self,
        contexts: ArrayLike,
        *,
        model: str | None = None,
        profile: str | None = None,
        traceparent: str | None = None,
    ) -> Prediction:
        """As `Client.predict`."""
        return await self._run(self._flow.predict(contexts, {"model": model, "profile": profile}, traceparent))

    async def retrieve(
        self,
        query_or_context: ArrayLike,
        *,
        k: int = 10,
        filter: Filter | None = None,
        mmr: float | None = None,
        traceparent: str | None = None,
        **options: Any,
    ) -> list[Passage]:
        """As `Client.retrieve`."""
        given = {"k": k, "filter": filter, "mmr": mmr, **options}
        return await self._run(self._flow.retrieve(query_or_context, given, traceparent))

    async def retrieve_many(
        self,
        queries_or_contexts: ArrayLike,
        *,
        k: int = 10,
        filter: Filter | None = None,
        mmr: float | None = None,
        traceparent: str | None = None,
        **options: Any,
    ) -> list[list[Passage]]:
        """As `Client.retrieve_many`."""
        given = {"k": k, "filter": filter, "mmr": mmr, **options}
        return await self._run(self._flow.retrieve_many(queries_or_contexts, given, traceparent))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = await self._perform(step)

    async def _perform(self, step: HttpRequest | Pause) -> Outcome:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return None
        _check_open(self._http)
        deadline = monotonic() + step.timeout
        try:
            async with asyncio.timeout(step.limit), self._http.stream("POST", **step.arguments()) as response:
                body = ResponseBody(response, step, deadline)
                async for part in response.aiter_bytes():
                    body.add(part)
                return body.whole()
        except Exception as error:
            return error


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
    detail = problem.get("detail") or f"status {response.status_code} {response.reason_phrase}".strip() + route
    error = _error_class(problem.get("type", ""), response.status_code)(str(detail))
    pointer, retry_after = problem.get("pointer"), response.headers.get("retry-after", "")
    error.pointer = pointer if isinstance(pointer, str) else None
    error.request_id = response.headers.get("x-request-id")
    is_seconds = retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10
    error.retry_after = int(retry_after) if is_seconds else None
    return error


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


def _error_class(kind: str, status: int) -> type[ServiceError]:
    """Return the error class of a problem type, or the most general one of the status, or a new class."""
    known: list[type[ServiceError]] = [ServiceError, *_subclasses(ServiceError)]
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


# Requests


def _to_floats(given: ArrayLike, what: str, shapes: Mapping[int, str]) -> Floats:
    """Return an array as little-endian float32; raises `ValueError` if it has no numbers or a wrong rank."""
    try:
        array = np.asarray(given)
    except Exception as error:
        raise ValueError(f"{what}: expected an array of numbers, got {type(given).__name__}: {error}") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{what}: expected an array of numbers, got one of {array.dtype}")
    if array.ndim not in shapes or 0 in array.shape[-2:]:
        raise ValueError(f"{what}: shape is {array.shape}; expected {' or '.join(shapes.values())}")
    # the service points at values that are not finite
    with np.errstate(over="ignore"):
        return array.astype("<f4")


def _octet_headers(rows: Floats) -> dict[str, str]:
    return {"content-type": f"{OCTETS}; dtype=float32; shape={'x'.join(map(str, rows.shape))}"}


def _retrieve_request(field: str, rows: Floats, given: dict[str, Any], trace: Mapping[str, str]) -> HttpRequest:
    """Return a request for passages, in octets if their shape says which `field` of JSON they are."""
    params = _params(given)
    is_ambiguous = field == "contexts" and rows.shape[1] == 1
    if sum(map(len, params.values())) <= MAX_QUERY_CHARACTERS and not is_ambiguous:
        sent = rows[:, None] if field == "queries" else rows
        return HttpRequest("/retrieve", rows.tobytes(), {**_octet_headers(sent), **trace}, params)
    body = json.dumps({field: rows.tolist(), **given}).encode()
    return HttpRequest("/retrieve", body, {"content-type": "application/json", **trace}, {})


def _rows_of_a_part(given: Mapping[str, Any], most: int) -> int:
    """Return how many queries one request has; the service bounds their hits and exclusions together."""
    k, exclude = given.get("k", 10), given.get("exclude", ())
    if not isinstance(k, int) or not isinstance(exclude, list | tuple) or k < 1:
        return most
    return max(1, min(most, MAX_FOUND // (k + len(exclude))))


def _to_json_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON values, without None; raises `ValueError` if one cannot be sent."""
    return {name: _to_json(name, value) for name, value in options.items() if value is not None}


def _to_json(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _to_json(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [_to_json(name, item) for item in value]
    raise ValueError(f"{name}: expected a string, a number, a boolean or a list of them, got {type(value).__name__}")


def _params(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}


def _parse_timeout(timeout: float | None) -> float:
    try:
        seconds = math.inf if timeout is None else float(timeout)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("timeout: expected seconds, or None for no limit") from error
    if not seconds > 0:
        raise ValueError(f"timeout: expected more than 0 seconds, or None for no limit; got {seconds:g}")
    return seconds if seconds < MAX_TIMEOUT_S else math.inf


def _parse_count(name: str, number: int, least: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}")
    return int(number)


def _parse_url(url: str) -> httpx.URL:
    """Return the address of the service; raises `ValueError` if it is not an HTTP URL, or has a query."""
    try:
        base = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise ValueError(f"not a URL: {error}") from error
    is_plain = base.scheme in ("http", "https") and base.host and not base.query and not base.fragment
    if not is_plain or not 0 < (base.port or 80) < 65_536:
        raise ValueError("expected a URL such as http://127.0.0.1:8000, without query and fragment")
    return base


def _without_password(url: httpx.URL) -> httpx.URL:
    return url.copy_with(userinfo=b"")


def _check_open(http: httpx.Client | httpx.AsyncClient) -> None:
    if http.is_closed:
        raise ValueError("the client is closed")


def trace_headers(traceparent: str | None) -> dict[str, str]:
    """Return the headers of a trace: `traceparent`, or the current trace of OpenTelemetry, if any."""
    if traceparent is not None:
        return {"traceparent": str(traceparent)}
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.propagate import inject

        inject(headers)
    return headers


def auth_headers(token: str | None) -> dict[str, str]:
    """Return the Authorization header of a token."""
    return {"authorization": f"Bearer {token}"} if token else {}


# Responses


def _read_vectors(response: httpx.Response, shape: tuple[int, ...]) -> Floats:
    """Return the vectors of a response; raises `BadAnswer` if they are not finite or have a wrong shape."""
    _check_type(response.headers.get("content-type", OCTETS).lower(), shape)
    size = 4 * math.prod(shape)
    if len(response.content) != size:
        raise BadAnswer(f"response has {len(response.content)} bytes; expected {size} (float32, shape {shape})")
    vectors: Floats = np.frombuffer(response.content, "<f4").reshape(shape)
    if not np.isfinite(vectors).all():
        raise BadAnswer("response has values that are not finite")
    return vectors


def _check_type(header: str, shape: tuple[int, ...]) -> None:
    """Raise `BadAnswer` if a media type is not float32 octets, or has another shape; the shape may be absent."""
    media_type, *parameters = (part.strip() for part in header.split(";"))
    found = dict(parameter.partition("=")[::2] for parameter in parameters)
    expected = "x".join(map(str, shape))
    is_right = found.get("dtype", "float32") == "float32" and found.get("shape", expected) == expected
    if media_type != OCTETS or not is_right:
        raise BadAnswer(f"response has media type {header[:100]}; expected {OCTETS} of float32 and shape {expected}")


# The members of a passage, and the types that their values may have.
MEMBERS: dict[str, tuple[type, ...]] = {
    "id": (int,),
    "score": (int, float),
    "article": (int,),
    "title": (str,),
    "position": (int,),
    "text": (str, NoneType),
    "source_id": (str, NoneType),
    "metadata": (dict, NoneType),
}
# Members that are absent if the corpus has none.
OPTIONAL = {"source_id": None, "metadata": None}


def _read_results(response: httpx.Response) -> Any:
    """Return the list under `results` in a response; raises `BadAnswer` if it is missing."""
    try:
        return json.loads(response.content)["results"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadAnswer(f"response is not a list of passages: {type(error).__name__}: {error}") from error


def _read_each(results: Any, count: int, most: Any) -> list[list[Passage]]:
    """Return the passages of each of `count` queries; raises `BadAnswer` as `_read_passages`."""
    if not isinstance(results, list) or len(results) != count:
        raise BadAnswer(f"response is not a list of {count} lists of passages")
    return [_read_passages(each, most) for each in results]


def _read_passages(results: Any, most: Any) -> list[Passage]:
    """Return the passages of a query; raises `BadAnswer` if a member is missing or wrong, or there are too many."""
    try:
        if not isinstance(results, list):
            raise TypeError("results: expected a list")
        found = [_read_passage(OPTIONAL | result) for result in results]
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise BadAnswer(f"response is not a list of passages: {type(error).__name__}: {error}") from error
    if isinstance(most, int) and len(found) > most:
        raise BadAnswer(f"response has {len(found)} passages; expected at most {most}")
    return found


def _read_passage(members: dict[str, Any]) -> Passage:
    for name, types in MEMBERS.items():
        if type(members[name]) not in types:
            raise TypeError(f"{name} is {type(members[name]).__name__}; expected {types[0].__name__}")
    score = float(members["score"])
    if not math.isfinite(score):
        raise ValueError("score: expected a finite number")
    return Passage(**{name: members[name] for name in MEMBERS} | {"score": score})


def _read_made_by(headers: httpx.Headers) -> MadeBy:
    model, version, served_by = (headers.get(name, "") for name in ("x-model", "x-model-version", "x-served-by"))
    return MadeBy(model, version, served_by, headers.get("x-fallback-reason"))
