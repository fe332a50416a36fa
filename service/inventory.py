"""What /models says: versions, aliases, cards, what is live since when, the breakers."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from models import card as cards
from models.card import BadCard, Card
from models.registry import Registry, UnknownVersion, Version
from service.errors import UnknownModel
from service.lineup import Lineup
from service.routing import Router


def describe(router: Router, lineup: Lineup) -> dict[str, Any]:
    """Return the body of /models."""
    return {
        "aliases": {alias: _alias(alias, router, lineup) for alias in lineup.live},
        "encoder": {"name": lineup.encoder.name if lineup.encoder else None, "missing": lineup.no_encoder},
        "versions": [summary(version) for version in lineup.registry.versions()],
    }


def summary(version: Version) -> dict[str, Any]:
    """Return what a version's card says, as `/models` and `lvm models` show it."""
    try:
        card = card_of(version.path)
    except BadCard as error:
        return {"id": version.id, "error": str(error)}
    return {
        "id": version.id,
        "model": version.name,
        "version": version.version,
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


def ledger(registry: Registry, offset: int, limit: int) -> dict[str, Any]:
    """Return the body of /ledger: `limit` moves, newest first, after the newest `offset`."""
    moves = registry.ledger()[::-1]
    return {"total": len(moves), "moves": [asdict(move) for move in moves[offset : offset + limit]]}


def card_text(registry: Registry, name: str, version: str) -> bytes:
    """Return the card of a version as it was written; raises `UnknownModel`."""
    try:
        found = registry.find(f"{name}/{version}")
    except UnknownVersion as error:
        raise UnknownModel("no such version") from error
    return (found.path / cards.FILE).read_bytes()


@cache
def card_of(directory: Path) -> Card:
    """Return the card of a version; raises `BadCard`."""
    return cards.read(directory)


def _figures(score: dict[str, Any]) -> dict[str, Any]:
    baselines = {name: figures["cosine"] for name, figures in score["baselines"].items()}
    return {"cosine": score["cosine"], "margin": score["margin"], "baselines": baselines}


def _alias(alias: str, router: Router, lineup: Lineup) -> dict[str, Any]:
    live, breaker = lineup.live[alias], router.breakers.get(alias)
    served = lineup.identity(alias)
    return {
        "id": live.version,
        **({"sha256": served[2], "runtime": served[3]} if served else {}),
        "since": live.since,
        "breaker": breaker.state if breaker else None,
        "warning": lineup.warning(alias),
        "refused": {"id": live.refused, "reason": live.reason} if live.refused else None,
    }
