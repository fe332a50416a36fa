"""The bodies of /models and /ledger: the slot of each alias, a summary of each version, and the moves of aliases."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from lvm.errors import UnknownModel
from models.registry import disk
from models.registry.card import CARD_FILE, MAX_CARD_BYTES, BadCard, Card, read_card_summary
from models.registry.registry import Registry, UnknownVersion, Version
from service.deploy.deployments import Deployments, Slot
from service.deploy.registry_sync import SyncLoop
from service.engines.breaker import Breaker
from service.engines.engine import Engine
from service.engines.router import Router
from service.engines.search import SearchAdapter

Stamp = tuple[int, int, int]  # time of the last change in nanoseconds, size in bytes, inode


def models_body(
    router: Router, deployments: Deployments, sync: SyncLoop | None, versions: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the body of /models; `versions` are the summaries of a `VersionListing`."""
    encoder = deployments.encoder
    return {
        "aliases": {str(alias): _alias(slot, router.breakers.get(alias)) for alias, slot in deployments.slots.items()},
        "encoder": {"name": encoder.engine.info.name if encoder.engine else None, "missing": encoder.missing},
        "store": sync.describe() if sync else None,
        "versions": versions,
    }


class VersionListing:
    """A summary of each version of a registry, from its card. A card is read again only if its file has changed."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._ids: list[str] = []
        self._read: dict[str, tuple[Stamp | None, dict[str, Any]]] = {}

    def refresh(self) -> None:
        """Read the cards that are new; `summaries` works meanwhile. Raises `OSError` if the registry cannot be read."""
        versions = self._registry.versions()
        self._ids = [version.id for version in versions]
        served = self._registry.aliases().values()
        for version in sorted(versions, key=lambda version: version.id not in served):
            stamp = _stamp(version.path / CARD_FILE)
            if self._read.get(version.id, (None,))[0] != stamp or stamp is None:
                self._read[version.id] = stamp, summary(version)
        self._read = {identity: self._read[identity] for identity in self._ids}

    def summaries(self) -> list[dict[str, Any]]:
        """Return a summary of every version; for a card that is not read yet, the id and an error."""
        unread = "its card is not read yet: ask again"
        read = self._read
        return [read[each][1] if each in read else {"id": each, "error": unread} for each in self._ids]


def summary(version: Version) -> dict[str, Any]:
    """Return what `/models` and `lvm models` show of a version: its card, or why that cannot be read."""
    try:
        card = read_card_summary(version.path)
    except BadCard as error:
        return {"id": version.id, "error": str(error)}
    return {
        "id": version.id,
        "model": version.name,
        "version": version.version,
        "date": _date(version),
        "bytes": _size(version.path),
        **_contents(card),
        "kind": card.kind,
        "architecture": card.architecture,
        "dim": card.dim,
        "context_length": card.context_length,
        "encoder": card.encoder,
        "parameters": card.parameters,
        "scores": {data: _figures(score) for data, score in card.scores.items()},
        "limits": list(card.limits),
        "license": card.license,
        "attribution": card.attribution,
    }


def ledger_body(registry: Registry, offset: int, limit: int) -> dict[str, Any]:
    """Return the body of /ledger: `limit` moves, newest first, after the newest `offset`."""
    moves, skipped = registry.read_ledger()
    newest = moves[::-1][offset : offset + limit]
    return {"total": len(moves), "skipped": skipped, "moves": [asdict(move) for move in newest]}


def card_text(registry: Registry, name: str, version: str) -> bytes:
    """Return the file of a version's card; raises `UnknownModel` if there is none."""
    try:
        found = registry.find(f"{name}/{version}")
    except UnknownVersion as error:
        raise UnknownModel("no such version") from error
    try:
        return disk.read(found.path / CARD_FILE, MAX_CARD_BYTES)
    except OSError as error:
        raise UnknownModel(f"no card of that version can be read: {error.strerror}") from error


def _stamp(path: Path) -> Stamp | None:
    """Return a value that changes with the file, or None if the file cannot be examined."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _date(version: Version) -> str | None:
    """Return the day on which a version was made, as its name says, in ISO 8601; None if it does not."""
    try:
        return date.fromisoformat(version.version[:8]).isoformat()
    except ValueError:
        return None


def _size(path: Path) -> int:
    """Return the size of a version's files in bytes; files that cannot be examined do not count."""
    size = 0
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with suppress(OSError):
                size += entry.stat(follow_symlinks=False).st_size
    return size


def _contents(card: Card) -> dict[str, int]:
    """Return the numbers of chunks and articles of a corpus, if its card has them."""
    counts = {name: card.data.get(name) for name in ("chunks", "articles")} if card.kind == "corpus" else {}
    return {name: count for name, count in counts.items() if type(count) is int and 0 <= count < 1 << 53}


def _figures(score: dict[str, Any]) -> dict[str, Any]:
    baselines = {name: figures["cosine"] for name, figures in score["baselines"].items()}
    found = {"cosine": score["cosine"], "margin": score["margin"], "R@5": _recall(score)}
    diagnosis = {"diagnosis": score["diagnosis"]} if "diagnosis" in score else {}
    return {**found, "baselines": baselines, **diagnosis}


def _recall(score: Mapping[str, Any]) -> float | None:
    """Return R@5 with the chunks of the context left out; None if the card has no such number."""
    try:
        found = score["retrieval"]["without_context"]["R@5"]
    except (KeyError, TypeError):
        return None
    return found if type(found) is float and math.isfinite(found) else None


def _alias(slot: Slot, breaker: Breaker | None) -> dict[str, Any]:
    engine = slot.engine
    deployed = slot.deployed
    if isinstance(engine, Engine) and isinstance(engine.model, SearchAdapter):
        breaker = engine.model.breaker
    return {
        "id": deployed.version,
        **({"sha256": engine.info.sha256, "runtime": engine.info.runtime} if engine else {}),
        "since": deployed.since,
        "breaker": breaker.state if breaker else None,
        "warning": engine.warning() if engine else None,
        "refused": {"id": deployed.refused, "reason": deployed.reason} if deployed.refused else None,
    }
