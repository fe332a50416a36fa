"""The shadow: what the `candidate` would have answered to some of the requests that others answered.

Callers neither wait for it nor fail with it; what it finds goes into histograms, for whoever decides on promotion.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import random
from time import monotonic
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from models.retrieval.retriever import Search
from models.vectors import Floats
from service.engines.engine import Engine
from service.engines.remote import PredictEngine
from service.engines.router import Routed
from service.engines.search import SearchModel
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import current_span

TOP = 10  # passages of which the overlap is taken
MOST = 4  # comparisons at a time; more are skipped, and counted
PATIENCE_S = 5.0


class Shadow:
    """Compares; `candidate` and `search` tell who does now, or None."""

    def __init__(
        self,
        candidate: Callable[[], PredictEngine | None],
        search: Callable[[], Engine[SearchModel] | None],
        settings: Settings,
        metrics: Metrics,
        draw: Callable[[], float] = random,
    ) -> None:
        self._candidate, self._search, self._draw = candidate, search, draw
        self._share, self._metrics = settings.shadow_share, metrics
        self._running: set[asyncio.Task[None]] = set()

    def consider(self, contexts: Floats, routed: Routed) -> None:
        """Compare the first of `contexts` `(n, T, D)` with its answer, later, if the lot falls on it."""
        engine = self._candidate()
        if engine is None or engine.info.shape != contexts.shape[1:] or self._draw() >= self._share:
            return
        if len(self._running) >= MOST:
            self._metrics.shadowed.inc("skipped")
            return
        task = asyncio.create_task(self._compare(engine, contexts[:1], routed))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def settle(self) -> None:
        """Wait for the comparisons that run."""
        await asyncio.gather(*self._running)

    async def _compare(self, engine: PredictEngine, context: Floats, routed: Routed) -> None:
        current_span.set(None)  # the caller's trace is of what the caller waited for
        try:
            theirs, ours = await engine.run(context, monotonic() + PATIENCE_S), routed.prediction
            cosine = float(np.vecdot(theirs.vectors[0], ours.vectors[0]))
            overlap = await self._overlap(theirs.vectors[0], ours.vectors[0])
        except Exception:  # whatever befalls the candidate is for the counter alone
            self._metrics.shadowed.inc("failed")
            return
        self._metrics.shadowed.inc("compared")
        self._metrics.shadow_cosine.labels().observe(cosine)
        if overlap is not None:
            self._metrics.shadow_overlap.labels().observe(overlap)
        if ours.batch_rows == theirs.batch_rows == 1:  # the times of larger batches are not of one request
            self._metrics.shadow_extra_seconds.labels().observe(theirs.infer_s - ours.infer_s)

    async def _overlap(self, theirs: Floats, ours: Floats) -> float | None:
        engine = self._search()
        if engine is None or engine.info.shape[1] != len(ours):
            return None
        deadline = monotonic() + PATIENCE_S
        found = [await engine.run(Search(query, TOP), deadline) for query in (theirs, ours)]
        first, second = ({hit.row for hit in each.hits} for each in found)
        return len(first & second) / max(len(first), 1)


def report(scrape: str) -> dict[str, Any]:
    """Return what a shadow has found so far, read off the text of /metrics."""
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(scrape)
        for sample in family.samples
        if sample.name.startswith("lvm_shadow")
    }
    outcomes = {key[1]: int(value) for key, value in samples.items() if key[0] == "lvm_shadow_total"}
    means = {name: _mean(samples, f"lvm_shadow_{name}") for name in ("cosine", "overlap", "extra_seconds")}
    return {"requests": outcomes, **means, "cosine_p10": _quantile(samples, "lvm_shadow_cosine", 0.1)}


def _mean(samples: Mapping[tuple[str, ...], float], name: str) -> float | None:
    count = samples.get((f"{name}_count",), 0)
    return samples[f"{name}_sum",] / count if count else None


def _quantile(samples: Mapping[tuple[str, ...], float], name: str, share: float) -> float | None:
    """Return the upper edge of the bucket in which the quantile lies."""
    buckets = sorted((float(key[1]), value) for key, value in samples.items() if key[0] == f"{name}_bucket")
    total = buckets[-1][1] if buckets else 0
    return next(edge for edge, count in buckets if count >= share * total) if total else None
