"""The leaderboard has the measured scores beside the baselines, and recommends by its rules."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import leaderboard, leaderboard_report
from models.evaluate import evaluate
from models.registry.registry import Registry
from models.retrieval.corpus import Corpus, read_corpus
from models.training.work_cache import WorkCache
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


def test_rejects_a_registry_without_nets(tmp_path: Path, data: dict[str, Corpus]) -> None:
    with pytest.raises(leaderboard.NothingToRank, match="D = 384"):
        leaderboard.measure(Registry(tmp_path), data, None, 1, lambda what: None, WorkCache(tmp_path))
