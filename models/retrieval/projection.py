"""A plane through the vectors of a corpus, on which passages are drawn: principal component analysis of a sample."""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from models.retrieval.corpus import Passages
from models.vectors import Floats

# passages of a sample: enough to show where the corpus is dense, few enough to draw
SAMPLE = 5_000
# of the randomised method: more columns and steps give axes nearer to the exact ones
_COLUMNS = 8
_STEPS = 12


class Plane(NamedTuple):
    """The `mean` `(D,)`, two orthonormal `axes` `(2, D)`, and the share of the variance along each, `(2,)`."""

    mean: Floats
    axes: Floats
    explained: Floats

    @classmethod
    def fit(cls, vectors: Floats) -> Self:
        """Return the plane of the two principal axes of `vectors` `(n, D)`.

        By subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011), which needs no matrix `(D, D)`.
        """
        mean = vectors.mean(axis=0)
        centred = vectors - mean
        basis = np.random.default_rng(0).standard_normal((vectors.shape[1], _COLUMNS)).astype(np.float32)
        for _ in range(_STEPS):
            basis, _ = np.linalg.qr(centred.T @ (centred @ basis))
        _, values, rotation = np.linalg.svd(centred @ basis, full_matrices=False)
        axes = np.zeros((2, vectors.shape[1]), np.float32)
        found = (rotation @ basis.T)[:2]
        axes[: len(found)] = found * _signs(found)
        squares = np.zeros(2, np.float32)
        squares[: len(values)] = values[:2] ** 2
        explained = squares / max(float((centred**2).sum()), 1e-12)
        return cls(mean, axes, explained.astype(np.float32))

    def project(self, vectors: Floats) -> Floats:
        """Return the coordinates `(n, 2)` of `vectors` `(n, D)`."""
        centred: Floats = vectors - self.mean
        return centred @ self.axes.T


def sample_rows(corpus: Passages) -> NDArray[np.int64]:
    """Return at most `SAMPLE` rows of a corpus, evenly spaced."""
    return np.linspace(0, len(corpus) - 1, min(SAMPLE, len(corpus))).astype(np.int64)


def _signs(axes: Floats) -> Floats:
    """Return the signs `(k, 1)` that make the greatest component of each axis positive: SVD leaves them open."""
    greatest = np.abs(axes).argmax(axis=1)[:, None]
    signs: Floats = np.sign(np.take_along_axis(axes, greatest, axis=1))
    return signs
