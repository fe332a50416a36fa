"""What the gate measured, for people: the new version beside the incumbent, and the checks that it passed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HEAD = ("measured", "new", "on its card", "incumbent", "difference")
Figures = Mapping[str, Any]


def rows(figures: Figures) -> Iterator[tuple[str, ...]]:
    """Yield a row for each score and each time in the figures of a verdict; "-" if there is nothing to compare with."""
    theirs = figures.get("incumbent_scores", {})
    for data, scores in figures.get("scores", {}).items():
        for measure in scores.keys() - {"card"}:
            score, incumbent = scores[measure], theirs.get(data, {}).get(measure)
            compared = ("-", "-") if incumbent is None else (f"{incumbent:.4f}", f"{score - incumbent:+.4f}")
            yield f"{measure}, {data}", f"{score:.4f}", f"{scores['card']:.4f}", *compared
    if live := figures.get("live"):
        yield f"cosine, live, {live['pairs']} contexts", "-", "-", "-", f"{live['mean']:+.4f}"
    for count, times in figures.get("latency", {}).items():
        label = "ms of CPU, 1 context" if count == "1" else f"ms of CPU, {count} contexts"
        yield label, f"{times['ms']:.3f}", "-", f"{times['incumbent_ms']:.3f}", f"{times['ratio']:.1f} x"
    reference, *others = figures.get("precision", {}).get("tried", [None])
    for tried in others:
        for count, seconds in tried["seconds"].items():
            ratio = f"{seconds / reference['seconds'][count]:.2f} x float32"
            yield f"ms of CPU in {tried['precision']}, {count} context(s)", f"{1e3 * seconds:.3f}", "-", "-", ratio


def passed(figures: Figures) -> str:
    """Return the checks that the version passed; those that were overridden have no figures."""
    found = ["complete card"] if "card" in figures else []
    if golden := figures.get("golden"):
        found.append(f"{golden['contexts']} golden vectors (worst cosine {golden['worst_cosine']:.6f})")
    if space := figures.get("space"):
        found.append(", ".join(f"{axis} = {value}" for axis, value in space.items()))
    chosen = f"; fastest precision here: {figures['precision']['precision']}" if "precision" in figures else ""
    return f"passed: {'; '.join(found) or 'no check'}{chosen}"
