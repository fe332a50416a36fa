"""Runs a batch in blocks of at most the rows that a net was tried with."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from models.vectors import Floats


class _Runtime(Protocol):
    name: str
    on_cpu: bool
    sizes: tuple[int, ...]

    def run(self, contexts: Floats) -> Floats:
        """Map contexts `(B, T, D)` to unit vectors `(B, D)`."""
        ...


class Blocks:
    """A runtime that runs at most `rows` contexts at once; if `is_fixed`, exactly `rows`, the last block filled up."""

    def __init__(self, runtime: _Runtime, rows: int, is_fixed: bool) -> None:
        self.name = runtime.name
        self.on_cpu = runtime.on_cpu
        self.sizes = runtime.sizes
        self._runtime = runtime
        self._rows = rows
        self._is_fixed = is_fixed

    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        if len(contexts) <= self._rows:
            return self._block(contexts)
        starts = range(0, len(contexts), self._rows)
        return np.concatenate([self._block(contexts[start : start + self._rows]) for start in starts])

    def _block(self, contexts: Floats) -> Floats:
        if not self._is_fixed or len(contexts) == self._rows:
            return self._runtime.run(contexts)
        filled = np.resize(contexts, (self._rows, *contexts.shape[1:]))
        return self._runtime.run(filled)[: len(contexts)]
