"""What `lvm models` shows of versions, in a file and in a narrow terminal."""

from __future__ import annotations

from lvm.cli import listing
from lvm.cli.output import fits, size_text

AMN = {
    "id": "amn/20261123-b96501f8de4c",
    "kind": "net",
    "architecture": "amn",
    "date": "2026-11-23",
    "bytes": 3_894_941,
    "dim": 384,
    "context_length": 5,
    "parameters": 822_400,
    "scores": {
        "wiki/val": {"cosine": 0.58623, "margin": -0.13799, "R@5": 0.29253},
        "other": {"cosine": 0.5, "margin": -0.1, "R@5": None},
    },
}
ODD = {"id": "odd/20260101-0", "error": "unreadable model card: a long reason"}
ALIASES = {"primary": AMN["id"], "candidate": AMN["id"], "fallback": "another/1"}


def test_a_wide_table_has_scores_size_and_day_of_each_version() -> None:
    head, (row, odd) = listing.wide([AMN, ODD], ALIASES)
    assert dict(zip(head, row, strict=True)) == {
        "version": AMN["id"],
        "alias": "primary, candidate",
        "net": "amn",
        "T x D": "5 x 384",
        "parameters": "822,400",
        "size": "3.9 MB",
        "made": "2026-11-23",
        "data": "wiki/val\nother",
        "cosine": "0.5862\n0.5000",
        "margin": "-0.1380\n-0.1000",
        "R@5": "0.2925\n-",
    }
    assert odd[:3] == (ODD["id"], "", ODD["error"])
    assert set(odd[3:]) == {""}


def test_a_narrow_table_fits_80_columns_and_names_what_cannot_be_read() -> None:
    head, rows = listing.narrow([AMN, ODD], ALIASES)
    assert rows[0] == (
        "amn\n20261123-b96501f8de4c",
        "primary\ncandidate",
        "3.9 MB",
        "wiki/val\nother",
        "0.5862\n0.5000",
        "0.2925\n-",
    )
    widths = [
        max(len(line) for row in (head, *rows) for line in row[at].splitlines() or [""]) for at in range(len(head))
    ]
    assert sum(widths) + 3 * len(widths) <= 80
    assert list(listing.errors([AMN, ODD])) == [f"{ODD['id']}: {ODD['error']}"]


def test_the_score_of_a_replica_is_that_on_the_first_data_set() -> None:
    assert listing.first_score(AMN) == ("0.2925", "3.9 MB")
    assert listing.first_score({}) == ("", "")


def test_any_table_fits_a_file() -> None:
    assert fits(("a" * 1000,), [])


def test_sizes_have_a_unit() -> None:
    assert [size_text(size) for size in (0, 999, 3_894_941, 2_000_000_000)] == ["0.0 kB", "1.0 kB", "3.9 MB", "2.0 GB"]
