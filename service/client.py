"""A client for callers in Python: arrays in, arrays out, over the binary wire.

    client = Client("http://127.0.0.1:8000")
    client.predict(contexts).vectors

Errors are the service's own (`service.errors`), so `except Overloaded` means here what it means there.
Asking twice does no harm to a service that only computes, so what may pass is asked again: refusals that
carry Retry-After, and connections that break.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from random import random
from time import monotonic, sleep
from typing import Any, NamedTuple, TypeVar

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from service.errors import Expired, ServiceError

Floats = NDArray[np.float32]
T = TypeVar("T")
OCTETS = {"content-type": "application/octet-stream"}
BOTH_WAYS = {**OCTETS, "accept": "application/octet-stream"}
SLOT_S = 0.05  # the first pause lies within it, each later one within twice as much
GRACE_S = 0.25  # for the service to say itself that the deadline passed


class Unreachable(ServiceError):
    """No connection, or one that broke before the answer was whole."""

    status, reason = 502, "unreachable"


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
    """A POST to be sent, as httpx names its parts; `timeout` in seconds."""

    url: str
    content: bytes
    headers: dict[str, str]
    params: dict[str, Any]
    timeout: float = 0.0


class Wait(NamedTuple):
    """Seconds to let pass before the next try."""

    seconds: float


Answer = httpx.Response | httpx.TransportError | None
Steps = Generator[Ask | Wait, Answer, T]  # what to do next, told what came of it; returns the result


class Conversation:
    """What is asked and what is made of the answers; knows neither sockets nor event loops.

    Args:
        timeout: seconds for a whole call, tries and pauses included.
        retries: how often a request is sent again at most.
        rows: contexts in one request; more are sent in several.
        clock: monotonic seconds.
        draw: random numbers in [0, 1), for the pauses.
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        retries: int = 3,
        rows: int = 512,
        clock: Callable[[], float] = monotonic,
        draw: Callable[[], float] = random,
    ) -> None:
        self._timeout, self._retries, self._rows = timeout, retries, rows
        self._clock, self._draw = clock, draw

    def predict(self, contexts: ArrayLike, options: Mapping[str, Any], traceparent: str | None) -> Steps[Prediction]:
        """Ask for the next vectors of contexts `(n, T, D)` or of one `(T, D)`."""
        rows = np.asarray(contexts, "<f4")
        if rows.ndim not in (2, 3):
            raise ValueError(f"contexts of shape {rows.shape}: want (n, T, D), or (T, D)")
        many, until, dim = rows.reshape(-1, *rows.shape[-2:]), self._until(), rows.shape[-1]
        headers = {**BOTH_WAYS, **trace_of(traceparent)}
        vectors: list[Floats] = [np.empty((0, dim), np.float32)]
        made_by: dict[MadeBy, None] = {}
        for at in range(0, len(many), self._rows):
            content = many[at : at + self._rows].tobytes()
            answer = yield from self._ask(Ask("/predict", content, headers, _given(options)), until)
            vectors.append(np.frombuffer(answer.content, "<f4").reshape(-1, dim))
            made_by[_made_by(answer.headers)] = None
        joined = np.concatenate(vectors)
        return Prediction(joined[0] if rows.ndim == 2 else joined, tuple(made_by))

    def retrieve(self, asked: ArrayLike, options: Mapping[str, Any], traceparent: str | None) -> Steps[list[Passage]]:
        """Ask for the passages nearest to a query `(D,)`, or to what a context `(T, D)` predicts."""
        rows = np.asarray(asked, "<f4")
        if rows.ndim not in (1, 2):
            raise ValueError(f"an array of shape {rows.shape}: want a query (D,) or a context (T, D)")
        headers = {**OCTETS, **trace_of(traceparent)}
        answer = yield from self._ask(Ask("/retrieve", rows.tobytes(), headers, _given(options)), self._until())
        return [Passage(**result) for result in answer.json()["results"]]

    def _until(self) -> float:
        return self._clock() + self._timeout

    def _ask(self, ask: Ask, until: float) -> Steps[httpx.Response]:
        for retry in range(self._retries + 1):
            answer = yield self._within(ask, until)
            if isinstance(answer, httpx.Response) and answer.status_code == 200:
                return answer
            error = error_of(answer)
            pause = self._pause(error, retry)
            if not may_pass(error) or retry == self._retries or self._clock() + pause >= until:
                raise error
            yield Wait(pause)
        raise AssertionError("the last try returns or raises")

    def _within(self, ask: Ask, until: float) -> Ask:
        left = until - self._clock()
        if left <= 0:
            raise Expired("the deadline passed before the request was sent")
        headers = {**ask.headers, "x-request-timeout-ms": f"{left * 1e3:.3f}"}
        return ask._replace(headers=headers, timeout=left + GRACE_S)

    def _pause(self, error: ServiceError, retry: int) -> float:
        """Return seconds to wait: what the service asks for and a random part of a slot that doubles.

        The random part is the "full jitter" of Brooker, Exponential Backoff And Jitter, 2015.
        """
        return (error.retry_after or 0) + self._draw() * SLOT_S * float(2**retry)


class Client:
    """Talks to one service over kept connections; safe to share between threads.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     client.predict(contexts).vectors

    Args:
        url: where the service listens.
        token: bearer token, where the service wants one.
        transport: stands in for the network in tests.
        policy: as `Conversation`.
    """

    def __init__(
        self, url: str, *, token: str | None = None, transport: httpx.BaseTransport | None = None, **policy: Any
    ) -> None:
        self._http = httpx.Client(base_url=url, headers=bearer(token), transport=transport)
        self._conversation = Conversation(**policy)

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
            ValueError: the array has another number of dimensions.
            ServiceError: what the service answered, as its class (`service.errors`), or `Unreachable`.
        """
        return self._run(self._conversation.predict(contexts, {"model": model, "profile": profile}, traceparent))

    def retrieve(
        self, query_or_context: ArrayLike, *, k: int = 10, traceparent: str | None = None, **options: Any
    ) -> list[Passage]:
        """Return the `k` passages nearest to a query `(D,)`, or to what a context `(T, D)` predicts.

        `options` are the route's: `exclude_context`, `rerank`, `model`. Raises as `predict`.
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
        try:
            return self._http.post(**step._asdict())
        except httpx.TransportError as error:
            return error


class AsyncClient:
    """`Client` for asyncio: the same calls, awaited."""

    def __init__(
        self, url: str, *, token: str | None = None, transport: httpx.AsyncBaseTransport | None = None, **policy: Any
    ) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=bearer(token), transport=transport)
        self._conversation = Conversation(**policy)

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
        try:
            return await self._http.post(**step._asdict())
        except httpx.TransportError as error:
            return error


def may_pass(error: ServiceError) -> bool:
    """Say whether the same request may do better in a while."""
    return isinstance(error, Unreachable) or error.status in (429, 503)


def error_of(answer: Answer) -> ServiceError:
    """Return what went wrong, as the class that the service raised."""
    if not isinstance(answer, httpx.Response):
        late = isinstance(answer, httpx.ReadTimeout | httpx.WriteTimeout | httpx.PoolTimeout)
        return (Expired if late else Unreachable)(f"{type(answer).__name__}: {answer}")
    said = _problem_of(answer)
    error = _class_of(said.get("type", ""), answer.status_code)(str(said.get("detail", answer.reason_phrase)))
    error.pointer, error.request_id = said.get("pointer"), answer.headers.get("x-request-id")
    retry_after = answer.headers.get("retry-after", "")
    error.retry_after = int(retry_after) if retry_after.isdigit() else None
    return error


def _problem_of(answer: httpx.Response) -> dict[str, Any]:
    try:
        said = answer.json()
    except ValueError:  # not the service: something between here and there
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


def _made_by(headers: httpx.Headers) -> MadeBy:
    model, version, served_by = (headers.get(name, "") for name in ("x-model", "x-model-version", "x-served-by"))
    return MadeBy(model, version, served_by, headers.get("x-fallback-reason"))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        name: json.dumps(list(value)) if isinstance(value, Collection) and not isinstance(value, str) else value
        for name, value in options.items()
    }
    return {name: value for name, value in shown.items() if value is not None}


def trace_of(traceparent: str | None) -> dict[str, str]:
    """Return the headers that carry a trace on: the one given, else OpenTelemetry's current one, if there is one."""
    if traceparent is not None:
        return {"traceparent": traceparent}
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.propagate import inject

        inject(headers)
    return headers


def bearer(token: str | None) -> dict[str, str]:
    """Return the header that carries a token."""
    return {"authorization": f"Bearer {token}"} if token else {}
