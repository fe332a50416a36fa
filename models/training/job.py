"""A training job: data in, a scored version out; the baselines come first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.evaluate import baseline_scores
from models.registry.card import Card
from models.registry.registry import Registry, Version
from models.retrieval.corpus import Corpus, read_corpus
from models.training.bundle import publish_towers
from models.training.publish import golden_contexts, publish, reference_of
from models.training.teachers import Ensemble, load_teachers
from models.training.towers import TowerTrainer
from models.training.train import Epoch, Recipe, Trainer
from models.windows import Windows, hold_out, require_windows

LIMITS = (
    "The margin over copying the context is small: sentence embeddings carry topic more than direction, "
    "and so does what this net learned.",
    "Reads vectors of the encoder named here, of unit length, T consecutive chunks of about 100 tokens; "
    "anything else is out of its space.",
)


@dataclass(frozen=True)
class Job:
    """Everything one run of `lvm train` needs; a data set is its name for the card and its directory."""

    net: str
    name: str
    config: Mapping[str, Any]
    recipe: Recipe
    data: tuple[str, Path]
    validate: tuple[tuple[str, Path], ...]
    encoder: str
    context_length: int
    held_out: float
    device: str
    state: Path
    resume: bool
    license: str
    attribution: str
    command: str
    two_tower: bool = False


def run_job(job: Job, registry: Registry, progress: Callable[[int, int], None], say: Callable[[str], None]) -> Version:
    """Train, score with the serving predictor, and store the version.

    Raises:
        BadCorpus: a data set cannot be read.
        NoWindows: a data set has no window.
        NoSuchDevice: the device is not here.
        AnotherRun: the state to resume belongs to another run.
        UnfitTeacher: a teacher reads vectors of another shape.
        NotAsTrained: the served net scores otherwise than the trained one.
    """
    corpus = read_corpus(job.data[1])
    train, held_out = hold_out(require_windows(corpus, job.context_length), job.held_out, job.recipe.seed)
    kind, store = (TowerTrainer, publish_towers) if job.two_tower else (Trainer, publish)
    trainer = kind(job.net, _config(job, corpus), job.recipe, train, job.device, _teacher(job, registry, corpus.dim))
    _prepare(job, trainer)
    _say_baselines(held_out, say)

    def report(epoch: Epoch) -> None:
        say(f"epoch {epoch.number}: loss {epoch.loss:.4f}, held-out {trainer.measure} {epoch.score:.4f}")
        progress(epoch.number, job.recipe.epochs)

    progress(len(trainer.history), job.recipe.epochs)
    net = trainer.run(held_out, job.state, report)
    golden = golden_contexts(corpus, corpus.dim, job.context_length)
    data = {name: read_corpus(path) for name, path in job.validate}
    card = _card(job, corpus, train, held_out, trainer.best_score)
    return store(registry, net, card, golden, data, corpus, (held_out, trainer.best_score))


def _config(job: Job, corpus: Corpus) -> dict[str, Any]:
    return {"dim": corpus.dim, "context_length": job.context_length, **job.config}


def _teacher(job: Job, registry: Registry, dim: int) -> Ensemble | None:
    versions = job.recipe.teachers
    return load_teachers(registry, versions, dim, job.context_length) if versions else None


def _prepare(job: Job, trainer: Trainer) -> None:
    job.state.parent.mkdir(parents=True, exist_ok=True)
    if job.resume:
        trainer.resume(job.state)


def _say_baselines(held_out: Windows, say: Callable[[str], None]) -> None:
    for name, cosine in baseline_scores(held_out).items():
        say(f"baseline {name}: held-out cosine {cosine:.4f}")


def _card(job: Job, corpus: Corpus, train: Windows, held_out: Windows, score: float) -> Card:
    teachers = {"teachers": list(job.recipe.teachers)} if job.recipe.teachers else {}
    return Card(
        name=job.name,
        kind="net",
        dim=corpus.dim,
        encoder=job.encoder,
        license=job.license,
        attribution=job.attribution,
        data={
            "train": job.data[0],
            "windows": len(train),
            "held_out_windows": len(held_out),
            f"held_out_{'MRR' if job.two_tower else 'cosine'}": round(score, 5),
            "split": f"by article, {job.held_out:.0%} held out to choose the epoch, seed {job.recipe.seed}",
            "held_out": job.held_out,
            "seed": job.recipe.seed,
            **teachers,
        },
        command=job.command,
        reference=reference_of(corpus),
        limits=LIMITS,
    )
