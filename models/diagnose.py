"""Diagnosis of a net: does it predict the next chunk, or copy and average what it read? No torch.

Chunks are counted from the end of the context: offset 0 is the last chunk read, -1 the one before it, +1 the true next
chunk. All figures are means over the same stretches: T chunks that the net reads, and the `steps` chunks that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bootstrap import intervals
from models.evaluate import baselines
from models.registry.card import rounded
from models.registry.checkpoint import BadCheckpoint
from models.retrieval.corpus import Corpus, MappedVectors
from models.vectors import Floats
from models.windows import NoWindows, PairCorpus, Rows, require_windows, window_starts

Predict = Callable[[Floats], Floats]
Progress = Callable[[int, int], None]

STEPS, SAMPLE = 3, 10_000
# windows for the diagnosis on a card
CARD_SAMPLE = 1_000
# An answer with this cosine to a chunk counts as that chunk.
SAME = 0.95
# Smaller differences of a cosine are not worth a word.
MATTERS = 0.001
NET, TRUE_NEXT = "net", "true_next"
TERCILES = ("low", "middle", "high")
# of the chunks read, how many are shown
_SHOWN = 5
_BLOCK = 512


@dataclass(frozen=True)
class Stretches:
    """Windows with what follows: the rows `(W, T + S)` of consecutive chunks, and the article of each `(W,)`.

    `length` is T, and `total` is the number of windows that W were drawn from.
    """

    rows: Rows
    article: NDArray[np.int32]
    length: int
    total: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps(self) -> int:
        """Chunks after the context (S)."""
        return int(self.rows.shape[1]) - self.length


@dataclass(frozen=True)
class _Block:
    """Vectors of some stretches `(B, T + S, D)`, the next chunk of another article `(B, D)`, an order `(B, T)`."""

    vectors: Floats
    elsewhere: Floats
    order: Rows
    length: int

    @property
    def contexts(self) -> Floats:
        """The contexts, `(B, T, D)`."""
        return np.ascontiguousarray(self.vectors[:, : self.length])

    @property
    def shown(self) -> Floats:
        """The last chunks read, at most five, and those that follow, `(B, O, D)`."""
        return self.vectors[:, max(self.length - _SHOWN, 0) :]

    @property
    def following(self) -> Floats:
        """The chunks that follow, `(B, S, D)`."""
        return self.vectors[:, self.length :]


@dataclass(frozen=True)
class _Cosines:
    """Cosines of answers by window.

    Args:
        offsets: to the chunk at each offset, `(W, O)`.
        elsewhere: to the next chunk of a window of another article, `(W,)`.
        order: of the answer to each altered context, to the true next chunk, `(W, A)`; A is 0 if T is 1.
        rollout: of the answer at each step to the true chunk, `(W, S)`.
    """

    offsets: Floats
    elsewhere: Floats
    order: Floats
    rollout: Floats

    @property
    def following(self) -> Floats:
        """To the true next chunk, `(W,)`."""
        return self.rollout[:, 0]

    @property
    def order_losses(self) -> Floats:
        """What each altered context loses in cosine to the true next chunk, `(A, W)`."""
        return self.following - self.order.T

    def take(self, which: NDArray[Any]) -> _Cosines:
        """Return those of the windows that a mask selects."""
        return _Cosines(self.offsets[which], self.elsewhere[which], self.order[which], self.rollout[which])


def _last_only(contexts: Floats, order: Rows) -> Floats:
    return np.repeat(contexts[:, -1:], contexts.shape[1], axis=1)


def _first_only(contexts: Floats, order: Rows) -> Floats:
    return np.repeat(contexts[:, :1], contexts.shape[1], axis=1)


# By name: what is done to a context `(B, T, D)`, with an order `(B, T)` that no context has.
ABLATIONS: Mapping[str, Callable[[Floats, Rows], Floats]] = {
    "shuffled": lambda contexts, order: np.take_along_axis(contexts, order[:, :, None], 1),
    "reversed": lambda contexts, order: contexts[:, ::-1],
    "last_only": _last_only,
    "first_only": _first_only,
}


def stretches(
    corpus: Corpus | MappedVectors, length: int, steps: int = STEPS, sample: int = SAMPLE, seed: int = 0
) -> Stretches:
    """Return windows of `length` chunks that are followed by `steps` more; `sample` of them, drawn, if there are more.

    Pairs have one following chunk, whatever `steps` is.

    Raises:
        NoWindows: no article has so many consecutive chunks.
    """
    if isinstance(corpus, PairCorpus):
        pairs = require_windows(corpus, length)
        rows, article = np.column_stack([pairs.rows(), pairs.target]), pairs.article
    else:
        start = window_starts(corpus, length + steps - 1)
        rows, article = start[:, None] + np.arange(length + steps), corpus.article[start]
    if not len(rows):
        raise NoWindows(f"no article has {length + steps} consecutive chunks: T = {length}, and {steps} that follow")
    if len(rows) <= sample:
        return Stretches(rows, article, length, len(rows))
    drawn = np.sort(np.random.default_rng(seed).choice(len(rows), sample, replace=False))
    return Stretches(rows[drawn], article[drawn], length, len(rows))


def diagnose(
    predict: Predict,
    corpus: Corpus | MappedVectors,
    data: Stretches,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Return the diagnosis of a net that maps contexts `(B, T, D)` to unit vectors `(B, D)`, for JSON.

    The same `data` and `seed` give the same figures. Intervals are of 95 %, by bootstrap over articles; None if there
    is one article. `progress` is called with (blocks done, blocks in all).

    Raises:
        BadCheckpoint: an answer is not finite.
    """
    found = _measure({NET: predict, **baselines(data.length, None)}, corpus, data, seed, progress)
    offsets = _offsets(data)
    sizes = {"context_length": data.length, "steps": data.steps, "drawn_from": data.total, "seed": seed}
    whole = _report(found, data.article, offsets)
    return {**sizes, "offsets": offsets, **whole, "coherence": _by_coherence(found, data, _coherence(corpus, data))}


def card_diagnosis(
    predict: Predict, corpus: Corpus | MappedVectors, length: int, sample: int = CARD_SAMPLE
) -> dict[str, Any]:
    """Return the diagnosis of a net for its card, of at most `sample` windows; raises as `stretches` and `diagnose`."""
    return for_card(diagnose(predict, corpus, stretches(corpus, length, sample=sample)))


def for_card(diagnosis: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a diagnosis that a card has."""
    cosines = zip(diagnosis["offsets"], diagnosis["cosine"][NET], strict=True)
    figures = {
        "verdict": diagnosis["verdict"]["kind"],
        "text": diagnosis["verdict"]["text"],
        "windows": diagnosis["windows"],
        "cosine": {f"{offset:+}": cosine for offset, cosine in cosines},
        "order_loss": {name: altered["loss"]["mean"] for name, altered in diagnosis["order"].items()},
        "rollout": diagnosis["rollout"][NET],
    }
    return {name: rounded(value) for name, value in figures.items()}


def _offsets(data: Stretches) -> list[int]:
    return list(range(1 - min(data.length, _SHOWN), data.steps + 1))


def _measure(
    systems: Mapping[str, Predict], corpus: Corpus | MappedVectors, data: Stretches, seed: int, progress: Progress
) -> dict[str, _Cosines]:
    """Return the cosines of every system, and of the true next chunk as if it were an answer."""
    parts: dict[str, list[_Cosines]] = {name: [] for name in (*systems, TRUE_NEXT)}
    numbers = np.array_split(np.arange(len(data)), len(data) // _BLOCK + 1)
    elsewhere, order = _other_article(data.article), _orders(len(data), data.length, seed)
    for done, which in enumerate(numbers, 1):
        block = _read(corpus, data, which, elsewhere[which], order[which])
        for name, predict in systems.items():
            parts[name].append(_ask(predict, block))
        parts[TRUE_NEXT].append(_nearness(block.following[:, 0], block))
        progress(done, len(numbers))
    return {name: _joined(found) for name, found in parts.items()}


def _joined(parts: list[_Cosines]) -> _Cosines:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return _Cosines(*map(np.concatenate, columns))


def _read(corpus: Corpus | MappedVectors, data: Stretches, which: Rows, elsewhere: Rows, order: Rows) -> _Block:
    rows = data.rows[which]
    vectors = corpus.vectors_at(rows.ravel()).reshape(*rows.shape, corpus.dim)
    return _Block(vectors, corpus.vectors_at(data.rows[elsewhere, data.length]), order, data.length)


def _other_article(article: NDArray[Any]) -> Rows:
    """Return for each window `(W,)` the number of one of another article; if there is one article, any number."""
    by_article = np.argsort(article, kind="stable")
    found = np.empty_like(by_article)
    found[by_article] = np.roll(by_article, len(article) // 2)
    first, last = by_article[[0, -1]]
    end = np.where(article[first] != article, first, last)
    return np.where(article[found] == article, end, found)


def _orders(count: int, length: int, seed: int) -> Rows:
    """Return random orders `(count, length)`, none of which is that of the text if `length` is more than 1."""
    orders = np.argsort(np.random.default_rng(seed).random((count, length)), axis=1)
    unchanged = (orders == np.arange(length)).all(axis=1)
    orders[unchanged] = np.roll(np.arange(length), 1)
    return orders


def _ask(predict: Predict, block: _Block) -> _Cosines:
    answers = predict(block.contexts)
    if not np.isfinite(answers).all():
        raise BadCheckpoint("an answer of the net is not finite")
    near = _nearness(answers, block)
    truth = block.following[:, 0]
    altered = [change(block.contexts, block.order) for change in ABLATIONS.values() if block.length > 1]
    order = [np.vecdot(predict(np.ascontiguousarray(contexts)), truth) for contexts in altered]
    rollout = np.stack(list(_rollout(predict, answers, block)), axis=1)
    return _Cosines(near.offsets, near.elsewhere, np.stack(order, axis=1) if order else near.order, rollout)


def _nearness(answers: Floats, block: _Block) -> _Cosines:
    """Return the cosines of answers `(B, D)` to the chunks of their stretch, and of another article."""
    none = np.zeros((len(answers), 0), np.float32)
    return _Cosines(np.vecdot(block.shown, answers[:, None]), np.vecdot(block.elsewhere, answers), none, none)


def _rollout(predict: Predict, answers: Floats, block: _Block) -> Iterator[Floats]:
    """Yield the cosine `(B,)` to the true chunk at each step; each answer is the last vector of the next context."""
    contexts = block.contexts
    for step in range(block.following.shape[1]):
        if step:
            contexts = np.concatenate([contexts[:, 1:], answers[:, None]], axis=1)
            answers = predict(contexts)
        yield np.vecdot(answers, block.following[:, step])


def _coherence(corpus: Corpus | MappedVectors, data: Stretches) -> Floats:
    """Return for each window `(W,)` the mean cosine of adjacent chunks of its article; of pairs, of its windows."""
    first, second, article = _adjacent(corpus, data)
    known, place = np.unique(article, return_inverse=True)
    sums = np.zeros(len(known))
    for which in np.array_split(np.arange(len(first)), len(first) // (8 * _BLOCK) + 1):
        cosines = np.vecdot(corpus.vectors_at(first[which]), corpus.vectors_at(second[which]))
        sums += np.bincount(place[which], cosines, len(known))
    means = sums / np.bincount(place)
    found: Floats = means[np.searchsorted(known, data.article)].astype(np.float32)
    return found


def _adjacent(corpus: Corpus | MappedVectors, data: Stretches) -> tuple[Rows, Rows, NDArray[np.int32]]:
    """Return the rows of adjacent chunks and their article, of the articles in `data`."""
    if isinstance(corpus, PairCorpus):
        article = np.repeat(data.article, data.rows.shape[1] - 1)
        return data.rows[:, :-1].ravel(), data.rows[:, 1:].ravel(), article
    follows = (np.diff(corpus.article) == 0) & (np.diff(corpus.position) == 1)
    first = np.flatnonzero(follows & np.isin(corpus.article[:-1], data.article))
    return first, first + 1, corpus.article[first]


def _by_coherence(found: Mapping[str, _Cosines], data: Stretches, coherence: Floats) -> list[dict[str, Any]]:
    """Return a report for each tercile of the articles, by coherence; none if there are fewer than three articles."""
    articles, first, place = np.unique(data.article, return_index=True, return_inverse=True)
    if len(articles) < len(TERCILES):
        return []
    rank = np.argsort(np.argsort(coherence[first], kind="stable"))
    tercile = (rank * len(TERCILES) // len(articles))[place]
    masks = {name: tercile == number for number, name in enumerate(TERCILES)}
    return [
        {
            "coherence": name,
            "adjacent_cosine": float(coherence[mask].mean()),
            **_report({key: one.take(mask) for key, one in found.items()}, data.article[mask], _offsets(data)),
        }
        for name, mask in masks.items()
    ]


def _report(found: Mapping[str, _Cosines], article: NDArray[np.int32], offsets: list[int]) -> dict[str, Any]:
    """Return the means of all cosines, differences with their intervals, and the verdict."""
    net, last = found[NET], offsets.index(0)
    others = {name: one for name, one in found.items() if name not in (NET, TRUE_NEXT)}
    best = max(others, key=lambda name: float(others[name].following.mean()))
    nearest = int(net.offsets[:, : last + 1].mean(axis=0).argmax())
    altered = list(ABLATIONS)[: len(net.order_losses)]
    steps = [f"{step:+}" for step in offsets[last + 1 :]]
    known = _differences(
        {
            "margin": net.following - net.offsets[:, last],
            "nearest": net.following - net.offsets[:, nearest],
            "others": net.following - net.elsewhere,
            **dict(zip(altered, net.order_losses, strict=True)),
            **dict(zip(steps, (net.rollout - others[best].rollout).T, strict=True)),
        },
        article,
    )
    losses = {name: _means(one.order_losses.T) for name, one in others.items()}
    figures = {
        "windows": len(article),
        "articles": len(np.unique(article)),
        "cosine": {name: _means(one.offsets) for name, one in found.items()},
        "other_articles": {name: float(one.elsewhere.mean()) for name, one in found.items()},
        "margin": known["margin"],
        "nearest_read": {"offset": offsets[nearest], "margin": known["nearest"]},
        "beyond_other_articles": known["others"],
        "order": {
            name: {"loss": known[name], "baselines": {each: loss[number] for each, loss in losses.items()}}
            for number, name in enumerate(altered)
        },
        "rollout": {name: _means(one.rollout) for name, one in {NET: net, **others}.items()},
        "best_baseline": best,
        "rollout_gain": [known[step] for step in steps],
    }
    return {**figures, "verdict": _verdict(figures, offsets)}


def _means(values: Floats) -> list[float]:
    """Return the mean of each column."""
    means: list[float] = values.mean(axis=0).tolist()
    return means


def _differences(columns: Mapping[str, Floats], article: NDArray[np.int32]) -> dict[str, dict[str, Any]]:
    """Return mean and interval of each difference `(W,)`; the interval is None if there is one article."""
    values = np.stack(list(columns.values()), axis=1)
    is_single = len(np.unique(article)) == 1
    known = [None] * len(columns) if is_single else intervals(values, article)
    each = zip(columns, _means(values), known, strict=True)
    return {name: {"mean": mean, "interval": interval} for name, mean, interval in each}


def _verdict(figures: Mapping[str, Any], offsets: list[int]) -> dict[str, str]:
    """Return the kind of the net and one or two sentences that say why."""
    kind = _kind(figures, offsets)
    sentences = [_nearest(kind, figures, offsets), _worth(figures)]
    return {"kind": kind, "text": " ".join(sentences)}


def _kind(figures: Mapping[str, Any], offsets: list[int]) -> str:
    """Return `predicts`, `copies`, `unrelated`, or `topic`: nearer to what was read than to the next chunk."""
    cosines = dict(zip(offsets, figures["cosine"][NET], strict=True))
    nearest = figures["nearest_read"]
    if cosines[1] >= SAME and _sign(figures["rollout_gain"][0]) > 0:
        return "predicts"
    if cosines[nearest["offset"]] >= SAME:
        return "copies"
    if figures["articles"] > 1 and _sign(figures["beyond_other_articles"]) <= 0:
        return "unrelated"
    return "predicts" if _sign(nearest["margin"]) > 0 else "topic"


def _nearest(kind: str, figures: Mapping[str, Any], offsets: list[int]) -> str:
    cosines = dict(zip(offsets, figures["cosine"][NET], strict=True))
    nearest = figures["nearest_read"]
    offset = nearest["offset"]
    ahead, near, other = cosines[1], cosines[offset], figures["other_articles"][NET]
    chunk = "the last chunk read" if offset == 0 else f"the chunk read at offset {offset}"
    if kind == "copies":
        return f"Answers copy {chunk} (cosine {near:.2f}); their cosine to the next chunk is {ahead:.2f}."
    if kind == "unrelated":
        return (
            f"Answers are no nearer to the next chunk than to chunks of other articles ({ahead:.2f} against "
            f"{other:.2f}): the net is untrained, or reads vectors of another encoder."
        )
    if kind == "predicts":
        return f"Answers are near the next chunk ({ahead:.2f}; {chunk}: {near:.2f}): this is prediction."
    nearer = f"nearer to {chunk} than to the next one ({near:.2f} against {ahead:.2f})"
    equal = f"no nearer to the next chunk than to {chunk} ({ahead:.2f} against {near:.2f})"
    return f"Answers are {nearer if _sign(nearest['margin']) < 0 else equal}: most of the score is topic."


def _worth(figures: Mapping[str, Any]) -> str:
    """Return what the net adds to the best baseline, and what the order of its context is worth, as a sentence."""
    gain, best = figures["rollout_gain"][0], figures["best_baseline"]
    amount = f"{abs(gain['mean']):.3f}"
    beside = {
        1: f"They are nearer to the next chunk than the best baseline, {best}, by {amount}",
        0: f"They are as near to the next chunk as the best baseline, {best}",
        -1: f"They are farther from the next chunk than the best baseline, {best}, by {amount}",
    }[_sign(gain)]
    if not figures["order"]:
        return f"{beside}."
    shuffled = figures["order"]["shuffled"]
    loss, by_best = shuffled["loss"], shuffled["baselines"][best]
    order = {
        1: f"order matters by {loss['mean']:.3f} (for {best} by {abs(by_best):.3f})",
        0: "order does not matter",
        -1: f"a shuffled context is better by {-loss['mean']:.3f}",
    }[_sign(loss)]
    return f"{beside}; {order}."


def _sign(difference: Mapping[str, Any]) -> int:
    """Return 1 or -1 if a difference is at least `MATTERS` and its interval excludes 0, else 0."""
    low, high = difference["interval"] or (difference["mean"],) * 2
    if abs(difference["mean"]) < MATTERS or low <= 0 <= high:
        return 0
    return 1 if difference["mean"] > 0 else -1
