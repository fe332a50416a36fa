"""The engine: runs one version of a model, with a batcher, statistics and a drift detector.

What differs between kinds of model is in an `EngineAdapter`: `predict.py`, `search.py`, `text.py`. A new kind of
model is one such file.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

from models.drift import ReferenceStats
from models.vectors import Floats
from service.engines.batcher import Batch, BatchLimits, MicroBatcher, Ticket
from service.engines.drift import DriftDetector
from service.engines.stats import EngineStats, is_engine_fault
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Attributes, BatchedRequest, RequestSpan, current_span, export_batch_spans

Identity = tuple[str, str, str, str]  # model, version, sha256, runtime
Stages = tuple[tuple[str, float], ...]  # names and seconds, one after another


@dataclass(frozen=True)
class EngineInfo:
    """What an engine serves, as plain values. `shape` is (T, D) of a context; `encoder` made the vectors it reads.

    `card_cosine` is the lowest mean cosine on its card, None if there is none.
    """

    alias: str
    name: str
    version: str
    sha256: str
    runtime: str
    shape: tuple[int, int]
    encoder: str
    warning: str | None = None
    card_cosine: float | None = None

    @property
    def identity(self) -> Identity:
        """The label values of `lvm_model_info` after the alias."""
        return self.name, self.version, self.sha256, self.runtime

    @property
    def input_space(self) -> tuple[int, int, str]:
        """T, D and the encoder: engines with the same can answer the same requests."""
        return (*self.shape, self.encoder)


@dataclass(frozen=True)
class Deployed:
    """The version that an alias serves, since when, and the version that it last refused to serve, with the reason."""

    version: str
    since: str
    refused: str | None = None
    reason: str | None = None


Request = TypeVar("Request", contravariant=True)
Answer = TypeVar("Answer", covariant=True)


class EngineAdapter(Protocol[Request, Answer]):
    """What an engine runs: turns requests into items of batches, and results into answers."""

    @property
    def info(self) -> EngineInfo:
        """What it serves."""
        ...

    @property
    def reference(self) -> ReferenceStats | None:
        """Statistics of the inputs that it was made for; None if they are not known."""
        ...

    def run(self, items: list[Any], watch: Callable[[Floats], None]) -> Sequence[Any]:
        """Return the result of each item of a batch, or its error; call `watch` with input contexts `(B, T, D)`."""
        ...

    def stages(self, result: Any | None, seconds: float) -> Stages:
        """Return the stages of a batch that took `seconds`, by one of its results; None if that item failed."""
        ...

    async def answer(self, request: Request, deadline: float, batcher: MicroBatcher[Any, Any]) -> Answer:
        """Submit the items of `request` to `batcher` and return the answer; `deadline` is on the monotonic clock."""
        ...


M = TypeVar("M", bound=EngineAdapter[Any, Any], covariant=True)


class Engine(Generic[M]):
    """Runs one `model`; one batch runs at a time. `runs_inline` and `client_of` are those of `MicroBatcher`.

    A caller who waited `full_wait_s` seconds in vain shows that the engine hangs. It is None if the time of an answer
    depends more on the request than on the model: then no time counts against the engine.
    """

    def __init__(
        self,
        model: M,
        limits: BatchLimits,
        metrics: Metrics,
        *,
        runs_inline: bool = False,
        full_wait_s: float | None = None,
        client_of: Callable[[Any], Hashable] | None = None,
    ) -> None:
        self.model = model
        self.info = model.info
        self.stats = EngineStats()
        self._alias = alias = self.info.alias
        self.drift = DriftDetector(model.reference, alias, metrics) if model.reference else None
        # called with each request and its answer: the comparer of a canary
        self.on_answer: Callable[[Any, Any], None] | None = None
        self._full_wait_s = full_wait_s
        self._metrics = metrics
        self._batch_rows = metrics.batch_rows.labels(alias)
        self._batch_seconds = metrics.batch_seconds.labels(alias)
        self.batcher: MicroBatcher[Any, Any] = MicroBatcher(
            partial(model.run, watch=self.drift.watch if self.drift else _ignore),
            name=alias,
            limits=limits,
            runs_inline=runs_inline,
            client_of=client_of,
            tag=current_span.get,
            on_batch=self._on_batch,
        )

    async def run(self: Engine[EngineAdapter[Request, Answer]], request: Request, deadline: float) -> Answer:
        """Return the answer of the model to `request` before `deadline`, on the monotonic clock.

        Raises:
            Overloaded, Draining, Expired: as `MicroBatcher.submit`.
            ModelFailed: the model raised, or returned values that are not finite.
            Invalid, NoEncoder: as the model.
        """
        had_full_wait = self._full_wait_s is not None and deadline - monotonic() >= self._full_wait_s
        try:
            answer = await self.model.answer(request, deadline, self.batcher)
        except Exception as error:
            self.stats.failed += is_engine_fault(error, had_full_wait=had_full_wait)
            raise
        self.stats.answered += 1
        if self.on_answer:
            self.on_answer(request, answer)
        return answer

    def describe(self) -> EngineInfo:
        """Return what it serves, with the warning about its last inputs."""
        return replace(self.info, warning=self.warning())

    def warning(self) -> str | None:
        """Return what is wrong with the last inputs, or None."""
        return self.drift.warning() if self.drift else None

    def update_gauges(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.queue_rows.set(self.batcher.pending_rows, self._alias)
        if self.drift:
            self.drift.update_gauges()

    def _on_batch(self, batch: Batch) -> None:
        self._batch_rows.observe(batch.rows)
        self._batch_seconds.observe(batch.seconds)
        self._metrics.batch_released.inc(self._alias, batch.reason)
        if self._full_wait_s is not None:
            self.stats.add_batch(batch.rows, batch.seconds)
        if batch.has_tags:
            traced = [self._traced(ticket, batch) for ticket in batch.tickets if ticket.tag is not None]
            attributes: Attributes = {"lvm.rows": batch.rows, "lvm.reason": batch.reason}
            export_batch_spans(self._alias, batch.began, batch.seconds, attributes, traced)

    def _traced(self, ticket: Ticket[Any, Any], batch: Batch) -> BatchedRequest:
        span: RequestSpan = ticket.tag
        result = None if ticket.error else ticket.answer
        error = type(ticket.error).__name__ if ticket.error else None
        return BatchedRequest(span, ticket.queued_at, self.model.stages(result, batch.seconds), error)


def _ignore(contexts: Floats) -> None: ...
