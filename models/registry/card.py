"""The model card: a README.md with the front matter of Hugging Face, and in it a block `lvm` of our own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from models.registry import disk

CARD_FILE = "README.md"
# libyaml, if it is installed, is ten times as fast
_SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# limit of a file, and of values and characters after the expansion of YAML aliases
MAX_CARD_BYTES = 1 << 17
# of nested collections
_MAX_DEPTH = 100
# Characters that begin a collection. Fewer of them cannot nest deeply enough to do harm.
_MARKS = "[{-?"
_MANY_MARKS = 1000
_MAX_REASON_CHARACTERS = 500
# The scores by rank, except R@5 of the version: these lines of its own scores have 10 spaces, of baselines more.
_RETRIEVAL = re.compile(r"^(?! {10}R@5:) {10,}(?:R@\d+|Contain@\d+|MRR): [-.\de]+\n", re.MULTILINE)
_FENCE = "---\n"
_TEXTS = ("name", "kind", "encoder", "license", "attribution", "architecture", "command")
_COUNTS = ("dim", "context_length", "parameters")
_MAPS = ("config", "data", "scores")


class BadCard(ValueError):
    """A model card that is unreadable or incomplete."""


@dataclass(frozen=True)
class CardVectorStats:
    """Statistics of the training data: mean and standard deviation of two numbers."""

    norm: tuple[float, float]
    neighbour_cosine: tuple[float, float]


@dataclass(frozen=True)
class Card:
    """Everything that is needed to serve a version and to judge it.

    `scores` maps the name of a data set to the output of `evaluate`, for a net perhaps with its `diagnosis`
    (`models.diagnose.for_card`). `kind` is `net`, `corpus`, `two_tower` or `reranker`. The config of a corpus with
    towers names their version, and that of its reranker.
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
    reference: CardVectorStats | None = None
    limits: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """Return the card as the text of a README.md."""
        front = yaml.safe_dump(self._front_matter(), sort_keys=False, allow_unicode=True, width=110)
        return f"{_FENCE}{front}{_FENCE}\n{self._body()}"

    @classmethod
    def from_markdown(cls, text: str) -> Card:
        """Read a card.

        Raises:
            BadCard: there is no front matter, no block `lvm`, or a field is missing, unknown or has the wrong type.
        """
        try:
            block = _block(text)
            reference = block.pop("reference", None)
            pairs = {key: (float(mean), float(std)) for key, (mean, std) in (reference or {}).items()}
            limits = tuple(_texts("limits", block.pop("limits", [])))
            card = cls(**block, limits=limits, reference=CardVectorStats(**pairs) if reference else None)
            card._check()
            return card
        except Exception as error:
            # an invalid card raises anything from OverflowError to YAMLError
            raise BadCard(f"unreadable model card: {str(error)[:_MAX_REASON_CHARACTERS]}") from error

    def _check(self) -> None:
        wrong = [name for name in _TEXTS if type(getattr(self, name)) is not str]
        wrong += [name for name in _COUNTS if not _is_count(getattr(self, name))]
        wrong += [name for name in _MAPS if not isinstance(getattr(self, name), Mapping)]
        if wrong:
            raise ValueError(f"wrong type: {', '.join(wrong)}")
        for name, score in self.scores.items():
            _check_score(name, score)

    def _front_matter(self) -> dict[str, Any]:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        required = ("name", "encoder", "license", "attribution")
        block = {name: value for name, value in given.items() if value or name in required}
        block["limits"] = list(self.limits)
        if self.reference:
            block["reference"] = {f.name: list(getattr(self.reference, f.name)) for f in fields(CardVectorStats)}
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
        parts = [
            f"# {self.name}",
            self._summary(),
            self._score_table(),
            self._diagnosis(),
            self._limits(),
            self._origin(),
        ]
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

    def _diagnosis(self) -> str:
        found = {data: score["diagnosis"] for data, score in self.scores.items() if "diagnosis" in score}
        if not found:
            return ""
        rows = [
            "## Diagnosis",
            "",
            "| data | verdict | cosine to the last chunk read | to the next | loss if shuffled | fed back |",
            "|---|---|---|---|---|---|",
        ]
        rows += [f"| {data} | {' | '.join(_diagnosis_cells(each))} |" for data, each in found.items()]
        return "\n".join([*rows, "", *(f"- On {data}: {each['text']}" for data, each in found.items())])

    def _limits(self) -> str:
        return "\n".join(["## Limits", "", *(f"- {limit}" for limit in self.limits)]) if self.limits else ""

    def _origin(self) -> str:
        made = f"Made by `{self.command}`.\n\n" if self.command else ""
        return f"## Origin\n\n{made}Licence: {self.license}. {self.attribution}"


def read_card(directory: Path) -> Card:
    """Read the card of the version in `directory`; raises `BadCard`."""
    return Card.from_markdown(_text(directory))


def read_card_summary(directory: Path) -> Card:
    """Read a card without most of its retrieval scores, which are most of its text; raises `BadCard`.

    R@5 of the version stays.
    """
    return _read_outline(_RETRIEVAL.sub("", _text(directory)))


# copies of a version have one card
@lru_cache(maxsize=64)
def _read_outline(text: str) -> Card:
    return Card.from_markdown(text)


def _text(directory: Path) -> str:
    try:
        return disk.read(directory / CARD_FILE, MAX_CARD_BYTES).decode()
    except UnicodeDecodeError as error:
        raise BadCard(f"{CARD_FILE}: {error}") from error
    except OSError as error:
        raise BadCard(f"{CARD_FILE}: {error.strerror}") from error


class _Loader(_SAFE):  # type: ignore[misc]
    """Reads plain YAML without merge keys: a few bytes of these could take unbounded time."""

    def flatten_mapping(self, node: Any) -> None:
        """Ignore merge keys."""


def _block(text: str) -> dict[str, Any]:
    """Return the block `lvm` in the front matter of a card."""
    opening, rest = text[: len(_FENCE)], text[len(_FENCE) :]
    # only a whole line is a fence; a value may end in one
    front, fence, _ = rest.partition(f"\n{_FENCE}")
    if opening != _FENCE or not fence:
        raise ValueError("no front matter" + ("; its lines end in CRLF, expected LF" if "\r\n" in text else ""))
    _check_depth(front)
    found = yaml.load(front, Loader=_Loader)
    block = found.get("lvm") if isinstance(found, dict) else None
    if not isinstance(block, dict):
        raise ValueError("the front matter has no block `lvm`")
    _check_size(block)
    return dict(block)


def _check_depth(front: str) -> None:
    """Raise `ValueError` if collections are nested too deeply: the loader of libyaml would overflow the stack."""
    if len(front) > MAX_CARD_BYTES:
        raise ValueError(f"front matter has {len(front)} characters; expected at most {MAX_CARD_BYTES}")
    if sum(map(front.count, _MARKS)) < _MANY_MARKS:
        return
    depth = 0
    for event in yaml.parse(front, Loader=_SAFE):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} nested collections")


def _check_size(block: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the block is too large after the expansion of aliases, or cannot be encoded in UTF-8."""
    pending: list[Any] = [block]
    size = 0
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple | set):
            pending += value
        size += len(value.encode()) if isinstance(value, str) else len(value) if isinstance(value, list) else 1
        if size > MAX_CARD_BYTES:
            raise ValueError(f"more than {MAX_CARD_BYTES} values and bytes after the expansion of aliases")


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"wrong type: {name}, expected a list of strings")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _check_score(name: Any, score: Any) -> None:
    """Raise `ValueError` if a score is not the output of an evaluation."""
    if not (isinstance(name, str) and isinstance(score, Mapping) and isinstance(score.get("baselines"), Mapping)):
        raise ValueError(f"wrong type: scores of {name!r}, expected cosine, margin and baselines")
    figures = {"cosine": score.get("cosine"), "margin": score.get("margin")}
    for baseline, values in score["baselines"].items():
        figures[f"baselines of {baseline}"] = values.get("cosine") if isinstance(values, Mapping) else None
    wrong = [figure for figure, value in figures.items() if not _is_figure(value)]
    if wrong or not all(isinstance(baseline, str) for baseline in score["baselines"]):
        raise ValueError(f"wrong type: scores of {name!r}, expected numbers: {', '.join(wrong)}")
    if "diagnosis" in score:
        _check_diagnosis(name, score["diagnosis"])


def _check_diagnosis(name: str, found: Mapping[str, Any]) -> None:
    """Raise an error if a diagnosis is not the output of `models.diagnose.for_card`."""
    texts = (found["verdict"], found["text"], *found["cosine"], *found["order_loss"])
    figures = (*found["cosine"].values(), *found["order_loss"].values(), *found["rollout"])
    if not (all(isinstance(text, str) for text in texts) and all(map(_is_figure, figures))):
        raise ValueError(f"wrong type: diagnosis on {name!r}, expected texts and numbers")


def _diagnosis_cells(found: Mapping[str, Any]) -> list[str]:
    """Return the cells of a diagnosis: verdict, and figures that a reader compares."""
    figures = (found["cosine"].get("+0"), found["cosine"].get("+1"), found["order_loss"].get("shuffled"))
    cells = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
    return [found["verdict"], *cells, ", ".join(f"{cosine:.3f}" for cosine in found["rollout"])]


def _is_figure(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


def rounded(scores: Any) -> Any:
    """Return `scores` with every float rounded to five decimals, as a card shows them."""
    if isinstance(scores, dict):
        return {key: rounded(value) for key, value in scores.items()}
    if isinstance(scores, list):
        return [rounded(value) for value in scores]
    return round(scores, 5) if isinstance(scores, float) else scores
