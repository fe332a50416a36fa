"""The tables of `lvm models`: versions with their scores, as wide as a file has room for, or for a narrow terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lvm.cli.output import TableData, size_text

Summary = Mapping[str, Any]


def wide(versions: Sequence[Summary], aliases: Mapping[str, str]) -> TableData:
    """Return a table with a line for each version and data set; a version that cannot be read has its error."""
    head = ("version", "alias", "net", "T x D", "parameters", "size", "made", "data", "cosine", "margin", "R@5")
    return head, [_wide_row(version, _aliases_of(version, aliases, ", ")) for version in versions]


def narrow(versions: Sequence[Summary], aliases: Mapping[str, str]) -> TableData:
    """Return a table of fewer and narrower columns, in which the name of a version has two lines."""
    head = ("version", "alias", "size", "data", "cosine", "R@5")
    rows = [
        (
            version["id"].replace("/", "\n"),
            _aliases_of(version, aliases, "\n"),
            _size(version),
            *_scores(version, "cosine", "R@5"),
        )
        for version in versions
    ]
    return head, rows


def errors(versions: Sequence[Summary]) -> Iterator[str]:
    """Yield a line for each version that cannot be read."""
    yield from (f"{version['id']}: {version['error']}" for version in versions if "error" in version)


def first_score(version: Summary) -> tuple[str, str]:
    """Return R@5 on the first data set of the card, and the size; empty if the version is not known."""
    scores = [score.get("R@5") for score in version.get("scores", {}).values()]
    return _figure(scores[0]) if scores else "", _size(version)


def _wide_row(version: Summary, aliases: str) -> tuple[str, ...]:
    return (
        version["id"],
        aliases,
        version.get("architecture") or version.get("kind") or version["error"],
        f"{version['context_length']} x {version['dim']}" if "dim" in version else "",
        f"{version['parameters']:,}" if version.get("parameters") else "",
        _size(version),
        version.get("date") or "",
        *_scores(version, "cosine", "margin", "R@5"),
    )


def _aliases_of(version: Summary, aliases: Mapping[str, str], separator: str) -> str:
    return separator.join(alias for alias, target in aliases.items() if target == version["id"])


def _size(version: Summary) -> str:
    return size_text(version["bytes"]) if "bytes" in version else ""


def _scores(version: Summary, *figures: str) -> Iterator[str]:
    """Yield the names of the data sets on the card, then each figure on all of them, a line each."""
    scores: Mapping[str, Mapping[str, float | None]] = version.get("scores", {})
    yield "\n".join(scores)
    for figure in figures:
        yield "\n".join(_figure(score.get(figure)) for score in scores.values())


def _figure(value: float | None) -> str:
    """Return a figure with four decimals; "-" if there is none."""
    return "-" if value is None else f"{value:.4f}"
