"""The clients: they perform the steps of a call in a thread, or in an event loop."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import random
from time import monotonic, sleep
from typing import Any, TypeVar

import httpx
from numpy.typing import ArrayLike

from lvm.client import calls
from lvm.client.answers import Article, Articles, Embeddings, Health, Models, Prediction, Retrieval
from lvm.client.failures import Outcome
from lvm.client.flow import Call, Default, Pause, RequestFlow, Steps
from lvm.client.requests import (
    Filter,
    HttpRequest,
    Ids,
    Profile,
    ReadAs,
    Text,
    auth_headers,
    finite,
    parse_count,
    parse_url,
    without_password,
)
from lvm.client.responses import ResponseBody
from lvm.errors import Expired
from lvm.transport import Transport, deadline_at, proxy_of

T = TypeVar("T")
Item = TypeVar("Item")
Timeout = float | Default | None
# Calls of an `AsyncClient` at a time, by default. At 20 ms to the service, 16 bring the most calls per second; beyond,
# each call costs this process two to three times as much time of the processor.
CONCURRENCY = 16


class _Caller:
    """What both clients share: the flow of requests, and how they reach the service."""

    def __init__(self, url: str, token: str | None, flow: RequestFlow, *, is_direct: bool) -> None:
        if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable()):
            raise ValueError("token: expected printable ASCII")
        base = parse_url(url)
        self._proxy = None if is_direct else proxy_of(base)
        self._through = f" through the proxy {without_password(self._proxy.url)}" if self._proxy else ""
        self._flow = replace(flow, route=f" ({without_password(base)}{self._through})")
        headers = {"accept-encoding": "identity", **auth_headers(token)}
        self._options: dict[str, Any] = {"base_url": base, "headers": headers}

    def _connect(self, open_transport: Callable[[httpx.Proxy | None], T]) -> T:
        try:
            return open_transport(self._proxy)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot connect{self._through}: {error}") from error


class Client(_Caller):
    """Calls one service over persistent connections; safe to share between threads, and after a fork.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     client.predict(contexts).vectors

    Args:
        url: address of the service; its path is a prefix of every route.
        token: bearer token, if the service requires one.
        timeout: seconds for a whole call with all tries and pauses; None or inf: no limit.
        retries: how often a request is repeated at most.
        rows: contexts, queries or texts in one request; more are sent in several requests.
        transport: replaces the network in tests; then the deadline is checked only between the parts of a response.
        clock: monotonic seconds, for tests.
        draw: random numbers in [0, 1) for the pauses, for tests.

    Every method takes `timeout`, the seconds for the whole call instead of those of the client, and raises:
        ValueError: the request cannot be sent as it is given, or the client is closed.
        ServiceError: the error of the service as a class of `lvm.errors`, or `Unreachable`, `BadAnswer` or
            `UnknownRoute` of this package.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float | None = 5.0,
        retries: int = 3,
        rows: int = 512,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = monotonic,
        draw: Callable[[], float] = random,
    ) -> None:
        flow = RequestFlow(timeout, retries, rows, clock, draw)
        super().__init__(url, token, flow, is_direct=transport is not None)
        self._given_transport = transport
        self._open()

    def predict(
        self,
        contexts: ArrayLike | Text,
        *,
        model: str | None = None,
        profile: Profile | None = None,
        timeout: Timeout = Default.TIMEOUT,
        traceparent: str | None = None,
    ) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`, or of one `(T, D)`; the service's `POST /predict`.

        A string is a text, which is cut into chunks as in training; a list of strings is the chunks of a context.

        Args:
            contexts: oldest vector first.
            model: an alias or a model, which then answers alone.
            profile: `realtime`, the primary first; `batch`, the fallbacks first.
            timeout: seconds for the whole call, instead of that of the client; None: no limit.
            traceparent: the trace of the requests; by default the current trace of OpenTelemetry, if any.
        """
        call = self._flow.begin(timeout, traceparent)
        return self._run(calls.predict(call, contexts, {"model": model, "profile": profile}))

    def retrieve(
        self,
        query_or_context: ArrayLike | Text,
        *,
        k: int = 10,
        exclude: Ids | None = None,
        exclude_context: bool | None = None,
        filter: Filter | None = None,
        mmr: float | None = None,
        rerank: bool | None = None,
        model: str | None = None,
        read_as: ReadAs | None = None,
        timeout: Timeout = Default.TIMEOUT,
        traceparent: str | None = None,
    ) -> Retrieval:
        """Return the `k` passages nearest to a query `(D,)`, to the prediction of a context `(T, D)`, or to a text.

        The service's `POST /retrieve`. `read_as` of the answer says what a text was read as.

        Args:
            query_or_context: an array, a text as a string, or the chunks of a context as a list of strings.
            k: passages at most.
            exclude: ids of passages that must not be found.
            exclude_context: leave out the chunks of the context itself; by default True.
            filter: by `article` or metadata field, the value, or values, that a passage must have.
            mmr: 0 to 1, the weight of relevance; the rest is that of being unlike the passages before.
            rerank: whether the reranker orders the passages; by default if the corpus has one.
            model: the alias or model that makes the query of a context, instead of the towers of the corpus.
            read_as: `query`: a text is a query however long it is.
            timeout: as of `predict`.
            traceparent: as of `predict`.
        """
        call = self._flow.begin(timeout, traceparent)
        options = _retrieve_options(k, exclude, exclude_context, filter, mmr, rerank, model, read_as)
        return self._run(calls.retrieve(call, query_or_context, options))

    def retrieve_many(
        self,
        queries_or_contexts: ArrayLike | Sequence[Text],
        *,
        k: int = 10,
        exclude: Ids | None = None,
        exclude_context: bool | None = None,
        filter: Filter | None = None,
        mmr: float | None = None,
        rerank: bool | None = None,
        model: str | None = None,
        read_as: ReadAs | None = None,
        timeout: Timeout = Default.TIMEOUT,
        traceparent: str | None = None,
    ) -> list[Retrieval]:
        """Return the passages of each of many queries `(n, D)`, contexts `(n, T, D)` or texts; arguments of `retrieve`.

        More than `rows` are sent in several requests; `timeout` is that of all. Texts are one request each, since each
        may be a context or a query; with `read_as="query"` they are sent together.
        """
        call = self._flow.begin(timeout, traceparent)
        options = _retrieve_options(k, exclude, exclude_context, filter, mmr, rerank, model, read_as)
        return self._run(calls.retrieve_many(call, queries_or_contexts, options))

    def embed(
        self,
        texts: Text,
        *,
        chunks: bool = False,
        model: str | None = None,
        timeout: Timeout = Default.TIMEOUT,
        traceparent: str | None = None,
    ) -> Embeddings:
        """Return the vectors `(n, D)` of texts, or the vector `(D,)` of one; the service's `POST /embed`.

        Args:
            texts: a string or a list of strings.
            chunks: cut one text into chunks as in training, and return the vector of each.
            model: the encoder, or an alias or model whose encoder is meant.
            timeout: as of `predict`.
            traceparent: as of `predict`.
        """
        call = self._flow.begin(timeout, traceparent)
        return self._run(calls.embed(call, texts, chunks, {"model": model}))

    def models(self, *, timeout: Timeout = Default.TIMEOUT) -> Models:
        """Return what the service serves, and the versions of its registry; the service's `GET /models`."""
        return self._run(calls.models(self._flow.begin(timeout)))

    def articles(
        self, search: str = "", *, offset: int = 0, limit: int = 100, timeout: Timeout = Default.TIMEOUT
    ) -> Articles:
        """Return `limit` articles with `search` in their titles, after the first `offset`; `GET /articles`."""
        return self._run(calls.articles(self._flow.begin(timeout), search, offset, limit))

    def article(self, article: int, *, timeout: Timeout = Default.TIMEOUT) -> Article:
        """Return an article of the corpus with the vectors of its passages; `GET /articles/{article}`."""
        return self._run(calls.article(self._flow.begin(timeout), article))

    def health(self, *, timeout: Timeout = Default.TIMEOUT) -> Health:
        """Return whether the service is live and ready; one try."""
        return self._run(calls.health(self._flow.begin(timeout)))

    def wait_ready(self, timeout: float | None = 60.0) -> None:
        """Wait until the service is ready, but at most `timeout` seconds.

        Raises:
            Expired: it did not become ready in time; the message has the last failure.
        """
        self._run(calls.wait_ready(self._flow.begin(timeout)))

    def close(self) -> None:
        """Close the connections."""
        self._connections().close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        transport = self._given_transport or self._connect(Transport)
        self._http = httpx.Client(transport=transport, **self._options)
        self._process = os.getpid()

    def _connections(self) -> httpx.Client:
        """Return the connections of this process: on those of its parent, the two would read each other's responses."""
        if self._process != os.getpid() and not self._http.is_closed:
            self._open()
        return self._http

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
        http = self._connections()
        _check_open(http)
        deadline = monotonic() + step.timeout
        try:
            with deadline_at(deadline), http.stream(**step.arguments()) as response:
                body = ResponseBody(response, step, deadline)
                for part in response.iter_bytes():
                    body.add(part)
                return body.whole()
        except Exception as error:
            return error


class AsyncClient(_Caller):
    """`Client` for asyncio: the same calls, awaited, in one event loop.

    Args:
        url: as of `Client`, as all others.
        concurrency: calls at a time. More wait for their turn, first come, first served; their `timeout` runs
            meanwhile, so send many with `map`, which begins a call only if it can run.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float | None = 5.0,
        retries: int = 3,
        rows: int = 512,
        concurrency: int = CONCURRENCY,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = monotonic,
        draw: Callable[[], float] = random,
    ) -> None:
        flow = RequestFlow(timeout, retries, rows, clock, draw)
        super().__init__(url, token, flow, is_direct=transport is not None)
        self._concurrency = parse_count("concurrency", concurrency, 1)
        self._turns = asyncio.Semaphore(self._concurrency)
        self._loop: asyncio.AbstractEventLoop | None = None
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._concurrency, keepalive_expiry=5.0)
        transport = transport or self._connect(lambda proxy: httpx.AsyncHTTPTransport(proxy=proxy, limits=limits))
        self._http = httpx.AsyncClient(transport=transport, **self._options)

    async def predict(
        self,
        contexts: ArrayLike | Text,
        *,
        model: str | None = None,
        profile: Profile | None = None,
        timeout: Timeout = Default.TIMEOUT,
        traceparent: str | None = None,
    ) -> Prediction:
        """As `Client.predict`."""
        call = self._flow.begin(timeout, traceparent)
        return await self._run(call, calls.predict(call, contexts, {"model": model, "profile": profile}))

    async def retrieve(
        self,
        query_or_context: ArrayLike | Text,
        *,
        k: int = 10,
        exclude: Ids | None = None,
        exclude_context: bool | None = None,
        filter: Filter | None = None,
        mmr: float | None = None,
        rerank: bool | None = None,
        model: str | None = None,
        read_as: ReadAs | None = None,
        timeout: Timeout = Default.TIMEOUT,
        traceparent: str | None = None,
    ) -> Retrieval:
        """As `Client.retrieve`."""
        call = self._flow.begin(timeout, traceparent)
        options = _retrieve_options(k, exclude, exclude_context, filter, mmr, rerank, model, read_as)
        return await self._run(call, calls.retrieve(call, query_or_context, options))

    async def retrieve_many(
        self,
        queries_or_contexts: ArrayLike | Sequence[Text],
        *,
        k: int = 10,
        exclude: Ids | None = None,
        exclude_context: bool | None = None,
        filter: Filter | None = None,
        mmr: float | None = None,
        rerank: bool | None = None,
        model: str | None = None,
        read_as: ReadAs | None = None,
        timeout: Timeout = Default.TIMEOUT,
        traceparent: str | None = None,
    ) -> list[Retrieval]:
        """As `Client.retrieve_many`."""
        call = self._flow.begin(timeout, traceparent)
        options = _retrieve_options(k, exclude, exclude_context, filter, mmr, rerank, model, read_as)
        return await self._run(call, calls.retrieve_many(call, queries_or_contexts, options))

    async def embed(
        self,
        texts: Text,
        *,
        chunks: bool = False,
        model: str | None = None,
        timeout: Timeout = Default.TIMEOUT,
        traceparent: str | None = None,
    ) -> Embeddings:
        """As `Client.embed`."""
        call = self._flow.begin(timeout, traceparent)
        return await self._run(call, calls.embed(call, texts, chunks, {"model": model}))

    async def models(self, *, timeout: Timeout = Default.TIMEOUT) -> Models:
        """As `Client.models`."""
        call = self._flow.begin(timeout)
        return await self._run(call, calls.models(call))

    async def articles(
        self, search: str = "", *, offset: int = 0, limit: int = 100, timeout: Timeout = Default.TIMEOUT
    ) -> Articles:
        """As `Client.articles`."""
        call = self._flow.begin(timeout)
        return await self._run(call, calls.articles(call, search, offset, limit))

    async def article(self, article: int, *, timeout: Timeout = Default.TIMEOUT) -> Article:
        """As `Client.article`."""
        call = self._flow.begin(timeout)
        return await self._run(call, calls.article(call, article))

    async def health(self, *, timeout: Timeout = Default.TIMEOUT) -> Health:
        """As `Client.health`; it does not wait for a turn."""
        return await self._perform_all(calls.health(self._flow.begin(timeout)))

    async def wait_ready(self, timeout: float | None = 60.0) -> None:
        """As `Client.wait_ready`; it does not wait for a turn."""
        await self._perform_all(calls.wait_ready(self._flow.begin(timeout)))

    async def map(self, call: Callable[[Item], Awaitable[T]], items: Iterable[Item]) -> AsyncGenerator[T, None]:
        """Yield what `call` returns for each item, in their order, with at most `concurrency` calls begun at a time.

        >>> found = [each async for each in client.map(client.retrieve, contexts)]

        `call` is a method of this client, or a function that awaits some. An item is taken only when there is room for
        its call. If a call raises, or the loop over the results ends, the calls that are on their way are cancelled.
        """
        begun: deque[asyncio.Future[T]] = deque()
        try:
            for item in items:
                begun.append(asyncio.ensure_future(call(item)))
                if len(begun) >= self._concurrency:
                    yield await begun.popleft()
            while begun:
                yield await begun.popleft()
        finally:
            for left in begun:
                left.cancel()
            await asyncio.gather(*begun, return_exceptions=True)

    async def close(self) -> None:
        """Close the connections."""
        self._check_loop()
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: Call, steps: Steps[T]) -> T:
        async with self._turn(call):
            return await self._perform_all(steps)

    @asynccontextmanager
    async def _turn(self, call: Call) -> AsyncIterator[None]:
        self._check_loop()
        try:
            async with asyncio.timeout(finite(call.seconds_left())):
                await self._turns.acquire()
        except TimeoutError as error:
            raise Expired(
                f"the deadline passed while the call waited for one of {self._concurrency} turns; "
                "send many with `map`, or allow more time or a larger `concurrency`"
            ) from error
        try:
            yield
        finally:
            self._turns.release()

    async def _perform_all(self, steps: Steps[T]) -> T:
        self._check_loop()
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
            async with asyncio.timeout(step.limit), self._http.stream(**step.arguments()) as response:
                body = ResponseBody(response, step, deadline)
                async for part in response.aiter_bytes():
                    body.add(part)
                return body.whole()
        except Exception as error:
            return error

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise ValueError("an AsyncClient belongs to one event loop, and this is another; make one in each loop")


def _retrieve_options(
    k: int,
    exclude: Ids | None,
    exclude_context: bool | None,
    filter: Filter | None,
    mmr: float | None,
    rerank: bool | None,
    model: str | None,
    read_as: ReadAs | None,
) -> dict[str, Any]:
    given = {"k": k, "exclude": exclude, "exclude_context": exclude_context, "filter": filter, "mmr": mmr}
    return {**given, "rerank": rerank, "model": model, "read_as": read_as}


def _check_open(http: httpx.Client | httpx.AsyncClient) -> None:
    if http.is_closed:
        raise ValueError("the client is closed")
