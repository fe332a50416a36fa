"""A card survives a round trip, Hugging Face reads it too, and incomplete cards are rejected."""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st

from models.registry.card import BadCard, Card, CardVectorStats, read_card, read_card_summary, rounded

PLAIN = Card("toy", "net", 16, "tiny-encoder", "cc-by-sa-3.0", "The authors.")
FOUND = {"R@1": 0.5, "R@3": 0.6, "R@5": 0.7, "R@10": 0.8, "R@20": 0.9, "R@50": 1.0, "Contain@50": 1.0, "MRR": 0.6}
FIGURES: dict[str, Any] = {
    "cosine": 0.61234,
    "margin": -0.012,
    "retrieval": {"with_context": {**FOUND}, "without_context": {**FOUND}},
}
FULL = replace(
    PLAIN,
    context_length=7,
    architecture="amn",
    config={"dim": 16, "context_length": 7, "dropout": 0.1},
    parameters=12_345,
    data={"train": "tiny", "windows": 180, "split": "by article: 20% held out"},
    command="lvm train amn --data 'a b' | tee # no comment",
    scores={"wiki-val": {**FIGURES, "baselines": {"mean": deepcopy(FIGURES)}, "windows": 90}},
    reference=CardVectorStats((1.0, 1e-05), (0.52, 0.13)),
    limits=("Short: yes.", "- not a list", "50 % of # nothing"),
)
DIAGNOSIS: dict[str, Any] = {
    "verdict": "topic",
    "text": "Most of the score is topic.",
    "windows": 90,
    "cosine": {"-1": 0.7, "+0": 0.84, "+1": 0.6},
    "order_loss": {"shuffled": 0.03},
    "rollout": [0.6, 0.56],
}
HEAD = "---\nlvm:\n"
FIELDS = "  name: a\n  kind: net\n  dim: 3\n  encoder: e\n  license: l\n  attribution: x\n"
EDGES = [
    "---",
    "a\n---\nb",
    "...",
    "x\n---\n",
    "no",
    "1e3",
    "",
    "{}",
    "'",
    '"',
    "\r\n",
    "\t",
    "\x00",
    "\u2028",
    "ä 水 🙂",
]
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\x85")  # which PyYAML reads back as a space
texts = st.text(characters, max_size=60) | st.sampled_from(EDGES)


@pytest.mark.parametrize("card", [PLAIN, FULL, replace(PLAIN, kind="corpus", data={"chunks": 9})])
def test_a_card_survives_a_round_trip(card: Card) -> None:
    assert Card.from_markdown(card.to_markdown()) == card


@given(texts, texts, texts, texts, texts, st.lists(texts, max_size=3).map(tuple))
@example("a", "b", "c ---", "d", "e", ())
@example("", "", "", "", "", ("",))
def test_any_text_survives_a_round_trip(
    encoder: str, license_: str, attribution: str, command: str, name: str, limits: tuple[str, ...]
) -> None:
    card = replace(
        FULL,
        name=name,
        encoder=encoder,
        license=license_,
        attribution=attribution,
        command=command,
        limits=limits,
        data={"train": name},
    )
    assert Card.from_markdown(card.to_markdown().encode().decode()) == card


@given(st.floats(allow_nan=False), st.integers(1, 10**6))
def test_any_number_survives_a_round_trip(figure: float, dim: int) -> None:
    card = replace(PLAIN, dim=dim, data={"figure": figure}, reference=CardVectorStats((figure, 0.0), (0.1, figure)))
    assert Card.from_markdown(card.to_markdown()) == card


def test_hugging_face_reads_its_front_matter() -> None:
    front = ModelCard(FULL.to_markdown()).data
    assert front.license == "cc-by-sa-3.0"
    assert front.library_name == "lvm-serve"
    assert front.pipeline_tag == "feature-extraction"
    assert front.tags == ["latent-vector-model", "amn"]
    assert front.model_name == "toy"
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in front.eval_results] == [
        ("wiki-val", "cosine", 0.61234),
        ("wiki-val", "margin", -0.012),
    ]
    assert front.lvm["dim"] == 16


def test_people_read_scores_limits_and_licence() -> None:
    text = FULL.to_markdown()
    assert "# toy\n" in text
    assert "| wiki-val | toy | 0.6123 | -0.0120 | 0.700 | 0.600 |" in text
    assert "| wiki-val | mean | 0.6123 |" in text
    assert "- Short: yes." in text
    assert "Licence: cc-by-sa-3.0. The authors." in text
    assert "12,345 parameters" in text


def test_diagnosis_is_read_back_and_shown() -> None:
    card = replace(FULL, scores={"wiki-val": {**FULL.scores["wiki-val"], "diagnosis": DIAGNOSIS}})
    text = card.to_markdown()
    assert Card.from_markdown(text) == card
    assert "| wiki-val | topic | 0.840 | 0.600 | 0.030 | 0.600, 0.560 |" in text
    assert "- On wiki-val: Most of the score is topic." in text


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        {},
        {**DIAGNOSIS, "text": 3},
        {**DIAGNOSIS, "cosine": {"+0": "high"}},
        {**DIAGNOSIS, "order_loss": [0.1]},
        {**DIAGNOSIS, "rollout": [True]},
    ],
)
def test_diagnosis_of_the_wrong_type_is_rejected(wrong: Any) -> None:
    front = {"name": "a", "kind": "net", "dim": 3, "encoder": "e", "license": "l", "attribution": "x"}
    score = {"cosine": 0.5, "margin": 0.1, "baselines": {}, "diagnosis": wrong}
    text = f"---\n{yaml.safe_dump({'lvm': {**front, 'scores': {'data': score}}})}---\n"
    with pytest.raises(BadCard):
        Card.from_markdown(text)


@pytest.mark.parametrize("field", ["name", "kind", "dim", "encoder", "license", "attribution"])
def test_a_missing_field_is_named(field: str) -> None:
    block = "".join(line for line in FIELDS.splitlines(True) if not line.startswith(f"  {field}:"))
    with pytest.raises(BadCard, match=field):
        Card.from_markdown(f"{HEAD}{block}---\n")


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(BadCard, match="surprise"):
        Card.from_markdown(f"{HEAD}{FIELDS}  surprise: 1\n---\n")


def test_the_smallest_card_is_read() -> None:
    assert Card.from_markdown(f"{HEAD}{FIELDS}---\n") == Card("a", "net", 3, "e", "l", "x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# A README",
        "---\n",
        "---\n---\n",
        f"{HEAD}{FIELDS}",
        f"x{HEAD}{FIELDS}---\n",
        "---\nlicense: mit\n---\n",
        "---\nlvm: text\n---\n",
        "---\nlvm: [1, 2]\n---\n",
        "---\n- a\n---\n",
        "---\nlvm: {a: [\n---\n",
        "---\nlvm: !!python/object/apply:os.system ['true']\n---\n",
        f"{HEAD}{FIELDS}  limits: 5\n---\n",
        f"{HEAD}{FIELDS}  reference: [1, 2]\n---\n",
        f"{HEAD}{FIELDS}  reference: {{norm: [1, 0]}}\n---\n",
        f"{HEAD}{FIELDS}  reference: {{norm: [1], neighbour_cosine: [1, 0]}}\n---\n",
        f"{HEAD}{FIELDS}  reference: {{norm: [a, b], neighbour_cosine: [1, 0]}}\n---\n",
    ],
)
def test_rejects_an_incomplete_card(text: str) -> None:
    with pytest.raises(BadCard, match="unreadable model card"):
        Card.from_markdown(text)


MANY = "[" + ", ".join(["x"] * 50) + "]"
ODD = {
    "no baselines": ("scores: {a: {cosine: .5, margin: .1}}", "scores of 'a', expected cosine, margin and baselines"),
    "a score that is a number": ("scores: {a: .5}", "scores of 'a'"),
    "a name that is a number": ("scores: {2026: {cosine: .5, margin: .1, baselines: {}}}", "scores of 2026"),
    "baselines of nothing": ("scores: {a: {cosine: .5, margin: .1, baselines: null}}", "scores of 'a'"),
    "a figure that is text": ("scores: {a: {cosine: high, margin: .1, baselines: {}}}", "expected numbers: cosine"),
    "a figure that is a date": ("scores: {a: {cosine: 2026-01-01, margin: .1, baselines: {}}}", "numbers: cosine"),
    "a figure that is a set": ("scores: {a: {cosine: !!set {b}, margin: .1, baselines: {}}}", "numbers: cosine"),
    "a figure that is giant": (
        "scores: {a: {cosine: 0x1" + "0" * 99 + ", margin: 1, baselines: {}}}",
        "numbers: cosine",
    ),
    "a baseline that is a number": ("scores: {a: {cosine: 1, margin: 1, baselines: {mean: 1}}}", "baselines of mean"),
    "limits of one text": ("limits: only English", "limits, expected a list of strings"),
    "limits of nothing": ("limits: null", "limits, expected a list of strings"),
    "limits of maps": ("limits: [{a: 1}, 3]", "limits, expected a list of strings"),
    "a giant count": ("parameters: 0x1" + "0" * 99, "wrong type: parameters"),
    "a giant mean": ("reference: {norm: [1" + "0" * 400 + ", 0], neighbour_cosine: [0, 0]}", "too large"),
    "aliases": (f"data: {{a: &a {MANY}, b: &b [{'*a, ' * 50}], c: &c [{'*b, ' * 50}], d: [{'*c, ' * 50}]}}", "aliases"),
    "an alias of itself": ("data: &a {b: [*a, *a]}", "more than"),
    "long texts": (f"limits: [&a {'x' * 60_000}, *a, *a, *a]", "more than"),
    "merged maps": ("data: {a: &a {b: 1}, c: {<<: [*a, *a]}}", "merge"),
    # The reason is ours, or that of a libyaml with a limit of its own.
    "brackets": ("data: " + "[" * 50_000 + "]" * 50_000, r"(?s:.*)nest(ed|ing)"),
    "dashes": ("data:\n    " + "- " * 50_000, r"(?s:.*)nest(ed|ing)"),
    "length": (f"data: {{a: {'x' * 200_000}}}", "expected at most"),
}


@pytest.mark.parametrize(("line", "reason"), ODD.values(), ids=ODD)
def test_rejects_an_invalid_card_with_the_reason(line: str, reason: str) -> None:
    with pytest.raises(BadCard, match=f"unreadable model card: .*{reason}") as refused:
        Card.from_markdown(f"{HEAD}{FIELDS}  {line}\n---\n")
    assert len(str(refused.value)) < 600


def test_rejects_crlf_with_the_cause() -> None:
    with pytest.raises(BadCard, match="its lines end in CRLF, expected LF"):
        Card.from_markdown(PLAIN.to_markdown().replace("\n", "\r\n"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "is a directory, expected a regular file"),
        (os.mkfifo, "is a named pipe, expected a regular file"),
        (lambda path: path.symlink_to(path.name), "is a symbolic link"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "can't decode"),
        (lambda path: path.write_bytes(b"x" * (1 << 20)), "is larger than"),
    ],
)
def test_rejects_special_files_without_blocking(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    make(tmp_path / "README.md")
    with pytest.raises(BadCard, match=rf"README\.md: .*{reason}"):
        read_card(tmp_path)


@given(st.text(max_size=200), st.integers(0, 2000))
def test_any_text_is_read_or_raises_bad_card(noise: str, place: int) -> None:
    text = FULL.to_markdown()
    for damaged in (noise, f"---\n{noise}\n---\n", text[:place], text[:place] + noise + text[place:]):
        try:
            Card.from_markdown(damaged)
        except BadCard:
            continue


@pytest.mark.parametrize("card", [PLAIN, FULL])
def test_a_card_summary_has_no_retrieval_scores_but_recall_at_5(tmp_path: Path, card: Card) -> None:
    (tmp_path / "README.md").write_text(card.to_markdown(), encoding="utf-8")
    found = read_card_summary(tmp_path)
    assert replace(found, scores={}) == replace(card, scores={})
    for name, score in card.scores.items():
        assert found.scores[name]["cosine"] == score["cosine"]
        assert found.scores[name]["baselines"]["mean"]["margin"] == score["baselines"]["mean"]["margin"]
        assert found.scores[name]["retrieval"] == {"with_context": {"R@5": 0.7}, "without_context": {"R@5": 0.7}}
        assert found.scores[name]["baselines"]["mean"]["retrieval"] == {"with_context": None, "without_context": None}


def test_rounding_reaches_every_float() -> None:
    assert rounded({"a": 0.1234567, "b": {"c": 1, "d": 2.000001}}) == {"a": 0.12346, "b": {"c": 1, "d": 2.0}}
