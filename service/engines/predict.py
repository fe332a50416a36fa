"""Predict: the adapter by which an engine runs a predictor. Contexts in, finite next vectors out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from lvm.errors import ModelFailed
from models.predictor import Predictor
from models.vectors import Floats
from service.engines.batcher import BatchLimits, MicroBatcher, Ticket, mark_own_faults
from service.engines.engine import Engine, EngineInfo, Stages
from service.engines.stats import full_wait_s
from service.settings import Settings
from service.telemetry.metrics import Metrics


class Prediction(NamedTuple):
    """Next vectors `(n, D)`, the model that made them, and where the time went (seconds)."""

    vectors: Floats
    model: str
    version: str
    queue_s: float
    infer_s: float
    batch_rows: int
    replica: str = ""  # that made it, if there are several


class PredictAdapter:
    """Runs one predictor. A request of more than `max_rows` contexts runs in several batches."""

    def __init__(self, predictor: Predictor, alias: str, max_rows: int) -> None:
        card = predictor.card
        shape = card.context_length, card.dim
        self.info = EngineInfo(
            alias,
            predictor.name,
            predictor.version,
            predictor.sha256,
            predictor.runtime,
            shape,
            card.encoder,
            card_cosine=min((score["cosine"] for score in card.scores.values()), default=None),
        )
        self.reference = predictor.reference_stats
        self._predict = predictor.predict_batch
        self._name = predictor.name
        self._version = predictor.version
        self._max_rows = max_rows

    async def answer(self, contexts: Floats, deadline: float, batcher: MicroBatcher[Floats, Floats]) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`."""
        if len(contexts) <= self._max_rows:
            only = await batcher.submit_one(contexts, len(contexts), deadline)
            return self._prediction(only.answer, only.run_s, only)
        tickets = await batcher.submit(self._parts(contexts), deadline)
        vectors = np.concatenate([ticket.answer for ticket in tickets])
        return self._prediction(vectors, sum([ticket.run_s for ticket in tickets]), tickets[-1])

    def _prediction(self, vectors: Floats, run_s: float, last: Ticket[Floats, Floats]) -> Prediction:
        return Prediction(vectors, self._name, self._version, last.queue_s, run_s, last.batch_rows)

    def run(self, items: list[Floats], watch: Callable[[Floats], None]) -> Sequence[Floats | Exception]:
        """Return the next vectors `(n, D)` of each item `(n, T, D)`, or a `ModelFailed` if they are not finite."""
        contexts = items[0] if len(items) == 1 else np.concatenate(items)
        watch(contexts)
        vectors = self._predict(contexts)
        if vectors.shape != (len(contexts), self.info.shape[1]):
            raise ValueError(f"answers of shape {vectors.shape}")
        parts = [vectors] if len(items) == 1 else _split(vectors, items)
        # the square of a value that is not finite is not finite; this takes a third of the time
        if math.isfinite(np.vdot(vectors, vectors)) or np.isfinite(vectors).all():
            return parts
        answers = [part if np.isfinite(part).all() else ModelFailed("the answer is not finite") for part in parts]
        mark_own_faults(answers)
        return answers

    def stages(self, result: Floats | None, seconds: float) -> Stages:
        """Return the one stage of a batch."""
        return (("infer", seconds),)

    def _parts(self, contexts: Floats) -> list[tuple[Floats, int]]:
        rows, most = len(contexts), self._max_rows
        return [(contexts[at : at + most], min(most, rows - at)) for at in range(0, rows, most)]


def make_predict_engine(
    predictor: Predictor, alias: str, settings: Settings, metrics: Metrics, *, may_run_inline: bool = True
) -> Engine[PredictAdapter]:
    """Return the engine that serves `predictor` as `alias`."""
    limits = BatchLimits(settings.max_batch, settings.max_queue, settings.max_wait_ms / 1000)
    return Engine(
        PredictAdapter(predictor, alias, limits.max_rows),
        limits,
        metrics,
        runs_inline=may_run_inline and predictor.runs_inline and not limits.max_wait_s,
        full_wait_s=full_wait_s(settings),
    )


def _split(vectors: Floats, items: list[Floats]) -> list[Floats]:
    ends = list(accumulate(map(len, items)))
    return [vectors[end - len(item) : end] for item, end in zip(items, ends, strict=True)]
