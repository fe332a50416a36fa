"""The leaderboard has the measured scores beside the baselines, and recommends by its rules."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import leaderboard, leaderboard_report
from models.evaluate import evaluate
from models.nets import build
from models.nets.two_tower import PassageTower, TwoTower
from models.registry.card import Card
from models.registry.registry import Registry
from models.retrieval.corpus import Corpus, read_corpus
from models.training import publish
from models.training.work_cache import WorkCache
from models.windows import OtherDimension
from tests.conftest import SHIPPED


def part_of(shipped: Corpus, first: int, last: int) -> Corpus:
    """Return the articles of these places."""
    wanted = np.unique(shipped.article)[first:last]
    rows = np.isin(shipped.article, wanted)
    articles = {int(article): shipped.articles[int(article)] for article in wanted}
    return Corpus(shipped.vectors[rows], shipped.article[rows], shipped.position[rows], articles)


@pytest.fixture(scope="module")
def data() -> dict[str, Corpus]:
    shipped = read_corpus(SHIPPED / "retriever")
    return {"home": part_of(shipped, 0, 12), "away": part_of(shipped, 12, 24)}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The primary net that ships, alone."""
    root = tmp_path_factory.mktemp("registry")
    shutil.copytree(
        (SHIPPED / "primary").resolve().parent, root / "models" / (SHIPPED / "primary").resolve().parent.name
    )
    return Registry(root)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> WorkCache:
    return WorkCache(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def figures(registry: Registry, data: dict[str, Corpus], cache: WorkCache) -> dict[str, Any]:
    found = leaderboard.measure(registry, data, None, 1, lambda what: None, cache)
    return {"command": "lvm leaderboard", **found}


def test_scores_equal_those_of_evaluate_and_lie_in_their_intervals(
    figures: dict[str, Any], registry: Registry, data: dict[str, Corpus]
) -> None:
    from models.predictor import load_predictor

    (name,) = figures["nets"]
    net = load_predictor(registry.versions()[0].path)
    for where, corpus in data.items():
        right, found = evaluate(net, corpus, 5), figures["scores"][where]
        assert found[name]["cosine"] == pytest.approx(right["cosine"], abs=1e-6)
        assert found["mean"]["retrieval"] == right["baselines"]["mean"]["retrieval"]
        assert found[name]["interval"][0] < found[name]["cosine"] < found[name]["interval"][1]
        beyond = found[name]["cosine"] - found["weighted_mean"]["cosine"]
        assert found[name]["beyond"]["mean"] == pytest.approx(beyond, abs=1e-6)


def test_stopped_measurement_resumes_after_the_scores(
    registry: Registry, data: dict[str, Corpus], figures: dict[str, Any], cache: WorkCache
) -> None:
    def stop(what: str) -> None:
        if what == "timing":
            raise KeyboardInterrupt

    kept = {path: path.stat().st_mtime_ns for path in cache.directory.iterdir()}
    assert len(kept) == 8  # a net and three baselines, twice
    with pytest.raises(KeyboardInterrupt):
        leaderboard.measure(registry, data, None, 1, stop, cache)
    again = leaderboard.measure(registry, data, None, 1, lambda what: None, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.directory.iterdir()} == kept
    assert again["scores"] == figures["scores"]


def add_net(registry: Registry, name: str, dim: int, length: int) -> str:
    """Add an untrained AMN, and return its id."""
    facts = Card(name, "net", dim, "any", "mit", "us", context_length=length)
    net = build("amn", {"dim": dim, "key_dim": 8, "hidden_dim": 8, "context_length": length})
    return publish.publish(registry, net, facts, publish.golden_contexts(None, dim, length), {}).id


def test_nets_of_another_context_length_or_dimension_are_left_out_and_named(
    registry: Registry, data: dict[str, Corpus], tmp_path: Path, cache: WorkCache
) -> None:
    mixed = Registry(Path(shutil.copytree(registry.root, tmp_path / "registry")))
    add_net(mixed, "second", 384, 5)
    longer = add_net(mixed, "longer", 384, 7)
    add_net(mixed, "narrow", 40, 5)
    said: list[str] = []
    found = leaderboard.measure(mixed, data, None, 1, said.append, cache)
    assert found["nets"].keys() == {"amn", "second"}
    assert f"left out {longer}, whose contexts have T = 7, not 5" in said


def test_data_sets_of_different_dimensions_are_refused_by_name(
    registry: Registry, data: dict[str, Corpus], cache: WorkCache
) -> None:
    home = data["home"]
    narrow = Corpus(home.vectors[:, :40], home.article, home.position, home.articles)
    for away, train in ((narrow, None), (home, narrow)):
        with pytest.raises(OtherDimension, match="has vectors with D = 40; the model reads D = 384"):
            leaderboard.measure(registry, {"home": home, "away": away}, train, 1, lambda what: None, cache)


def test_every_table_has_every_system(figures: dict[str, Any]) -> None:
    text = leaderboard_report.to_markdown(figures)
    (net,) = figures["nets"]
    for section in text.split("\n## ")[2:]:
        assert f"| {net} |" in section
    for baseline in ("persistence", "weighted_mean"):
        assert text.count(f"| {baseline} |") == 6, "accuracy, generalisation, and four of retrieval"


def score(cosine: float, low: float, mrr: float = 0.1) -> dict[str, Any]:
    ranking = {"without_context": {"MRR": mrr}}
    return {"cosine": cosine, "beyond": {"interval": (low, 1)}, "retrieval": ranking}


def test_recommends_by_the_rules() -> None:
    speeds = {"swift": (0.1, 0.01), "exact": (2.0, 0.5), "slow": (9.0, 5.0), "lucky": (0.05, 0.01)}
    scores = {"swift": (0.60, 0.001), "exact": (0.61, 0.001), "slow": (0.62, 0.001), "lucky": (0.60, -0.001)}
    figures: dict[str, Any] = {
        "nets": speeds,
        "speed": {
            name: {"query": {"mean_ms": one, "p95_ms": one}, "batch": {"128": many}}
            for name, (one, many) in speeds.items()
        },
        "scores": {
            where: {name: score(cosine, low, mrr=cosine / 3) for name, (cosine, low) in scores.items()}
            for where in ("home", "away")
        },
    }
    chosen = {use: name for use, _, name in leaderboard_report.recommend(figures)}
    assert chosen == {
        "Real time": "swift", "Accuracy": "slow", "Other domains": "slow", "Batch work": "exact",
        "Efficiency": "lucky", "Retrieval": "slow",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("net", "remark"), [(0.55, " (below the baseline mean: cosine 0.5500, not 0.5800)"), (0.59, "")]
)
def test_a_choice_below_a_baseline_says_so(net: float, remark: str) -> None:
    scores = {"amn": score(net, -0.1, mrr=0.3), "mean": score(0.58, 0), "weighted_mean": score(0.57, 0)}
    speed = {"amn": {"query": {"mean_ms": 1, "p95_ms": 1}, "batch": {"128": 1}}}
    figures = {"nets": {"amn": 1}, "speed": speed, "scores": {"home": scores, "away": scores}}
    chosen = {use: name for use, _, name in leaderboard_report.recommend(figures)}
    assert chosen["Accuracy"] == chosen["Other domains"] == chosen["Efficiency"] == f"amn{remark}"
    assert chosen["Real time"] == "none"


def test_two_towers_are_timed_and_have_their_training_by_version(
    registry: Registry, data: dict[str, Corpus], tmp_path: Path
) -> None:
    both = Registry(Path(shutil.copytree(registry.root, tmp_path / "registry")))
    stated = {"epoch": 4, "metrics": {"train_loss": 0.9055, "val_cosine": 0.6326, "val_cosine_std": 0.1214}}
    facts = Card("pair", "two_tower", 384, "any", "mit", "us", data={"file": "epoch4.pt", "stated": stated})
    net = TwoTower(build("amn", {"dim": 384, "key_dim": 8, "hidden_dim": 8}), PassageTower(384))
    made = publish.publish(both, net, facts, publish.golden_contexts(None, 384, 5), {})
    found = leaderboard.measure(both, data, None, 1, lambda what: None, WorkCache(tmp_path / "parts"))
    assert {"mean_ms", "p95_ms"} <= found["speed"]["pair"]["query"].keys()
    text = leaderboard_report.to_markdown({"command": "lvm leaderboard", **found})
    serving, training = text.split("## Two-towers")[1].split("## Training of the two-towers")
    assert f"| {made.id} |" in serving
    assert f"| {made.id} | epoch4.pt | 4 | 0.905 | 0.633 | 0.121 | - | - |" in training
    # The payload tower of a new two-tower changes nothing, and its AMN predicts the mean.
    assert found["scores"]["home"]["pair, towers alone"]["tower_cosine"] == pytest.approx(
        found["scores"]["home"]["mean"]["cosine"], abs=1e-3
    )


def test_retrieval_says_which_targets_are_met(figures: dict[str, Any]) -> None:
    text = leaderboard_report.to_markdown(figures)
    assert "Targets: R@5 >= 30 %, Contain@50 >= 82 %, MRR >= 0.2." in text
    row = next(line for line in text.split("`with_context`")[1].splitlines() if line.startswith("| weighted_mean"))
    assert row.endswith("| not met: R@5, MRR |")


def test_rejects_a_registry_without_nets(tmp_path: Path, data: dict[str, Corpus]) -> None:
    with pytest.raises(leaderboard.NothingToRank, match="D = 384"):
        leaderboard.measure(Registry(tmp_path), data, None, 1, lambda what: None, WorkCache(tmp_path))
