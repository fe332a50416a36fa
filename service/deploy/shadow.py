"""The shadow: compares the answers to some requests with what the `candidate` would have answered.

Callers neither wait for it nor fail with it. It reports in histograms, for the decision on a promotion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import random
from time import monotonic
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from models.registry.alias import Alias
from models.retrieval.retriever import Search
from models.vectors import Floats
from service.deploy.comparer import TIMEOUT_S, Comparer, Comparison
from service.deploy.deployments import Slot
from service.engines.engine import Engine
from service.engines.router import Routed
from service.telemetry.metrics import Metrics

TOP = 10  # passages, of which the overlap is computed
MAX_RUNNING = 4  # comparisons at a time; more are skipped, and counted


class Shadow:
    """Compares a `share` of the answers with those of the candidate in `slots`, by alias, and counts in `metrics`."""

    def __init__(
        self, slots: Mapping[str, Slot], share: float, metrics: Metrics, draw: Callable[[], float] = random
    ) -> None:
        self._slots = slots
        self._metrics = metrics
        self._comparer = Comparer(lambda: draw() < share, self._report, MAX_RUNNING, metrics.shadowed.inc)
        self.wait = self._comparer.wait

    def maybe_compare(self, contexts: Floats, routed: Routed) -> None:
        """Compare the answer to the first of `contexts` `(n, T, D)`, later, if it is sampled."""
        slot = self._slots.get(Alias.CANDIDATE)
        if slot and slot.engine and slot.engine.info.shape == contexts.shape[1:]:
            self._comparer.maybe_compare(slot.engine.run, contexts, routed.prediction)

    async def _report(self, comparison: Comparison) -> None:
        _, ours, theirs, cosine = comparison
        overlap = await self._overlap(ours.vectors[0], theirs.vectors[0])
        self._metrics.shadow_cosine.labels().observe(cosine)
        if overlap is not None:
            self._metrics.shadow_overlap.labels().observe(overlap)
        # the time of a larger batch is not that of one request
        if ours.batch_rows == theirs.batch_rows == 1:
            self._metrics.shadow_extra_seconds.labels().observe(theirs.infer_s - ours.infer_s)

    async def _overlap(self, ours: Floats, theirs: Floats) -> float | None:
        """Return the share of passages that a search finds by both vectors; None if there is no corpus for them."""
        slot = self._slots.get(Alias.RETRIEVER)
        if slot is None or not isinstance(slot.engine, Engine) or slot.engine.info.shape[1] != len(ours):
            return None
        deadline = monotonic() + TIMEOUT_S
        found = await slot.engine.run([Search(vector, TOP) for vector in (ours, theirs)], deadline)
        first, second = ({hit.row for hit in hits} for hits in found.hits)
        return len(first & second) / max(len(first), 1)


def candidate_of(scrape: str) -> str | None:
    """Return the id of the version that is the candidate, by the text of /metrics; None if there is none."""
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "lvm_model_info" and labels["alias"] == Alias.CANDIDATE and sample.value > 0:
                return f"{labels['model']}/{labels['version']}"
    return None


def summarize_shadow(scrape: str) -> dict[str, Any]:
    """Return what a shadow has found so far, by the text of /metrics."""
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
