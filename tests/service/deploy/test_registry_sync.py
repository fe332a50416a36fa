"""A remote registry is synced while serving: absence is logged once, damage refused, and a warm start needs none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from models.registry.manifest import Corrupt
from models.registry.registry import Registry, RegistryLocked
from models.registry.remote import (
    AliasRecord,
    RegistrySync,
    RemoteRegistry,
    RemoteUnavailable,
)
from models.runtimes.priority import has_lowered_priority
from service.app import create_app
from service.deploy.deployments import Deployments
from service.deploy.registry_sync import HANG_S, SyncLoop
from service.deploy.watcher import RETRY_S, Watcher
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.conftest import PATIENCE_S, running, until
from tests.fakes import FakeLoader, add_version, mean_of, registry_of


class FakeRemote(RegistrySync):
    """A remote registry with the `records` of a test, which is `away` or raises `trouble` if the test says so."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(RemoteRegistry("memory://told"), registry, lambda alias, version: None)
        self.records: dict[str, bytes | None] = {"primary": b"{}"}
        self.trouble: Exception | None = None
        self.away: Exception | None = None
        self.applied, self.gave_way = 0, list[bool]()
        self.answers = threading.Event()
        self.answers.set()

    def poll(self) -> dict[str, bytes | None]:
        self.answers.wait(PATIENCE_S)
        if self.away:
            raise self.away
        return self.records

    def apply(self, alias: str, said: bytes | None) -> None:
        self.applied += 1
        self.gave_way.append(has_lowered_priority())
        if self.trouble:
            raise self.trouble


class Harness:
    """A sync loop with such a remote registry, deployments, and a clock that tests move."""

    def __init__(self, root: Path, **aliases: str) -> None:
        self.now = 0.0
        self.metrics = Metrics()
        registry = registry_of(root, **aliases)
        self.deployments = Deployments(registry, FakeLoader(amn=mean_of), Settings(), self.metrics)
        self.remote = FakeRemote(registry)
        self.sync = SyncLoop(self.remote, self.deployments, 0.005, self.metrics, clock=lambda: self.now)

    def polls(self, outcome: str) -> float:
        return self.metrics.store_looks.value(outcome)


def run(root: Path, scenario: Callable[[Harness], Awaitable[None]], **aliases: str) -> None:
    async def play() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario(Harness(root, **aliases))

    asyncio.run(play())


def test_counts_every_poll_of_an_absent_remote_but_logs_one_and_is_stale_until_it_is_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(harness: Harness) -> None:
        sync = harness.sync
        await sync.start()
        answered = sync.describe()["answered"]
        harness.remote.away, harness.now = RemoteUnavailable("no route"), 7.0
        for _ in range(3):
            await sync.poll()
        sync.update_gauges()
        assert harness.metrics.store_age.value() == 7
        expected = {"url": "memory://told", "is_stale": True, "answered": answered, "error": "no route"}
        assert sync.describe() == expected
        harness.remote.away = None
        await sync.poll()
        assert (harness.polls("ok"), harness.polls("failed")) == (2, 3)
        assert (sync.describe()["is_stale"], sync.describe()["error"]) == (False, None)

    run(tmp_path, scenario, primary="amn")
    log = capsys.readouterr()
    assert (log.out + log.err).count("registry store away") == 1
    assert (log.out + log.err).count("registry store back") == 1


def test_a_remote_that_hangs_is_stale_after_a_while(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        harness.remote.answers.clear()
        watch = asyncio.create_task(harness.sync.run())
        try:
            await asyncio.sleep(0.05)
            assert not harness.sync.describe()["is_stale"]
            harness.now = HANG_S + 1
            assert harness.sync.describe()["error"] == "no answer for 31 s"
        finally:
            watch.cancel()
            harness.remote.answers.set()

    run(tmp_path, scenario, primary="amn")


def test_shows_a_refused_record_and_retries_it_later_or_if_it_changes(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        version = harness.deployments.registry.resolve("primary")
        await Watcher(harness.deployments, 0.05, harness.metrics).start()
        harness.remote.trouble = Corrupt("weights.safetensors was altered: sha256 0123...")
        for _ in range(3):
            await harness.sync.poll()
        shown = harness.deployments.slots["primary"].deployed
        assert (shown.version, shown.refused) == (version.id, "unreadable")
        assert "was altered: sha256 0123" in str(shown.reason)
        assert (harness.remote.applied, harness.metrics.reloads.value("primary", "refused")) == (1, 1)
        assert harness.polls("ok") == 3, "the store is not away"
        harness.remote.records["primary"] = b"[]"
        await harness.sync.poll()
        harness.now += RETRY_S
        await harness.sync.poll()
        assert harness.remote.applied == 3
        await harness.deployments.close(1)

    run(tmp_path, scenario, primary="amn")


def test_a_locked_registry_is_not_a_failure(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        harness.remote.trouble = RegistryLocked("held")
        for _ in range(2):
            await harness.sync.poll()
        assert (harness.remote.applied, harness.polls("ok"), harness.polls("failed")) == (2, 2, 0)

    run(tmp_path, scenario, primary="amn")


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        ({"away": RemoteUnavailable("no route")}, RemoteUnavailable),
        ({"trouble": Corrupt("altered")}, Corrupt),
        ({"records": {"primary": None}}, RemoteUnavailable),
    ],
)
def test_a_start_without_a_primary_fails_with_the_reason(
    tmp_path: Path, trouble: dict[str, Any], error: type[Exception]
) -> None:
    async def scenario(harness: Harness) -> None:
        vars(harness.remote).update(trouble)
        with pytest.raises(error):
            await harness.sync.start()

    run(tmp_path, scenario)


def test_checks_versions_at_a_lower_priority_once_callers_are_served(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        await harness.sync.start()
        watch = asyncio.create_task(harness.sync.run())
        while len(harness.remote.gave_way) < 2:
            await asyncio.sleep(0.005)
        watch.cancel()
        assert harness.remote.gave_way[:2] == [False, True], "at the start no caller waits"

    run(tmp_path, scenario, primary="amn")


def test_a_poll_times_out_if_the_remote_hangs(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        harness.remote.answers.clear()
        try:
            await harness.sync.poll(0.02)
        finally:
            harness.remote.answers.set()
        assert (harness.polls("ok"), harness.polls("failed")) == (0, 1)
        assert harness.sync.describe()["error"] == "memory://told: no answer in time"

    run(tmp_path, scenario, primary="amn")


def test_syncs_only_the_aliases_of_this_process(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        harness.deployments.aliases = ("retriever",)
        harness.remote.trouble = Corrupt("a net, and no device to check it on")
        await harness.sync.start()
        assert (harness.remote.applied, harness.polls("ok"), harness.deployments.slots) == (0, 1, {})
        harness.remote.records["retriever"] = b"{}"
        await harness.sync.poll()
        assert harness.remote.applied == 1

    run(tmp_path, scenario)


def test_starts_from_the_local_copy_if_the_remote_is_away(tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    settings = Settings(registry=f"file://{objects}", cache=tmp_path / "cache", store_s=0.05, reload_s=0.05)
    ours = registry_of(tmp_path / "ours", primary="amn")
    RemoteRegistry(settings.registry).push(ours)
    for is_stale in (False, True):
        app = create_app(settings, FakeLoader(amn=mean_of, gru=mean_of))
        with running(app, settings) as server:
            assert server.http.get("/readyz").status_code == 200
            body = server.http.get("/models").json()
            assert body["aliases"]["primary"]["id"] == ours.resolve("primary").id
            assert (body["store"]["url"], body["store"]["is_stale"]) == (settings.registry, is_stale)
            assert bool(server.metric("lvm_store_looks_total", outcome="failed")) == is_stale
        if not is_stale:
            objects.rename(tmp_path / "elsewhere")


def test_a_version_that_does_not_load_never_moves_the_alias(tmp_path: Path) -> None:
    settings = Settings(registry=f"file://{tmp_path}/objects", cache=tmp_path / "cache", store_s=0.05, reload_s=0.05)
    ours = registry_of(tmp_path / "ours", primary="amn")
    RemoteRegistry(settings.registry).push(ours)
    good = ours.resolve("primary")
    with running(create_app(settings, FakeLoader(amn=mean_of)), settings) as server:
        bad = add_version(ours, "broken")
        ours.point("primary", bad)
        RemoteRegistry(settings.registry).push(ours)
        said = lambda: server.http.get("/models").json()["aliases"]["primary"]["refused"]  # noqa: E731
        until(said, "the refusal")
        assert said() == {"id": bad.id, "reason": f"{bad.id} was altered"}
        assert server.app.state.deployments.registry.resolve("primary").id == good.id
    assert AliasRecord.from_json(RemoteRegistry(settings.registry).read("primary") or b"").move.after == bad.id
