"""The gate before an alias: a version is judged as it would serve, beside the one that serves. Knows no torch.

Damage is raised. A judgement is an `Objection`, which says what is wrong, by how much and what would change it, and
which whoever promotes may override.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from time import process_time
from typing import Any

import numpy as np

from models.evaluate import COUNTS, TOLERANCE, find_on_card, mean_cosine, rank_metrics, retrieval_ranks, window_counts
from models.predictor import load_predictor
from models.registry.alias import ALIASES, Alias
from models.registry.card import BadCard, Card, read_card
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import (
    Registry,
    UnknownVersion,
    Version,
)
from models.retrieval.corpus import (
    BadCorpus,
    Corpus,
    read_corpus,
)
from models.retrieval.retriever import Search, load_retriever
from models.vectors import Floats, normalise
from models.windows import Windows, require_windows

MAX_SCORE_LOSS = 0.005  # cosine, or R@5, below the incumbent's: a third of what the best net gains on a weighted mean
MAX_SLOWDOWN = 2.0  # times as much time of processor as the incumbent
ROUNDS = {1: 100, 128: 10}  # by rows of a batch: how often it is timed, in turns with the incumbent's; the best counts
UNSPECIFIED = "unspecified"  # the encoder of a card whose maker did not say
_ALWAYS_REQUIRED = ("encoder", "license", "command")
REQUIRED_FIELDS = {
    "net": (*_ALWAYS_REQUIRED, "architecture", "parameters", "scores", "reference", "limits"),
    "corpus": (*_ALWAYS_REQUIRED, "data"),
    "bundle": (*_ALWAYS_REQUIRED, "data", "scores"),
}


class Objection(ValueError):
    """A judgement against a promotion."""


class IncompleteCard(Objection):
    """The card leaves out what a card must say."""


class OtherSpace(Objection):
    """Its vectors are not those that other aliases speak."""


class NoData(Objection):
    """Nothing is at hand on which the scores of its card could be put to the test."""


class NotAsCarded(Objection):
    """It does not score what its card says."""


class WorseThanIncumbent(Objection):
    """It scores less than the version that serves."""


class TooSlow(Objection):
    """It takes much longer than the version that serves."""


class PromotionRejected(ValueError):
    """Some objections that nobody overrode."""

    def __init__(self, objections: tuple[Objection, ...]) -> None:
        super().__init__("; ".join(map(str, objections)) + " (--force --why TEXT overrides)")


@dataclass(frozen=True)
class Verdict:
    """What was found: `figures` ready for JSON, the objections, and the aliases that it was judged by."""

    figures: dict[str, Any]
    objections: tuple[Objection, ...]
    aliases_before: Mapping[str, str | None]


@dataclass(frozen=True)
class Contender:
    """A version as it would serve: `run` answers contexts `(B, T, D)`, `score` gives the `measure` on windows.

    A bundle has a `home`, the corpus that it searches; a corpus without towers answers no contexts.
    """

    id: str
    card: Card
    measure: str
    run: Callable[[Floats], object] | None
    score: Callable[[Windows], float]
    corpus: Corpus | None = None

    def card_score(self, name: str) -> float | None:
        """Return what its card says that it scores on a data set, None where that is no figure."""
        score = self.card.scores[name]
        found = score if self.measure == "cosine" else score.get("retrieval", {}).get("without_context", {})
        return found[self.measure] if isinstance(found.get(self.measure), float) else None


@dataclass(frozen=True)
class Case:
    """What is judged: a contender, its like that serves, the cards of the other aliases, the data at hand."""

    contender: Contender
    incumbent: Contender | None
    others: Mapping[str, Card]
    data: Mapping[str, Corpus]

    @cached_property
    def windows(self) -> dict[str, Windows]:
        """The windows of the data at hand that the contender's card has scores on, by their name there."""
        card, found = self.contender.card, {}
        for corpus in self.data.values():
            data = require_windows(corpus, card.context_length)
            name = find_on_card(card, window_counts(data)) if corpus.dim == card.dim else None
            if name and self.contender.card_score(name) is not None:
                found[name] = data
        return found

    @cached_property
    def scores(self) -> dict[str, float]:
        """What the contender scores on them."""
        return {name: self.contender.score(data) for name, data in self.windows.items()}


def judge(registry: Registry, alias: str, version: Version, data: Mapping[str, Corpus]) -> Verdict:
    """Judge `version` as what `alias` is to point at, on the `data` given and the corpus that `retriever` points at.

    `candidate` answers nobody: there it need not be the equal of what it follows.

    Raises:
        BadCheckpoint: it is damaged, or cannot be served under that alias.
        NoWindows: a data set has no window.
    """
    since = registry.aliases()
    contender = _load(alias, version)
    known = _read_cards(registry, since)
    others = {other: card for other, card in known.items() if other != alias}
    at_hand = {**_known_data(contender, registry, known.get(Alias.RETRIEVER)), **data}
    case = Case(contender, _incumbent(registry, alias, contender), others, at_hand)
    figures: dict[str, Any] = {"incumbent": since.get(alias)}
    objections = []
    for name, check in CHECKS.items():
        try:
            figures[name] = check(case)
        except Objection as objection:
            objections.append(objection)
    return Verdict(figures, tuple(objections), {every: since.get(every) for every in ALIASES})


def _load(alias: str, version: Version) -> Contender:
    return _load_corpus(version) if alias == Alias.RETRIEVER else _load_net(version)


def _load_net(version: Version) -> Contender:
    """Return a net, measured by the mean cosine to the true next vector."""
    net = load_predictor(version.path, "cpu", os.cpu_count() or 1)
    return Contender(
        version.id, net.card, "cosine", net.predict_batch, lambda data: mean_cosine(net.predict_batch, data)
    )


def _load_corpus(version: Version) -> Contender:
    """Return a corpus, measured, if it has towers, by how often the true next passage is among the first five."""
    loaded = load_retriever(version.path, os.cpu_count() or 1)

    def search(contexts: Floats) -> object:
        return loaded.search_batch([Search(None, 10, context=context) for context in contexts])

    def recall(data: Windows) -> float:
        return rank_metrics(retrieval_ranks(loaded, data, exclude_context=True))["R@5"]

    towers = loaded.towers is not None
    home = read_corpus(version.path) if towers else None
    return Contender(version.id, loaded.card, "R@5", search if towers else None, recall, home)


def _incumbent(registry: Registry, alias: str, contender: Contender) -> Contender | None:
    """Return what the contender is measured by: another version that serves, is sound, and answers alike."""
    try:
        version = registry.resolve(alias)
        if alias == Alias.CANDIDATE or version.id == contender.id:
            return None
        serves = _load(alias, version)
    except (UnknownVersion, BadCheckpoint):
        return None
    return serves if _are_alike(contender, serves) else None


def _are_alike(one: Contender, other: Contender) -> bool:
    """Say whether both answer contexts of the same T and D, with passages of the same corpus where with any."""
    shapes = {(each.card.context_length, each.card.dim) for each in (one, other) if each.run}
    if one.corpus and other.corpus:
        return len(shapes) == 1 and np.array_equal(one.corpus.vectors, other.corpus.vectors)
    return bool(one.run and other.run) and len(shapes) == 1


def _read_cards(registry: Registry, aliases: Mapping[str, str]) -> dict[str, Card]:
    found = {}
    for alias, identity in aliases.items():
        try:
            found[alias] = read_card(registry.find(identity).path)
        except (UnknownVersion, BadCard):
            continue  # it serves nothing that anything could clash with
    return found


def _known_data(contender: Contender, registry: Registry, passages: Card | None) -> dict[str, Corpus]:
    """Return a bundle's own corpus; for a net the retriever's, where its size is on the net's card."""
    if contender.corpus:
        return {contender.id: contender.corpus}
    size = {count: passages.data.get(count) for count in ("chunks", "articles")} if passages else {"chunks": None}
    if not any(size.items() <= score.items() for score in contender.card.scores.values()):
        return {}
    try:
        return {"retriever": read_corpus(registry.resolve(Alias.RETRIEVER).path)}
    except (UnknownVersion, BadCorpus):
        return {}


def check_card(case: Case) -> list[str]:
    """Return what the card says of all that it must say; raises `IncompleteCard`."""
    card = case.contender.card
    needed = REQUIRED_FIELDS["bundle" if case.contender.corpus else card.kind]
    lacks = [name for name in needed if not getattr(card, name) or getattr(card, name) == UNSPECIFIED]
    lacks += [f"counts of {name}" for name, score in card.scores.items() if not {*COUNTS, "cosine"} <= score.keys()]
    if lacks:
        raise IncompleteCard(
            f"the card of {case.contender.id} lacks {', '.join(lacks)}: make it anew with them (lvm import has "
            "--data, --encoder and --license)"
        )
    return list(needed)


def check_space(case: Case) -> dict[str, Any]:
    """Return D, T and encoder; raises `OtherSpace` where another alias is of others."""
    ours = _vector_space(case.contender.card)
    for alias, card in case.others.items():
        theirs = _vector_space(card)
        if any(ours[axis] != theirs[axis] for axis in ours.keys() & theirs.keys()):
            raise OtherSpace(
                f"{case.contender.id} has {_describe_space(ours)}; {alias} has {_describe_space(theirs)}. "
                "A caller of one would get errors from the other: promote a version with the same values"
            )
    return ours


def _vector_space(card: Card) -> dict[str, Any]:
    """Return what vectors a version is about; a corpus without towers takes contexts of any length."""
    is_plain = card.kind == "corpus" and "towers" not in card.config
    return {"D": card.dim, **({} if is_plain else {"T": card.context_length}), "encoder": card.encoder}


def _describe_space(space: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} = {value}" for axis, value in space.items())


def check_scores(case: Case) -> dict[str, Any]:
    """Return the scores recomputed beside the card's.

    Raises:
        NoData: no data set of the card is at hand.
        NotAsCarded: they differ by more than `TOLERANCE`.
    """
    us, found = case.contender, {}
    if us.card.scores and not case.windows:
        raise NoData(
            f"no data set on the card of {us.id} ({', '.join(us.card.scores)}) is at hand, nor is "
            f"{', '.join(case.data) or 'any other'} on it: --data DIR names where one lies"
        )
    for name, score in case.scores.items():
        promised = us.card_score(name)
        assert promised is not None
        if not abs(score - promised) <= TOLERANCE:
            raise NotAsCarded(
                f"{us.id} scores {us.measure} {score:.4f} on {name}, its card says {promised:.4f}: "
                f"{promised - score:+.4f}, tolerated is {TOLERANCE}; promote one whose card says what it scores"
            )
        found[name] = {us.measure: score, "card": promised}
    return found


def check_incumbent(case: Case) -> dict[str, Any]:
    """Return the incumbent's scores on the same data; raises `WorseThanIncumbent` beyond `MAY_WORSEN`."""
    us, found = case.contender, {}
    for name, data in case.windows.items() if case.incumbent else ():
        assert case.incumbent
        score, theirs = case.scores[name], case.incumbent.score(data)
        if not theirs - score <= MAX_SCORE_LOSS:
            raise WorseThanIncumbent(
                f"{us.id} scores {us.measure} {score:.4f} on {name}, {case.incumbent.id} {theirs:.4f}: "
                f"{theirs - score:.4f} less, tolerated is {MAX_SCORE_LOSS}; {theirs - MAX_SCORE_LOSS:.4f} would do"
            )
        found[name] = {us.measure: theirs}
    return found


def check_latency(case: Case) -> dict[str, Any]:
    """Return the least times in milliseconds by batch size; raises `TooSlow` beyond `MAY_SLOW`."""
    found = {}
    for rows in ROUNDS if case.incumbent else ():
        assert case.incumbent
        ours, theirs = _best_times(case.contender, case.incumbent, rows)
        if ours > MAX_SLOWDOWN * theirs:
            raise TooSlow(
                f"{case.contender.id} takes {1e3 * ours:.3f} ms of processor for a batch of {rows}, "
                f"{case.incumbent.id} {1e3 * theirs:.3f} ms: {ours / theirs:.1f} times as long, "
                f"tolerated is {MAX_SLOWDOWN:g}; {1e3 * MAX_SLOWDOWN * theirs:.3f} ms would do"
            )
        found[str(rows)] = {"ms": 1e3 * ours, "incumbent_ms": 1e3 * theirs, "ratio": ours / theirs}
    return found


def _best_times(one: Contender, other: Contender, rows: int) -> tuple[float, float]:
    """Return the least seconds of processor that each takes for a batch of `rows`, measured in turns.

    Of processor, not by the clock: what else the machine does, which two threads would wait for, is no fault of a net.
    """
    shape = rows, one.card.context_length, one.card.dim
    contexts = normalise(np.random.default_rng(0).standard_normal(shape))
    runs = [each.run for each in (one, other) if each.run]
    times = [[_cpu_seconds(run, contexts) for run in runs] for _ in range(ROUNDS[rows])]
    ours, theirs = np.min(times, axis=0).tolist()
    return ours, theirs


def _cpu_seconds(run: Callable[[Floats], object], contexts: Floats) -> float:
    began = process_time()
    run(contexts)
    return process_time() - began


CHECKS: Mapping[str, Callable[[Case], Any]] = {
    "card": check_card,
    "space": check_space,
    "scores": check_scores,
    "incumbent_scores": check_incumbent,
    "latency": check_latency,
}
