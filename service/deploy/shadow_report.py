"""What a shadow has found so far, by the text of /metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from models.registry.alias import Alias

Samples = Mapping[tuple[str, ...], float]
_DIFFERENCE = "lvm_shadow_difference"
ALL = "all"


class Difference(NamedTuple):
    """How much nearer to the true next vectors a candidate was than the primary: mean cosine, with its 95 % interval.

    The interval takes the contexts as independent.
    """

    pairs: int
    mean: float
    interval: tuple[float, float]


def candidate_of(scrape: str) -> str | None:
    """Return the id of the version that is the candidate; None if there is none."""
    return _alias_of(scrape, Alias.CANDIDATE)


def summarize_shadow(scrape: str) -> dict[str, Any]:
    """Return the counts and the means of the comparisons, and the `differences` of the candidate and the primary."""
    samples = _samples(scrape, "lvm_shadow")
    outcomes = {key[1]: int(value) for key, value in samples.items() if key[0] == "lvm_shadow_total"}
    means = {name: _mean(samples, f"lvm_shadow_{name}") for name in ("cosine", "overlap", "extra_seconds")}
    summary = {"requests": outcomes, **means, "cosine_p10": _quantile(samples, "lvm_shadow_cosine", 0.1)}
    candidate, primary = (_alias_of(scrape, alias) for alias in (Alias.CANDIDATE, Alias.PRIMARY))
    found = differences(scrape, candidate, primary) if candidate and primary else {}
    return {**summary, "differences": {level: each._asdict() for level, each in found.items()}}


def differences(scrape: str, candidate: str, primary: str) -> dict[str, Difference]:
    """Return the differences of two versions, by their ids, by the coherence of the context, and of all contexts."""
    counted: dict[str, dict[str, float]] = {}
    sums: dict[str, float] = {}
    for (name, *labels), value in _samples(scrape, _DIFFERENCE).items():
        if (f"{labels[0]}/{labels[1]}", labels[2]) == (candidate, primary):
            if name == f"{_DIFFERENCE}_bucket":
                counted.setdefault(labels[3], {})[labels[4]] = value
            elif name == f"{_DIFFERENCE}_sum":
                sums[labels[3]] = value
    by_level = {level: _buckets(counts.items()) for level, counts in counted.items()}
    found = {level: _difference(buckets, sums[level]) for level, buckets in by_level.items()}
    together = [bucket for buckets in by_level.values() for bucket in buckets]
    return {ALL: _difference(together, sum(sums.values())), **found} if together else {}


def _buckets(cumulative: Iterable[tuple[str, float]]) -> list[tuple[float, float]]:
    """Return the middle and the count of each bucket, by upper edges and cumulative counts."""
    ordered = sorted((float(edge), count) for edge, count in cumulative)
    edges = [edge for edge, _ in ordered]
    lower = [edges[0], *edges[:-1]]
    counts = [count - before for (_, count), before in zip(ordered, [0.0, *(c for _, c in ordered)], strict=False)]
    middles = [below if math.isinf(edge) else (below + edge) / 2 for below, edge in zip(lower, edges, strict=True)]
    return list(zip(middles, counts, strict=True))


def _difference(buckets: list[tuple[float, float]], total: float) -> Difference:
    pairs = sum(count for _, count in buckets)
    mean = total / max(pairs, 1)
    variance = sum(count * (middle - mean) ** 2 for middle, count in buckets) / max(pairs - 1, 1)
    half = 1.96 * math.sqrt(variance / max(pairs, 1))
    return Difference(int(pairs), mean, (mean - half, mean + half))


def _alias_of(scrape: str, alias: str) -> str | None:
    for _, found, model, version, *_ in _samples(scrape, "lvm_model_info"):
        if found == alias:
            return f"{model}/{version}"
    return None


def _samples(scrape: str, prefix: str) -> Samples:
    """Return the samples by name and label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(scrape)
        for sample in family.samples
        if sample.name.startswith(prefix)
    }


def _mean(samples: Samples, name: str) -> float | None:
    count = samples.get((f"{name}_count",), 0)
    return samples[f"{name}_sum",] / count if count else None


def _quantile(samples: Samples, name: str, share: float) -> float | None:
    """Return the upper edge of the bucket in which the quantile lies."""
    buckets = sorted((float(key[1]), value) for key, value in samples.items() if key[0] == f"{name}_bucket")
    total = buckets[-1][1] if buckets else 0
    return next(edge for edge, count in buckets if count >= share * total) if total else None
