"""The comparer: asks another engine for its answer to some of the requests, and compares the two.

Callers neither wait for a comparison nor fail with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import NamedTuple

import numpy as np

from models.vectors import Floats
from service.engines.predict import Prediction
from service.telemetry.tracing import current_span

TIMEOUT_S = 5.0

Ask = Callable[[Floats, float], Awaitable[Prediction]]  # contexts `(n, T, D)`, deadline on the monotonic clock


class Comparison(NamedTuple):
    """What two engines answered to one context `(1, T, D)`, and the cosine of their vectors."""

    context: Floats
    ours: Prediction
    theirs: Prediction
    cosine: float


class Comparer:
    """Compares sampled answers with those of another engine, one context each.

    Args:
        is_sampled: returns whether to compare an answer.
        report: called with each comparison.
        max_running: comparisons at a time; a sampled answer beyond them is skipped.
        count: called with the outcome of each sampled answer: "compared", "failed" or "skipped".
    """

    def __init__(
        self,
        is_sampled: Callable[[], bool],
        report: Callable[[Comparison], Awaitable[None]],
        max_running: int,
        count: Callable[[str], object] = lambda outcome: None,
    ) -> None:
        self._is_sampled = is_sampled
        self._report = report
        self._max_running = max_running
        self._count = count
        self._running: set[asyncio.Task[None]] = set()

    def maybe_compare(self, ask: Ask, contexts: Floats, ours: Prediction) -> None:
        """Compare the answer to the first of `contexts` `(n, T, D)` with that of `ask`, later, if it is sampled."""
        if not self._is_sampled():
            return
        if len(self._running) >= self._max_running:
            self._count("skipped")
            return
        # copies: views would keep the whole request in memory
        first = ours._replace(vectors=ours.vectors[:1].copy())
        task = asyncio.create_task(self._compare(ask, contexts[:1].copy(), first))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def wait(self) -> None:
        """Wait for the comparisons that run."""
        await asyncio.gather(*self._running)

    async def _compare(self, ask: Ask, context: Floats, ours: Prediction) -> None:
        # a trace shows what its caller waited for
        current_span.set(None)
        try:
            theirs = await ask(context, monotonic() + TIMEOUT_S)
            await self._report(Comparison(context, ours, theirs, _cosine(theirs.vectors[0], ours.vectors[0])))
        except Exception:  # the other engine may raise anything; no caller may notice
            self._count("failed")
        else:
            self._count("compared")


def _cosine(one: Floats, other: Floats) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.vecdot(one, other)) / lengths if lengths else 0.0
