"""Training learns, is the same twice, goes on where it was cut off, and hands back the best epoch."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.nets.two_tower import info_nce
from models.recipe import Recipe
from models.retrieval.corpus import Corpus
from models.training.train import AnotherRun, Epoch, Trainer, in_contexts, warm_up_cosine, with_dropped
from models.vectors import Floats
from models.windows import Windows, hold_out, windows

RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=5e-3, noise=0.1, reverse=0.5)
NETS: dict[str, dict[str, Any]] = {
    "amn": {"dim": 16, "context_length": 5, "key_dim": 8, "hidden_dim": 16, "dropout": 0.1},
    "lstm": {"dim": 16, "context_length": 5, "hidden_dim": 8},
}


@pytest.fixture(scope="module")
def split(corpus: Corpus) -> tuple[Windows, Windows]:
    return hold_out(windows(corpus, 5), 0.25, seed=0)


@pytest.fixture
def trainer_of(split: tuple[Windows, Windows]) -> Callable[..., Trainer]:
    """Return a function that makes the trainer of a net, by the recipe with the changes given."""

    def make(architecture: str = "amn", **changes: Any) -> Trainer:
        return Trainer(architecture, dict(NETS[architecture]), replace(RECIPE, **changes), split[0])

    return make


class CutOff(Exception):
    """The machine went away."""


def quiet(epoch: Epoch) -> None:
    pass


def cut_off_after(number: int) -> Callable[[Epoch], None]:
    def report(epoch: Epoch) -> None:
        if epoch.number == number:
            raise CutOff

    return report


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_falls_and_the_net_beats_the_mean(
    trainer_of: Callable[..., Trainer], split: tuple[Windows, Windows], tmp_path: Path
) -> None:
    trainer = trainer_of(epochs=8, noise=0.0, reverse=0.0)
    untrained = trainer.score(split[0])  # an untrained AMN is the mean of the context
    net = trainer.run(split[1], tmp_path / "run.pt", quiet)
    losses = [epoch.loss for epoch in trainer.history]
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.score(split[0]) > untrained + 0.01
    assert not net.training


OPTIONS: list[dict[str, Any]] = [{"ema": 0.9}, {"drop": 0.3}, {"contrast": 0.5}, {"precision": "bf16"}]


@pytest.mark.parametrize("options", [{"schedule": "baseline"}, {}, *OPTIONS], ids=str)
@pytest.mark.parametrize("architecture", NETS)
def test_two_runs_are_equal_and_so_is_one_that_was_cut_off(
    trainer_of: Callable[..., Trainer],
    split: tuple[Windows, Windows],
    tmp_path: Path,
    architecture: str,
    options: dict[str, Any],
) -> None:
    """Bit for bit: dropout, noise, shuffles, moments, averages and schedule go on as if nothing had been."""
    first = trainer_of(architecture, **options)
    whole = first.run(split[1], tmp_path / "whole.pt", quiet).state_dict()
    second = trainer_of(architecture, **options)
    with pytest.raises(CutOff):
        second.run(split[1], tmp_path / "cut.pt", cut_off_after(1))
    third = trainer_of(architecture, **options)
    torch.manual_seed(7)  # what was drawn in between is nobody's business
    third.resume(tmp_path / "cut.pt")
    assert third.history == first.history[:1]
    resumed = third.run(split[1], tmp_path / "cut.pt", quiet).state_dict()
    again = trainer_of(architecture, **options).run(split[1], tmp_path / "again.pt", quiet).state_dict()
    assert same(whole, again)
    assert same(whole, resumed)
    assert first.history == third.history


def test_another_seed_is_another_run(
    trainer_of: Callable[..., Trainer], split: tuple[Windows, Windows], tmp_path: Path
) -> None:
    one, other = (trainer_of(seed=seed, epochs=1).run(split[1], tmp_path / "x.pt", quiet) for seed in (0, 1))
    assert not same(one.state_dict(), other.state_dict())


def test_every_epoch_sees_every_window_once_in_another_order(trainer_of: Callable[..., Trainer]) -> None:
    trainer = trainer_of()
    epochs = [torch.cat(list(trainer.batches(number))).tolist() for number in range(3)]
    assert all(sorted(epoch) == trainer.start.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_finished_run_is_resumed_to_its_best_net(
    trainer_of: Callable[..., Trainer], split: tuple[Windows, Windows], tmp_path: Path
) -> None:
    best = trainer_of().run(split[1], tmp_path / "run.pt", quiet).state_dict()
    again = trainer_of()
    again.resume(tmp_path / "run.pt")
    assert same(again.run(split[1], tmp_path / "run.pt", quiet).state_dict(), best)


@pytest.mark.parametrize("change", [{"epochs": 4}, {"learning_rate": 1e-3}, {"seed": 1}, {"schedule": "baseline"}])
def test_rejects_a_state_of_another_recipe(
    trainer_of: Callable[..., Trainer], tmp_path: Path, change: dict[str, Any]
) -> None:
    trainer_of().save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="written by another run"):
        trainer_of(**change).resume(tmp_path / "run.pt")


def test_rejects_a_state_of_another_net_or_size(
    trainer_of: Callable[..., Trainer], split: tuple[Windows, Windows], tmp_path: Path
) -> None:
    trainer_of().save(tmp_path / "run.pt")
    for other in (trainer_of("lstm"), Trainer("amn", {**NETS["amn"], "key_dim": 4}, RECIPE, split[0])):
        with pytest.raises(ValueError, match="written by another run"):
            other.resume(tmp_path / "run.pt")


def test_rejects_a_state_of_other_data(
    trainer_of: Callable[..., Trainer], split: tuple[Windows, Windows], tmp_path: Path
) -> None:
    trainer_of().save(tmp_path / "run.pt")
    fewer = Trainer("amn", NETS["amn"], RECIPE, split[0].take(np.arange(len(split[0]) - 1)))
    with pytest.raises(AnotherRun, match="written by another run"):
        fewer.resume(tmp_path / "run.pt")


@pytest.mark.parametrize("data", [None, b"", b"no state", b"PK\x03\x04"])
def test_rejects_a_file_that_is_not_a_state(
    trainer_of: Callable[..., Trainer], tmp_path: Path, data: bytes | None
) -> None:
    if data is not None:
        (tmp_path / "run.pt").write_bytes(data)
    with pytest.raises(
        AnotherRun, match="not the state of a training run" if data is not None else "no saved training state"
    ):
        trainer_of().resume(tmp_path / "run.pt")


def test_the_state_is_replaced_whole(trainer_of: Callable[..., Trainer], tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(b"older")
    inode = path.stat().st_ino
    trainer_of().save(path)
    assert path.stat().st_ino != inode  # a new file under the old name, never a half-written one
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


# The best epoch


class Told:
    """Stands for the held-out windows: each score is the next one told, whatever the net."""

    def __init__(self, trainer: Trainer, scores: list[float]) -> None:
        self.scores, self.states = iter(scores), []  # type: ignore[var-annotated]
        self.trainer = trainer

    def score(self, data: Any) -> float:
        self.states.append({name: tensor.clone() for name, tensor in self.trainer.net.state_dict().items()})
        return next(self.scores)


class ToldTrainer(Trainer):
    """A trainer whose held-out scores are told beforehand."""

    told: Told

    def score(self, data: Windows) -> float:
        return self.told.score(data)


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.3, 0.2], 1), ([0.3, 0.1, 0.2], 0), ([0.1, 0.2, 0.3], 2), ([0.2] * 3, 0)]
)
def test_the_net_of_the_best_epoch_comes_back(
    split: tuple[Windows, Windows], tmp_path: Path, scores: list[float], best: int
) -> None:
    trainer = ToldTrainer("amn", dict(NETS["amn"]), RECIPE, split[0])
    trainer.told = Told(trainer, scores)
    net = trainer.run(split[1], tmp_path / "run.pt", quiet)
    assert same(net.state_dict(), trainer.told.states[best])
    assert not same(net.state_dict(), trainer.told.states[best - 1])
    assert [epoch.score for epoch in trainer.history] == scores


# The schedules


def test_warm_up_takes_a_twentieth_and_the_cosine_ends_at_the_floor() -> None:
    rates = [5e-4 * warm_up_cosine(step, 1000, 5e-4) for step in range(1001)]
    assert rates[0] == pytest.approx(5e-4 / 50)
    assert rates[24] == pytest.approx(2.5e-4)
    assert rates[49] == rates[50] == pytest.approx(5e-4)
    assert rates[525] == pytest.approx((5e-4 + 1e-6) / 2)  # half way down
    assert rates[1000] == pytest.approx(1e-6)
    assert np.all(np.diff(rates[:50]) > 0)
    assert np.all(np.diff(rates[50:]) < 0)


@pytest.mark.parametrize("total", [0, 1, 2, 7])
def test_a_run_of_few_steps_has_a_schedule_too(total: int) -> None:
    rates = [warm_up_cosine(step, total, 1e-3) for step in range(total + 3)]
    assert rates[0] == 1
    assert all(1e-3 <= rate <= 1 for rate in rates)


def test_the_optimised_schedule_is_stepped_by_the_batch(
    trainer_of: Callable[..., Trainer], split: tuple[Windows, Windows], tmp_path: Path
) -> None:
    trainer = trainer_of()
    trainer.run(split[1], tmp_path / "run.pt", quiet)
    per_epoch = -(-len(split[0]) // 16)
    total = 3 * per_epoch
    expected = [5e-3 * warm_up_cosine(per_epoch * (epoch + 1), total, 5e-3) for epoch in range(3)]
    assert [epoch.learning_rate for epoch in trainer.history] == pytest.approx(expected)
    assert trainer.history[-1].learning_rate == pytest.approx(1e-6)


def test_the_baseline_schedule_halves_after_three_epochs_without_progress(
    split: tuple[Windows, Windows], tmp_path: Path
) -> None:
    recipe = replace(RECIPE, schedule="baseline", epochs=8)
    trainer = ToldTrainer("amn", dict(NETS["amn"]), recipe, split[0])
    trainer.told = Told(trainer, [0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.7])
    trainer.run(split[1], tmp_path / "run.pt", quiet)
    rates = [epoch.learning_rate for epoch in trainer.history]
    assert rates == pytest.approx([5e-3] * 5 + [2.5e-3] * 3)


# One step


def test_the_recipe_is_the_seeds() -> None:
    assert asdict(Recipe()) == {
        "epochs": 20,
        "batch_size": 32,
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "clip": 1.0,
        "schedule": "optimised",
        "negatives": 3,
        "noise": 0.0,
        "drop": 0.0,
        "contrast": 0.0,
        "ema": 0.0,
        "precision": "float32",
        "reverse": 0.0,
        "teachers": (),
        "distil": 0.5,
        "seed": 0,
    }


def test_the_optimizer_is_adamw_by_the_recipe(trainer_of: Callable[..., Trainer]) -> None:
    trainer = trainer_of(weight_decay=0.07, schedule="baseline")
    assert type(trainer.optimizer) is torch.optim.AdamW
    (group,) = trainer.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (5e-3, 0.07)


def test_the_loss_is_the_squared_distance_and_the_gradient_is_clipped(
    trainer_of: Callable[..., Trainer], split: tuple[Windows, Windows]
) -> None:
    trainer = trainer_of(noise=0.0, reverse=0.0, clip=1e-3)
    trainer.net.eval()  # no dropout, so that the answer is known
    rows = trainer.start[:7]
    with torch.no_grad():
        answer = trainer.net(torch.from_numpy(split[0].contexts()[:7]))
    expected = float(((answer - torch.from_numpy(split[0].targets()[:7])) ** 2).sum(dim=1).mean())
    assert trainer.step(rows) == pytest.approx(expected, rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in trainer.net.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_noise_has_the_length_that_was_asked_for(split: tuple[Windows, Windows]) -> None:
    """The net is trained on unit contexts, each turned by noise of about the recipe's length."""
    seen: list[Tensor] = []

    trainer = Trainer("amn", dict(NETS["amn"]), replace(RECIPE, noise=0.2, reverse=0.0), split[0])
    trainer.net.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    trainer.step(trainer.start)
    clean = torch.from_numpy(split[0].contexts())
    assert torch.allclose(seen[0].norm(dim=2), torch.ones(seen[0].shape[:2]), atol=1e-5)
    assert (seen[0] - clean).norm(dim=2).mean().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize(("reverse", "backwards"), [(0.0, {False}), (0.5, {True, False}), (1.0, {True})])
def test_the_share_of_batches_asked_for_is_read_backwards(
    trainer_of: Callable[..., Trainer], reverse: float, backwards: set[bool]
) -> None:
    """From the five chunks that follow, last first, to the one before them."""
    trainer = trainer_of(reverse=reverse, noise=0.0)
    read: list[Tensor] = []
    trainer.net.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    start = trainer.start[:4]
    for _ in range(20):
        trainer.step(start)
    either = {turned: trainer.gather(start, turned)[0] for turned in (False, True)}
    assert {turned for context in read for turned in either if torch.equal(context, either[turned])} == backwards
    block = trainer.vectors_at(start[:, None] + torch.arange(6))
    for turned, rows in ((False, block), (True, block.flip(1))):
        assert torch.equal(torch.cat([either[turned], trainer.gather(start, turned)[1][:, None]], dim=1), rows)


@pytest.mark.parametrize("reverse", [0.0, 1.0])
def test_a_teachers_share_of_the_target_is_the_recipes(split: tuple[Windows, Windows], reverse: float) -> None:
    """Its answer to what the net reads: where that is read backwards, so did the teacher."""

    class First(nn.Module):
        def forward(self, context: Tensor) -> Tensor:
            return context[:, 0]

    recipe = replace(RECIPE, noise=0.0, reverse=reverse, distil=0.25)
    trainer = Trainer("amn", {**NETS["amn"], "dropout": 0.0}, recipe, split[0])
    trainer.learn_from(First())
    context, true = trainer.gather(trainer.start[:7], bool(reverse))
    with torch.no_grad():
        answer = trainer.net(context)
    expected = float(((answer - 0.75 * true - 0.25 * context[:, 0]) ** 2).sum(dim=1).mean())
    assert trainer.step(trainer.start[:7]) == pytest.approx(expected, rel=1e-5)


def test_the_average_of_the_weights_is_scored_and_kept(
    trainer_of: Callable[..., Trainer], split: tuple[Windows, Windows], tmp_path: Path
) -> None:
    trainer = trainer_of(ema=0.75, epochs=1)
    path: list[dict[str, Tensor]] = []
    trainer.optimizer.register_step_post_hook(
        lambda *given: path.append({name: value.clone() for name, value in trainer.net.state_dict().items()})
    )
    average = dict(trainer.run(split[1], tmp_path / "run.pt", quiet).state_dict())
    expected = path[0]
    for weights in path[1:]:
        expected = {name: 0.75 * value + 0.25 * weights[name] for name, value in expected.items()}
    assert all(torch.allclose(average[name], expected[name], atol=1e-6) for name in expected)
    assert not same(average, path[-1])
    assert trainer.history[0].score == pytest.approx(trainer.score(split[1]), abs=1e-6)


def test_dropped_vectors_are_the_mean_of_the_others(contexts: Callable[..., Floats]) -> None:
    torch.manual_seed(0)
    given = torch.from_numpy(contexts(2000))
    found = with_dropped(given, 0.4)
    kept = (found == given).all(dim=2)
    assert float(1 - kept.float().mean()) == pytest.approx(0.4, abs=0.02)
    assert kept.any(dim=1).all()
    row = int(torch.nonzero(~kept.all(dim=1))[0, 0])
    mean = normalize(given[row][kept[row]].mean(dim=0), dim=0)
    assert torch.allclose(found[row][~kept[row]], mean, atol=1e-6)


def test_if_all_would_be_dropped_the_last_vector_stays(contexts: Callable[..., Floats]) -> None:
    given = torch.from_numpy(contexts(3))
    assert torch.allclose(with_dropped(given, 1.0), given[:, -1:].expand_as(given), atol=1e-6)


@pytest.mark.parametrize("reverse", [0.0, 1.0])
def test_the_loss_adds_infonce_by_its_weight(trainer_of: Callable[..., Trainer], reverse: float) -> None:
    plain, both = (trainer_of("lstm", noise=0.0, reverse=reverse, contrast=weight) for weight in (0.0, 0.5))
    start = plain.start[:7]
    context, true = plain.gather(start, bool(reverse))
    rows = start[:, None] + torch.arange(6)
    own = in_contexts(rows.flip(1) if reverse else rows)
    wrong = info_nce(plain.net.eval()(context), true, true.new_zeros(7, 0, 16), own)
    both.net.eval()
    assert both.step(start) == pytest.approx(plain.step(start) + 0.5 * wrong.item(), rel=1e-5)


def test_a_next_chunk_in_the_context_of_another_window_is_found() -> None:
    rows = torch.tensor([[0, 1, 2], [1, 2, 3], [3, 2, 1]])
    assert in_contexts(rows).tolist() == [[False, False, True], [True, False, True], [True, True, False]]


def test_bf16_is_for_products_in_training_only(
    trainer_of: Callable[..., Trainer], split: tuple[Windows, Windows]
) -> None:
    trainer = trainer_of(precision="bf16")
    found: list[torch.dtype] = []
    trainer.net.get_submodule("residual_net.0").register_forward_hook(lambda *given: found.append(given[2].dtype))
    trainer.step(trainer.start[:7])
    trainer.score(split[1])
    assert set(found[:1]) == {torch.bfloat16}
    assert set(found[1:]) == {torch.float32}
    assert {tensor.dtype for tensor in trainer.net.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_a_teacher_answers_in_the_precision_of_the_recipe(
    trainer_of: Callable[..., Trainer], precision: str, dtype: torch.dtype
) -> None:
    trainer = trainer_of(precision=precision)
    teacher = deepcopy(trainer.net)
    found: list[torch.dtype] = []
    teacher.get_submodule("residual_net.0").register_forward_hook(lambda *given: found.append(given[2].dtype))
    trainer.learn_from(teacher)
    assert set(found) == {dtype}
    assert trainer.teacher_answers is not None
    assert trainer.teacher_answers.dtype == np.float32


def test_a_state_without_a_newer_parameter_has_its_default(trainer_of: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer_of(reverse=0.0).save(tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    del state["recipe"]["reverse"]
    torch.save(state, tmp_path / "run.pt")
    trainer_of(reverse=0.0).resume(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="written by another run"):
        trainer_of(reverse=0.5).resume(tmp_path / "run.pt")


def test_the_score_is_the_mean_cosine(trainer_of: Callable[..., Trainer], make_corpus: Callable[..., Corpus]) -> None:
    class Last(nn.Module):
        def forward(self, context: Tensor) -> Tensor:
            return context[:, -1]

    trainer = trainer_of()
    trainer.net = Last()
    angles = np.arange(2106) * np.pi / 3  # each vector is 60 degrees on: the last context vector has cosine 1/2
    vectors: Floats = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    data = windows(make_corpus(vectors), 5)
    assert len(data) == 2101  # more than the block that is scored at a time
    assert trainer.score(data) == pytest.approx(0.5, abs=1e-4)
