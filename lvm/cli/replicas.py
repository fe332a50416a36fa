"""Compares what several running services (replicas) serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx

from lvm.cli import listing
from lvm.client import auth_headers

TIMEOUT_S = 10.0
CONCURRENCY = 16  # replicas asked at the same time


HEAD = ("alias", "replica", "version", "R@5", "size", "since", "breaker", "")
NARROW_HEAD = ("alias", "version", "R@5, size", "since")


class Replica(NamedTuple):
    """One service: `aliases` and `store` from its /models, or the `error` that prevented an answer.

    `versions` has the summaries of the versions that it serves, by id; `live` their live scores, by alias.
    """

    url: str
    aliases: Mapping[str, Mapping[str, Any]]
    store: Mapping[str, Any] | None = None
    error: str | None = None
    versions: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    live: Mapping[str, Mapping[str, Any]] = MappingProxyType({})

    def served(self, alias: str) -> str | None:
        """Return the id of the version that serves `alias`, None if there is none."""
        return self.aliases.get(alias, {}).get("id") or None

    def version(self, alias: str) -> Mapping[str, Any]:
        """Return the summary of the version that serves `alias`, empty if there is none."""
        return self.versions.get(self.served(alias) or "", {})


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
    """Yield a row with the cells of `HEAD` for each alias of each replica, ordered by alias."""
    different = differing(replicas)
    for alias, replica in _served(replicas):
        state, shown = replica.aliases.get(alias, {}), replica.served(alias)
        since = state.get("since", "") if shown else ""
        figures = listing.first_score(replica.version(alias))
        found = "; ".join(_notes(alias, replica, alias in different))
        yield alias, replica.url, shown or "-", *figures, since, state.get("breaker") or "", found
    for replica in replicas:
        if replica.error is not None:
            yield "", replica.url, "", "", "", "", "", f"no answer: {replica.error}"


def narrow_rows(replicas: Sequence[Replica]) -> Iterator[tuple[str, ...]]:
    """Yield such rows with the cells of `NARROW_HEAD`, some of two lines."""
    for alias, replica in _served(replicas):
        since = replica.aliases.get(alias, {}).get("since", "")[:19].replace("T", "\n") if replica.served(alias) else ""
        place = f"{alias}\n{replica.url}" if len(replicas) > 1 else alias
        version = (replica.served(alias) or "-").replace("/", "\n")
        yield place, version, "\n".join(listing.first_score(replica.version(alias))), since


def notes(replicas: Sequence[Replica]) -> Iterator[str]:
    """Yield what is to be said of an alias of a replica, a line for each, such as a warning about its inputs."""
    for alias, replica in _served(replicas):
        yield from (f"{alias} at {replica.url}: {note}" for note in _notes(alias, replica, False))
    yield from (f"{replica.url}: no answer: {replica.error}" for replica in replicas if replica.error is not None)


def _served(replicas: Sequence[Replica]) -> Iterator[tuple[str, Replica]]:
    """Yield each alias and each replica that answered, ordered by alias."""
    present = [replica for replica in replicas if replica.error is None]
    for alias in dict.fromkeys(alias for replica in present for alias in replica.aliases):
        yield from ((alias, replica) for replica in present)


def _notes(alias: str, replica: Replica, is_different: bool) -> Iterator[str]:
    state = replica.aliases.get(alias, {})
    if is_different:
        yield "differs"
    if (runtime := state.get("runtime") or "").startswith("openvino-"):
        yield f"runs on {runtime}"
    if warning := state.get("warning"):
        yield warning
    if score := replica.live.get(alias):
        low, high = score["interval"]
        yield f"live cosine {score['cosine']:.4f} ({low:.4f} to {high:.4f}), {score['pairs']} contexts"
    if refused := state.get("refused"):
        yield f"refused {refused['id']}: {refused['reason']}"
    if replica.store and replica.store["is_stale"]:
        yield "store unreachable"


def _fetch(http: httpx.Client, url: str) -> Replica:
    try:
        body = http.get(f"{url.rstrip('/')}/models").raise_for_status().json()
        served = {state.get("id") for state in body["aliases"].values()}
        versions = {version["id"]: version for version in body["versions"] if version["id"] in served}
        # absent from services of earlier releases
        scores = (body.get("live") or {}).get("versions", [])
        live = {score["alias"]: score for score in scores if score["id"] == body["aliases"][score["alias"]]["id"]}
        return Replica(url, body["aliases"], body.get("store"), versions=versions, live=live)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Replica(url, {}, error=f"{type(error).__name__}: {error}".splitlines()[0])
    except (ValueError, TypeError, LookupError, AttributeError):
        return Replica(url, {}, error="the answer is not /models of such a service")
