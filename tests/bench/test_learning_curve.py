"""Curves are read off the cards of a registry, and a line through them says what more data would bring."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.learning_curve import Key, curves, table, trend
from bench.plot import draw_learning_curves
from models.registry.card import CARD_FILE, Card
from models.registry.registry import Registry, Version


def add(registry: Registry, name: str, kind: str, **fields: object) -> Version:
    card = Card(name=name, kind=kind, dim=4, encoder="e", license="l", attribution="", **fields)  # type: ignore[arg-type]
    return registry.add(name, {CARD_FILE: card.to_markdown().encode()})


def score(cosine: float, recall: float) -> dict[str, object]:
    retrieval = {"without_context": {"R@5": recall, "MRR": 0.0}, "with_context": {"R@5": 0.0, "MRR": 0.0}}
    return {"cosine": cosine, "margin": 0.0, "retrieval": retrieval, "baselines": {}}


def net(registry: Registry, name: str, windows: int, cosine: float) -> None:
    add(registry, name, "net", data={"windows": windows}, scores={"val": score(cosine, 0.0)})


def bundle(registry: Registry, windows: int, recall: float) -> None:
    towers = add(registry, "two-tower", "two_tower", data={"windows": windows})
    add(registry, "bank", "corpus", config={"towers": towers.id}, scores={"bank": score(0.0, recall)})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(tmp_path / "registry")
    net(found, "gmn", 2000, 0.62)
    net(found, "gmn", 1000, 0.6)
    net(found, "lstm", 1000, 0.5)
    bundle(found, 500, 0.3)
    bundle(found, 1000, 0.4)
    return found


def test_versions_of_one_name_make_a_curve_by_windows(registry: Registry) -> None:
    assert curves(registry) == {
        Key("gmn", "val", "cosine"): {1000: 0.6, 2000: 0.62},
        Key("bank", "bank", "R@5"): {500: 0.3, 1000: 0.4},
    }


def test_versions_that_do_not_say_what_they_were_trained_on_are_left_out(registry: Registry) -> None:
    before = curves(registry)
    add(registry, "gmn", "net", scores={"val": score(0.9, 0.0)})
    add(
        registry, "bank", "corpus", config={"towers": "two-tower/20200101-000000000000"}, scores={"bank": score(0, 0.9)}
    )
    add(registry, "bank", "corpus", scores={"bank": score(0.0, 0.9)})
    assert curves(registry) == before


def test_the_line_says_what_a_doubling_brings_and_ten_times_the_most() -> None:
    found = trend({1000: 0.6, 2000: 0.62, 4000: 0.64})
    assert found.doubling == pytest.approx(0.02)
    assert found.predicted == pytest.approx(0.64 + 0.02 * 3.3219, abs=1e-5)


def test_the_table_has_a_row_for_each_curve(registry: Registry) -> None:
    _, _, row, _ = table(curves(registry))
    assert row == "| bank | bank | R@5 | 500: 0.3000, 1,000: 0.4000 | +0.1000 | 0.7322 |"


def test_draws_a_picture(registry: Registry, tmp_path: Path) -> None:
    draw_learning_curves(tmp_path / "curves.png", curves(registry))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
