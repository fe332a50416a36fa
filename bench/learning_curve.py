"""What more articles bring: scores against the windows trained on, `python -m bench.learning_curve REGISTRY`.

The versions were made by `lvm train --used SHARE`, and bundles by `lvm corpus --towers` of such towers. Those of one
name make a curve. A line through score and logarithm of windows predicts what ten times as many would bring.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.plot import draw_learning_curves
from models.registry.card import Card, read_card
from models.registry.registry import Registry

MORE = 10


class Key(NamedTuple):
    """What a curve is of: the model, the data set, and the figure."""

    model: str
    data: str
    figure: str


Curve = dict[int, float]


class Trend(NamedTuple):
    """A line through a curve: what a doubling of the windows brings, and the score at `MORE` times the most."""

    doubling: float
    predicted: float


def curves(registry: Registry) -> dict[Key, Curve]:
    """Return score by windows of each model with at least two sizes: cosine of nets, R@5 of bundles.

    Of versions that are trained on equally many windows the last counts; a version whose card, or whose towers' card,
    does not say how many is left out.

    Raises:
        BadCard: a card cannot be read.
    """
    cards = {version.id: read_card(version.path) for version in registry.versions()}
    found: defaultdict[Key, Curve] = defaultdict(dict)
    for card in cards.values():
        trained = cards.get(card.config.get("towers", "")) if card.kind == "corpus" else card
        if trained and "windows" in trained.data:
            for key, score in _scores(card):
                found[key][int(trained.data["windows"])] = score
    return {key: dict(sorted(curve.items())) for key, curve in found.items() if len(curve) > 1}


def _scores(card: Card) -> Iterator[tuple[Key, float]]:
    if card.kind == "net":
        yield from ((Key(card.name, data, "cosine"), score["cosine"]) for data, score in card.scores.items())
    elif card.kind == "corpus":
        for data, score in card.scores.items():
            yield Key(card.name, data, "R@5"), score["retrieval"]["without_context"]["R@5"]


def trend(curve: Curve) -> Trend:
    """Fit a line to score and logarithm of windows by least squares."""
    doublings = np.log2(list(curve))
    slope, start = np.polyfit(doublings, list(curve.values()), 1)
    return Trend(float(slope), float(start + slope * (doublings[-1] + np.log2(MORE))))


def table(found: dict[Key, Curve]) -> list[str]:
    """Return the lines of a table in Markdown."""
    lines = [
        f"| model | data | figure | windows: score | each doubling | {MORE} times as many |",
        "|---|---|---|---|---|---|",
    ]
    for key, curve in found.items():
        points = ", ".join(f"{windows:,}: {score:.4f}" for windows, score in curve.items())
        line = trend(curve)
        lines.append(f"| {' | '.join(key)} | {points} | {line.doubling:+.4f} | {line.predicted:.4f} |")
    return lines


def main() -> None:
    """Print the table, and draw the curves if a picture is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning_curve", description=__doc__)
    parser.add_argument("registry", type=Path)
    parser.add_argument("--picture", type=Path, help="a .png to draw")
    asked = parser.parse_args()
    found = curves(Registry(asked.registry))
    if not found:
        parser.error(f"{asked.registry}: no model here was trained on several numbers of windows")
    print("\n".join(table(found)))
    if asked.picture:
        draw_learning_curves(asked.picture, found)


if __name__ == "__main__":
    main()
