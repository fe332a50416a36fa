"""The drift detector: compares the inputs of an engine with the reference statistics of its model, and warns."""

from __future__ import annotations

import numpy as np

from models.drift import STATISTICS, ReferenceStats
from models.vectors import Floats
from service.telemetry.metrics import Metrics

SAMPLE = 8  # rows of each batch that are compared
BLOCK = 48  # rows per verdict: a change shows after two of them at most
MAX_DEVIATION = 2.0  # of length, or of the cosine of neighbours: no other domain gets so far
MIN_ALIGNMENT = -1.4  # deviations: another domain gets down to -1.1, another encoder to -1.7 and less
LIMITS = (MAX_DEVIATION, MAX_DEVIATION, MIN_ALIGNMENT)  # of the STATISTICS, in their order


class DriftDetector:
    """Compares the contexts of one engine with `reference`. `watch` is for the thread that runs batches."""

    def __init__(self, reference: ReferenceStats, alias: str, metrics: Metrics) -> None:
        self._reference = reference
        self._alias = alias
        self._gauge = metrics.input_drift
        for figure, limit in zip(STATISTICS, LIMITS, strict=True):
            metrics.drift_limit.set(limit, figure)
        self._norms = metrics.input_norm.labels(alias)
        self._neighbours = metrics.input_neighbour_cosine.labels(alias)
        self._start_block()
        self.drift: tuple[float, ...] = ()

    def _start_block(self) -> None:
        self._sum = np.zeros(len(STATISTICS), np.float32)
        self._count = 0

    def watch(self, contexts: Floats) -> None:
        """Compare the first rows of a batch `(B, T, D)`."""
        figures = self._reference.measure(contexts[:SAMPLE])
        norms, neighbours, _ = figures.T.tolist()
        self._norms.observe(*norms)
        self._neighbours.observe(*neighbours)
        self._sum += figures[0] if len(figures) == 1 else figures.sum(axis=0)
        self._count += len(figures)
        if self._count >= BLOCK:
            self.drift = tuple(self._reference.deviations(self._sum / np.float32(self._count)).tolist())
            self._start_block()

    def update_gauges(self) -> None:
        """Bring the gauges up to date."""
        for figure, drift in zip(STATISTICS, self.drift, strict=False):
            self._gauge.set(drift, self._alias, figure)

    def warning(self) -> str | None:
        """Return what is wrong with the last inputs, or None."""
        if not self.drift:
            return None
        norm, neighbours, alignment = self.drift
        if abs(norm) > MAX_DEVIATION:
            return f"inputs are not of unit length: {norm:+.1f} deviations from what the net was trained on"
        if abs(neighbours) > MAX_DEVIATION or alignment < MIN_ALIGNMENT:
            off = f"neighbours {neighbours:+.1f}, alignment {alignment:+.1f} deviations"
            return f"inputs look like vectors of another encoder than the net's: {off}"
        return None
