"""Fixtures for the tests of models/: articles of correlated vectors, and nets that are exported in seconds."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.nets import build
from models.recipe import DataSet, Job, Recipe
from models.registry.card import Card
from models.registry.registry import Registry, Version
from models.retrieval.corpus import (
    Corpus,
    read_corpus,
    write_corpus,
)
from models.training import bundle, publish
from models.training.bundle import BundleParts
from models.training.job import run_job
from models.training.publish_corpus import publish_corpus
from models.vectors import Floats, normalise

DIM, LENGTH, ARTICLES, CHUNKS = 16, 5, 12, 20
TINY: dict[str, dict[str, Any]] = {
    "amn": {"key_dim": 8, "hidden_dim": 16},
    "gmn": {"gram_dim": 8, "hidden_dim": 16},
    "gru": {"hidden_dim": 16, "blocks": 2},
    "lstm": {"hidden_dim": 16},
    "lstm_stack": {"hidden_dim": 16, "blocks": 2},
    "mamba": {"blocks": 2, "state_dim": 4},
    "mamba_lnsp": {"blocks": 2, "state_dim": 4, "width": 16},
    "transformer": {"model_dim": 16, "heads": 2, "layers": 2, "feedforward_dim": 32, "max_positions": 20},
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: tests share few cores, and sums in one order make runs equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def article_vectors(seed: int, articles: int, chunks: int, dim: int) -> Floats:
    """Chunks drift around the topic of their article, so that the context predicts the next one."""
    random = np.random.default_rng(seed)
    topic = random.standard_normal((articles, 1, dim))
    drift = np.cumsum(0.3 * random.standard_normal((articles, chunks, dim)), axis=1)
    return normalise((topic + drift).reshape(-1, dim))


def write_articles(directory: Path, seed: int = 0, articles: int = ARTICLES, chunks: int = CHUNKS) -> Path:
    lines = [
        {"article_id": 100 + a, "title": f"Article {a}", "chunks": [f"chunk {c} of {a}" for c in range(chunks)]}
        for a in range(articles)
    ]
    write_corpus(directory, article_vectors(seed, articles, chunks, DIM), lines)
    return directory


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training set: 12 articles of 20 chunks, D = 16; read only."""
    return write_articles(tmp_path_factory.mktemp("data") / "train", seed=0)


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation set, of other articles; read only."""
    return write_articles(tmp_path_factory.mktemp("data") / "other", seed=1, articles=6)


@pytest.fixture(scope="session")
def corpus(corpus_dir: Path) -> Corpus:
    return read_corpus(corpus_dir)


@pytest.fixture(scope="session")
def other(other_dir: Path) -> Corpus:
    return read_corpus(other_dir)


@pytest.fixture
def make_corpus() -> Callable[..., Corpus]:
    """Return a function that makes a corpus in memory of vectors, articles and positions."""

    def make(vectors: Any, article: Any = None, position: Any = None) -> Corpus:
        rows = np.asarray(vectors, dtype=np.float32)
        article = np.zeros(len(rows), np.int32) if article is None else np.asarray(article, np.int32)
        position = np.arange(len(rows), dtype=np.int32) if position is None else np.asarray(position, np.int32)
        return Corpus(normalise(rows), article, position, {})

    return make


@pytest.fixture(scope="session")
def tiny_net() -> Callable[..., nn.Module]:
    """Return a function that builds a tiny net with random weights in every tensor."""

    def make(architecture: str, seed: int = 0, **changes: Any) -> nn.Module:
        torch.manual_seed(seed)
        config = {"dim": DIM, "context_length": LENGTH, **TINY[architecture], **changes}
        net = build(architecture, config)
        with torch.no_grad():  # fresh nets are silent in places, which would hide what is lost there
            for parameter in net.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return net.eval()

    return make


@pytest.fixture(scope="session")
def contexts() -> Callable[..., Floats]:
    """Return a function that draws contexts `(B, T, D)` of unit vectors."""

    def draw(count: int, dim: int = DIM, length: int = LENGTH, seed: int = 0) -> Floats:
        return normalise(np.random.default_rng(seed).standard_normal((count, length, dim)))

    return draw


@pytest.fixture(scope="session")
def card() -> Callable[..., Card]:
    """Return a function that makes the card of a net, with the changes given."""

    def make(**changes: Any) -> Card:
        plain = Card("toy", "net", DIM, "tiny-encoder", "cc-by-sa-3.0", "The authors of the tiny articles.")
        return replace(plain, **changes)

    return make


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """An empty registry."""
    root = tmp_path / "registry"
    root.mkdir()
    return Registry(root)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The registry of the versions; read only."""
    root = tmp_path_factory.mktemp("published")
    return Registry(root)


@pytest.fixture(scope="session")
def job_of(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Return a function that makes the training job of a tiny net, with the changes given."""

    def make(net: str, **changes: Any) -> Job:
        job = Job(
            net=net,
            config=TINY[net],
            recipe=Recipe(epochs=2, batch_size=32, learning_rate=5e-3),
            data=(DataSet("tiny", corpus_dir),),
            encoder="tiny-encoder",
            context_length=LENGTH,
            held_out=0.2,
            run=tmp_path_factory.mktemp("runs") / "deep" / f"{net}.pt",
            command=f"lvm train {net} --data tiny",
        )
        return replace(job, **changes)

    return make


@pytest.fixture(scope="session")
def val(corpus_dir: Path, other_dir: Path) -> tuple[DataSet, ...]:
    """The data sets that the trained net is scored on."""
    return DataSet("other", other_dir), DataSet("tiny", corpus_dir)


@pytest.fixture(scope="session")
def trained(
    published: Registry, val: tuple[DataSet, ...], job_of: Callable[..., Job]
) -> tuple[Version, list[str], list[tuple[int, int]]]:
    """What one training job of a tiny AMN returned, printed and reported as progress."""
    job = job_of("amn", val=val)
    said: list[str] = []
    progress: list[tuple[int, int]] = []
    version = run_job(job, published, lambda done, total: progress.append((done, total)), said.append)
    return version, said, progress


@pytest.fixture(scope="session")
def amn_version(trained: tuple[Version, list[str], list[tuple[int, int]]]) -> Version:
    return trained[0]


@pytest.fixture(scope="session")
def towers_version(published: Registry, corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """A two-tower whose query tower is a tiny Mamba, half of the articles held out for a reranker."""
    job = Job(
        net="mamba",
        name="two-tower",
        config=TINY["mamba"],
        recipe=Recipe(epochs=2, batch_size=16, learning_rate=1e-3),
        data=(DataSet("tiny", corpus_dir),),
        encoder="tiny-encoder",
        context_length=LENGTH,
        held_out=0.5,
        run=tmp_path_factory.mktemp("runs") / "towers.pt",
        command="lvm train mamba --two-tower",
        two_tower=True,
    )
    return run_job(job, published, lambda done, total: None, lambda line: None)


@pytest.fixture(scope="session")
def rerank_job(towers_version: Version, corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job of a reranker of that two-tower."""
    return Job(
        net="reranker",
        towers=towers_version.id,
        data=(DataSet("tiny", corpus_dir),),
        config={"hidden_dim": 8},
        recipe=Recipe(epochs=4, batch_size=32, learning_rate=1e-2),
        run=tmp_path_factory.mktemp("runs") / "reranker.pt",
        command="lvm train reranker",
    )


@pytest.fixture(scope="session")
def reranker_version(published: Registry, rerank_job: Job) -> Version:
    """The reranker of that two-tower."""
    return run_job(rerank_job, published, lambda done, total: None, lambda line: None)


@pytest.fixture(scope="session")
def bundle_version(
    published: Registry, towers_version: Version, reranker_version: Version, other_dir: Path, card: Callable[..., Card]
) -> Version:
    """A bundle of both with the index of the validation set."""
    passages = card(name="passages", kind="corpus", dim=0)
    return publish_corpus(
        published, other_dir, passages, extension=BundleParts(bundle.read(towers_version), reranker_version)
    )


@pytest.fixture(scope="session")
def gru_net(tiny_net: Callable[..., nn.Module]) -> nn.Module:
    return tiny_net("gru")


@pytest.fixture(scope="session")
def gru_version(published: Registry, gru_net: nn.Module, card: Callable[..., Card], corpus: Corpus) -> Version:
    golden = publish.golden_contexts(None, DIM, LENGTH)
    return publish.publish(published, gru_net, card(name="gru"), golden, {})


@pytest.fixture(scope="session")
def corpus_version(published: Registry, corpus_dir: Path, card: Callable[..., Card]) -> Version:
    return publish_corpus(published, corpus_dir, card(name="passages", kind="corpus", dim=0))


@pytest.fixture(scope="session")
def larger_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 articles of 20 chunks, to be indexed; read only."""
    return write_articles(tmp_path_factory.mktemp("data") / "larger", seed=2, articles=60)


@pytest.fixture(scope="session")
def indexed_version(published: Registry, larger_dir: Path, card: Callable[..., Card]) -> Version:
    return publish_corpus(published, larger_dir, card(name="larger", kind="corpus", dim=0), "ivf")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Version], Path]:
    """Return a function that copies a version, for a test to damage."""

    def copy(version: Version) -> Path:
        return Path(shutil.copytree(version.path, tmp_path / "copy" / version.version))

    return copy


@pytest.fixture
def rewrite_checksums() -> Callable[[Path], None]:
    """Return a function that updates the manifest of a directory, as an attacker would."""
    from models.registry import manifest

    def seal(directory: Path) -> None:
        files = sorted(path for path in directory.iterdir() if path.name != manifest.CHECKSUMS_FILE)
        sums = "".join(f"{manifest.digest(path.read_bytes())}  {path.name}\n" for path in files)
        (directory / manifest.CHECKSUMS_FILE).write_text(sums)

    return seal
