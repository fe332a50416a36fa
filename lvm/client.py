"""A client for callers in Python: arrays in, arrays out, over the binary wire.

    client = Client("http://127.0.0.1:8000")
    client.predict(contexts).vectors

Errors are the service's own (`lvm.errors`), so `except Overloaded` means here what it means there; what cannot
be sent is a `ValueError`. Asking twice does no harm to a service that only computes, so what may pass is asked again:
refusals that carry Retry-After, and connections that break.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from random import random
from time import monotonic, sleep
from typing import Any, NamedTuple, TypeVar

import httpcore
import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lvm.errors import Expired, ServiceError
from lvm.transport import (
    LIMITS,
    LONGEST_S,
    Transport,
    proxy_of,
    until,
)

Floats = NDArray[np.float32]
T = TypeVar("T")
OCTETS = "application/octet-stream"
CODINGS = ("identity", "gzip", "deflate")  # of answers; what others would expand to is not known beforehand
FRAMING = (b"content-encoding", b"content-length", b"transfer-encoding")  # headers of a body on its way
LATE = (httpx.TimeoutException, httpcore.TimeoutException, TimeoutError)
NOT_CONNECTED = (httpx.ConnectTimeout, httpcore.ConnectTimeout)
NOT_SENT = (httpx.LocalProtocolError, httpcore.LocalProtocolError, UnicodeEncodeError)
SLOT_S = 0.05  # the first pause lies within it, each later one within twice as much
GRACE_S = 0.25  # for the service to say itself that the deadline passed
MOST_PAUSE_S = 60.0  # a service that asks for a longer pause is not asked again
MOST_MS = 3_600_000.0  # the longest deadline that the service takes
MOST_QUERY = 4_000  # characters of options in a query string; the service takes 16 KiB of headers
MOST_ANSWER = 64 << 20  # decoded bytes of an answer, beside as many as were sent


class Unreachable(ServiceError):
    """No connection, or one that broke before the answer was whole."""

    status, reason = 502, "unreachable"


class BadAnswer(ServiceError):
    """An answer that does not match the request: wrong shape, not finite, incomplete or too large."""

    status, reason = 502, "bad_answer"


class MadeBy(NamedTuple):
    """Who made an answer: model, version, the alias that served it, and why it was not the first in order."""

    model: str
    version: str
    served_by: str
    fallback_reason: str | None


class Prediction(NamedTuple):
    """Next vectors, `(D,)` of one context or `(n, D)` of n; `made_by` has one entry, or more after a swap."""

    vectors: Floats
    made_by: tuple[MadeBy, ...]


class Passage(NamedTuple):
    """A passage that was found; `text` where the corpus has it."""

    id: int
    score: float
    article: int
    title: str
    position: int
    text: str | None


class Ask(NamedTuple):
    """A POST to be sent, as httpx names its parts; `timeout` in seconds, or inf."""

    url: str
    content: bytes
    headers: dict[str, str]
    params: dict[str, str]
    timeout: float = math.inf

    @property
    def limit(self) -> float | None:
        """Seconds, or None if there is no limit."""
        return self.timeout if self.timeout < LONGEST_S else None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of httpx; a connection is given up early enough to say that there was none."""
        connect = self.limit and self.limit - GRACE_S
        return {**self._asdict(), "timeout": httpx.Timeout(self.limit, connect=connect)}


class Wait(NamedTuple):
    """Seconds to let pass before the next try."""

    seconds: float


Answer = httpx.Response | Exception | None
Steps = Generator[Ask | Wait, Answer, T]  # what to do next, told what came of it; returns the result


class Conversation:
    """What is asked and what is made of the answers; knows neither sockets nor event loops.

    Args:
        timeout: seconds for a whole call, tries and pauses included; None or inf: no limit.
        retries: how often a request is sent again at most.
        rows: contexts in one request; more are sent in several.
        clock: monotonic seconds.
        draw: random numbers in [0, 1), for the pauses.
        way: what errors say of the way to the service.

    Raises:
        ValueError: one of these is out of range.
    """

    def __init__(
        self,
        *,
        timeout: float | None = 5.0,
        retries: int = 3,
        rows: int = 512,
        clock: Callable[[], float] = monotonic,
        draw: Callable[[], float] = random,
        way: str = "",
    ) -> None:
        self._timeout = _seconds(timeout)
        self._retries = _whole("retries", retries, 0)
        self._rows = _whole("rows", rows, 1)
        self._clock, self._draw, self._way = clock, draw, way

    def predict(self, contexts: ArrayLike, options: Mapping[str, Any], traceparent: str | None) -> Steps[Prediction]:
        """Ask for the next vectors of contexts `(n, T, D)` or of one `(T, D)`."""
        rows = _floats(contexts, "contexts", {2: "(T, D)", 3: "(n, T, D)"})
        parts = [rows] if rows.ndim == 2 else [rows[at : at + self._rows] for at in range(0, len(rows), self._rows)]
        params, trace, deadline = _params(_plain_options(options)), trace_of(traceparent), self._deadline()
        vectors: list[Floats] = []
        made_by: dict[MadeBy, None] = {}
        for part in parts:
            headers = {**_octets(part), "accept": OCTETS, **trace}
            answer = yield from self._ask(Ask("/predict", part.tobytes(), headers, params), deadline)
            vectors.append(_vectors(answer, (*part.shape[:-2], part.shape[-1])))
            made_by[_made_by(answer.headers)] = None
        if rows.ndim == 2:
            return Prediction(vectors[0], tuple(made_by))
        return Prediction(np.concatenate([np.empty((0, rows.shape[-1]), np.float32), *vectors]), tuple(made_by))

    def retrieve(self, asked: ArrayLike, options: Mapping[str, Any], traceparent: str | None) -> Steps[list[Passage]]:
        """Ask for the passages nearest to a query `(D,)`, or to what a context `(T, D)` predicts."""
        rows = _floats(asked, "a query or a context", {1: "(D,)", 2: "(T, D)"})
        given, trace = _plain_options(options), trace_of(traceparent)
        params = _params(given)
        if sum(map(len, params.values())) <= MOST_QUERY:
            ask = Ask("/retrieve", rows.tobytes(), {**_octets(rows), **trace}, params)
        else:
            body = {"query" if rows.ndim == 1 else "context": rows.tolist(), **given}
            ask = Ask("/retrieve", json.dumps(body).encode(), {"content-type": "application/json", **trace}, {})
        answer = yield from self._ask(ask, self._deadline())
        return _passages(answer, given.get("k"))

    def _deadline(self) -> float:
        return self._clock() + self._timeout

    def _ask(self, ask: Ask, deadline: float) -> Steps[httpx.Response]:
        for retry in range(self._retries + 1):
            answer = yield self._within(ask, deadline)
            if isinstance(answer, httpx.Response) and answer.status_code == 200:
                return answer
            error = error_of(answer, self._way)
            pause = self._pause(error, retry)
            is_last = retry == self._retries or pause > MOST_PAUSE_S or self._clock() + pause >= deadline
            if is_last or not may_pass(error):
                raise error
            yield Wait(pause)
        raise AssertionError("the last try returns or raises")

    def _within(self, ask: Ask, deadline: float) -> Ask:
        left = deadline - self._clock()
        if left <= 0:
            raise Expired("the deadline passed before the request was sent")
        headers = {**ask.headers, "x-request-timeout-ms": f"{min(max(left * 1e3, 0.001), MOST_MS):.3f}"}
        return ask._replace(headers=headers, timeout=left + GRACE_S)

    def _pause(self, error: ServiceError, retry: int) -> float:
        """Return seconds to wait: what the service asks for and a random part of a slot that doubles.

        The random part is the "full jitter" of Brooker, Exponential Backoff And Jitter, 2015.
        """
        return (error.retry_after or 0) + self._draw() * SLOT_S * float(2**retry)


class Body:
    """Collects the decoded body of an answer, up to a size and a deadline in monotonic seconds.

    Raises:
        BadAnswer: the answer is coded in a way that the client did not accept.
    """

    def __init__(self, answer: httpx.Response, ask: Ask, deadline: float) -> None:
        self._answer, self._deadline = answer, deadline
        self._parts: list[bytes] = []
        self._left = MOST_ANSWER + len(ask.content)
        if answer.headers.get("content-encoding", "identity").strip().lower() not in CODINGS:
            raise BadAnswer(f"an answer of unknown Content-Encoding; expected {', '.join(CODINGS)}")

    def add(self, part: bytes) -> None:
        """Take the next part.

        Raises:
            BadAnswer: the answer is larger than any that the service gives.
            Expired: the deadline passed.
        """
        self._left -= len(part)
        if self._left < 0:
            raise BadAnswer(f"an answer of more than {MOST_ANSWER} decoded bytes")
        if monotonic() > self._deadline:
            raise Expired("the deadline passed before the answer was whole")
        self._parts.append(part)

    def whole(self) -> httpx.Response:
        """Return the answer with its body decoded."""
        headers = [(name, value) for name, value in self._answer.headers.raw if name.lower() not in FRAMING]
        return httpx.Response(self._answer.status_code, headers=headers, content=b"".join(self._parts))


class Client:
    """Talks to one service over kept connections; safe to share between threads.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     client.predict(contexts).vectors

    Args:
        url: where the service listens; a path is a prefix of every route.
        token: bearer token, where the service wants one.
        transport: stands in for the network in tests; the deadline is checked between the parts of an answer only.
        policy: as `Conversation`: `timeout`, `retries`, `rows`.

    Raises:
        ValueError: the URL, the token, the policy or the environment's proxy is not usable.
    """

    def __init__(
        self, url: str, *, token: str | None = None, transport: httpx.BaseTransport | None = None, **policy: Any
    ) -> None:
        base, headers = _base(url), _client_headers(token)
        proxy = None if transport else proxy_of(base)
        self._conversation = Conversation(way=_way(base, proxy), **policy)
        transport = transport or _built(lambda: Transport(proxy), proxy)
        self._http = httpx.Client(base_url=base, headers=headers, transport=transport)

    def predict(
        self,
        contexts: ArrayLike,
        *,
        model: str | None = None,
        profile: str | None = None,
        traceparent: str | None = None,
    ) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`, or of one `(T, D)`.

        The request is part of the trace that `traceparent` names, else of OpenTelemetry's current one, if there is one.

        Raises:
            ValueError: the array has another number of dimensions or no numbers, or the client is closed.
            ServiceError: what the service answered, as its class (`lvm.errors`), `Unreachable` or `BadAnswer`.
        """
        return self._run(self._conversation.predict(contexts, {"model": model, "profile": profile}, traceparent))

    def retrieve(
        self, query_or_context: ArrayLike, *, k: int = 10, traceparent: str | None = None, **options: Any
    ) -> list[Passage]:
        """Return the `k` passages nearest to a query `(D,)`, or to what a context `(T, D)` predicts.

        `options` are the route's: `exclude`, `exclude_context`, `rerank`, `model`. Raises as `predict`.
        """
        return self._run(self._conversation.retrieve(query_or_context, {"k": k, **options}, traceparent))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        outcome: Answer = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = self._take(step)

    def _take(self, step: Ask | Wait) -> Answer:
        if isinstance(step, Wait):
            sleep(step.seconds)
            return None
        _check_open(self._http)
        deadline = monotonic() + step.timeout
        try:
            with until(deadline), self._http.stream("POST", **step.arguments()) as answer:
                body = Body(answer, step, deadline)
                for part in answer.iter_bytes():
                    body.add(part)
                return body.whole()
        except Exception as error:
            return error


class AsyncClient:
    """`Client` for asyncio: the same calls, awaited, in one event loop."""

    def __init__(
        self, url: str, *, token: str | None = None, transport: httpx.AsyncBaseTransport | None = None, **policy: Any
    ) -> None:
        base, headers = _base(url), _client_headers(token)
        proxy = None if transport else proxy_of(base)
        self._conversation = Conversation(way=_way(base, proxy), **policy)
        transport = transport or _built(lambda: httpx.AsyncHTTPTransport(proxy=proxy, limits=LIMITS), proxy)
        self._http = httpx.AsyncClient(base_url=base, headers=headers, transport=transport)

    async def predict(
        self,
        contexts: ArrayLike,
        *,
        model: str | None = None,
        profile: str | None = None,
        traceparent: str | None = None,
    ) -> Prediction:
        """As `Client.predict`."""
        return await self._run(self._conversation.predict(contexts, {"model": model, "profile": profile}, traceparent))

    async def retrieve(
        self, query_or_context: ArrayLike, *, k: int = 10, traceparent: str | None = None, **options: Any
    ) -> list[Passage]:
        """As `Client.retrieve`."""
        return await self._run(self._conversation.retrieve(query_or_context, {"k": k, **options}, traceparent))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        outcome: Answer = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = await self._take(step)

    async def _take(self, step: Ask | Wait) -> Answer:
        if isinstance(step, Wait):
            await asyncio.sleep(step.seconds)
            return None
        _check_open(self._http)
        deadline = monotonic() + step.timeout
        try:
            async with asyncio.timeout(step.limit), self._http.stream("POST", **step.arguments()) as answer:
                body = Body(answer, step, deadline)
                async for part in answer.aiter_bytes():
                    body.add(part)
                return body.whole()
        except Exception as error:
            return error


def may_pass(error: ServiceError) -> bool:
    """Say whether the same request may do better in a while."""
    return isinstance(error, Unreachable) or error.status in (429, 503)


def error_of(answer: Answer, way: str = "") -> ServiceError:
    """Return what went wrong, as the class that the service raised; `way` is added if the service did not say it.

    Raises:
        ValueError: the request could not be sent as it was given.
    """
    if not isinstance(answer, httpx.Response):
        return _failure(answer, way)
    if answer.status_code < 400:
        return BadAnswer(f"an answer of status {answer.status_code}; expected 200{way}")
    said = _problem_of(answer)
    detail = said.get("detail") or f"status {answer.status_code} {answer.reason_phrase}".strip() + way
    error = _class_of(said.get("type", ""), answer.status_code)(str(detail))
    pointer, retry_after = said.get("pointer"), answer.headers.get("retry-after", "")
    error.pointer = pointer if isinstance(pointer, str) else None
    error.request_id = answer.headers.get("x-request-id")
    is_seconds = retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10
    error.retry_after = int(retry_after) if is_seconds else None
    return error


def _failure(failed: Exception | None, way: str) -> ServiceError:
    if isinstance(failed, ServiceError):
        return failed
    if isinstance(failed, NOT_SENT):
        raise ValueError(f"the request cannot be sent: {failed}") from failed
    error: ServiceError = Unreachable(f"{type(failed).__name__}: {failed}{way}")
    if isinstance(failed, LATE) and not isinstance(failed, NOT_CONNECTED):
        error = Expired(f"the deadline passed before the answer was whole{way}")
    elif isinstance(failed, httpx.DecodingError):
        error = BadAnswer(f"an answer that is not what its Content-Encoding says{way}")
    error.__cause__ = failed
    return error


def _problem_of(answer: httpx.Response) -> dict[str, Any]:
    try:
        said = answer.json()
    except (ValueError, RecursionError):  # not the service: something between here and there
        return {}
    return said if isinstance(said, dict) else {}


def _class_of(kind: str, status: int) -> type[ServiceError]:
    """Return the class of a problem's type, else the most general one of its status, else a new one of that status."""
    known: list[type[ServiceError]] = [ServiceError, *_below(ServiceError)]
    for error in known:
        if kind == f"urn:lvm:problem:{error.reason}":
            return error
    for error in known:
        if error.status == status:
            return error
    return type("ServiceError", (ServiceError,), {"status": status, "reason": "other"})


def _below(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


# ---- what is sent


def _floats(given: ArrayLike, what: str, shapes: Mapping[int, str]) -> Floats:
    """Return an array as little-endian float32; raises `ValueError` if it has no numbers or another rank."""
    try:
        array = np.asarray(given)
    except Exception as error:
        raise ValueError(f"{what}: expected an array of numbers, got {type(given).__name__}: {error}") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{what}: expected an array of numbers, got one of {array.dtype}")
    if array.ndim not in shapes or 0 in array.shape[-2:]:
        raise ValueError(f"{what} of shape {array.shape}: want {' or '.join(shapes.values())}")
    with np.errstate(over="ignore"):  # the service points at what is not finite
        return array.astype("<f4")


def _octets(rows: Floats) -> dict[str, str]:
    return {"content-type": f"{OCTETS}; dtype=float32; shape={'x'.join(map(str, rows.shape))}"}


def _plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON has them, without None; raises `ValueError` if one cannot be sent."""
    return {name: _plain(name, value) for name, value in options.items() if value is not None}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping):
        return [_plain(name, item) for item in value]
    raise ValueError(f"{name}: expected a string, a number, a boolean or a list of them, got {type(value).__name__}")


def _params(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}


def _seconds(timeout: float | None) -> float:
    try:
        seconds = math.inf if timeout is None else float(timeout)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("timeout: expected seconds, or None for no limit") from error
    if not seconds > 0:
        raise ValueError(f"timeout: expected more than 0 seconds, or None for no limit, got {seconds:g}")
    return seconds if seconds < LONGEST_S else math.inf


def _whole(name: str, number: int, least: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}")
    return int(number)


def _base(url: str) -> httpx.URL:
    """Return where the service listens; raises `ValueError` if that is no HTTP URL, or one with a query."""
    try:
        base = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise ValueError(f"not a URL: {error}") from error
    is_plain = base.scheme in ("http", "https") and base.host and not base.query and not base.fragment
    if not is_plain or not 0 < (base.port or 80) < 65_536:
        raise ValueError("expected a URL such as http://127.0.0.1:8000, without query and fragment")
    return base


def _client_headers(token: str | None) -> dict[str, str]:
    if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable()):
        raise ValueError("token: expected printable ASCII")
    return {"accept-encoding": "identity", **bearer(token)}


def _way(base: httpx.URL, proxy: httpx.Proxy | None) -> str:
    """Return what errors say of the way to the service, without passwords."""
    through = f" through the proxy {_bare(proxy.url)}" if proxy else ""
    return f" ({_bare(base)}{through})"


def _bare(url: httpx.URL) -> httpx.URL:
    return url.copy_with(userinfo=b"")


def _built(build: Callable[[], T], proxy: httpx.Proxy | None) -> T:
    try:
        return build()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        through = f" through the proxy {_bare(proxy.url)}" if proxy else ""
        raise ValueError(f"no connection can be made{through}: {error}") from error


def _check_open(http: httpx.Client | httpx.AsyncClient) -> None:
    if http.is_closed:
        raise ValueError("the client is closed")


def trace_of(traceparent: str | None) -> dict[str, str]:
    """Return the headers that carry a trace on: the one given, else OpenTelemetry's current one, if there is one."""
    if traceparent is not None:
        return {"traceparent": str(traceparent)}
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.propagate import inject

        inject(headers)
    return headers


def bearer(token: str | None) -> dict[str, str]:
    """Return the header that carries a token."""
    return {"authorization": f"Bearer {token}"} if token else {}


# ---- what comes back


def _vectors(answer: httpx.Response, shape: tuple[int, ...]) -> Floats:
    """Return the vectors of an answer; raises `BadAnswer` if they are not finite or of another shape."""
    _check_type(answer.headers.get("content-type", OCTETS).lower(), shape)
    size = 4 * math.prod(shape)
    if len(answer.content) != size:
        raise BadAnswer(f"an answer of {len(answer.content)} bytes; expected {size} (float32, shape {shape})")
    vectors: Floats = np.frombuffer(answer.content, "<f4").reshape(shape)
    if not np.isfinite(vectors).all():
        raise BadAnswer("an answer with values that are not finite")
    return vectors


def _check_type(header: str, shape: tuple[int, ...]) -> None:
    """Raise `BadAnswer` if a media type is not of float32 octets, or tells another shape; it may tell none."""
    media_type, *parameters = (part.strip() for part in header.split(";"))
    told = dict(parameter.partition("=")[::2] for parameter in parameters)
    wanted = "x".join(map(str, shape))
    is_right = told.get("dtype", "float32") == "float32" and told.get("shape", wanted) == wanted
    if media_type != OCTETS or not is_right:
        raise BadAnswer(f"an answer of {header[:100]}; expected {OCTETS} of float32 and shape {wanted}")


def _passages(answer: httpx.Response, most: Any) -> list[Passage]:
    """Return the passages of an answer; raises `BadAnswer` if a member is missing or wrong, or there are too many."""
    try:
        results = _list(json.loads(answer.content)["results"])
        found = [Passage(*(read(result[name]) for name, read in MEMBERS.items())) for result in results]
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise BadAnswer(f"an answer that is not a list of passages: {type(error).__name__}: {error}") from error
    if isinstance(most, int) and len(found) > most:
        raise BadAnswer(f"an answer of {len(found)} passages; expected at most {most}")
    return found


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("expected a list")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError("expected a finite number")
    return float(value)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("expected an integer")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected a string")
    return value


def _string_or_none(value: Any) -> str | None:
    return None if value is None else _string(value)


MEMBERS: dict[str, Callable[[Any], Any]] = {
    "id": _integer,
    "score": _number,
    "article": _integer,
    "title": _string,
    "position": _integer,
    "text": _string_or_none,
}


def _made_by(headers: httpx.Headers) -> MadeBy:
    model, version, served_by = (headers.get(name, "") for name in ("x-model", "x-model-version", "x-served-by"))
    return MadeBy(model, version, served_by, headers.get("x-fallback-reason"))
