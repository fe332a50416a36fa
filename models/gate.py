"""The gate: before an alias moves, the new version is judged as it would serve, against the one that serves. No torch.

A damaged version raises `BadCheckpoint`. Each failed check is an `Objection`: it says what is wrong, by how much, and
what would pass. The user may override objections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from time import process_time
from typing import Any

import numpy as np

from models.cores import cores
from models.evaluate import COUNTS, TOLERANCE, find_on_card, mean_cosine, rank_metrics, retrieval_ranks, window_counts
from models.predictor import build_predictor, load_net
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
    MappedCorpus,
    read_corpus,
)
from models.retrieval.retriever import Search, load_retriever
from models.runtimes import worst_cosine
from models.vectors import Floats, normalise
from models.windows import DrawnWindows, Windows, require_windows, scored_windows

# in cosine or R@5, compared with the incumbent: a third of the gain of the best net over a weighted mean
MAX_SCORE_LOSS = 0.005
# ratio of CPU times
MAX_SLOWDOWN = 2.0
# the shortest times of one small net differ by as much from measurement to measurement
TIMING_NOISE_S = 20e-6
# By rows of a batch: how often each version is timed, in turns with the other. The fastest run counts.
ROUNDS = {1: 100, 128: 10}
# the encoder on the card of an import without --encoder
UNSPECIFIED = "unspecified"
_ALWAYS_REQUIRED = ("encoder", "license", "command")
REQUIRED_FIELDS = {
    "net": (*_ALWAYS_REQUIRED, "architecture", "parameters", "scores", "reference", "limits"),
    "corpus": (*_ALWAYS_REQUIRED, "data"),
    "bundle": (*_ALWAYS_REQUIRED, "data", "scores"),
}


class Objection(ValueError):
    """A judgement against a promotion."""


class IncompleteCard(Objection):
    """The card lacks required fields."""


class OtherSpace(Objection):
    """D, T or the encoder differ from those of another alias."""


class NoData(Objection):
    """No data set is available on which the scores of the card can be verified."""


class NotAsCarded(Objection):
    """The scores differ from those on the card."""


class WorseThanIncumbent(Objection):
    """The scores are worse than those of the version that serves."""


class TooSlow(Objection):
    """The version is much slower than the one that serves."""


class PromotionRejected(ValueError):
    """The gate has objections, and the user did not override them."""

    def __init__(self, objections: tuple[Objection, ...]) -> None:
        super().__init__("; ".join(map(str, objections)) + " (--force --why TEXT overrides)")


@dataclass(frozen=True)
class Verdict:
    """The result of all checks: `figures` for JSON, the objections, and the aliases at the time of judgement."""

    figures: dict[str, Any]
    objections: tuple[Objection, ...]
    aliases_before: Mapping[str, str | None]


@dataclass(frozen=True)
class Contender:
    """A version as it would serve: `run` answers contexts `(B, T, D)`; `score` returns its `measure` on windows.

    A bundle has the `corpus` that it searches, in memory or on disk. A corpus without towers has no `run`. `golden`
    is how near a net comes to its golden vectors; that of others is empty.
    """

    id: str
    card: Card
    measure: str
    run: Callable[[Floats], object] | None
    score: Callable[[Windows], float]
    corpus: Corpus | MappedCorpus | None = None
    golden: Mapping[str, float] = field(default_factory=dict)

    def card_score(self, name: str) -> float | None:
        """Return the score of a data set on the card, None if it has no number."""
        score = self.card.scores[name]
        found = score if self.measure == "cosine" else score.get("retrieval", {}).get("without_context", {})
        return found[self.measure] if isinstance(found.get(self.measure), float) else None


@dataclass(frozen=True)
class GateInput:
    """The input of every check: the contender, a comparable incumbent, cards of the other aliases, and data sets."""

    contender: Contender
    incumbent: Contender | None
    others: Mapping[str, Card]
    data: Mapping[str, Corpus | MappedCorpus]

    @cached_property
    def windows(self) -> dict[str, Windows]:
        """The windows of those data sets on which the contender's card has scores, by their name on the card."""
        card, found = self.contender.card, {}
        for corpus in self.data.values():
            for data in _windows_of(corpus, card.context_length):
                name = find_on_card(card, window_counts(data)) if corpus.dim == card.dim else None
                if name and self.contender.card_score(name) is not None:
                    found[name] = data
        return found

    @cached_property
    def scores(self) -> dict[str, float]:
        """The contender's scores on these windows."""
        return {name: self.contender.score(data) for name, data in self.windows.items()}


def _windows_of(corpus: Corpus | MappedCorpus, length: int) -> Iterator[Windows]:
    """Yield all windows of a corpus in memory, and those that were drawn for a card if they are others."""
    if isinstance(corpus, Corpus):
        yield require_windows(corpus, length)
    drawn = scored_windows(corpus, length)
    if isinstance(drawn, DrawnWindows):
        yield drawn


def judge(registry: Registry, alias: str, version: Version, data: Mapping[str, Corpus]) -> Verdict:
    """Judge whether `alias` may move to `version`, on `data` and on the corpus of the alias `retriever`.

    A `candidate` is not compared with its predecessor, since it answers no requests.

    Raises:
        BadCheckpoint: the version is damaged, or cannot be served under this alias.
        NoWindows: a data set has no window.
    """
    aliases = registry.aliases()
    contender = _load(alias, version)
    cards = _read_cards(registry, aliases)
    others = {other: card for other, card in cards.items() if other != alias}
    data_sets = {**_known_data(contender, registry, cards.get(Alias.RETRIEVER)), **data}
    case = GateInput(contender, _incumbent(registry, alias, contender), others, data_sets)
    figures: dict[str, Any] = {"incumbent": aliases.get(alias)}
    objections = []
    for name, check in CHECKS.items():
        try:
            figures[name] = check(case)
        except Objection as objection:
            objections.append(objection)
    return Verdict(figures, tuple(objections), {each: aliases.get(each) for each in ALIASES})


def foresee(registry: Registry, alias: str, version: Version) -> Objection | None:
    """Return the first objection of `judge` that cards alone show, or None: nothing is loaded or measured."""
    cards = _read_cards(registry, registry.aliases())
    others = {other: card for other, card in cards.items() if other != alias}
    contender = Contender(version.id, read_card(version.path), "", None, lambda data: 0.0)
    try:
        for check in (check_card, check_space):
            check(GateInput(contender, None, others, {}))
    except Objection as objection:
        return objection
    return None


def _load(alias: str, version: Version) -> Contender:
    return _load_corpus(version) if alias == Alias.RETRIEVER else _load_net(version)


def _load_net(version: Version) -> Contender:
    """Load a net; its measure is the mean cosine to the true next vector."""
    checkpoint = load_net(version.path)
    run = build_predictor(checkpoint, "cpu", cores()).predict_batch
    worst = worst_cosine(run(checkpoint.golden_context), checkpoint.golden_vector)
    golden = {"contexts": len(checkpoint.golden_context), "worst_cosine": worst}
    return Contender(version.id, checkpoint.card, "cosine", run, lambda data: mean_cosine(run, data), golden=golden)


def _load_corpus(version: Version) -> Contender:
    """Load a corpus; its measure, if it has towers, is how often the true next passage is among the first five."""
    loaded = load_retriever(version.path, cores())

    def search(contexts: Floats) -> object:
        return loaded.search_batch([Search(None, 10, context=context) for context in contexts])

    def recall(data: Windows) -> float:
        return rank_metrics(retrieval_ranks(loaded, data, exclude_context=True))["R@5"]

    has_towers = loaded.towers is not None
    assert isinstance(loaded.corpus, Corpus | MappedCorpus)
    corpus = loaded.corpus if has_towers else None
    return Contender(version.id, loaded.card, "R@5", search if has_towers else None, recall, corpus)


def _incumbent(registry: Registry, alias: str, contender: Contender) -> Contender | None:
    """Return the version that serves under the alias, if it is sound, another one, and comparable."""
    try:
        version = registry.resolve(alias)
        if alias == Alias.CANDIDATE or version.id == contender.id:
            return None
        incumbent = _load(alias, version)
    except (UnknownVersion, BadCheckpoint):
        return None
    return incumbent if are_comparable(contender, incumbent) else None


def are_comparable(one: Contender, other: Contender) -> bool:
    """Return whether both answer contexts of the same T and D and, if both search a corpus, search the same one."""
    shapes = {(each.card.context_length, each.card.dim) for each in (one, other) if each.run}
    if one.corpus and other.corpus:
        return len(shapes) == 1 and _have_equal_vectors(one.corpus, other.corpus)
    return bool(one.run and other.run) and len(shapes) == 1


def _have_equal_vectors(one: Corpus | MappedCorpus, other: Corpus | MappedCorpus) -> bool:
    if len(one) != len(other):
        return False
    return all(
        np.array_equal(ours, theirs) for (_, ours), (_, theirs) in zip(one.blocks(), other.blocks(), strict=True)
    )


def _read_cards(registry: Registry, aliases: Mapping[str, str]) -> dict[str, Card]:
    found = {}
    for alias, identity in aliases.items():
        try:
            found[alias] = read_card(registry.find(identity).path)
        except (UnknownVersion, BadCard):
            # it cannot serve, so nothing can conflict with it
            continue
    return found


def _known_data(contender: Contender, registry: Registry, passages: Card | None) -> Mapping[str, Corpus | MappedCorpus]:
    """Return the corpus of a bundle; for a net that of the retriever, if its size is on the card of the net."""
    if contender.corpus:
        return {contender.id: contender.corpus}
    size = {count: passages.data.get(count) for count in ("chunks", "articles")} if passages else {"chunks": None}
    if not any(size.items() <= score.items() for score in contender.card.scores.values()):
        return {}
    try:
        return {"retriever": read_corpus(registry.resolve(Alias.RETRIEVER).path)}
    except (UnknownVersion, BadCorpus):
        return {}


def check_card(case: GateInput) -> list[str]:
    """Return the required fields of the card; raises `IncompleteCard` if one is missing."""
    card = case.contender.card
    required = REQUIRED_FIELDS["bundle" if case.contender.corpus else card.kind]
    missing = [name for name in required if not getattr(card, name) or getattr(card, name) == UNSPECIFIED]
    missing += [f"counts of {name}" for name, score in card.scores.items() if not {*COUNTS, "cosine"} <= score.keys()]
    if missing:
        raise IncompleteCard(
            f"the card of {case.contender.id} lacks {', '.join(missing)}: create the version again with them "
            "(`lvm train` has --val; `lvm import` has --data, --encoder and --license)"
        )
    return list(required)


def check_golden(case: GateInput) -> Mapping[str, float]:
    """Return the number of golden contexts and the worst cosine; a net that fails them was not even loaded."""
    return case.contender.golden


def check_space(case: GateInput) -> dict[str, Any]:
    """Return D, T and encoder; raises `OtherSpace` if another alias has different ones."""
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
    """Return D, T and encoder of a version; a corpus without towers accepts contexts of any length T."""
    is_plain = card.kind == "corpus" and "towers" not in card.config
    return {"D": card.dim, **({} if is_plain else {"T": card.context_length}), "encoder": card.encoder}


def _describe_space(space: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} = {value}" for axis, value in space.items())


def check_scores(case: GateInput) -> dict[str, Any]:
    """Return the recomputed scores and those of the card.

    Raises:
        NoData: no data set of the card is available.
        NotAsCarded: the scores differ by more than `TOLERANCE`.
    """
    contender, found = case.contender, {}
    if contender.card.scores and not case.windows:
        raise NoData(
            f"the card of {contender.id} has scores on {', '.join(contender.card.scores)}; available: "
            f"{', '.join(case.data) or 'no data'}. --data DIR names a data set"
        )
    for name, score in case.scores.items():
        on_card = contender.card_score(name)
        assert on_card is not None
        if not abs(score - on_card) <= TOLERANCE:
            raise NotAsCarded(
                f"{contender.id} scores {contender.measure} {score:.4f} on {name}, its card says {on_card:.4f}: "
                f"{on_card - score:+.4f}, allowed difference: {TOLERANCE}; "
                "the card is wrong: create the version again so that it is scored again"
            )
        found[name] = {contender.measure: score, "card": on_card}
    return found


def check_incumbent(case: GateInput) -> dict[str, Any]:
    """Return the incumbent's scores on the same data; raises `WorseThanIncumbent` beyond `MAX_SCORE_LOSS`."""
    contender, found = case.contender, {}
    for name, data in case.windows.items() if case.incumbent else ():
        assert case.incumbent
        score, theirs = case.scores[name], case.incumbent.score(data)
        if not theirs - score <= MAX_SCORE_LOSS:
            raise WorseThanIncumbent(
                f"{contender.id} scores {contender.measure} {score:.4f} on {name}, {case.incumbent.id} {theirs:.4f}: "
                f"{theirs - score:.4f} less, tolerated: {MAX_SCORE_LOSS}; {theirs - MAX_SCORE_LOSS:.4f} would pass"
            )
        found[name] = {contender.measure: theirs}
    return found


def check_latency(case: GateInput) -> dict[str, Any]:
    """Return the shortest CPU times in milliseconds by batch size; raises `TooSlow` beyond `MAX_SLOWDOWN`.

    Less than `TIMING_NOISE_S` is no objection.
    """
    found = {}
    for rows in ROUNDS if case.incumbent else ():
        assert case.incumbent
        ours, theirs = _best_times(case.contender, case.incumbent, rows)
        limit = max(MAX_SLOWDOWN * theirs, theirs + TIMING_NOISE_S)
        if ours > limit:
            raise TooSlow(
                f"{case.contender.id} takes {1e3 * ours:.3f} ms of CPU time for a batch of {rows}, "
                f"{case.incumbent.id} {1e3 * theirs:.3f} ms: {ours / theirs:.1f} times as long, "
                f"tolerated: {MAX_SLOWDOWN:g}; {1e3 * limit:.3f} ms would pass"
            )
        found[str(rows)] = {"ms": 1e3 * ours, "incumbent_ms": 1e3 * theirs, "ratio": ours / theirs}
    return found


def _best_times(one: Contender, other: Contender, rows: int) -> tuple[float, float]:
    """Return the shortest CPU time in seconds that each takes for a batch of `rows`, measured in turns.

    CPU time does not count waiting for other programs on the machine.
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


CHECKS: Mapping[str, Callable[[GateInput], Any]] = {
    "card": check_card,
    "golden": check_golden,
    "space": check_space,
    "scores": check_scores,
    "incumbent_scores": check_incumbent,
    "latency": check_latency,
}
