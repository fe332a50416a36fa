"""The predictor: one version of a net as a function on arrays. What serves is what evaluates."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from models.drift import ReferenceStats
from models.registry.card import Card
from models.registry.checkpoint import BadCheckpoint, Checkpoint, load_checkpoint
from models.runtimes import Runtime, find_device, open_runtime
from models.runtimes.quick import is_quick
from models.vectors import Floats


class Predictor:
    """Predicts next vectors with one version; called from one thread at a time."""

    def __init__(self, version: str, sha256: str, card: Card, runtime: Runtime, golden: Floats) -> None:
        self.version, self.sha256, self.card = version, sha256, card
        self._runtime, self._golden = runtime, golden
        self.is_quick = False  # whether one row takes less than a hand-over to a thread; warm-up finds out

    @property
    def name(self) -> str:
        """The model's name."""
        return self.card.name

    @cached_property
    def reference_stats(self) -> ReferenceStats | None:
        """The space of its inputs, where its card says that golden contexts are of one."""
        return ReferenceStats.from_contexts(self._golden) if self.card.reference and len(self._golden) > 1 else None

    @property
    def runtime(self) -> str:
        """The runtime's name."""
        return self._runtime.name

    def predict_batch(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit next vectors `(B, D)`."""
        return self._runtime.run(contexts)

    def warm_up(self, max_batch: int) -> None:
        """Run every power of two below `max_batch`, and it, so that no caller pays for a size's first-time work.

        A CPU has none that is worth it, beside a service that answers meanwhile: the golden contexts have run.
        """
        for size in () if self._runtime.on_cpu else (*(1 << n for n in range((max_batch - 1).bit_length())), max_batch):
            self.predict_batch(self._golden[:1].repeat(size, axis=0))
        self.is_quick = self._runtime.on_cpu and is_quick(lambda: self.predict_batch(self._golden[:1]))


def load_predictor(directory: Path, device: str = "auto", threads: int = 1, precision: str = "float32") -> Predictor:
    """Load the version in `directory`, verified and checked against its golden vectors.

    Raises:
        NoSuchDevice: the device, or the precision on it, is not to be had here.
        BadCheckpoint: it must not be served; the message says why.
    """
    checkpoint = load_checkpoint(directory)
    if checkpoint.card.kind != "net":
        raise BadCheckpoint(f"{directory}: a {checkpoint.card.kind}, not a net that predicts")
    return build_predictor(checkpoint, device, threads, precision)


def build_predictor(
    checkpoint: Checkpoint, device: str = "auto", threads: int = 1, precision: str = "float32"
) -> Predictor:
    """Return the predictor of a checkpoint in memory; raises as `load` does."""
    runtime = open_runtime(checkpoint, find_device(device), threads, precision)
    return Predictor(checkpoint.version, checkpoint.sha256, checkpoint.card, runtime, checkpoint.golden_context)
