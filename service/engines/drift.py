"""The vector-space guard: notices inputs that are of another space than the net's, and says so."""

from __future__ import annotations

import numpy as np

from models.drift import STATISTICS, ReferenceStats
from service.telemetry.metrics import Metrics

ROWS = 8  # of a batch that are looked at
BLOCK = 48  # rows in one verdict: at most two of them until a change shows
FAR = 2.0  # deviations of length, or of the cosine of neighbours, that no domain shift made
OPPOSED = -1.4  # deviations of alignment: another domain makes up to -1.1, a turned space -1.7 and less


class Guard:
    """Watches the contexts of one engine; written by what runs its batches, read by the event loop."""

    def __init__(self, space: ReferenceStats, alias: str, metrics: Metrics) -> None:
        self._reference, self._alias, self._gauge = space, alias, metrics.input_drift
        self._norms = metrics.input_norm.labels(alias)
        self._neighbours = metrics.input_neighbour_cosine.labels(alias)
        self._sum, self._count = np.zeros(len(STATISTICS), np.float32), 0
        self.drift: tuple[float, ...] = ()

    def watch(self, contexts: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
        """Look at some of a batch `(B, T, D)`."""
        figures = self._reference.measure(contexts[:ROWS])
        for norm, neighbours, _ in figures.tolist():
            self._norms.observe(norm)
            self._neighbours.observe(neighbours)
        self._sum = self._sum + figures.sum(axis=0)
        self._count += len(figures)
        if self._count >= BLOCK:
            self.drift = tuple(self._reference.deviations(self._sum / np.float32(self._count)).tolist())
            self._sum, self._count = np.zeros(len(STATISTICS), np.float32), 0

    def observe(self) -> None:
        """Bring the gauges up to date."""
        for figure, drift in zip(STATISTICS, self.drift, strict=False):
            self._gauge.set(drift, self._alias, figure)

    def warning(self) -> str | None:
        """Return what is wrong with the last inputs, None where nothing is."""
        if not self.drift:
            return None
        norm, neighbours, alignment = self.drift
        if abs(norm) > FAR:
            return f"inputs are not of unit length: {norm:+.1f} deviations from what the net was trained on"
        if abs(neighbours) > FAR or alignment < OPPOSED:
            off = f"neighbours {neighbours:+.1f}, alignment {alignment:+.1f} deviations"
            return f"inputs look like vectors of another encoder than the net's: {off}"
        return None
