"""What /models and `lvm models` show of a version, by its card and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.registry.registry import Registry
from service.http.routes.models import summary
from tests.fakes import add_version, card

FIGURES: dict[str, Any] = {"cosine": 0.6, "margin": -0.1, "baselines": {}}


def test_a_summary_has_the_day_and_the_size_of_the_files(tmp_path: Path) -> None:
    version = add_version(Registry(tmp_path), "amn")
    found = summary(version)
    assert found["date"].replace("-", "") == version.version[:8]
    assert found["bytes"] == sum(path.stat().st_size for path in version.path.iterdir())


def test_a_version_whose_name_has_no_date_has_none(tmp_path: Path) -> None:
    version = add_version(Registry(tmp_path), "amn")
    renamed = version.path.rename(version.path.with_name("first-0"))
    (found,) = Registry(tmp_path).versions()
    assert (found.path, summary(found)["date"]) == (renamed, None)


def test_the_recall_of_a_data_set_is_that_without_the_chunks_of_the_context(tmp_path: Path) -> None:
    retrieval = {
        name: {"R@5": recall, "MRR": 0.3} for name, recall in (("with_context", 0.2), ("without_context", 0.4))
    }
    scores = {"wiki/val": {**FIGURES, "retrieval": retrieval}}
    text = card("amn", scores=scores).to_markdown()
    version = Registry(tmp_path).add("amn", {"README.md": text.encode()})
    assert summary(version)["scores"]["wiki/val"]["R@5"] == 0.4


@pytest.mark.parametrize(
    "retrieval",
    [
        None,
        {},
        {"without_context": None},
        {"without_context": {"R@5": "high"}},
        {"without_context": {"R@5": float("nan")}},
    ],
)
def test_a_card_without_recall_has_none(tmp_path: Path, retrieval: Any) -> None:
    text = card("amn").to_markdown().splitlines()
    scores = json.dumps({"wiki/val": {**FIGURES, "retrieval": retrieval}}).replace("NaN", ".nan")
    text.insert(text.index("lvm:") + 1, f"  scores: {scores}")
    version = Registry(tmp_path).add("amn", {"README.md": "\n".join(text).encode()})
    assert summary(version)["scores"]["wiki/val"]["R@5"] is None


@pytest.mark.parametrize(
    ("kind", "chunks", "shown"),
    [("corpus", 9, {"chunks": 9}), ("corpus", "many", {}), ("corpus", -1, {}), ("net", 9, {})],
)
def test_a_corpus_has_the_number_of_its_chunks(tmp_path: Path, kind: str, chunks: Any, shown: dict[str, int]) -> None:
    text = card("held", kind=kind, data={"chunks": chunks}).to_markdown()
    found = summary(Registry(tmp_path).add("held", {"README.md": text.encode()}))
    assert {name: count for name, count in found.items() if name == "chunks"} == shown
