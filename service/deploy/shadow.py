"""The shadow: compares the answers to some requests with what the `candidate` would have answered.

Callers neither wait for it nor fail with it. It reports in histograms, for the decision on a promotion. If a later
context shows the true next vector, it reports how much nearer to that the candidate was than the primary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from mmap import mmap
from random import random
from time import monotonic

import numpy as np

from models.drift import STATISTICS, ReferenceStats
from models.registry.alias import Alias
from models.retrieval.retriever import Search
from models.vectors import Floats
from service.deploy.comparer import TIMEOUT_S, Comparer, Comparison
from service.deploy.deployments import Slot
from service.deploy.paired import PairedScores
from service.engines.engine import Engine, Identity
from service.engines.pairing import Pairing
from service.engines.remote import PredictEngine
from service.engines.router import Routed
from service.telemetry.metrics import COHERENCES, Metrics

TOP = 10  # passages, of which the overlap is computed
# a third of a normal distribution is below its mean less so many standard deviations, a third above its mean plus them
THIRD = 0.4307
MAX_RUNNING = 4  # comparisons at a time; more are skipped, and counted


class Shadow:
    """Compares a `share` of the answers with those of the candidate in `slots`, by alias, and counts in `metrics`.

    Predictions wait for their true next vectors for `seconds`, in `size` bytes; 0 bytes: these are not looked for.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        share: float,
        metrics: Metrics,
        draw: Callable[[], float] = random,
        *,
        seconds: float = 3600,
        size: int = 0,
    ) -> None:
        self._slots = slots
        self._metrics = metrics
        self._seconds = seconds
        self._size = size
        # the candidate and the primary, by identity, that predictions are kept of
        self._pair: tuple[Identity, Identity] | None = None
        self._pairing: Pairing | None = None
        self._comparer = Comparer(lambda: draw() < share, self._report, MAX_RUNNING, metrics.shadowed.inc)
        self.wait = self._comparer.wait

    def maybe_compare(self, contexts: Floats, routed: Routed) -> None:
        """Compare the answer to the first of `contexts` `(n, T, D)`, later, if it is sampled."""
        slot = self._slots.get(Alias.CANDIDATE)
        if slot and slot.engine and slot.engine.info.shape == contexts.shape[1:]:
            if self._size:
                self._pair_with_primary(slot.engine, contexts)
            self._comparer.maybe_compare(slot.engine.run, contexts, routed.prediction)

    async def _report(self, comparison: Comparison) -> None:
        context, ours, theirs, cosine = comparison
        if self._pairing and self._pair and self._pair[1][:2] == (ours.model, ours.version):
            self._pairing.keep(context[0], ours.vectors[0], PairedScores.OLD)
            self._pairing.keep(context[0], theirs.vectors[0], PairedScores.NEW)
        overlap = await self._overlap(ours.vectors[0], theirs.vectors[0])
        self._metrics.shadow_cosine.labels().observe(cosine)
        if overlap is not None:
            self._metrics.shadow_overlap.labels().observe(overlap)
        # the time of a larger batch is not that of one request
        if ours.batch_rows == theirs.batch_rows == 1:
            self._metrics.shadow_extra_seconds.labels().observe(theirs.infer_s - ours.infer_s)

    def _pair_with_primary(self, candidate: PredictEngine, contexts: Floats) -> None:
        """Take the true next vectors in `contexts`; begin again if candidate or primary are others than before."""
        primary = self._slots.get(Alias.PRIMARY)
        if primary is None or primary.engine is None:
            return
        pair = candidate.info.identity, primary.engine.info.identity
        if pair != self._pair:
            self._pair = pair
            self._pairing = Pairing(
                mmap(-1, self._size), 1, self._seconds, PairedScores(self._counter(candidate, pair))
            )
        assert self._pairing
        self._pairing.arrive(contexts)

    def _counter(self, candidate: PredictEngine, pair: tuple[Identity, Identity]) -> Callable[[Floats, Floats], None]:
        """Return what counts differences `(p,)` of a pair by the coherence of the contexts `(p, T, D)`."""
        coherence = Coherence(candidate.model.reference if isinstance(candidate, Engine) else None)
        (model, version, *_), (other, its_version, *_) = pair
        series = partial(self._metrics.shadow_difference.labels, model, version, f"{other}/{its_version}")

        def count(differences: Floats, contexts: Floats) -> None:
            for difference, level in zip(differences.tolist(), coherence.levels(contexts), strict=True):
                series(level).observe(difference)

        return count

    async def _overlap(self, ours: Floats, theirs: Floats) -> float | None:
        """Return the share of passages that a search finds by both vectors; None if there is no corpus for them."""
        slot = self._slots.get(Alias.RETRIEVER)
        if slot is None or not isinstance(slot.engine, Engine) or slot.engine.info.shape[1] != len(ours):
            return None
        deadline = monotonic() + TIMEOUT_S
        found = await slot.engine.run([Search(vector, TOP) for vector in (ours, theirs)], deadline)
        first, second = ({hit.row for hit in hits} for hits in found.hits)
        return len(first & second) / max(len(first), 1)


class Coherence:
    """Tells contexts whose vectors are alike from others, by thirds of the contexts that a net was trained on.

    `reference` has the mean and the standard deviation of the cosine of neighbours; without it, there is one level.
    """

    def __init__(self, reference: ReferenceStats | None) -> None:
        self._reference = reference

    def levels(self, contexts: Floats) -> list[str]:
        """Return the level of each context `(n, T, D)`."""
        if self._reference is None:
            return [COHERENCES[1]] * len(contexts)
        near = STATISTICS.index("neighbour_cosine")
        measured = self._reference.measure(contexts)[:, near]
        deviations = (measured - self._reference.mean[near]) / self._reference.deviation[near]
        return [COHERENCES[level] for level in np.digitize(deviations, (-THIRD, THIRD)).tolist()]
