"""The predictor: one version of a net as a function on arrays; the same class serves and evaluates."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from models.drift import ReferenceStats
from models.registry.card import Card
from models.registry.checkpoint import BadCheckpoint, Checkpoint, load_checkpoint
from models.runtimes import Runtime, find_device, open_runtime
from models.runtimes.inline import can_run_inline
from models.vectors import Floats


class Predictor:
    """Predicts next vectors with one version. Call it from one thread at a time."""

    def __init__(self, version: str, sha256: str, card: Card, runtime: Runtime, golden: Floats) -> None:
        self.version = version
        self.sha256 = sha256
        self.card = card
        self._runtime = runtime
        # maps float32 contexts `(B, T, D)` to float32 unit next vectors `(B, D)`
        self.predict_batch: Callable[[Floats], Floats] = runtime.run
        self._golden = golden
        # Whether one row takes less time than a hand-over to a thread; measured by `warm_up`.
        self.runs_inline = False

    @property
    def name(self) -> str:
        """The model's name."""
        return self.card.name

    @cached_property
    def reference_stats(self) -> ReferenceStats | None:
        """Statistics of the golden contexts, if the card has such of the training data."""
        return ReferenceStats.from_contexts(self._golden) if self.card.reference and len(self._golden) > 1 else None

    @property
    def runtime(self) -> str:
        """The runtime's name."""
        return self._runtime.name

    def warm_up(self, max_batch: int) -> None:
        """Run batches of every power of two up to `max_batch`, so that the first requests are not slow.

        A CPU needs no warm-up, which would take time from requests: the golden contexts have run already.
        """
        if not self._runtime.on_cpu:
            for size in (*(1 << n for n in range((max_batch - 1).bit_length())), max_batch):
                self.predict_batch(self._golden[:1].repeat(size, axis=0))
        self.runs_inline = self._runtime.on_cpu and can_run_inline(lambda: self.predict_batch(self._golden[:1]))


def load_predictor(directory: Path, device: str = "auto", threads: int = 1, precision: str = "float32") -> Predictor:
    """Load the version in `directory`; verify its files and its golden vectors.

    Raises:
        NoSuchDevice: the device, or the precision on it, is not available.
        BadCheckpoint: the version must not be served; the message says why.
    """
    return build_predictor(load_net(directory), device, threads, precision)


def load_net(directory: Path) -> Checkpoint:
    """Load the files of a net and verify them; raises `BadCheckpoint`."""
    checkpoint = load_checkpoint(directory)
    if checkpoint.card.kind != "net":
        raise BadCheckpoint(f"{directory}: kind {checkpoint.card.kind}, expected net")
    return checkpoint


def build_predictor(
    checkpoint: Checkpoint, device: str = "auto", threads: int = 1, precision: str = "float32"
) -> Predictor:
    """Make a predictor of a checkpoint in memory; raises as `load_predictor`."""
    runtime = open_runtime(checkpoint, find_device(device), threads, precision)
    return Predictor(checkpoint.version, checkpoint.sha256, checkpoint.card, runtime, checkpoint.golden_context)
