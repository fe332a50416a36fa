"""One training job from end to end: the baselines first, then epochs, then a version that can be served."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from models.evaluate import mean_cosine
from models.predictor import load_predictor
from models.recipe import DataSet, Job
from models.registry.registry import Registry, Version
from models.retrieval.corpus import Corpus
from models.training.job import run_job
from models.windows import hold_out, windows

Trained = tuple[Version, list[str], list[tuple[int, int]]]


def test_the_version_is_in_the_registry_and_can_be_served(trained: Trained, published: Registry) -> None:
    version = trained[0]
    assert published.find(version.id) == version
    assert load_predictor(version.path, device="cpu").name == "amn"


def test_baselines_are_reported_before_the_first_epoch(trained: Trained) -> None:
    said = trained[1]
    assert [line.split(":")[0] for line in said] == [
        "baseline persistence",
        "baseline mean",
        "baseline weighted_mean",
        "epoch 1",
        "epoch 2",
    ]
    assert all("cosine 0." in line for line in said)


def test_progress_starts_at_nothing_and_ends_at_the_last_epoch(trained: Trained) -> None:
    assert trained[2] == [(0, 2), (1, 2), (2, 2)]


def test_the_card_names_data_split_and_command(trained: Trained, corpus: Corpus) -> None:
    served = load_predictor(trained[0].path, device="cpu")
    card = served.card
    rest, held_out = hold_out(windows(corpus, 5), 0.2, 0)
    assert card.data == {
        "train": "tiny",
        "windows": len(rest),
        "held_out_windows": len(held_out),
        "held_out_cosine": pytest.approx(mean_cosine(served.predict_batch, held_out), abs=1e-4),
        "split": "by article, 20% held out to choose the epoch, seed 0",
        "held_out": 0.2,
        "seed": 0,
    }
    assert (card.encoder, card.license, card.attribution) == ("tiny-encoder", "cc-by-sa-3.0", "")
    assert card.command == "lvm train amn --data tiny"
    assert card.config["key_dim"] == 8
    assert card.reference is not None
    assert card.reference.norm[0] == pytest.approx(1, abs=1e-4)
    assert card.limits
    assert set(card.scores) == {"other", "tiny"}
    assert "ridge" in card.scores["other"]["baselines"]


def test_the_card_says_which_share_of_the_articles_was_used(
    job_of: Callable[..., Job], corpus: Corpus, tmp_path: Path
) -> None:
    job = replace(job_of("amn"), used=0.5)
    data = load_predictor(
        run_job(job, Registry(tmp_path), lambda done, total: None, lambda line: None).path, device="cpu"
    ).card.data
    rest, held_out = hold_out(windows(corpus, 5), 0.2, 0, 0.5)
    assert (data["used"], data["windows"], data["held_out_windows"]) == (0.5, len(rest), len(held_out))


def test_a_stopped_job_resumes_to_the_same_version(
    trained: Trained, job_of: Callable[..., Job], val: tuple[DataSet, ...], tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    job = job_of("amn", val=val)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Registry(tmp_path), stop, lambda line: None)
    lines: list[str] = []
    version = run_job(replace(job, resume=True), Registry(tmp_path), lambda done, total: None, lines.append)
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 2"]
    assert version.id == trained[0].id


def test_several_data_sets_are_trained_on_as_one_also_after_a_stop(
    job_of: Callable[..., Job], corpus_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    job = job_of("amn", data=(DataSet("tiny", corpus_dir), DataSet("other", other_dir)))
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Registry(tmp_path / "stopped"), stop, lambda line: None)
    stopped = run_job(
        replace(job, resume=True), Registry(tmp_path / "stopped"), lambda done, total: None, lambda line: None
    )
    whole = run_job(job, Registry(tmp_path / "whole"), lambda done, total: None, lambda line: None)
    assert stopped.id == whole.id
    card = load_predictor(whole.path, device="cpu").card
    assert card.data["train"] == "tiny + other"
    assert card.data["windows"] + card.data["held_out_windows"] == (12 + 6) * 15


def test_the_net_learned_more_than_the_mean(trained: Trained) -> None:
    scores = load_predictor(trained[0].path, device="cpu").card.scores["tiny"]
    assert scores["cosine"] > scores["baselines"]["mean"]["cosine"]


def test_nothing_but_the_version_is_in_its_place(trained: Trained, published: Registry) -> None:
    home: Path = trained[0].path.parent
    assert [path.name for path in home.iterdir()] == [trained[0].version]
    assert published.aliases() == {}  # training promotes nothing
