"""What a file says of its model: plain values for the card, and the cosine to compare with the one found here."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from models.registry.card import Card

# a difference from the file's cosine that calls for a warning
DIFFERENCE = 0.01
RESULTS = ("val_results", "metrics", "val_metrics", "results")
COSINES = (
    "val_cosine",
    "best_val_cosine",
    "cosine",
    "mean_cosine",
    "val_mean_cosine",
    "cosine_similarity",
    "val_cosine_similarity",
    "mean_cosine_similarity",
    "avg_cosine",
    "best_cosine",
)
_KEYS = (
    *COSINES,
    *RESULTS,
    *("epoch", "step", "global_step", "train_loss", "val_loss", "best_val_loss"),
    *("model_type", "model_config", "config", "args", "hyper_parameters"),
)
_SECRET = re.compile(r"(?i)token$|passw|secret|credential|api_?key")
# of what is put on a card: nested collections, members of one, characters of a text, and of all in JSON
_DEEPEST, _MOST, _LONGEST, _LARGEST = 4, 200, 300, 16_384
_SHORT = (torch.float32, torch.float16, torch.bfloat16)
_OMITTED = object()
_WARNING = (
    f"warning: they differ by more than {DIFFERENCE}: either the data set is another, or this net does not compute "
    "what the trained one did"
)


@dataclass(frozen=True)
class Comparison:
    """The cosine that the file states, None if it states none, and the one on the data set `data` here."""

    data: str
    file: float | None
    here: float

    @property
    def differs(self) -> bool:
        """Whether they differ by more than `DIFFERENCE`."""
        return self.file is not None and abs(self.file - self.here) > DIFFERENCE

    def __str__(self) -> str:
        """The comparison in words."""
        says = "states no cosine" if self.file is None else f"says {self.file:.4f}"
        warning = f"; {_WARNING}" if self.differs else ""
        return f"the file {says}; here, on {self.data}, {self.here:.4f}{warning}"


def card_data(file: str, saved: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what a file says of its model, for the field `data` of its card.

    `saved` is the dictionary that the file holds. `file` is the name of the file; `stated` has the plain values among
    the known keys; `stated_cosine` is the cosine on the validation set, and `stated_by` its key, if there is one.
    """
    stated: dict[str, Any] = {}
    for key in _KEYS:
        value = _plain(saved[key], _DEEPEST) if key in saved else _OMITTED
        if value is not _OMITTED and len(json.dumps({**stated, key: value})) <= _LARGEST:
            stated[key] = value
    found = next(_cosines(stated), None)
    cosine = {"stated_by": found[0], "stated_cosine": found[1]} if found else {}
    return {"file": file, **({"stated": stated} if stated else {}), **cosine}


def comparisons(card: Card, scores: Mapping[str, Any]) -> list[Comparison]:
    """Return a comparison for each data set in `scores`; none if the model was not read from a file."""
    if "file" not in card.data:
        return []
    stated = card.data.get("stated_cosine")
    # of a two-tower, files state how near queries are to passages as the towers place both
    return [Comparison(data, stated, score.get("passage_cosine", score["cosine"])) for data, score in scores.items()]


def sentences(compared: list[Comparison]) -> list[str]:
    """Return the comparisons with a stated cosine as sentences for a card."""
    return [f"T{str(each)[1:]}." for each in compared if each.file is not None]


def _cosines(stated: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield each cosine with its key: those of the file itself first, then those in its results."""
    places = {"": stated, **{f"{name}.": stated[name] for name in RESULTS if isinstance(stated.get(name), dict)}}
    for place, values in places.items():
        for key in COSINES:
            value = values.get(key)
            if type(value) in (int, float) and -1 <= value <= 1:
                yield f"{place}{key}", round(float(value), 6)


def _plain(value: Any, depth: int) -> Any:
    """Return a value as one of JSON's; `_OMITTED` if it is none, or too large for a card."""
    if isinstance(value, Tensor):
        value = _number(value)
    if isinstance(value, Namespace | SimpleNamespace):
        value = vars(value)
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, date | time):
        value = value.isoformat()
    if isinstance(value, Mapping | list | tuple):
        return _collection(value, depth - 1) if depth and len(value) <= _MOST else _OMITTED
    if value is None or type(value) is bool:
        return value
    if type(value) in (int, float):
        return value if math.isfinite(value) and abs(value) < 1 << 53 else _OMITTED
    return value if type(value) is str and value.isprintable() and len(value) <= _LONGEST else _OMITTED


def _collection(value: Mapping[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> Any:
    if not isinstance(value, Mapping):
        items = [_plain(item, depth) for item in value]
        return _OMITTED if _OMITTED in items else items
    named = {str(key): _plain(item, depth) for key, item in value.items() if type(key) in (str, int)}
    return {
        name: item
        for name, item in named.items()
        if item is not _OMITTED and _plain(name, 0) is not _OMITTED and not _SECRET.search(name)
    }


def _number(tensor: Tensor) -> Any:
    """Return the number that a tensor of one element holds, in the fewest digits."""
    try:
        number = tensor.item()
    except RuntimeError:
        return _OMITTED
    return float(f"{number:.7g}") if tensor.dtype in _SHORT else number
