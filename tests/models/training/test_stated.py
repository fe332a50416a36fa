"""What a file says of its model: plain values go on the card, and its cosine is compared with the one here."""

import argparse
import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch

from models.registry.card import Card
from models.training.stated import card_data, comparisons, sentences


def stated(value: Any) -> Any:
    return card_data("x.pt", {"args": value}).get("stated", {}).get("args", "omitted")


def cosine_of(saved: dict[str, Any]) -> tuple[Any, Any]:
    data = card_data("x.pt", saved)
    return data.get("stated_by"), data.get("stated_cosine")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"lr": 5e-4, "out": None, "amp": True}, {"lr": 5e-4, "out": None, "amp": True}),
        (argparse.Namespace(lr=1, out=PurePosixPath("/x")), {"lr": 1, "out": "/x"}),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (torch.tensor(0.25), 0.25),
        ([1, (2, "three")], [1, [2, "three"]]),
        ({0: 1, (1, 2): 3}, {"0": 1}),
    ],
)
def test_takes_plain_values(value: Any, expected: Any) -> None:
    assert stated(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        10**30,
        "\udcff",
        "two\nlines",
        "x" * 1000,
        object(),
        torch.ones(2),
        torch.ones(1, device="meta"),
        torch.zeros(1).expand(10**6, 10**6),
        [object()],
        list(range(10_000)),
    ],
)
def test_leaves_out_what_is_not_plain_or_too_long(value: Any) -> None:
    assert stated(value) == "omitted"
    assert stated({"bad": value, "good": 1}) == {"good": 1}


@pytest.mark.parametrize("name", ["hf_token", "PASSWORD", "wandb_api_key", "client_secret", "credentials"])
def test_leaves_out_what_may_be_secret(name: str) -> None:
    assert stated({name: "x", "lr": 1}) == {"lr": 1}


def test_what_is_nested_too_deeply_or_in_itself_is_left_out() -> None:
    deep: dict[str, Any] = {}
    for _ in range(10_000):
        deep = {"a": deep}
    assert len(str(stated(deep))) < 100
    cycle: dict[str, Any] = {"lr": 1}
    cycle["self"] = cycle
    assert stated(cycle)["lr"] == 1


def test_what_is_too_large_for_a_card_is_left_out() -> None:
    many = {str(number): "x" * 290 for number in range(100)}
    assert card_data("x.pt", {"args": many, "epoch": 3})["stated"] == {"epoch": 3}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"val_cosine": 0.5664, "metrics": {"cosine": 0.1}}, ("val_cosine", 0.5664)),
        ({"best_val_cosine": 0.5}, ("best_val_cosine", 0.5)),
        ({"metrics": {"val_cosine": 0.6326, "train_loss": 2}}, ("metrics.val_cosine", 0.6326)),
        ({"val_results": {"mean_cosine": 0.4}}, ("val_results.mean_cosine", 0.4)),
        ({"val_cosine": torch.tensor(0.5664)}, ("val_cosine", 0.5664)),
        ({"val_cosine": "0.5664"}, (None, None)),
        ({"val_cosine": 56.64}, (None, None)),
        ({"val_cosine": True}, (None, None)),
        ({"val_cosine": float("nan"), "metrics": [0.5]}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_finds_the_cosine_under_the_keys_of_the_customer(saved: dict[str, Any], expected: tuple[Any, Any]) -> None:
    assert cosine_of(saved) == expected


def test_compares_the_cosine_with_each_data_set(card: Callable[..., Card]) -> None:
    known = card(data=card_data("x.pt", {"val_cosine": 0.5664}))
    near, far = comparisons(known, {"near": {"cosine": 0.5597}, "far": {"cosine": 0.41}})
    assert str(near) == "the file says 0.5664; here, on near, 0.5597"
    assert str(far).startswith("the file says 0.5664; here, on far, 0.4100; warning: they differ by more than 0.01: ")
    assert (near.differs, far.differs) == (False, True)
    assert sentences([near]) == ["The file says 0.5664; here, on near, 0.5597."]


def test_says_that_a_file_states_no_cosine(card: Callable[..., Card]) -> None:
    (found,) = comparisons(card(data=card_data("x.pt", {})), {"near": {"cosine": 0.5597}})
    assert str(found) == "the file states no cosine; here, on near, 0.5597"
    assert not found.differs
    assert sentences([found]) == []


def test_compares_nothing_if_the_net_was_trained_here(card: Callable[..., Card]) -> None:
    assert comparisons(replace(card(), data={"train": "wiki"}), {"near": {"cosine": 0.5}}) == []


def test_compares_a_two_tower_by_the_cosine_of_queries_and_passages(card: Callable[..., Card]) -> None:
    known = card(kind="two_tower", data=card_data("x.pt", {"metrics": {"val_cosine": 0.6326}}))
    (found,) = comparisons(known, {"near": {"cosine": 0.1, "passage_cosine": 0.63}})
    assert (found.file, found.here) == (0.6326, 0.63)
