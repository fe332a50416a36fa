"""Wrong answers to learn from: chunks of the same article, and near misses that the towers score highly.

Chunks and windows are identified by their row in the corpus, never by their place in a batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.windows import NoWindows, Windows


class Negatives:
    """Draws `same + 1` wrong rows for each window; none is its next chunk or in its context.

    `same` rows come from the window's article, and one from the near misses found for it. If there are none, other rows
    of the corpus replace them, so that every window has equally many.

    Raises:
        NoWindows: the corpus is a single window.
    """

    def __init__(self, data: Windows, same: int) -> None:
        self.same, self._span, rows = same, data.length + 1, len(data.vectors)
        if rows <= self._span:
            raise NoWindows("the data set has a single window; training towers needs more")
        begin, end = _bounds(data)
        has_others = end - begin > self._span
        self._begin = torch.from_numpy(np.where(has_others, begin, 0))
        self._end = torch.from_numpy(np.where(has_others, end, rows))
        self._near = torch.full((rows, 1), -1)

    def draw(self, start: Tensor) -> Tensor:
        """Return rows `(B, same + 1)`, drawn from torch's generator, for the windows that begin at `start` `(B,)`."""
        others = self._others(start, self.same + 1)
        near = self._near[start, torch.randint(self._near.shape[1], start.shape)]
        return torch.cat([others[:, :-1], torch.where(near >= 0, near, others[:, -1])[:, None]], dim=1)

    def remember(self, start: Tensor, near: Tensor) -> None:
        """Store `near` `(B, M)` as the near misses of the windows that begin at `start`; -1: none."""
        if self._near.shape[1] != near.shape[1]:
            self._near = torch.full((len(self._near), near.shape[1]), -1)
        self._near[start] = near

    def _others(self, start: Tensor, count: int) -> Tensor:
        """Draw rows of each article as if it did not contain the window, then skip the window."""
        begin, end = self._begin[start, None], self._end[start, None]
        places = (torch.rand(len(start), count) * (end - begin - self._span)).long()
        rows = begin + places
        return torch.where(rows >= start[:, None], rows + self._span, rows)


def _bounds(data: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each row that a window begins at, the first row of its article's windows and the row after them."""
    rows = len(data.vectors)
    begin, end = np.zeros(rows, np.int64), np.full(rows, rows)
    for article in np.unique(data.article):
        starts = data.start[data.article == article]
        begin[starts], end[starts] = starts[0], starts[-1] + data.length + 1
    return begin, end


def near_misses(scores: Tensor, start: Tensor, first: int, span: int, count: int) -> Tensor:
    """Return the `count` wrong rows `(B, count)` of a bank with the best scores; -1 if there are no more.

    `scores` `(B, N)` belong to the rows from `first` on. The `span` rows from each `start` are the window itself.
    """
    own = start[:, None] - first + torch.arange(span)
    best = scores.scatter(1, own, -torch.inf).topk(min(count, scores.shape[1]), dim=1)
    return torch.where(best.values > -torch.inf, best.indices + first, -1)
