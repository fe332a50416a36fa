"""The customer's negatives went wrong in four ways; each stays shut: counts, leaks, empty samples, paths as text."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.recipe import Recipe
from models.retrieval.corpus import Corpus
from models.training.negatives import Negatives, near_misses
from models.training.tower_trainer import MINED, TowerTrainer
from models.training.train import Epoch
from models.windows import NoWindows, Windows, compact_windows, hold_out, windows

K = 3


@pytest.fixture(scope="module")
def split(corpus: Corpus) -> tuple[Windows, Windows]:
    return hold_out(windows(corpus, 5), 0.25, seed=0)


@pytest.fixture
def trainer(split: tuple[Windows, Windows]) -> TowerTrainer:
    recipe = Recipe(epochs=2, batch_size=16, learning_rate=1e-3, negatives=K)
    config = {"dim": 16, "context_length": 5, "key_dim": 8, "hidden_dim": 16}
    return TowerTrainer("amn", config, recipe, split[0])


def quiet(epoch: Epoch) -> None:
    pass


def of_articles(make_corpus: Callable[..., Corpus], *lengths: int) -> Windows:
    article = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    vectors = np.random.default_rng(0).standard_normal((len(article), 8))
    return windows(make_corpus(vectors, article, position), 5)


def test_every_window_of_an_epoch_has_exactly_k_plus_one_negatives_and_never_its_own(trainer: TowerTrainer) -> None:
    """Counted over a whole shuffled epoch, near misses mined: neither too few, nor the positive, nor the context."""
    seen = 0
    for start in trainer.batches(0):
        negatives = trainer.negatives.draw(start)
        assert negatives.shape == (len(start), K + 1)
        own = start[:, None] + torch.arange(6)
        assert not (negatives[:, :, None] == own[:, None, :]).any()
        assert ((negatives >= 0) & (negatives < len(trainer.windows.vectors))).all()
        seen += len(start)
    assert seen == len(trainer.start)


def test_a_shuffle_loses_no_near_miss(trainer: TowerTrainer) -> None:
    """Near misses are kept by the row of their window: whatever the order of a batch, the last is one of them."""
    trainer.mine()
    shuffled = trainer.start[torch.randperm(len(trainer.start))]
    mined = trainer.negatives._near[shuffled]
    assert mined.shape[1] == MINED
    assert (mined >= 0).all()
    assert (trainer.negatives.draw(shuffled)[:, -1:] == mined).any(dim=1).all()


def test_same_article_negatives_are_of_the_same_article(trainer: TowerTrainer, split: tuple[Windows, Windows]) -> None:
    own = compact_windows(split[0])
    article = torch.full((len(own.vectors),), -1)
    for start, name in zip(own.start.tolist(), own.article.tolist(), strict=True):
        article[start : start + 6] = name
    start = trainer.start
    assert (article[trainer.negatives.draw(start)[:, :K]] == article[start, None]).all()


def test_an_article_of_one_window_borrows_its_negatives(make_corpus: Callable[..., Corpus]) -> None:
    """Six chunks are a context and its next: all other articles' chunks are wrong answers then, and there are K + 1."""
    data = of_articles(make_corpus, 6, 9)
    negatives = Negatives(data, K).draw(torch.zeros(500, dtype=torch.int64))
    assert negatives.shape == (500, K + 1)
    assert set(negatives.flatten().tolist()) == set(range(6, 15))


def test_rejects_a_corpus_of_one_window(make_corpus: Callable[..., Corpus]) -> None:
    with pytest.raises(NoWindows):
        Negatives(of_articles(make_corpus, 6), K)


def test_near_misses_are_the_best_wrong_rows_of_the_bank() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    found = near_misses(scores, torch.tensor([10, 12]), first=10, span=2, count=3)
    assert found.tolist() == [[12, 13, 14], [15, 14, 11]]


def test_there_are_no_more_near_misses_than_wrong_rows() -> None:
    found = near_misses(torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([0]), first=0, span=2, count=3)
    assert found.tolist() == [[2, -1, -1]]


def test_the_rank_is_one_without_other_passages(trainer: TowerTrainer, make_corpus: Callable[..., Corpus]) -> None:
    """A sample without negatives is not a sample without a rank."""
    vectors = np.random.default_rng(0).standard_normal((6, 16))
    assert trainer.score(windows(make_corpus(vectors), 5)) == 1


def test_the_state_path_may_be_a_string(trainer: TowerTrainer, split: tuple[Windows, Windows], tmp_path: Path) -> None:
    trainer.run(split[1], str(tmp_path / "towers.pt"), quiet)
    trainer.resume(str(tmp_path / "towers.pt"))
    assert [epoch.number for epoch in trainer.history] == [1, 2]


def test_two_runs_are_equal_bit_for_bit(split: tuple[Windows, Windows], tmp_path: Path) -> None:
    def run() -> dict[str, torch.Tensor]:
        recipe = Recipe(epochs=1, batch_size=16)
        trainer = TowerTrainer("mamba", {"dim": 16, "blocks": 1, "state_dim": 4}, recipe, split[0])
        return dict(trainer.run(split[1], tmp_path / "x.pt", quiet).state_dict())

    one, other = run(), run()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_held_out_chunks_are_not_even_wrong_answers(trainer: TowerTrainer, split: tuple[Windows, Windows]) -> None:
    held = split[1].vectors[split[1].rows()].reshape(-1, 16)
    assert not (torch.cdist(torch.from_numpy(np.asarray(trainer.windows.vectors)), torch.from_numpy(held)) < 1e-6).any()


def test_the_towers_learn(trainer: TowerTrainer, split: tuple[Windows, Windows], tmp_path: Path) -> None:
    before = trainer.score(split[0])
    trainer.run(split[1], tmp_path / "run.pt", quiet)
    assert trainer.history[-1].loss < trainer.history[0].loss
    assert trainer.score(split[0]) > before
