"""Arguments and options that several commands share, how their texts are read, and what a shell completes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.recipe import NAMED_DATA, NAMED_DIR, DataSet
from models.registry.alias import ALIASES
from models.registry.registry import Registry, RegistryError
from models.registry.remote import CACHE_DIRECTORY, is_url, local_directory, without_secret

if TYPE_CHECKING:
    from models.retrieval.corpus import Corpus


def registry() -> Registry:
    """Return the registry, which need not exist yet; raises `RegistryError` if LVM_REGISTRY is an object store."""
    location = os.environ.get("LVM_REGISTRY") or "artifacts/lvm"
    if is_url(location):
        local = registry_to_read().root
        raise RegistryError(f"{without_secret(location)} is an object store; its local copy is {local}")
    return Registry(Path(location))


def registry_to_read() -> Registry:
    """Return the registry, or the local copy of an object store."""
    cache = Path(os.environ.get("LVM_CACHE") or CACHE_DIRECTORY)
    return Registry(local_directory(os.environ.get("LVM_REGISTRY") or "artifacts/lvm", cache))


def existing_registry() -> Registry:
    """Return the registry; raises `RegistryError` if its directory does not exist."""
    found = registry()
    if not found.root.is_dir():
        raise RegistryError(f"no registry at {found.root.absolute()}")
    return found


def complete_alias(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the aliases that start with `incomplete`, with their versions."""
    targets = registry_to_read().aliases()
    yield from ((alias, targets.get(alias, "not set")) for alias in ALIASES if alias.startswith(incomplete))


def complete_version(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the versions that start with `incomplete`, with their aliases."""
    aliases = registry_to_read().aliases()
    for version in registry_to_read().versions():
        if version.id.startswith(incomplete):
            yield version.id, ", ".join(alias for alias, target in aliases.items() if target == version.id)


def complete_alias_or_version(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the aliases that are set, and the versions, that start with `incomplete`."""
    targets = registry_to_read().aliases()
    yield from ((alias, target) for alias, target in complete_alias(incomplete) if alias in targets)
    yield from complete_version(incomplete)


def check_alias(alias: str) -> str:
    """Return an alias; raises `BadParameter` for any other name."""
    if alias not in ALIASES:
        raise typer.BadParameter(f"{alias!r} is not one of {', '.join(ALIASES)}", param_hint="ALIAS")
    return alias


def check_environment(directory: Path | None) -> Path | None:
    """Return a virtual environment; raises `BadParameter` if the directory is not one."""
    if directory and not (directory / "bin" / "python").exists():
        raise typer.BadParameter(f"{directory} is not a virtual environment", param_hint="--peers")
    return directory


def as_utf8(text: str) -> str:
    """Return an argument as valid UTF-8, whatever its bytes and the locale are, for cards and the ledger."""
    return os.fsencode(text).decode(errors="replace")


def as_utf8_or_none(text: str | None) -> str | None:
    """Return an argument as `as_utf8`, or None if it was not given."""
    return text and as_utf8(text)


def named_dir(text: str) -> DataSet:
    """Return the data set of `[NAME=]DIR`; the default name is that of the directory."""
    name, _, path = text.rpartition("=")
    return DataSet(as_utf8(name or Path(path).name), Path(path))


def read_data(path: Path) -> Corpus:
    """Read a data set: its directory, or a file of vectors or pairs. The image reads directories only.

    Raises:
        BadCorpus: a directory has no corpus.
        BadArrays: a file is damaged, or holds neither vectors nor pairs.
    """
    from models.retrieval.corpus import read_corpus

    if path.is_dir():
        return read_corpus(path)
    # the image has no `models.training`
    from models.training import pairs

    return pairs.read_data(path)


def json_object(text: str) -> dict[str, Any]:
    """Return a JSON object; raises `BadParameter`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("expected a JSON object")
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Alias = Annotated[
    str,
    typer.Argument(
        metavar="ALIAS",
        callback=check_alias,
        autocompletion=complete_alias,
        help="primary, fallback, fallback-2 to fallback-9, candidate or retriever.",
    ),
]
AliasOrVersion = Annotated[
    str,
    typer.Argument(
        metavar="ALIAS|VERSION",
        autocompletion=complete_alias_or_version,
        help="An alias; a model that has one version; NAME/VERSION.",
    ),
]
DataDir = Annotated[
    str,
    typer.Option("--data", metavar=NAMED_DIR, help="Directory of vectors.f16.npy, index.npy, articles.jsonl.gz."),
]
ScoredData = Annotated[
    str,
    typer.Option(
        "--data",
        metavar=NAMED_DATA,
        help="A data set, or a .npz or .npy file of vectors, or of contexts and next vectors.",
    ),
]
Url = Annotated[str, typer.Argument(metavar="URL", help="Address of the service.")]
Token = Annotated[str | None, typer.Option(envvar="LVM_TOKEN", help="Bearer token, if the service requires one.")]
Why = Annotated[str, typer.Option(callback=as_utf8, help="The reason, for the ledger.")]
