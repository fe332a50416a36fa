"""The engine keeps its own statistics, whoever calls it: a router, HTTP workers, a deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

import numpy as np
import pytest

from lvm.errors import (
    Draining,
    Expired,
    ModelFailed,
    ServiceError,
)
from models.vectors import Floats
from service.engines.engine import Engine
from service.engines.predict import PredictAdapter, Prediction, make_predict_engine
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.fakes import FakePredictor, Gate, answers_nan, contexts, mean_of, raises


def engine(answer: Callable[[Floats], Floats], *, runs_inline: bool = False) -> Engine[PredictAdapter]:
    """Return an engine for which a millisecond is a full wait."""
    settings = Settings(timeout_ms=2, primary_share=0.5)
    return make_predict_engine(FakePredictor(answer=answer, runs_inline=runs_inline), "primary", settings, Metrics())


@pytest.mark.parametrize(
    ("answer", "seconds", "error", "counts"),
    [
        (mean_of, 60.0, None, (1, 0)),
        (raises, 60.0, ModelFailed, (0, 1)),
        (answers_nan, 60.0, ModelFailed, (0, 1)),
        (Gate(), 0.2, Expired, (0, 1)),
        (Gate(), 0.0, Expired, (0, 0)),
    ],
    ids=["answers", "raises", "nan", "hangs", "hurried"],
)
def test_counts_only_what_the_model_did(
    answer: Callable[[Floats], Floats], seconds: float, error: type[ServiceError] | None, counts: tuple[int, int]
) -> None:
    async def scenario() -> None:
        made = engine(answer)
        asked = made.run(contexts(), monotonic() + seconds)
        if error:
            with pytest.raises(error):
                await asked
        else:
            await asked
        assert (made.stats.answered, made.stats.failed) == counts
        if isinstance(answer, Gate):
            answer.opened.set()
        await made.batcher.close(1)

    asyncio.run(scenario())


def test_does_not_count_rejections_and_rows_that_fail_alone() -> None:
    def fails_alone(batch: Floats) -> Floats:
        return np.where(batch[:, -1, :1] == 0, np.nan, mean_of(batch))

    async def scenario() -> None:
        made, rows = engine(fails_alone, runs_inline=True), contexts(2)
        rows[1, -1] = 0
        asked = [made.run(row[None], monotonic() + 60) for row in rows]
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(end) for end in ends] == [Prediction, ModelFailed]
        await made.batcher.close(1)
        with pytest.raises(Draining):
            await made.run(rows[:1], monotonic() + 60)
        assert (made.stats.answered, made.stats.failed) == (1, 0)

    asyncio.run(scenario())
