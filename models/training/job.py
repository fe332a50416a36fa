"""Runs a training job: data in, a scored version in the registry out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from models.evaluate import baseline_scores
from models.recipe import RERANKER, Job
from models.registry.card import CARD_FILE, Card
from models.registry.registry import Registry, Version, check_name
from models.retrieval.corpus import read_corpus
from models.retrieval.reranker import RERANK_DEPTH, RERANKER_FILE
from models.training import bundle
from models.training.publish import golden_contexts, publish, reference_of
from models.training.rerank_trainer import (
    ARTICLES,
    CandidateLists,
    RerankTrainer,
    find_candidate_lists,
    held_out_banks,
    joined,
    served,
)
from models.training.teachers import load_teachers
from models.training.tower_trainer import TowerTrainer
from models.training.train import Epoch, Trainer
from models.training.training_sets import map_training_sets
from models.training.work_cache import cache_next_to
from models.windows import StoredCorpus, Windows, draw_articles, hold_out, require_windows

TOWERS_SCORED = 30_000  # held-out windows, at most, by which the epoch of towers is chosen: each is ranked among all

Progress = Callable[[int, int], None]
Report = Callable[[str], None]

LIMITS = (
    "The margin over copying the context is small: sentence embeddings carry topic more than direction, "
    "and so does what this net learned.",
    "Reads vectors of the encoder named here, of unit length, T consecutive chunks of about 100 tokens; "
    "anything else is out of its space.",
)


@dataclass(frozen=True)
class PreparedTraining:
    """What is ready when training begins: the trainer, held-out windows, and a function that stores the trained net.

    `steps` counts the steps of preparation, which progress has shown already.
    """

    trainer: Trainer
    held_out: Windows
    store: Callable[[nn.Module], Version]
    steps: int = 0


def run_job(job: Job, registry: Registry, progress: Progress, report: Report) -> Version:
    """Train, score with the serving predictor, and store the version.

    Args:
        job: what to train, on what, and how.
        registry: where teachers and towers are found, and the version is stored.
        progress: called with (steps done, steps in all); a step is an epoch, or a bank of a reranker.
        report: called with a line for each baseline and epoch.

    Raises:
        BadName: no model may have such a name.
        BadCorpus: a data set cannot be read.
        BadConfig: the net does not have such sizes.
        NoWindows: a data set has no window, or a reranker's towers held out fewer than two banks.
        NoSuchDevice: torch does not have the device.
        AnotherRun: the state to resume belongs to another run.
        UnfitTeacher: a teacher reads vectors of another shape.
        BadCheckpoint: the version in `job.towers` holds no towers, or does not say what they held out.
        NotAsTrained: the served net does not score as the trained one did.
    """
    check_name(job.model)
    teachers = tuple(registry.find(teacher).id for teacher in job.recipe.teachers)
    job = replace(job, recipe=replace(job.recipe, teachers=teachers))
    prepare = _prepare_reranker if job.net == RERANKER else _prepare_net
    task = prepare(job, registry, progress, report)
    trainer, total = task.trainer, task.steps + job.recipe.epochs

    def on_epoch(epoch: Epoch) -> None:
        report(f"epoch {epoch.number}: loss {epoch.loss:.4f}, held-out {trainer.measure} {epoch.score:.4f}")
        progress(task.steps + epoch.number, total)

    progress(task.steps + len(trainer.history), total)
    return task.store(trainer.run(task.held_out, job.state, on_epoch))


def _prepare_net(job: Job, registry: Registry, progress: Progress, report: Report) -> PreparedTraining:
    corpus = map_training_sets([directory for _, directory in job.data])
    windows = require_windows(corpus, job.context_length)
    train, held_out = hold_out(windows, job.held_out, job.recipe.seed, job.used)
    if job.two_tower:
        held_out = draw_articles(held_out, TOWERS_SCORED, job.recipe.seed)
    config = {"dim": corpus.dim, "context_length": job.context_length, **job.config}
    teachers = job.recipe.teachers
    # loaded first: making nets draws random numbers, and the trainer seeds the generator
    teacher = load_teachers(registry, teachers, corpus.dim, job.context_length) if teachers else None
    kind = TowerTrainer if job.two_tower else Trainer
    trainer = kind(job.net, config, job.recipe, train, job.device)
    _prepare_state(job, trainer)
    if teacher:
        trainer.learn_from(teacher, job.state.parent)
    for name, cosine in baseline_scores(held_out).items():
        report(f"baseline {name}: held-out cosine {cosine:.4f}")

    def store(net: nn.Module) -> Version:
        golden = golden_contexts(corpus, corpus.dim, job.context_length)
        data = {name: read_corpus(directory) for name, directory in job.val}
        score = trainer.best_score
        card = _net_card(job, corpus, train, held_out, score)
        return publish(registry, net, card, golden, data, corpus, (held_out, score))

    return PreparedTraining(trainer, held_out, store)


def _prepare_reranker(job: Job, registry: Registry, progress: Progress, report: Report) -> PreparedTraining:
    towers = bundle.read(registry.find(job.towers))
    banks = held_out_banks(towers.card, map_training_sets([directory for _, directory in job.data]))
    report(f"{len(banks)} banks of about {ARTICLES} articles that the towers have not seen")
    cache = cache_next_to(job.state)
    lists = list[CandidateLists]()
    for number, bank in enumerate(banks, 1):
        lists.append(find_candidate_lists(towers, bank, cache))
        progress(number, len(banks) + job.recipe.epochs)
    trainer = RerankTrainer(RERANKER, dict(job.config), job.recipe, joined(lists[1:]))
    _prepare_state(job, trainer)

    def store(net: nn.Module) -> Version:
        card = _reranker_card(job, towers, trainer)
        files = {RERANKER_FILE: served(trainer.net).to_bytes(), CARD_FILE: card.to_markdown().encode()}
        # the lists take longest: after a wrong option above they stay, for the corrected command
        with cache:
            return registry.add(job.model, files)

    return PreparedTraining(trainer, lists[0], store, steps=len(banks))


def _prepare_state(job: Job, trainer: Trainer) -> None:
    job.state.parent.mkdir(parents=True, exist_ok=True)
    if job.resume:
        trainer.resume(job.state)


def _net_card(job: Job, corpus: StoredCorpus, train: Windows, held_out: Windows, score: float) -> Card:
    data: dict[str, Any] = {
        "train": _name_of_data(job),
        "windows": len(train),
        "held_out_windows": len(held_out),
        f"held_out_{'MRR' if job.two_tower else 'cosine'}": round(score, 5),
        "split": f"by article, {job.held_out:.0%} held out to choose the epoch, seed {job.recipe.seed}",
        "held_out": job.held_out,
        "seed": job.recipe.seed,
    }
    if job.used < 1:
        data["used"] = job.used
    if job.recipe.teachers:
        data["teachers"] = list(job.recipe.teachers)
    card = _card(job, "net", corpus.dim, job.encoder, data)
    return replace(card, reference=reference_of(corpus), limits=LIMITS)


def _reranker_card(job: Job, towers: bundle.LoadedTowers, trainer: RerankTrainer) -> Card:
    score = round(trainer.best_score, 5)
    data = {"train": _name_of_data(job), "lists": len(trainer.windows), "held_out_MRR_in_lists": score}
    return replace(
        _card(job, "reranker", towers.card.dim, towers.card.encoder, data),
        context_length=towers.card.context_length,
        config={"towers": towers.id, "hidden_dim": trainer.net.hidden.out_features, "depth": RERANK_DEPTH},
        parameters=sum(parameter.numel() for parameter in trainer.net.parameters()),
        limits=bundle.LIMITS,
    )


def _name_of_data(job: Job) -> str:
    return " + ".join(name for name, _ in job.data)


def _card(job: Job, kind: str, dim: int, encoder: str, data: dict[str, Any]) -> Card:
    return Card(
        name=job.model,
        kind=kind,
        dim=dim,
        encoder=encoder,
        license=job.license,
        attribution=job.attribution,
        data=data,
        command=job.command,
    )
