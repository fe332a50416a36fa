"""A registry in an object store, followed while serving: away is told once, damage refused, a warm start needs none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from models.registry.manifest import Corrupt
from models.registry.registry import Registry, RegistryLocked
from models.registry.remote import AliasRecord, RegistrySync, RemoteRegistry, RemoteUnavailable
from models.runtimes.priority import gives_way
from service.app import create_app
from service.deploy.deployments import RETRY_S, Lineup
from service.deploy.registry_sync import HANG_S, Follower
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.conftest import PATIENCE_S, running, until
from tests.fakes import FakeLoaders, add_version, mean_of, registry_of


class Told(RegistrySync):
    """A mirror whose store says what it is told to, and whose registry does as `trouble` says."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(RemoteRegistry("memory://told"), registry, lambda alias, version: None)
        self.said: dict[str, bytes | None] = {"primary": b"{}"}
        self.trouble: Exception | None = None
        self.away: Exception | None = None
        self.follows, self.gave_way = 0, list[bool]()
        self.answers = threading.Event()
        self.answers.set()

    def poll(self) -> dict[str, bytes | None]:
        self.answers.wait(PATIENCE_S)
        if self.away:
            raise self.away
        return self.said

    def apply(self, alias: str, said: bytes | None) -> None:
        self.follows += 1
        self.gave_way.append(gives_way())
        if self.trouble:
            raise self.trouble


class House:
    """A follower of such a mirror, and the time."""

    def __init__(self, root: Path, **aliases: str) -> None:
        self.now, self.metrics = 0.0, Metrics()
        registry, settings = registry_of(root, **aliases), Settings(store_s=0.005)
        self.lineup = Lineup(registry, FakeLoaders(amn=mean_of), settings, self.metrics)
        self.mirror = Told(registry)
        self.follower = Follower(self.mirror, self.lineup, settings, self.metrics, clock=lambda: self.now)

    def looks(self, outcome: str) -> float:
        return self.metrics.store_looks.value(outcome)


def live(root: Path, scenario: Callable[[House], Awaitable[None]], **aliases: str) -> None:
    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario(House(root, **aliases))

    asyncio.run(run())


def test_a_store_away_is_counted_told_once_and_stale_until_it_is_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(house: House) -> None:
        follower = house.follower
        await follower.start()
        answered = follower.describe()["answered"]
        house.mirror.away, house.now = RemoteUnavailable("no route"), 7.0
        for _ in range(3):
            await follower.look()
        follower.observe()
        assert house.metrics.store_age.value() == 7
        said = {"url": "memory://told", "is_stale": True, "answered": answered, "error": "no route"}
        assert follower.describe() == said
        house.mirror.away = None
        await follower.look()
        assert (house.looks("ok"), house.looks("failed")) == (2, 3)
        assert (follower.describe()["is_stale"], follower.describe()["error"]) == (False, None)

    live(tmp_path, scenario, primary="amn")
    log = capsys.readouterr()
    assert (log.out + log.err).count("registry store away") == 1
    assert (log.out + log.err).count("registry store back") == 1


def test_a_store_that_never_answers_is_stale_after_a_while_and_holds_nobody_up(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        house.mirror.answers.clear()
        watch = asyncio.create_task(house.follower.watch())
        try:
            await asyncio.sleep(0.05)
            assert not house.follower.describe()["is_stale"]
            house.now = HANG_S + 1
            assert house.follower.describe()["error"] == "no answer for 31 s"
        finally:
            watch.cancel()
            house.mirror.answers.set()

    live(tmp_path, scenario, primary="amn")


def test_what_is_refused_shows_and_is_tried_again_later_or_when_the_store_says_something_else(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        version = house.lineup.registry.resolve("primary")
        await house.lineup.start()
        house.mirror.trouble = Corrupt("weights.safetensors was altered: sha256 0123...")
        for _ in range(3):
            await house.follower.look()
        shown = house.lineup.live["primary"]
        assert (shown.version, shown.refused) == (version.id, "unreadable")
        assert "was altered: sha256 0123" in str(shown.reason)
        assert (house.mirror.follows, house.metrics.reloads.value("primary", "refused")) == (1, 1)
        assert house.looks("ok") == 3, "the store is not away"
        house.mirror.said["primary"] = b"[]"
        await house.follower.look()
        house.now += RETRY_S
        await house.follower.look()
        assert house.mirror.follows == 3
        await house.lineup.close(1)

    live(tmp_path, scenario, primary="amn")


def test_a_registry_that_the_lineup_is_writing_is_no_trouble(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        house.mirror.trouble = RegistryLocked("held")
        for _ in range(2):
            await house.follower.look()
        assert (house.mirror.follows, house.looks("ok"), house.looks("failed")) == (2, 2, 0)

    live(tmp_path, scenario, primary="amn")


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        ({"away": RemoteUnavailable("no route")}, RemoteUnavailable),
        ({"trouble": Corrupt("altered")}, Corrupt),
        ({"said": {"primary": None}}, RemoteUnavailable),
    ],
)
def test_a_cold_start_wants_a_primary_and_says_why_there_is_none(
    tmp_path: Path, trouble: dict[str, Any], error: type[Exception]
) -> None:
    async def scenario(house: House) -> None:
        vars(house.mirror).update(trouble)
        with pytest.raises(error):
            await house.follower.start()

    live(tmp_path, scenario)


def test_what_is_checked_beside_callers_gives_way_to_them(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        await house.follower.start()
        watch = asyncio.create_task(house.follower.watch())
        while len(house.mirror.gave_way) < 2:
            await asyncio.sleep(0.005)
        watch.cancel()
        assert house.mirror.gave_way[:2] == [False, True], "at the start nobody waits"

    live(tmp_path, scenario, primary="amn")


def test_a_start_waits_for_no_store_that_hangs(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        house.mirror.answers.clear()
        try:
            await house.follower.look(0.02)
        finally:
            house.mirror.answers.set()
        assert (house.looks("ok"), house.looks("failed")) == (0, 1)
        assert house.follower.describe()["error"] == "memory://told: no answer in time"

    live(tmp_path, scenario, primary="amn")


def test_aliases_of_others_are_left_to_them(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        house.lineup.aliases = ("retriever",)
        house.mirror.trouble = Corrupt("a net, and no device to check it on")
        await house.follower.start()
        assert (house.mirror.follows, house.looks("ok"), house.lineup.live) == (0, 1, {})
        house.mirror.said["retriever"] = b"{}"
        await house.follower.look()
        assert house.mirror.follows == 1

    live(tmp_path, scenario)


def test_a_warm_mirror_is_served_while_its_store_is_away_and_says_so(tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    settings = Settings(registry=f"file://{objects}", cache=tmp_path / "cache", store_s=0.05, reload_s=0.05)
    ours = registry_of(tmp_path / "ours", primary="amn")
    RemoteRegistry(settings.registry).push(ours)
    for is_stale in (False, True):
        app = create_app(settings, FakeLoaders(amn=mean_of, gru=mean_of))
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
    with running(create_app(settings, FakeLoaders(amn=mean_of)), settings) as server:
        bad = add_version(ours, "broken")
        ours.point("primary", bad)
        RemoteRegistry(settings.registry).push(ours)
        said = lambda: server.http.get("/models").json()["aliases"]["primary"]["refused"]  # noqa: E731
        until(said, "the refusal")
        assert said() == {"id": bad.id, "reason": f"{bad.id} was altered"}
        assert server.app.state.lineup.registry.resolve("primary").id == good.id
    assert AliasRecord.from_json(RemoteRegistry(settings.registry).read("primary") or b"").move.after == bad.id
