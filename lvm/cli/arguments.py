"""What commands are told: kinds of arguments and options, with what a shell may complete them to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from models.registry.alias import ALIASES
from models.registry.registry import (
    Registry,
    RegistryError,
    check_name,
)
from models.registry.remote import CACHE_DIRECTORY, is_url, local_directory, without_secret


def registry() -> Registry:
    """Return the registry, which need not be there yet; raises `RegistryError` where it is an object store."""
    named = os.environ.get("LVM_REGISTRY") or "artifacts/lvm"
    if is_url(named):
        raise RegistryError(f"{without_secret(named)} is an object store, mirrored in {registry_to_read().root}")
    return Registry(Path(named))


def registry_to_read() -> Registry:
    """Return the registry, or the mirror here of an object store."""
    cache = Path(os.environ.get("LVM_CACHE") or CACHE_DIRECTORY)
    return Registry(local_directory(os.environ.get("LVM_REGISTRY") or "artifacts/lvm", cache))


def existing_registry() -> Registry:
    """Return the registry; raises `RegistryError` where it is not there."""
    found = registry()
    if not found.root.is_dir():
        raise RegistryError(f"no registry at {found.root.absolute()}")
    return found


def complete_alias(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the aliases that begin so, with what they point at."""
    known = registry_to_read().aliases()
    yield from ((alias, known.get(alias, "not set")) for alias in ALIASES if alias.startswith(incomplete))


def complete_version(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the versions that begin so, with their aliases."""
    aliases = registry_to_read().aliases()
    for version in registry_to_read().versions():
        if version.id.startswith(incomplete):
            yield version.id, ", ".join(alias for alias, target in aliases.items() if target == version.id)


def complete_named(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the aliases that are set, and the versions, that begin so."""
    set_ = registry_to_read().aliases()
    yield from ((alias, target) for alias, target in complete_alias(incomplete) if alias in set_)
    yield from complete_version(incomplete)


def check_alias(alias: str) -> str:
    """Return an alias; raises `BadParameter` for another name."""
    if alias not in ALIASES:
        raise typer.BadParameter(f"{alias!r} is none of {', '.join(ALIASES)}", param_hint="ALIAS")
    return alias


def check_model_name(name: str | None) -> str | None:
    """Return the name of a model to be, before hours of work go into it; raises `BadName`."""
    return name and check_name(name)


def check_environment(directory: Path | None) -> Path | None:
    """Return a virtual environment; raises `BadParameter` for a directory that is none."""
    if directory and not (directory / "bin" / "python").exists():
        raise typer.BadParameter(f"{directory} is no virtual environment", param_hint="--peers")
    return directory


def as_utf8(given: str) -> str:
    """Return an argument as text that a card or the ledger can hold, whatever its bytes and the locale are."""
    return os.fsencode(given).decode(errors="replace")


def named_dir(text: str) -> tuple[str, Path]:
    """Return name and directory of `[NAME=]DIR`; the directory's own name goes without saying."""
    name, _, path = text.rpartition("=")
    return as_utf8(name or Path(path).name), Path(path)


def json_object(text: str) -> dict[str, Any]:
    """Return a JSON object; raises `BadParameter`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("want a JSON object")
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Alias = Annotated[
    str,
    typer.Argument(
        callback=check_alias, autocompletion=complete_alias, help="primary, fallback, candidate, retriever."
    ),
]
Named = Annotated[
    str,
    typer.Argument(
        metavar="ALIAS|VERSION", autocompletion=complete_named, help="An alias, name/version, or a version."
    ),
]
NAMED_DIR = "[NAME=]DIR"
DataDir = Annotated[
    str,
    typer.Option("--data", metavar=NAMED_DIR, help="Directory of vectors.f16.npy, index.npy, articles.jsonl.gz."),
]
Url = Annotated[str, typer.Argument(help="Where the service listens.")]
Token = Annotated[str | None, typer.Option(envvar="LVM_TOKEN", help="Bearer token, where the service wants one.")]
Why = Annotated[str, typer.Option(callback=as_utf8, help="The reason, for the ledger.")]
