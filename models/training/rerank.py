"""Training of a reranker on what towers find in articles that they did not learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.evaluate import window_searches
from models.nets import BadConfig
from models.nets.reranker import RerankerNet
from models.registry.card import CARD_FILE, Card
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import (
    Corpus,
    read_corpus,
)
from models.retrieval.reranker import RERANK_DEPTH, RERANKER_FILE, Reranker
from models.training import bundle
from models.training.parts import Arrays, Parts, beside, identity, sources
from models.training.train import Epoch, Recipe, Trainer
from models.vectors import Floats
from models.windows import NoWindows, Rows, Windows, compact_windows, hold_out, require_windows

ARTICLES = 118  # in a bank: what the figures are depends on how much there is to choose from


@dataclass(frozen=True)
class Lists(Windows):
    """Windows, and of what the towers found for each the `figures` `(W, C, F)` and the true one's place `(W,)`."""

    figures: Floats
    truth: Rows


class RerankTrainer(Trainer):
    """Trains a reranker to put the true next chunk first; an epoch's score is the MRR within held-out lists."""

    measure = "MRR in lists"
    net: RerankerNet

    def __init__(self, config: Mapping[str, Any], recipe: Recipe, train: Lists) -> None:
        self.lists = train
        super().__init__("reranker", dict(config), recipe, train)
        self.unit = 1

    def make_net(self) -> RerankerNet:
        """Return the fresh net, standardised to the training lists; raises `BadConfig`."""
        figures = self.lists.figures.reshape(-1, self.lists.figures.shape[2])
        mean, scale = (torch.from_numpy(part(figures, axis=0, dtype=np.float64)).float() for part in (np.mean, np.std))
        try:
            return RerankerNet(mean, scale, **self.config)
        except TypeError as error:
            raise BadConfig(f"reranker: {error}") from error

    def loss(self, start: Tensor) -> Tensor:
        """Return the cross-entropy of the true next chunk within its list."""
        which = np.searchsorted(self.lists.start, start.numpy())
        figures, truth = self.lists.figures[which], self.lists.truth[which]
        return cross_entropy(self.net(torch.from_numpy(figures)), torch.from_numpy(truth))

    @torch.no_grad()
    def score(self, data: Windows) -> float:
        """Return the MRR of the true next chunks within the lists of `data`."""
        assert isinstance(data, Lists)
        scores = self.net(torch.from_numpy(data.figures)).numpy()
        true = np.take_along_axis(scores, data.truth[:, None], 1)
        return float(np.mean(1 / (scores >= true).sum(axis=1)))


@dataclass(frozen=True)
class RerankJob:
    """Everything one run of `lvm train reranker` needs; a data set is its name for the card and its directory."""

    name: str
    towers: Version
    data: tuple[str, Path]
    config: Mapping[str, Any]
    recipe: Recipe
    state: Path
    resume: bool
    license: str
    attribution: str
    command: str


def run_rerank_job(
    job: RerankJob, registry: Registry, progress: Callable[[int, int], None], say: Callable[[str], None]
) -> Version:
    """Train a reranker on the articles that the towers held out, and store the version.

    Raises:
        BadCorpus: the data set cannot be read.
        BadCheckpoint: the version holds no towers, or does not say what they held out.
        NoWindows: the articles held out make less than two banks.
        AnotherRun: the state to resume belongs to another run.
        BadConfig: the reranker takes no such sizes.
    """
    made = bundle.read(job.towers)
    banks = held_out_banks(made.card, read_corpus(job.data[1]))
    say(f"{len(banks)} banks of about {ARTICLES} articles that the towers have not seen")
    parts, lists = beside(job.state), list[Lists]()
    for number, bank in enumerate(banks):
        lists.append(listed(made, bank, parts))
        progress(number + 1, len(banks) + job.recipe.epochs)
    trainer = _trained(job, lists, say, lambda epochs: progress(len(banks) + epochs, len(banks) + job.recipe.epochs))
    card = _card(job, made, len(trainer.lists), trainer)
    files = {RERANKER_FILE: served(trainer.net).to_bytes(), CARD_FILE: card.to_markdown().encode()}
    with parts:  # only now: the lists take longest, and serve the same command without its typing error
        return registry.add(job.name, files)


def _trained(
    job: RerankJob, lists: list[Lists], say: Callable[[str], None], progress: Callable[[int], None]
) -> RerankTrainer:
    trainer = RerankTrainer(job.config, job.recipe, joined(lists[1:]))
    job.state.parent.mkdir(parents=True, exist_ok=True)
    if job.resume:
        trainer.resume(job.state)

    def report(epoch: Epoch) -> None:
        say(f"epoch {epoch.number}: loss {epoch.loss:.4f}, held-out {trainer.measure} {epoch.score:.4f}")
        progress(epoch.number)

    trainer.run(lists[0], job.state, report)
    return trainer


def held_out_banks(card: Card, corpus: Corpus) -> list[Windows]:
    """Return the windows of the articles that towers held out in training, by banks of as many articles.

    Raises:
        BadCheckpoint: the card does not say what was held out.
        NoWindows: that makes less than two banks.
    """
    try:
        share, seed = float(card.data["held_out"]), int(card.data["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"the card does not say what the towers held out: {error}") from error
    data = hold_out(require_windows(corpus, card.context_length), share, seed)[1]
    articles = np.unique(data.article)
    np.random.default_rng(seed).shuffle(articles)
    count = min(max(round(len(articles) / ARTICLES), 2), len(articles))
    if count < 2:
        raise NoWindows("the towers held out a single article: a reranker needs banks of them")
    return [data.take(np.isin(data.article, part)) for part in np.array_split(articles, count)]


def listed(made: bundle.Made, bank: Windows, parts: Parts) -> Lists:
    """Return what the towers find for the windows of a bank among its own chunks, where the truth is among it."""
    found = parts.arrays(lambda: finds(made, bank), sources(), made.id, identity(bank))
    part = bank.take(found["kept"])
    return Lists(part.vectors, part.start, part.article, part.length, found["figures"], found["truth"])


def finds(made: bundle.Made, bank: Windows) -> Arrays:
    """Return which windows `(K,)` of a bank are `kept`, and for each `figures` and `truth` as in `Lists`."""
    data = compact_windows(bank)
    corpus = Corpus(
        data.vectors, np.zeros(len(data.vectors), np.int32), np.arange(len(data.vectors), dtype=np.int32), {}
    )
    retriever = made.over(corpus)
    asked = window_searches(data, exclude_context=True, k=RERANK_DEPTH)
    found = [retriever.find_candidates([search])[0] for search in asked]
    width = min(len(rows) for _, rows in found)
    rows = np.array([rows[:width] for _, rows in found])
    is_true = rows == data.target[:, None]
    kept = np.flatnonzero(is_true.any(axis=1))
    contexts = data.contexts()
    figures = np.array([retriever.candidate_features(contexts[n], found[n][0][:width], rows[n]) for n in kept])
    return {"kept": kept, "figures": figures, "truth": is_true[kept].argmax(axis=1)}


def joined(lists: list[Lists]) -> Lists:
    """Return the lists of several banks as one, cut to the length of the shortest, in the order of their rows."""
    width = min(part.figures.shape[1] for part in lists)
    parts = [_cut(part, width) for part in lists]
    start, article, figures, truth = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "article", "figures", "truth")
    )
    order = np.argsort(start)
    first = parts[0]
    return Lists(first.vectors, start[order], article[order], first.length, figures[order], truth[order])


def _cut(lists: Lists, width: int) -> Lists:
    kept = lists.truth < width
    part = lists.take(kept)
    figures, truth = lists.figures[kept, :width], lists.truth[kept]
    return Lists(part.vectors, part.start, part.article, part.length, figures, truth)


def served(net: RerankerNet) -> Reranker:
    """Return the reranker that orders as `net` does."""
    return Reranker(*(part.detach().numpy() for part in net.folded()))


def _card(job: RerankJob, made: bundle.Made, count: int, trainer: RerankTrainer) -> Card:
    config = {"towers": made.id, "hidden_dim": trainer.net.hidden.out_features, "depth": RERANK_DEPTH}
    return Card(
        name=job.name,
        kind="reranker",
        dim=made.card.dim,
        encoder=made.card.encoder,
        license=job.license,
        attribution=job.attribution,
        context_length=made.card.context_length,
        config=config,
        parameters=sum(parameter.numel() for parameter in trainer.net.parameters()),
        data={"train": job.data[0], "lists": count, "held_out_MRR_in_lists": round(trainer.best_score, 5)},
        command=job.command,
        limits=bundle.LIMITS,
    )
