"""The comparer compares answers of two engines, and no caller notices."""

from __future__ import annotations

import asyncio
import weakref

import numpy as np
import pytest

from models.vectors import Floats
from service.deploy.comparer import Comparer, Comparison
from service.engines.predict import Prediction
from service.telemetry.tracing import RequestSpan, Tracer, current_span
from tests.fakes import contexts, mean_of


class Other:
    """An engine that answers twice the mean, when it may; or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked = 0
        self.span: RequestSpan | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def predict(self, batch: Floats, deadline: float) -> Prediction:
        self.asked += len(batch)
        self.span = current_span.get()
        await self.go.wait()
        if self.error:
            raise self.error
        return prediction(2 * mean_of(batch))


class Report:
    """The comparisons and outcomes that a comparer reports."""

    def __init__(self) -> None:
        self.cosines: list[float] = []
        self.outcomes: list[str] = []

    def comparer(self, max_running: int = 1, is_sampled: bool = True) -> Comparer:
        return Comparer(lambda: is_sampled, self.add, max_running, self.outcomes.append)

    async def add(self, comparison: Comparison) -> None:
        self.cosines.append(comparison.cosine)


def prediction(vectors: Floats) -> Prediction:
    return Prediction(vectors, "amn", "v", 0, 0, len(vectors))


@pytest.mark.parametrize(("sign", "cosine"), [(1, 1), (-1, -1), (0, 0)])
def test_compares_the_first_context_by_the_cosine_whatever_the_length(sign: int, cosine: float) -> None:
    async def scenario() -> None:
        report, other, batch = Report(), Other(), contexts(4)
        comparer = report.comparer()
        comparer.maybe_compare(other.predict, batch, prediction(sign * mean_of(batch)))
        await comparer.wait()
        assert other.asked == 1
        assert report.cosines == pytest.approx([cosine])
        assert report.outcomes == ["compared"]

    asyncio.run(scenario())


def test_asks_for_sampled_answers_only() -> None:
    async def scenario() -> None:
        report, other = Report(), Other()
        comparer = report.comparer(is_sampled=False)
        comparer.maybe_compare(other.predict, contexts(), prediction(mean_of(contexts())))
        await comparer.wait()
        assert (other.asked, report.outcomes) == (0, [])

    asyncio.run(scenario())


def test_skips_what_is_more_than_may_run_at_a_time() -> None:
    async def scenario() -> None:
        report, other = Report(), Other()
        comparer = report.comparer(max_running=2)
        other.go.clear()
        for _ in range(3):
            comparer.maybe_compare(other.predict, contexts(), prediction(mean_of(contexts())))
        other.go.set()
        await comparer.wait()
        assert other.asked == 2
        assert report.outcomes == ["skipped", "compared", "compared"]

    asyncio.run(scenario())


def test_counts_errors_of_the_other_engine_and_no_more() -> None:
    async def scenario() -> None:
        report = Report()
        comparer = report.comparer()
        comparer.maybe_compare(
            Other(RuntimeError("no kernel")).predict, contexts(), prediction(np.ones((1, 8), np.float32))
        )
        await comparer.wait()
        assert (report.cosines, report.outcomes) == ([], ["failed"])

    asyncio.run(scenario())


def test_stays_out_of_the_callers_trace() -> None:
    async def scenario() -> None:
        report, other = Report(), Other()
        current_span.set(Tracer(lambda span: None, share=1).start(None))
        comparer = report.comparer()
        comparer.maybe_compare(other.predict, contexts(), prediction(mean_of(contexts())))
        await comparer.wait()
        assert (other.asked, other.span) == (1, None)

    asyncio.run(scenario())


def test_a_comparison_keeps_no_request_in_memory() -> None:
    async def scenario() -> None:
        report, other = Report(), Other()
        comparer = report.comparer()
        other.go.clear()
        batch = contexts(4)
        vectors = mean_of(batch)
        alive = weakref.ref(batch), weakref.ref(vectors)
        comparer.maybe_compare(other.predict, batch, prediction(vectors))
        del batch, vectors
        assert [each() for each in alive] == [None, None]
        other.go.set()
        await comparer.wait()
        assert report.outcomes == ["compared"]

    asyncio.run(scenario())
