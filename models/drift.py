"""Reference statistics of contexts: three cheap numbers that differ between the vectors of different encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from models.vectors import Floats, normalise

STATISTICS = ("norm", "neighbour_cosine", "alignment")
# A smaller standard deviation comes from rounding or from a small sample.
_MIN_DEVIATION = np.array([0.01, 0.05, 0.05], np.float32)
_UNKNOWN = np.full(3, np.nan, np.float32)


@dataclass(frozen=True)
class ReferenceStats:
    """Mean and standard deviation of the `STATISTICS`, `(3,)` each, and the mean direction `(D,)` of the vectors."""

    direction: Floats
    mean: Floats
    deviation: Floats

    @classmethod
    def from_contexts(cls, contexts: Floats) -> Self:
        """Compute the statistics of contexts `(B, T, D)`, B > 1, each against the mean direction of the others."""
        units = normalise(contexts)
        total = units.sum(axis=(0, 1))
        others = normalise(total - units.sum(axis=1))  # (B, D)
        alone = [cls(direction, _UNKNOWN, _UNKNOWN) for direction in others]
        values = np.vstack([stats.measure(one[None]) for one, stats in zip(contexts, alone, strict=True)])
        return cls(normalise(total), values.mean(axis=0), np.maximum(values.std(axis=0), _MIN_DEVIATION))

    def measure(self, contexts: Floats) -> Floats:
        """Return the `STATISTICS` of contexts `(B, T, D)`: means over the vectors of each context, `(B, 3)`.

        A context of one vector has no neighbours; its neighbour cosine counts as the mean.
        """
        length = contexts.shape[1]
        lengths = np.sqrt(np.vecdot(contexts, contexts))  # (B, T)
        safe = np.maximum(lengths, 1e-12)
        values = np.empty((len(contexts), 3), np.float32)
        # sums: a mean takes twice as long for a few numbers
        lengths.sum(1, out=values[:, 0])
        if length > 1:
            near = np.vecdot(contexts[:, 1:], contexts[:, :-1]) / (safe[:, 1:] * safe[:, :-1])
            near.sum(1, out=values[:, 1])
        (contexts @ self.direction / safe).sum(1, out=values[:, 2])
        values /= np.array([length, max(1, length - 1), length], np.float32)
        if length == 1:
            values[:, 1] = self.mean[1]
        return values

    def deviations(self, values: Floats) -> Floats:
        """Return by how many standard deviations `values` `(3,)` differ from the mean; average over many contexts."""
        deviations: Floats = (values - self.mean) / self.deviation
        return deviations
