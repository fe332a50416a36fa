"""Imports a model from a file of any type that is known here, and publishes it as a version.

To add a type of file: a line in `FORMATS`. To add a kind of model that `torch.save` or safetensors holds: a line in
`MODELS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from models.nets import NETS
from models.registry.card import Card
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import Corpus
from models.training import publish, torch_import, two_tower_import
from models.training.export import net_files
from models.training.imported import ImportedModel, ImportOptions
from models.training.onnx_import import read_onnx
from models.training.stated import card_data
from models.windows import check_dim, require_windows

LIMIT = "Imported: what it was trained on is not known here."

# readers of whole files, by the suffix of the file's name; a file with any other suffix is read as tensors by name
FORMATS: Mapping[str, Callable[[Path, ImportOptions], ImportedModel]] = {".onnx": read_onnx}

# readers of a dictionary that holds tensors, by a key that only this kind of model has
MODELS: Mapping[str, Callable[[Path, Mapping[Any, Any], ImportOptions], nn.Module]] = {
    two_tower_import.QUERY_KEY: two_tower_import.read_two_tower,
    two_tower_import.PASSAGE_KEY: two_tower_import.read_two_tower,
}


def read_model(path: Path, options: ImportOptions) -> ImportedModel:
    """Return the model in the file `path`.

    Raises:
        BadCheckpoint: the file is damaged, holds no model, or one that `options` do not fit.
    """
    whole = FORMATS.get(path.suffix.lower())
    if whole:
        model = whole(path, options)
        return replace(model, stated={"file": _text(path.name), **model.stated})
    if options.output:
        raise BadCheckpoint(f"{path} is no ONNX file, so it has no output {options.output!r} to choose")
    saved = torch_import.read_saved(path)
    reader = next((reader for key, reader in MODELS.items() if key in saved), torch_import.net_from)
    net = reader(path, saved, options)
    return ImportedModel(publish.facts(net), lambda golden: net_files(net, golden), card_data(_text(path.name), saved))


def publish_model(
    registry: Registry, model: ImportedModel, options: ImportOptions, card: Card, data: Mapping[str, Corpus]
) -> Version:
    """Publish a model from a file as a new version, scored on the corpora `data` by name.

    `card` has what the file does not say: encoder, licence, attribution and command.

    Raises:
        BadCheckpoint: the model cannot be served.
        OtherDimension: a corpus has vectors of another D than the model reads.
        NoWindows: no article of a corpus is longer than T chunks.
    """
    corpus = next(iter(data.values()), None)
    card = replace(
        card,
        **{**model.facts, "name": _name(model, options)},
        data=model.stated,
        reference=publish.reference_of(corpus) if corpus else None,
        limits=(LIMIT, *model.limits),
    )
    _check_data(card, data)
    golden = publish.golden_contexts(corpus, card.dim, card.context_length)
    return publish.publish_files(registry, card, model.files(golden), data)


def _text(name: str) -> str:
    """Return the name of a file as text, whatever its bytes are."""
    return os.fsencode(name).decode(errors="replace")


def _name(model: ImportedModel, options: ImportOptions) -> str:
    """Return the name in the registry: the net that was found, if the caller named a net and nothing else."""
    found = str(model.facts["architecture"])
    is_net = options.architecture is None and {options.name, found} <= NETS.keys()
    return found if is_net else options.name


def _check_data(card: Card, data: Mapping[str, Corpus]) -> None:
    for name, corpus in data.items():
        check_dim(name, corpus.dim, card.dim)
        require_windows(corpus, card.context_length)
