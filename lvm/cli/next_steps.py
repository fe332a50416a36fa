"""What to do next, after a command that made something: a line on stderr with a command that can be pasted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.registry.alias import Alias
from models.registry.registry import Registry, RegistryError, Version
from models.registry.remote import without_secret

if TYPE_CHECKING:
    from models.registry.card import Card

_NOT_IN_NAMES = re.compile(r"[^a-z0-9_.-]")
_MAX_NAME = 64


def after_data(registry: Registry, out: Path, summary: Mapping[str, Any]) -> str:
    """Return how to search a data set, and how to train on it if it has windows and torch is installed."""
    from models.text.encoder import BUNDLED_MODEL

    place = shlex.quote(str(out))
    encoder, dim = summary["encoder"], summary["dim"]
    towers = " --towers retriever" if summary["windows"] and _has_towers_for(registry, encoder, dim) else ""
    hint = f"next: `lvm corpus {_model_name(out)} --data {place}{towers}` makes it searchable"
    if summary["windows"] and find_spec("torch"):
        named = f" --encoder {shlex.quote(encoder)}" if encoder not in ("", BUNDLED_MODEL) else ""
        hint += f"; `lvm train gmn --data {place}{named}` trains a net on it"
    return hint


def after_version(registry: Registry, version: Version, data: Sequence[Path] = ()) -> str:
    """Return how to promote a version, or why the gate would reject it; how to use towers or a reranker.

    `data` are the data sets on its card.
    """
    from models.registry.card import read_card

    card = read_card(version.path)
    name = name_of(registry, version)
    if card.kind in ("two_tower", "reranker"):
        return f"next: `{_corpus_with(card, name, data)}` makes a corpus that is searched with it"
    from models.gate import foresee

    alias = Alias.RETRIEVER if card.kind == "corpus" else Alias.PRIMARY
    objection = foresee(registry, alias, version)
    if objection:
        return f"next: `lvm promote {alias} {name}` would be rejected: {objection}"
    return f"next: `lvm promote {alias} {name}{_options(data)}`"


def after_push(url: str) -> str:
    """Return how to serve what was pushed."""
    return f"next: `LVM_REGISTRY={shlex.quote(without_secret(url))} lvm serve` serves it, here or on another machine"


def name_of(registry: Registry, version: Version) -> str:
    """Return the shortest name by which a command finds a version: the model's, if it has no other version."""
    with suppress(RegistryError):
        if registry.find(version.name) == version:
            return version.name
    return version.id


def _corpus_with(card: Card, name: str, data: Sequence[Path]) -> str:
    towers = f"--towers {card.config['towers']} --reranker {name}" if card.kind == "reranker" else f"--towers {name}"
    place = data[0] if data else Path("DIR")
    return f"lvm corpus {_model_name(place)} --data {shlex.quote(str(place))} {towers}"


def _options(data: Sequence[Path]) -> str:
    return "".join(f" --data {shlex.quote(str(each))}" for each in data)


def _model_name(path: Path) -> str:
    """Return a valid name of a model, like that of the path."""
    name = _NOT_IN_NAMES.sub("-", path.absolute().name.lower()).lstrip("_.-")[:_MAX_NAME]
    return name or "my-corpus"


def _has_towers_for(registry: Registry, encoder: str, dim: int) -> bool:
    """Return whether `retriever` has towers for vectors of D = `dim` by this encoder."""
    from models.registry.card import BadCard, read_card

    try:
        card = read_card(registry.resolve(Alias.RETRIEVER).path)
    except (RegistryError, BadCard, OSError):
        return False
    return "towers" in card.config and (card.encoder, card.dim) == (encoder, dim)
