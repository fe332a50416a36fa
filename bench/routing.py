"""Whether a router that knows the context would beat the better of two nets: `python -m bench.routing FIRST SECOND`.

It learns the difference of their cosines to the true next vector from cheap features of the context and of both
answers, by ridge regression, on four fifths of the articles, and routes the windows of the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.bootstrap import Interval, interval
from models.predictor import Predictor, load_predictor
from models.registry.registry import Registry
from models.retrieval.corpus import read_corpus
from models.vectors import Floats, normalise
from models.windows import Windows, require_windows

FOLDS = 5
# of the ridge regression
PENALTY = 100.0
Figures = NDArray[np.float64]


class Routing(NamedTuple):
    """Mean cosines of both nets, of the better one at each window, and of a learned choice; what the choice gains.

    `gain` is over always taking the net that is better on average; `interval` holds it with 95 %, by article.
    """

    each: tuple[float, float]
    oracle: float
    learned: float
    gain: float
    interval: Interval

    def row(self) -> str:
        """Return a row of a table in Markdown."""
        low, high = self.interval
        figures = (*self.each, self.oracle, self.learned)
        return " | ".join([*(f"{figure:.4f}" for figure in figures), f"{self.gain:+.4f} ({low:+.4f} to {high:+.4f})"])


def features(contexts: Floats, answers: tuple[Floats, Floats]) -> Figures:
    """Return features `(n, F)` of contexts `(n, T, D)` and unit answers `(n, D)`.

    These are the cosines of all pairs of the context, the length of its mean, and the cosines of the answers to each
    other, to the last vector and to the mean.
    """
    units = normalise(contexts)
    products = np.einsum("btd,bsd->bts", units, units)
    first, second = np.triu_indices(units.shape[1], 1)
    mean = units.mean(axis=1)
    length = np.linalg.norm(mean, axis=1)
    near = [np.vecdot(answer, other) for answer in answers for other in (units[:, -1], normalise(mean))]
    columns = [*products[:, first, second].T, length, np.vecdot(*answers), *near]
    return np.stack(columns, axis=1).astype(np.float64)


def measure(known: Figures, cosines: Figures, article: NDArray[Any], seed: int = 0) -> Routing:
    """Return what a learned choice makes of features `(n, F)` and the cosines `(n, 2)` of both nets, by article."""
    names, place = np.unique(article, return_inverse=True)
    folds = (np.random.default_rng(seed).permutation(len(names)) % FOLDS)[place]
    expected = np.empty(len(known))
    for fold in range(FOLDS):
        is_held = folds == fold
        fitted = _fit(known[~is_held], cosines[~is_held, 1] - cosines[~is_held, 0])
        expected[is_held] = fitted(known[is_held])
    chosen = np.where(expected > 0, cosines[:, 1], cosines[:, 0])
    means = cosines.mean(axis=0)
    gains = chosen - cosines[:, means.argmax()]
    each = float(means[0]), float(means[1])
    oracle = float(cosines.max(axis=1).mean())
    return Routing(each, oracle, float(chosen.mean()), float(gains.mean()), interval(gains, article, seed))


def _fit(known: Figures, target: Figures) -> Any:
    """Return a ridge regression from features and their squares."""
    centre, spread = known.mean(axis=0), known.std(axis=0) + 1e-9

    def design(values: Figures) -> Figures:
        scaled = (values - centre) / spread
        return np.column_stack([np.ones(len(values)), scaled, scaled**2])

    rows = design(known)
    weights = np.linalg.solve(rows.T @ rows + PENALTY * np.eye(rows.shape[1]), rows.T @ target)
    return lambda values: design(values) @ weights


def route(nets: tuple[Predictor, Predictor], data: Windows) -> Routing:
    """Return what a learned choice between two nets makes on a data set."""
    contexts, truths = data.contexts(), data.targets()
    first, second = (normalise(net.predict_batch(contexts)) for net in nets)
    cosines = np.stack([np.vecdot(answer, truths) for answer in (first, second)], axis=1).astype(np.float64)
    return measure(features(contexts, (first, second)), cosines, data.article)


def main() -> None:
    """Print the report for two aliases or versions."""
    parser = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    parser.add_argument("nets", nargs=2, metavar="NET", help="an alias or a version")
    parser.add_argument("--data", action="append", type=Path, help="a data directory; repeat")
    parser.add_argument("--registry", type=Path, default=Path("artifacts/lvm"))
    asked = parser.parse_args()
    found = Registry(asked.registry)
    first, second = (load_predictor(found.find(name).path, "cpu") for name in asked.nets)
    print(f"| data | {first.name} | {second.name} | better one | learned | gain over the better net |")
    print("|---|---|---|---|---|---|")
    for directory in asked.data or [asked.registry / "retriever"]:
        made = route((first, second), require_windows(read_corpus(directory), first.card.context_length))
        print(f"| {directory} | {made.row()} |")


if __name__ == "__main__":
    main()
