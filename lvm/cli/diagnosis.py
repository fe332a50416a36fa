"""The tables of `lvm diagnose`, 80 characters wide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from models.diagnose import NET

Figures = Mapping[str, Any]
_OFFSETS = {0: "last", 1: "next"}
# More do not fit.
_LAST_OFFSET = 3


class Table(NamedTuple):
    """A table and the sentence above it."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(found: Figures) -> Iterator[Table]:
    """Yield the tables of a diagnosis."""
    yield _offsets(found)
    if found["order"]:
        yield _order(found)
    yield _rollout(found)
    if found["coherence"]:
        yield _coherence(found)


def _offsets(found: Figures) -> Table:
    offsets = [offset for offset in found["offsets"] if offset <= _LAST_OFFSET]
    rows = [
        (_words(system), *_cells(cosines[: len(offsets)]), _cell(found["other_articles"][system]))
        for system, cosines in found["cosine"].items()
    ]
    head = "", *(_OFFSETS.get(offset, f"{offset:+}") for offset in offsets), "others"
    return Table("Cosine to each chunk: read (up to last), that follows, and of other articles", head, rows)


def _order(found: Figures) -> Table:
    rows = [
        (_words(altered), *_difference(lost["loss"]), *_cells(lost["baselines"].values()))
        for altered, lost in found["order"].items()
    ]
    baselines = next(iter(found["order"].values()))["baselines"]
    head = "context", NET, "95 %", *map(_words, baselines)
    return Table("Loss of cosine to the next chunk if the context is changed", head, rows)


def _rollout(found: Figures) -> Table:
    kept = found["cosine"][NET][-found["steps"] :]
    steps = zip(*found["rollout"].values(), kept, found["rollout_gain"], strict=True)
    rows = [(f"+{number}", *_cells(cosines), *_difference(gain)) for number, (*cosines, gain) in enumerate(steps, 1)]
    head = "step", *map(_words, found["rollout"]), "kept", "gain", "95 %"
    title = f"Answers fed back; kept: the first answer; gain: over {_words(found['best_baseline'])}"
    return Table(title, head, rows)


def _coherence(found: Figures) -> Table:
    last = found["offsets"].index(0)
    altered = [name for name in ("shuffled", "last_only") if name in found["order"]]
    rows = [
        (
            part["coherence"],
            _cell(part["adjacent_cosine"]),
            f"{part['windows']:,}",
            *_cells(part["cosine"][NET][last : last + 2]),
            _cell(part["rollout_gain"][0]["mean"]),
            *_cells(part["order"][name]["loss"]["mean"] for name in altered),
            _cell(part["rollout"][NET][-1]),
        )
        for part in found["coherence"]
    ]
    head = "articles", "adjacent", "windows", "last", "next", "gain", *map(_words, altered), f"step +{found['steps']}"
    return Table("By coherence of the article, the mean cosine of its adjacent chunks", head, rows)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cells(values: Iterable[float]) -> list[str]:
    return [_cell(value) for value in values]


def _cell(value: float) -> str:
    # without the sign of a zero
    return f"{round(value, 3) + 0.0: .3f}"


def _difference(found: Figures) -> tuple[str, str]:
    """Return the mean of a difference, and its interval."""
    if found["interval"] is None:
        return _cell(found["mean"]), "one article"
    low, high = found["interval"]
    return _cell(found["mean"]), f"{low:.3f} to {high:.3f}"
