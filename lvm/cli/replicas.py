"""Replicas: what several services say that they serve, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

from lvm.client import auth_headers

TIMEOUT_S = 10.0
AT_ONCE = 16  # replicas asked at a time


class Replica(NamedTuple):
    """What one service says in /models: `aliases` and `store` as they stand there; or why it said nothing."""

    url: str
    aliases: Mapping[str, Mapping[str, Any]]
    store: Mapping[str, Any] | None = None
    error: str | None = None

    def served(self, alias: str) -> str | None:
        """Return the id of the version that answers for `alias`, None where none does."""
        return self.aliases.get(alias, {}).get("id") or None


def ask(urls: Sequence[str], token: str | None = None) -> list[Replica]:
    """Return what the services at `urls` serve; who does not answer in ten seconds has an `error` instead."""
    with httpx.Client(headers=auth_headers(token), timeout=TIMEOUT_S) as http, ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda url: _ask(http, url), urls))


def differing(replicas: Sequence[Replica]) -> dict[str, dict[str, str | None]]:
    """Return the aliases that replicas serve differently: by alias, the version's id by replica."""
    present = [replica for replica in replicas if replica.error is None]
    aliases = dict.fromkeys(alias for replica in present for alias in replica.aliases)
    found = {alias: {replica.url: replica.served(alias) for replica in present} for alias in aliases}
    return {alias: served for alias, served in found.items() if len(set(served.values())) > 1}


def rows(replicas: Sequence[Replica]) -> Iterator[tuple[str, ...]]:
    """Yield alias, replica, version, since when, breaker, and what is to be said of it; by alias."""
    apart = differing(replicas)
    for alias in dict.fromkeys(alias for replica in replicas for alias in replica.aliases):
        for replica in replicas:
            if replica.error is None:
                yield _row(alias, replica, alias in apart)
    for replica in replicas:
        if replica.error is not None:
            yield "", replica.url, "", "", "", f"no answer: {replica.error}"


def _row(alias: str, replica: Replica, is_apart: bool) -> tuple[str, ...]:
    said, refused = replica.aliases.get(alias, {}), replica.aliases.get(alias, {}).get("refused")
    notes = ["differs"] if is_apart else []
    notes += [f"refused {refused['id']}: {refused['reason']}"] if refused else []
    notes += ["store away"] if replica.store and replica.store["is_stale"] else []
    served = replica.served(alias)
    since = said.get("since", "") if served else ""
    return alias, replica.url, served or "-", since, said.get("breaker") or "", "; ".join(notes)


def _ask(http: httpx.Client, url: str) -> Replica:
    try:
        body = http.get(f"{url.rstrip('/')}/models").raise_for_status().json()
        return Replica(url, body["aliases"], body.get("store"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Replica(url, {}, error=f"{type(error).__name__}: {error}".splitlines()[0])
    except (ValueError, TypeError, LookupError):
        return Replica(url, {}, error="what it says is no /models of this service")
