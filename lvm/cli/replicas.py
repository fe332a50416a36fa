"""Compares what several running services (replicas) serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

from lvm.client import auth_headers

TIMEOUT_S = 10.0
CONCURRENCY = 16  # replicas asked at the same time


class Replica(NamedTuple):
    """One service: `aliases` and `store` from its /models, or the `error` that prevented an answer."""

    url: str
    aliases: Mapping[str, Mapping[str, Any]]
    store: Mapping[str, Any] | None = None
    error: str | None = None

    def served(self, alias: str) -> str | None:
        """Return the id of the version that serves `alias`, None if there is none."""
        return self.aliases.get(alias, {}).get("id") or None


def fetch(urls: Sequence[str], token: str | None = None) -> list[Replica]:
    """Return what the services at `urls` serve; a service that does not answer within 10 s has an `error`."""
    with (
        httpx.Client(headers=auth_headers(token), timeout=TIMEOUT_S) as http,
        ThreadPoolExecutor(CONCURRENCY) as threads,
    ):
        return list(threads.map(lambda url: _fetch(http, url), urls))


def differing(replicas: Sequence[Replica]) -> dict[str, dict[str, str | None]]:
    """Return the aliases for which replicas serve different versions: by alias, the version's id by URL."""
    present = [replica for replica in replicas if replica.error is None]
    aliases = dict.fromkeys(alias for replica in present for alias in replica.aliases)
    found = {alias: {replica.url: replica.served(alias) for replica in present} for alias in aliases}
    return {alias: served for alias, served in found.items() if len(set(served.values())) > 1}


def rows(replicas: Sequence[Replica]) -> Iterator[tuple[str, ...]]:
    """Yield alias, URL, version, since when, breaker state and remarks, ordered by alias."""
    different = differing(replicas)
    for alias in dict.fromkeys(alias for replica in replicas for alias in replica.aliases):
        for replica in replicas:
            if replica.error is None:
                yield _row(alias, replica, alias in different)
    for replica in replicas:
        if replica.error is not None:
            yield "", replica.url, "", "", "", f"no answer: {replica.error}"


def _row(alias: str, replica: Replica, is_different: bool) -> tuple[str, ...]:
    state = replica.aliases.get(alias, {})
    refused = state.get("refused")
    notes = ["differs"] if is_different else []
    notes += [f"refused {refused['id']}: {refused['reason']}"] if refused else []
    notes += ["store unreachable"] if replica.store and replica.store["is_stale"] else []
    served = replica.served(alias)
    since = state.get("since", "") if served else ""
    return alias, replica.url, served or "-", since, state.get("breaker") or "", "; ".join(notes)


def _fetch(http: httpx.Client, url: str) -> Replica:
    try:
        body = http.get(f"{url.rstrip('/')}/models").raise_for_status().json()
        return Replica(url, body["aliases"], body.get("store"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Replica(url, {}, error=f"{type(error).__name__}: {error}".splitlines()[0])
    except (ValueError, TypeError, LookupError):
        return Replica(url, {}, error="the answer is not /models of such a service")
