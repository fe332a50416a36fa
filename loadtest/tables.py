"""Tables for reports, made of figures: nested mappings and lists as in their JSON."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]
# A key of a mapping, or what the wanted row of a list contains.
Step = str | Figures
# What a column shows of a row: the path to a value, with dots and perhaps a format ("latency.p50:.2f"), or a function.
Column = str | Callable[[Any], str]


def at(figures: Any, *path: Step) -> Any:
    """Return what lies at the end of a path in figures, None if a part of it is missing."""
    for step in path:
        if isinstance(step, str):
            figures = figures.get(step) if isinstance(figures, Mapping) else None
        else:
            figures = next((row for row in figures or () if step.items() <= row.items()), None)
    return figures


def tabulate(rows: Iterable[Figures], columns: Mapping[str, Column]) -> str:
    """Return a Markdown table of rows, its columns by heading."""
    return table(list(columns), [[cell(row, column) for column in columns.values()] for row in rows])


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of cells."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(row: Figures, column: Column) -> str:
    """Return what a column shows of a row."""
    if callable(column):
        return column(row)
    path, _, form = column.partition(":")
    value = at(row, *path.split("."))
    if isinstance(value, str):
        return value
    if form:
        return "-" if value is None else format(value, form)
    return ranged(value) if isinstance(value, Mapping) else number(value)


def number(value: float | None) -> str:
    """Return three significant digits, thousands with commas, a dash for a missing value."""
    if value is None or math.isnan(value):
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ranged(spread: Mapping[str, float]) -> str:
    """Return a median with its least and largest value."""
    return f"{number(spread['median'])} ({number(spread['min'])}-{number(spread['max'])})"
