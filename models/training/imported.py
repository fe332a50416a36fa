"""What the readers of files share: the options of an import, and a model as a file holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.vectors import Floats


def _ignore(message: str) -> None:
    """Discard a message."""


@dataclass(frozen=True)
class ImportOptions:
    """What the caller of an import states.

    `name` is the model's name in the registry; if it names a net and `architecture` is None, the file must hold that
    net. `context_length` is T; None: as the file says, else 5. `dim` is D if an ONNX file leaves it free, and `output`
    names the output to keep of one that has several. `report` is called with each message for the caller.
    """

    name: str
    architecture: str | None = None
    context_length: int | None = None
    dim: int | None = None
    output: str | None = None
    report: Callable[[str], None] = _ignore


@dataclass(frozen=True)
class ImportedModel:
    """A model that was read from a file.

    `facts` are fields of its card: `kind`, `architecture`, `config`, `dim`, `context_length` and `parameters`. `files`
    makes the files of its version, but for the card, from contexts `(G, T, D)` for the golden vectors. `stated` is
    what the file says of its model, see `stated.card_data`. `limits` are sentences for the card.
    """

    facts: Mapping[str, Any]
    files: Callable[[Floats], dict[str, bytes]]
    stated: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
