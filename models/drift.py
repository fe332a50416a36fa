"""The space that contexts are of: three figures, cheap to take, in which vectors of different encoders differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from models.vectors import Floats, normalise

STATISTICS = ("norm", "neighbour_cosine", "alignment")
_MIN_DEVIATION = np.array([0.01, 0.05, 0.05], np.float32)  # deviations: less is rounding, or a small sample's luck


@dataclass(frozen=True)
class ReferenceStats:
    """What the figures of contexts `(3,)` are there, and the direction `(D,)` that most of its vectors share."""

    direction: Floats
    mean: Floats
    deviation: Floats

    @classmethod
    def from_contexts(cls, contexts: Floats) -> Self:
        """Return the space of some contexts `(B, T, D)`, each held to the direction of the others; B > 1."""
        units = normalise(contexts)
        total = units.sum(axis=(0, 1))
        others = normalise(total - units.sum(axis=1))  # (B, D)
        taken = np.vstack([_measure(one[None], direction) for one, direction in zip(contexts, others, strict=True)])
        return cls(normalise(total), taken.mean(axis=0), np.maximum(taken.std(axis=0), _MIN_DEVIATION))

    def measure(self, contexts: Floats) -> Floats:
        """Return length, cosine of neighbours and cosine to the direction, means over each context, `(B, 3)`.

        A context of one vector, which has no neighbours, says nothing of them: it counts as usual there.
        """
        figures = _measure(contexts, self.direction)
        return np.where(np.isnan(figures), self.mean, figures)

    def deviations(self, figures: Floats) -> Floats:
        """Return by how many deviations `figures` `(3,)`, best a mean over many contexts, are off."""
        off: Floats = (figures - self.mean) / self.deviation
        return off


def _measure(contexts: Floats, direction: Floats) -> Floats:
    lengths = np.sqrt(np.vecdot(contexts, contexts))  # (B, T)
    safe = np.maximum(lengths, 1e-12)
    neighbours = np.vecdot(contexts[:, 1:], contexts[:, :-1]) / (safe[:, 1:] * safe[:, :-1])
    aligned = contexts @ direction / safe
    near = neighbours.mean(1) if contexts.shape[1] > 1 else np.full(len(contexts), np.nan, np.float32)
    figures: Floats = np.stack([lengths.mean(1), near, aligned.mean(1)], axis=1)
    return figures
