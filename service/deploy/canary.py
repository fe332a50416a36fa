"""The canary: a version that replaces another is judged for a while by the one before it, the incumbent.

It is rolled back if too many of its calls fail, its batches take too long, its answers differ too much, or they are
further from the true next vectors than those of the incumbent. Contexts that arrive later show these vectors.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

from models.registry.registry import AliasMoved, Registry, RegistryLocked
from models.vectors import Floats
from service.deploy.comparer import Ask, Comparer, Comparison
from service.deploy.paired import PairedScores, PairedTest
from service.engines.pairing import Pairing
from service.engines.predict import Prediction
from service.engines.stats import EngineStats
from service.settings import Settings
from service.tasks import SerialExecutor

# fewer are no evidence
MIN_FAILURES = 5
MIN_BATCHES = 50
MIN_COMPARISONS = 30
# between two comparisons: few beside the requests, enough within any window
COMPARE_EVERY_S = 0.05
LOCK_TRIES = 20
# for the predictions of both versions that wait for their true next vectors
PAIR_BYTES = 1 << 23


class Canary:
    """Judges a new engine for `watch_s` seconds from now, by its `stats` and those of the incumbent until now."""

    def __init__(
        self, stats: EngineStats, incumbent: EngineStats, settings: Settings, clock: Callable[[], float] = monotonic
    ) -> None:
        self._stats = stats
        self._latencies_before = incumbent.latency_by_size()
        self._limits = settings
        self._clock = clock
        self._end = clock() + settings.watch_s
        # a quicker batch is quick enough
        self._least_s = min(settings.slo_ms, default=0.0) / 1000
        self._next_comparison = clock()
        self._cosines = 0.0
        self._compared = 0
        self.comparer = Comparer(self._is_due, self._add, max_running=1)
        self._test = PairedTest()
        scores = PairedScores(lambda differences, contexts: self._test.add(differences.tolist()))
        self._pairing = pairing = Pairing(mmap.mmap(-1, PAIR_BYTES), 1, settings.watch_s, scores, clock)
        self.flush = pairing.flush

    def observe(self, ask_incumbent: Ask, contexts: Floats, prediction: Prediction) -> None:
        """Take the prediction of the new version for `contexts` `(n, T, D)`; compare it later, if it is due."""
        self._pairing.arrive(contexts)
        self.comparer.maybe_compare(ask_incumbent, contexts, prediction)

    async def verdict(self, poll_s: float) -> str | None:
        """Return the first fault, looking every `poll_s` seconds; None if there is none until the window ends."""
        while (fault := self.fault()) is None and not self.is_over:
            await asyncio.sleep(poll_s)
        return fault

    @property
    def is_over(self) -> bool:
        """Whether the window has ended."""
        return self._clock() >= self._end

    def fault(self) -> str | None:
        """Return which limit the new engine exceeds so far, and by how much; None if it keeps them."""
        return self._errors() or self._slowness() or self._disagreement() or self._worse_scores()

    def _errors(self) -> str | None:
        failed = self._stats.failed
        limit = self._limits.watch_errors
        calls = failed + self._stats.answered
        if failed < MIN_FAILURES or failed <= limit * calls:
            return None
        return f"{failed} of {calls} calls failed, LVM_WATCH_ERRORS is {limit:g}"

    def _slowness(self) -> str | None:
        latencies = self._stats.latency_by_size()
        sizes = latencies.keys() & self._latencies_before.keys()
        pairs = [(latencies[size], self._latencies_before[size]) for size in sizes]
        pairs = [(new, old) for new, old in pairs if min(new.batches, old.batches) >= MIN_BATCHES]
        expected_s = sum(new.batches * max(old.seconds, self._least_s) for new, old in pairs)
        ratio = sum(new.batches * new.seconds for new, _ in pairs) / expected_s if expected_s else 0.0
        if ratio <= self._limits.watch_slower:
            return None
        slower = f"batches take {ratio:.1f} times as long as the incumbent's of as many rows"
        return f"{slower}, LVM_WATCH_SLOWER is {self._limits.watch_slower:g}"

    def _disagreement(self) -> str | None:
        limit = self._limits.watch_agreement
        mean = self._cosines / max(self._compared, 1)
        if self._compared < MIN_COMPARISONS or mean >= limit:
            return None
        agreement = f"mean cosine {mean:.3f} to the incumbent's answers to {self._compared} contexts"
        return f"{agreement}, LVM_WATCH_AGREEMENT is {limit:g}"

    def _worse_scores(self) -> str | None:
        test = self._test
        limit = self._limits.watch_worse
        if not test.is_worse_by(limit):
            return None
        worse = f"mean cosine to the true next vectors {-test.mean:.3f} below the incumbent's on {test.pairs} contexts"
        return f"{worse}, LVM_WATCH_WORSE is {limit:g}"

    def _is_due(self) -> bool:
        now = self._clock()
        if now < self._next_comparison:
            return False
        self._next_comparison = now + COMPARE_EVERY_S
        return True

    async def _add(self, comparison: Comparison) -> None:
        self._cosines += comparison.cosine
        self._compared += 1
        context = comparison.context[0]
        self._pairing.keep(context, comparison.ours.vectors[0], PairedScores.NEW)
        self._pairing.keep(context, comparison.theirs.vectors[0], PairedScores.OLD)


class Rollback(NamedTuple):
    """A move of an alias from a version back to its incumbent, both ids, because of a fault of the version."""

    alias: str
    version: str
    incumbent: str
    fault: str

    async def record(self, registry: Registry, executor: SerialExecutor, retry_s: float) -> None:
        """Move the alias in the registry, unless it points elsewhere by now; retry while the registry is locked.

        Raises:
            RegistryLocked: the registry stays locked.
            OSError, RegistryError: the registry cannot be written.
        """
        for _ in range(LOCK_TRIES - 1):
            with suppress(RegistryLocked):
                await executor.run(self._move, registry)
                return
            await asyncio.sleep(retry_s)
        await executor.run(self._move, registry)

    def _move(self, registry: Registry) -> None:
        target = registry.find(self.incumbent)
        expected = {self.alias: self.version}
        with suppress(AliasMoved):
            registry.point(self.alias, target, why=f"automatic: {self.fault}", action="rollback", expected=expected)
