"""The engine: one loaded version with its batcher. Takes many rows or few, answers finite vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from time import monotonic
from typing import NamedTuple, Protocol

import numpy as np

from lvm.errors import ModelFailed
from models.drift import ReferenceStats
from models.vectors import Floats
from service.engines.batcher import Batch, MicroBatcher, mark_alone
from service.engines.drift import Guard
from service.engines.stats import Conduct, full_wait_s, is_telling
from service.settings import Settings
from service.telemetry.metrics import Metrics

Identity = tuple[str, str, str, str]  # model, version, sha256, runtime


class CardLike(Protocol):
    """What the service reads of a model card."""

    @property
    def dim(self) -> int:
        """D."""
        ...

    @property
    def context_length(self) -> int:
        """T."""
        ...

    @property
    def encoder(self) -> str:
        """The encoder whose vectors it reads."""
        ...


class Versioned(Protocol):
    """What a predictor and a retriever both say of themselves."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def version(self) -> str:
        """The version, without the name."""
        ...

    @property
    def sha256(self) -> str:
        """Digest of what was loaded."""
        ...

    @property
    def runtime(self) -> str:
        """What executes it."""
        ...

    @property
    def card(self) -> CardLike:
        """Its model card."""
        ...


class PredictorLike(Versioned, Protocol):
    """What an engine runs: `models.predictor.Predictor`, or a fake of it."""

    @property
    def is_quick(self) -> bool:
        """Whether it is sure to end, and a row takes less than the way to a thread and back."""
        ...

    @property
    def reference_stats(self) -> ReferenceStats | None:
        """The space of its inputs, None where that is not known."""
        ...

    def predict_batch(self, contexts: Floats) -> Floats:
        """Map contexts `(B, T, D)` to next vectors `(B, D)`."""
        ...


def identity(served: Versioned) -> Identity:
    """Return the label values of `lvm_model_info` after the alias."""
    return served.name, served.version, served.sha256, served.runtime


@dataclass(frozen=True)
class Live:
    """What an alias serves, since when, and the version it was last asked to serve but refused."""

    version: str
    since: str
    refused: str | None = None
    reason: str | None = None


class Prediction(NamedTuple):
    """Vectors `(n, D)`, who made them, and where the time went (seconds)."""

    vectors: Floats
    model: str
    version: str
    queue_s: float
    infer_s: float
    batch_rows: int
    replica: str = ""  # where it was made, of several places


class Engine:
    """Serves one predictor; one batch runs at a time, on the event loop only where `on_loop` lets it."""

    def __init__(
        self, predictor: PredictorLike, alias: str, settings: Settings, metrics: Metrics, *, on_loop: bool = True
    ) -> None:
        self.predictor, self.alias = predictor, alias
        self.identity = identity(predictor)
        self.name, self.version, _, self.runtime = self.identity
        self.shape = (predictor.card.context_length, predictor.card.dim)
        self.encoder = predictor.card.encoder
        self.reads = (*self.shape, self.encoder)
        self._max_batch = settings.max_batch
        self._metrics = metrics
        self._rows = metrics.batch_rows.labels(alias)
        self.guard = Guard(predictor.reference_stats, alias, metrics) if predictor.reference_stats else None
        self.conduct, self._patience = Conduct(), full_wait_s(settings)
        self.witness: Callable[[Floats, Floats], None] | None = None  # sees contexts and answers
        self.batcher: MicroBatcher[Floats, Floats] = MicroBatcher(
            self._run,
            name=alias,
            max_rows=settings.max_batch,
            max_queue=settings.max_queue,
            max_wait_s=settings.max_wait_ms / 1000,
            on_batch=self._observe,
            inline=on_loop and predictor.is_quick and not settings.max_wait_ms,
        )

    async def predict(self, contexts: Floats, deadline: float) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`; more than a batch of them run in several.

        Raises:
            Overloaded, Draining, Expired: as `MicroBatcher.submit`.
            ModelFailed: the net raised or answered something else than finite vectors.
        """
        patient = deadline - monotonic() >= self._patience
        try:
            tickets = await self.batcher.submit(self._parts(contexts), deadline)
        except Exception as error:
            self.conduct.failed += is_telling(error, patient=patient)
            raise
        self.conduct.answered += 1
        vectors = _joined([ticket.answer for ticket in tickets])
        if self.witness:
            self.witness(contexts, vectors)
        return Prediction(
            vectors,
            self.name,
            self.version,
            tickets[-1].queue_s,
            sum([ticket.infer_s for ticket in tickets]),
            tickets[-1].batch_rows,
        )

    def _parts(self, contexts: Floats) -> list[tuple[Floats, int]]:
        rows, most = len(contexts), self._max_batch
        if rows <= most:
            return [(contexts, rows)]
        return [(contexts[at : at + most], min(most, rows - at)) for at in range(0, rows, most)]

    def _run(self, items: list[Floats]) -> Sequence[Floats | Exception]:
        contexts = _joined(items)
        if self.guard:
            self.guard.watch(contexts)
        vectors = self.predictor.predict_batch(contexts)
        if vectors.shape != (len(contexts), self.shape[1]):
            raise ValueError(f"answers of shape {vectors.shape}")
        parts = _split(vectors, items)
        if np.isfinite(vectors).all():
            return parts
        answers = [part if np.isfinite(part).all() else ModelFailed("the answer is not finite") for part in parts]
        mark_alone(answers)
        return answers

    def _observe(self, batch: Batch) -> None:
        self._rows.observe(batch.rows)
        self.conduct.note(batch.rows, batch.seconds)
        self._metrics.batch_released.inc(self.alias, batch.reason)


def _joined(parts: list[Floats]) -> Floats:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _split(vectors: Floats, items: list[Floats]) -> list[Floats]:
    ends = list(accumulate(map(len, items)))
    return [vectors[end - len(item) : end] for item, end in zip(items, ends, strict=True)]
