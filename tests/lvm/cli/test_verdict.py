"""What `lvm promote` prints of the gate's figures."""

from __future__ import annotations

from lvm.cli.verdict import passed, rows

FIGURES = {
    "incumbent": "amn/20260101-0",
    "card": ["encoder"],
    "golden": {"contexts": 64, "worst_cosine": 0.9999994},
    "space": {"D": 384, "T": 5, "encoder": "MiniLM"},
    "scores": {"wiki/val": {"cosine": 0.60258, "card": 0.6026}, "other": {"cosine": 0.5, "card": 0.5}},
    "incumbent_scores": {"wiki/val": {"cosine": 0.58618}},
    "latency": {
        "1": {"ms": 0.0621, "incumbent_ms": 0.054, "ratio": 1.15},
        "128": {"ms": 3, "incumbent_ms": 2, "ratio": 1.5},
    },
}


def test_scores_and_times_stand_beside_those_of_the_incumbent() -> None:
    assert list(rows(FIGURES)) == [
        ("cosine, wiki/val", "0.6026", "0.6026", "0.5862", "+0.0164"),
        ("cosine, other", "0.5000", "0.5000", "-", "-"),
        ("ms of CPU, 1 context", "0.062", "-", "0.054", "1.1 x"),
        ("ms of CPU, 128 contexts", "3.000", "-", "2.000", "1.5 x"),
    ]


def test_names_the_checks_that_passed_and_no_others() -> None:
    assert passed(FIGURES) == (
        "passed: complete card; 64 golden vectors (worst cosine 0.999999); D = 384, T = 5, encoder = MiniLM"
    )
    assert passed({"golden": {}, "space": {"D": 8}}) == "passed: D = 8"


def test_overridden_checks_have_no_rows() -> None:
    assert list(rows({"incumbent": None, "latency": {}})) == []
