"""The model card: a README.md whose YAML front matter is the Hugging Face one plus our `lvm` block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

FILE = "README.md"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where it is: ten times as quick
_FENCE = "---\n"
_TEXTS = ("name", "kind", "encoder", "license", "attribution", "architecture", "command")
_COUNTS = ("dim", "context_length", "parameters")
_MAPS = ("config", "data", "scores")


class BadCard(ValueError):
    """A model card that cannot be read or lacks something."""


@dataclass(frozen=True)
class Reference:
    """What input vectors looked like in training: mean and standard deviation of two figures."""

    norm: tuple[float, float]
    neighbour_cosine: tuple[float, float]


@dataclass(frozen=True)
class Card:
    """All that must be known to serve a version and to judge it.

    `scores` maps a data set's name to what `evaluate` printed for it; `kind` is `net`, `corpus`, `two_tower` or
    `reranker`. A corpus with towers names their version, and its reranker's, in its config.
    """

    name: str
    kind: str
    dim: int
    encoder: str
    license: str
    attribution: str
    context_length: int = 5
    architecture: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    scores: Mapping[str, Any] = field(default_factory=dict)
    reference: Reference | None = None
    limits: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """Return the card as the text of a README.md."""
        front = yaml.safe_dump(self._front_matter(), sort_keys=False, allow_unicode=True, width=110)
        return f"{_FENCE}{front}{_FENCE}\n{self._body()}"

    @classmethod
    def from_markdown(cls, text: str) -> Card:
        """Read a card.

        Raises:
            BadCard: there is no front matter, no `lvm` block, or a field is missing or unknown.
        """
        try:
            opening, rest = text[: len(_FENCE)], text[len(_FENCE) :]
            front, fence, _ = rest.partition(f"\n{_FENCE}")  # a value may end in the fence; a line is one
            if opening != _FENCE or not fence:
                raise ValueError("no front matter")
            block = dict(yaml.load(front, Loader=_LOADER)["lvm"])
            reference = block.pop("reference", None)
            pairs = {key: (float(mean), float(std)) for key, (mean, std) in (reference or {}).items()}
            limits = tuple(block.pop("limits", ()))
            card = cls(**block, limits=limits, reference=Reference(**pairs) if reference else None)
            card._check()
            return card
        except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise BadCard(f"unreadable model card: {error}") from error

    def _check(self) -> None:
        wrong = [name for name in _TEXTS if type(getattr(self, name)) is not str]
        wrong += [name for name in _COUNTS if type(getattr(self, name)) is not int or getattr(self, name) < 0]
        wrong += [name for name in _MAPS if not isinstance(getattr(self, name), Mapping)]
        if wrong:
            raise ValueError(f"of the wrong kind: {', '.join(wrong)}")

    def _front_matter(self) -> dict[str, Any]:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        required = ("name", "encoder", "license", "attribution")
        block = {name: value for name, value in given.items() if value or name in required}
        block["limits"] = list(self.limits)
        if self.reference:
            block["reference"] = {f.name: list(getattr(self.reference, f.name)) for f in fields(Reference)}
        return {
            "license": self.license,
            "library_name": "lvm-serve",
            "pipeline_tag": "feature-extraction",
            "tags": ["latent-vector-model", self.architecture or self.kind],
            "model-index": [{"name": self.name, "results": self._results()}],
            "lvm": block,
        }

    def _results(self) -> list[dict[str, Any]]:
        return [
            {
                "task": {"type": "feature-extraction", "name": "next-vector prediction"},
                "dataset": {"type": data, "name": data},
                "metrics": [
                    {"type": "cosine", "value": score["cosine"]},
                    {"type": "margin", "value": score["margin"]},
                ],
            }
            for data, score in self.scores.items()
        ]

    def _body(self) -> str:
        parts = [f"# {self.name}", self._summary(), self._score_table(), self._limits(), self._origin()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _summary(self) -> str:
        if self.kind == "corpus":
            parts = " and ".join(f"`{self.config[part]}`" for part in ("towers", "reranker") if part in self.config)
            holds = f"A corpus of {self.data.get('chunks')} passages: unit vectors, D = {self.dim}, by {self.encoder}."
            return f"{holds} Bundled with {parts}, to which its index belongs." if parts else holds
        if self.kind == "reranker":
            return f"A 2-layer MLP of {self.parameters:,} parameters that orders what {self.config['towers']} finds."
        if self.kind == "two_tower":
            return (
                f"Towers of {self.parameters:,} parameters: a `{self.architecture}` net makes a query of "
                f"{self.context_length} consecutive chunks, a payload tower makes of a passage what the query searches "
                f"for (D = {self.dim}, {self.encoder})."
            )
        return (
            f"A `{self.architecture}` net of {self.parameters:,} parameters: the embeddings of "
            f"{self.context_length} consecutive chunks in (D = {self.dim}, {self.encoder}), "
            "the embedding of the next one out."
        )

    def _score_table(self) -> str:
        if not self.scores:
            return ""
        rows = [
            "## Scores",
            "",
            "| data | predictor | cosine | margin | R@5 | MRR |",
            "|---|---|---|---|---|---|",
        ]
        for data, score in self.scores.items():
            for predictor, figures in ({self.name: score} | score["baselines"]).items():
                found = figures["retrieval"]["without_context"]
                rows.append(
                    f"| {data} | {predictor} | {figures['cosine']:.4f} | {figures['margin']:.4f} "
                    f"| {found['R@5']:.3f} | {found['MRR']:.3f} |"
                )
        note = "Retrieval ranks the true next chunk among the set's chunks, the context's own left out."
        return "\n".join([*rows, "", note])

    def _limits(self) -> str:
        return "\n".join(["## Limits", "", *(f"- {limit}" for limit in self.limits)]) if self.limits else ""

    def _origin(self) -> str:
        made = f"Made by `{self.command}`.\n\n" if self.command else ""
        return f"## Origin\n\n{made}Licence: {self.license}. {self.attribution}"


def read(directory: Path) -> Card:
    """Return the card of the version in `directory`; raises `BadCard`."""
    try:
        return Card.from_markdown((directory / FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadCard(str(error)) from error
