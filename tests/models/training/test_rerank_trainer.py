"""A reranker learns from articles that its towers did not, orders better than they do, and serves what it learned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.nets import BadConfig
from models.nets.reranker import RerankerNet
from models.recipe import Job, Recipe
from models.registry import manifest
from models.registry.card import Card
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import Corpus
from models.training import bundle
from models.training.bundle import LoadedTowers
from models.training.job import run_job
from models.training.rerank_trainer import (
    CandidateLists,
    RerankTrainer,
    find_candidate_lists,
    held_out_banks,
    joined,
    served,
)
from models.training.train import AnotherRun, Epoch
from models.training.training_sets import map_training_sets
from models.training.work_cache import WorkCache
from models.windows import NoWindows, hold_out, windows


@pytest.fixture(scope="module")
def made(towers_version: Version) -> LoadedTowers:
    return bundle.read(towers_version)


@pytest.fixture(scope="module")
def lists(made: LoadedTowers, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[CandidateLists]:
    cache = WorkCache(tmp_path_factory.mktemp("cache"))
    return [find_candidate_lists(made, bank, cache) for bank in held_out_banks(made.card, corpus)]


@pytest.fixture
def towers_registry(towers_version: Version, tmp_path: Path) -> Registry:
    """A registry that holds the two-tower alone."""
    registry = Registry(tmp_path / "registry")
    files = {
        path.name: path.read_bytes() for path in towers_version.path.iterdir() if path.name != manifest.CHECKSUMS_FILE
    }
    registry.add(towers_version.name, files)
    return registry


def quiet(epoch: Epoch) -> None:
    pass


def test_the_banks_are_of_the_articles_that_the_towers_held_out(made: LoadedTowers, corpus: Corpus) -> None:
    banks = held_out_banks(made.card, corpus)
    train, held_out = hold_out(windows(corpus, 5), 0.5, seed=0)
    articles = [set(bank.article.tolist()) for bank in banks]
    assert len(banks) == 2
    assert articles[0] | articles[1] == set(held_out.article.tolist())
    assert not articles[0] & articles[1]
    assert not (articles[0] | articles[1]) & set(train.article.tolist())


def test_the_banks_are_of_the_articles_that_the_towers_used(made: LoadedTowers, corpus: Corpus) -> None:
    train, held_out = hold_out(windows(corpus, 5), 0.5, seed=0, used=0.7)
    card = replace(made.card, data={"held_out": 0.5, "seed": 0, "used": 0.7, "windows": len(train)})
    articles = [set(bank.article.tolist()) for bank in held_out_banks(card, corpus)]
    assert articles[0] | articles[1] == set(held_out.article.tolist())


def test_rejects_towers_that_do_not_say_what_they_held_out(made: LoadedTowers, corpus: Corpus) -> None:
    with pytest.raises(BadCheckpoint, match="held out"):
        held_out_banks(replace(made.card, data={}), corpus)
    with pytest.raises(NoWindows):
        held_out_banks(replace(made.card, data={"held_out": 0.01, "seed": 0}), corpus)


def test_rejects_other_data_than_that_of_the_towers(made: LoadedTowers, larger_dir: Path, corpus_dir: Path) -> None:
    """Articles that the towers were trained on must not be taken for held-out ones."""
    for directories in ([larger_dir], [corpus_dir, larger_dir]):
        with pytest.raises(BadCheckpoint, match="give the data sets of the towers"):
            held_out_banks(made.card, map_training_sets(directories))


def test_a_list_holds_the_true_next_chunk_where_it_says(lists: list[CandidateLists], made: LoadedTowers) -> None:
    some = joined(lists)
    assert len(some) == len(some.features) == len(some.truth) > 50
    assert (np.diff(some.start) > 0).all()
    last = np.array([some.vectors[start + 4] @ some.vectors[start + 5] for start in some.start])
    assert np.allclose(some.features[np.arange(len(some)), some.truth, 4], last, atol=1e-5)


def test_training_orders_better_than_the_towers(lists: list[CandidateLists], tmp_path: Path) -> None:
    recipe = Recipe(epochs=40, batch_size=8, learning_rate=1e-2)
    trainer = RerankTrainer("reranker", {"hidden_dim": 8}, recipe, lists[1])
    trainer.run(lists[0], tmp_path / "r.pt", quiet)
    as_found = float(np.mean(1 / (1 + lists[0].truth)))
    assert trainer.best_score > as_found
    again = RerankTrainer("reranker", {"hidden_dim": 8}, recipe, lists[1])
    again.run(lists[0], tmp_path / "r.pt", quiet)
    assert again.history == trainer.history


def test_what_is_served_is_what_was_trained() -> None:
    torch.manual_seed(0)
    net = RerankerNet(torch.randn(21), torch.rand(21) + 0.1, 8)
    features = torch.randn(3, 10, 21)
    with torch.no_grad():
        expected = net(features).numpy()
    assert np.allclose(served(net).score(features.numpy()), expected, atol=1e-5)


@pytest.mark.parametrize("stops_at", [1, 3], ids=["a bank", "an epoch"])
def test_a_stopped_job_continues_to_the_same_version(
    reranker_version: Version, rerank_job: Job, towers_registry: Registry, tmp_path: Path, stops_at: int
) -> None:
    def stop(done: int, total: int) -> None:
        if done == stops_at:
            raise KeyboardInterrupt

    job, done = replace(rerank_job, run=tmp_path / "r.pt"), list[int]()
    with pytest.raises(KeyboardInterrupt):
        run_job(job, towers_registry, stop, lambda said: None)
    banks = [path.stat().st_mtime_ns for path in (tmp_path / ".r.pt.parts").iterdir()]
    again = replace(job, resume=job.state.exists())
    made = run_job(again, towers_registry, lambda n, total: done.append(n), lambda said: None)
    assert (len(banks), done) == ((1, [1, 2, 2, 3, 4, 5, 6]) if stops_at == 1 else (2, [1, 2, 3, 4, 5, 6]))
    assert made.id == reranker_version.id
    assert not (tmp_path / ".r.pt.parts").exists()


@pytest.mark.parametrize(
    ("slip", "error"),
    [({"resume": True}, AnotherRun), ({"config": {"hiden_dim": 8}}, BadConfig)],
    ids=["run", "config"],
)
def test_a_wrong_option_keeps_the_cached_lists(
    rerank_job: Job, towers_registry: Registry, tmp_path: Path, slip: dict[str, Any], error: type[Exception]
) -> None:
    job = replace(rerank_job, run=tmp_path / "r.pt", **slip)
    with pytest.raises(error):
        run_job(job, towers_registry, lambda done, total: None, lambda said: None)
    assert len([*(tmp_path / ".r.pt.parts").iterdir()]) == 2


def test_a_reranker_card_names_its_towers(
    reranker_version: Version, towers_version: Version, published: Registry
) -> None:
    card = Card.from_markdown((reranker_version.path / "README.md").read_text())
    assert (card.kind, card.config["towers"]) == ("reranker", towers_version.id)
    assert towers_version.id in card.to_markdown()
