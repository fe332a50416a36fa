"""A version promoted while serving is on trial: it stays, or the incumbent comes back, and the registry says so."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import structlog

from lvm.errors import ServiceError
from models.registry.registry import Registry, Version
from models.retrieval.retriever import Retriever, Search
from models.runtimes.priority import gives_way
from service.deploy.canary import CONTEXTS, EVERY_S
from service.deploy.deployments import RETRY_S, Lineup
from service.engines.router import Router
from service.engines.search import SearchModel
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.conftest import PATIENCE_S
from tests.fakes import FakeLoaders, FakePredictor, add_version, card, contexts, mean_of, raises, registry_of

WINDOW_S = 1e6
SETTINGS: dict[str, Any] = {"reload_s": 0.005, "breaker_hold_s": 0.001, "watch_s": WINDOW_S}


def opposite(batch: Any) -> Any:
    return -mean_of(batch)


class House:
    """A line-up that follows a registry of tiny versions, a router over it, and the time."""

    def __init__(self, root: Path, kind: type[FakeLoaders] = FakeLoaders, **settings: Any) -> None:
        self.registry = registry_of(root, primary="amn", fallback="gru")
        self.now = 0.0
        self.metrics, known = Metrics(), Settings(**{**SETTINGS, **settings})
        self.loaders = kind(amn=mean_of, gru=mean_of, good=mean_of, fails=raises, opposes=opposite)
        self.lineup = Lineup(self.registry, self.loaders, known, self.metrics, clock=lambda: monotonic() + self.now)
        self.router = Router(self.lineup.engines, known, self.metrics)
        self.first = self.registry.resolve("primary")

    async def promote(self, name: str) -> Version:
        version = add_version(self.registry, name)
        self.registry.point("primary", version)
        await self.until(lambda: self.lineup.live["primary"].version == version.id)
        return version

    async def ask(self, count: int = 1) -> set[str]:
        """Ask the router; return who answered."""
        served = set()
        for _ in range(count):
            routed = await self.router.predict(contexts(), self.router.chain(None, "realtime"), monotonic() + 9)
            served.add(routed.prediction.model)
            self.now += EVERY_S
            await asyncio.sleep(0.002)
        return served

    async def ask_until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self.ask()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.005)

    def count(self, outcome: str, alias: str = "primary") -> float:
        return self.metrics.reloads.value(alias, outcome)


def live(root: Path, scenario: Callable[[House], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        house = House(root, **settings)
        await house.lineup.start()
        watcher = asyncio.create_task(house.lineup.watch())
        try:
            await scenario(house)
        finally:
            watcher.cancel()
            await house.lineup.close(1)

    asyncio.run(run())


@pytest.mark.parametrize(("name", "why"), [("fails", "LVM_WATCH_ERRORS"), ("opposes", "LVM_WATCH_AGREEMENT")])
def test_a_version_out_of_bounds_is_rolled_back_and_the_ledger_says_why(tmp_path: Path, name: str, why: str) -> None:
    async def scenario(house: House) -> None:
        bad = await house.promote(name)
        await house.ask_until(lambda: house.count("rolled_back"))
        await house.until(lambda: house.registry.ledger()[-1].action == "rollback")
        move = house.registry.ledger()[-1]
        assert (move.before, move.after) == (bad.id, house.first.id)
        assert house.registry.resolve("primary") == house.first
        assert move.why.startswith("automatic: ")
        assert why in move.why
        said = house.lineup.live["primary"]
        assert (said.version, said.refused) == (house.first.id, bad.id)
        assert why in str(said.reason)
        assert len(house.loaders.loaded) == 3, "the incumbent was warm all the while"
        await asyncio.sleep(0.02)
        assert await house.ask() <= {"amn", "gru"}
        assert house.count("ok") == 1, "going back is no promotion"

    live(tmp_path, scenario)


def test_a_version_within_bounds_stays_and_its_incumbent_retires(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        incumbent = house.lineup.engines["primary"]
        good = await house.promote("good")
        assert await house.ask(CONTEXTS + 5) == {"good"}
        assert house.lineup.engines["primary"].stats.latency_by_size()[1].batches >= CONTEXTS
        house.now += WINDOW_S
        await house.until(lambda: incumbent.batcher.is_closed)
        await house.ask(5)
        assert house.registry.resolve("primary") == good
        assert house.lineup.live["primary"].refused is None
        assert house.lineup.engines["primary"].on_answer is None

    live(tmp_path, scenario)


@pytest.mark.parametrize("settings", [{"watch_s": 0}, {"watch_errors": 1, "watch_agreement": -1}])
def test_nothing_is_rolled_back_where_the_settings_say_so(tmp_path: Path, settings: dict[str, float]) -> None:
    async def scenario(house: House) -> None:
        bad = await house.promote("opposes")
        assert await house.ask(CONTEXTS + 5) == {"opposes"}
        await asyncio.sleep(0.02)
        assert house.lineup.live["primary"].version == bad.id

    live(tmp_path, scenario, **settings)


class OfAnotherEncoder(FakeLoaders):
    def predictor(self, version: Version) -> FakePredictor:
        made = super().predictor(version)
        made.card = card(made.name, encoder="another" if made.name == "opposes" else "fake")
        return made


def test_nets_of_two_encoders_need_not_agree(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        await house.promote("opposes")
        assert await house.ask(CONTEXTS + 5) == {"opposes"}
        await asyncio.sleep(0.02)
        assert house.count("rolled_back") == 0

    live(tmp_path, scenario, kind=OfAnotherEncoder)


def test_a_second_promotion_is_tried_against_the_last_that_passed(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        await house.promote("good")
        await house.promote("opposes")
        await house.ask_until(lambda: house.registry.resolve("primary") == house.first)
        assert await house.ask() == {"amn"}

    live(tmp_path, scenario)


def test_who_goes_back_by_hand_gets_the_warm_incumbent(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        incumbent = house.lineup.engines["primary"]
        for _ in range(2):  # and what was refused, or taken back, may be promoted again
            await house.promote("good")
            house.registry.rollback("primary")
            await house.until(lambda: house.lineup.engines["primary"] is incumbent)
        assert await house.ask() == {"amn"}
        assert house.count("rolled_back") == 0

    live(tmp_path, scenario)


def test_an_alias_that_moved_on_is_left_where_it_is(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        await house.promote("opposes")
        elsewhere = add_version(house.registry, "broken")
        house.registry.point("primary", elsewhere)
        await house.until(lambda: house.count("refused"))
        await house.ask_until(lambda: house.count("rolled_back"))
        await house.lineup.close(1)
        assert house.registry.resolve("primary") == elsewhere
        assert house.lineup.live["primary"].version == house.first.id
        assert house.count("unrecorded") == 0

    live(tmp_path, scenario)


def test_a_registry_that_cannot_be_written_leaves_the_incumbent_serving(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        bad = await house.promote("opposes")
        (house.registry.root / ".lock").unlink()
        (house.registry.root / ".lock").mkdir()
        await house.ask_until(lambda: house.count("unrecorded"))
        await asyncio.sleep(0.02)
        assert house.registry.resolve("primary") == bad
        assert await house.ask(3) == {"amn"}
        assert house.lineup.live["primary"].refused == bad.id

    live(tmp_path, scenario)


def test_a_lock_that_somebody_holds_is_waited_for(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        await house.promote("opposes")
        with house.registry._lock():
            await house.ask_until(lambda: house.count("rolled_back"))
            await asyncio.sleep(0.02)
        await house.until(lambda: house.registry.resolve("primary") == house.first)

    live(tmp_path, scenario)


def test_a_corpus_that_fails_is_rolled_back_as_well(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        registry, lineup = Registry(house.registry.root), house.lineup
        first = add_version(registry, "corpus")
        registry.point("retriever", first)
        await house.until(lambda: lineup.search)
        incumbent = lineup.search
        registry.point("retriever", add_version(registry, "corpus", "second"))
        await house.until(lambda: lineup.search is not incumbent)
        bad = Search(np.zeros(3, np.float32), 1)  # of no length that a corpus has: its search raises
        for _ in range(5):
            with pytest.raises(ServiceError):
                await lineup.search_engine().run(bad, monotonic() + 9)
        await house.until(lambda: lineup.search is incumbent)
        await house.until(lambda: registry.resolve("retriever") == first)

    live(tmp_path, scenario)


def test_a_store_is_connected_to_at_full_priority(tmp_path: Path) -> None:
    """A client's threads, which will answer callers, are started where it connects."""

    async def scenario(house: House) -> None:
        connected: list[bool] = []

        def connect(corpus: Retriever) -> SearchModel:
            connected.append(gives_way())
            return SearchModel(corpus)

        house.loaders.search_model = connect
        house.registry.point("retriever", add_version(house.registry, "corpus"))
        await house.until(lambda: house.lineup.search)
        assert connected == [False]

    live(tmp_path, scenario)


class BusyAtFirst(FakeLoaders):
    """Loads the second version it is asked for only when asked again."""

    failures = 0

    def predictor(self, version: Version) -> FakePredictor:
        if version.name == "good" and not self.failures:
            self.failures += 1
            raise OSError(24, "Too many open files")
        return super().predictor(version)


def test_what_could_not_be_loaded_is_tried_again_after_a_while(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        good = add_version(house.registry, "good")
        house.registry.point("primary", good)
        await house.until(lambda: house.count("refused"))
        await asyncio.sleep(0.03)
        assert house.count("refused") == 1, "not at every look"
        assert house.lineup.live["primary"].refused == good.id
        house.now += RETRY_S
        await house.until(lambda: house.lineup.live["primary"].version == good.id)
        assert house.lineup.live["primary"].refused is None

    live(tmp_path, scenario, kind=BusyAtFirst)


class Share(Registry):
    """A registry on a share: `trouble` is done at every look at an alias."""

    @staticmethod
    def trouble() -> None:
        """Nothing, at first."""

    def resolve(self, alias: str) -> Version:
        self.trouble()
        return super().resolve(alias)


def stale() -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


def test_a_share_that_is_away_is_counted_at_every_look_and_followed_when_it_is_back(tmp_path: Path) -> None:
    """An alert tells one look that failed from a registry that is away."""

    async def scenario(house: House) -> None:
        share = house.lineup.registry = Share(house.registry.root)
        for spell in (1, 2):
            share.trouble = stale  # type: ignore[method-assign]
            before = house.count("failed", "retriever")
            await house.until(lambda before=before: house.count("failed", "retriever") >= before + 3)  # type: ignore[misc]
            assert house.lineup._unseen == {"primary", "fallback", "candidate", "retriever"}
            assert await house.ask() <= {"amn", "good"}
            share.trouble = Share.trouble  # type: ignore[method-assign]
            await house.promote("good" if spell == 1 else "amn")
            await house.until(lambda: not house.lineup._unseen)  # those that are looked at after it are back, too

    live(tmp_path, scenario)


def test_an_alias_that_is_gone_leaves_what_serves_and_is_counted_at_every_look_and_told_once(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        (house.registry.root / "primary").unlink()
        await house.until(lambda: house.count("failed") >= 3)
        assert await house.ask() == {"amn"}

    with structlog.testing.capture_logs() as lines:
        live(tmp_path, scenario)
    assert [line["alias"] for line in lines if line["event"] == "look at alias failed"] == ["primary"]


def test_a_share_that_hangs_holds_up_no_request(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        share, back, hangs = Share(house.registry.root), threading.Event(), threading.Event()
        share.trouble = lambda: hangs.set() or back.wait(PATIENCE_S) or None  # type: ignore[func-returns-value,method-assign]
        house.lineup.registry = share
        try:
            await house.until(hangs.is_set)
            assert await house.ask(5) == {"amn"}
        finally:
            back.set()
        await house.promote("good")

    live(tmp_path, scenario)


def test_an_end_waits_for_no_registry_that_hangs(tmp_path: Path) -> None:
    async def scenario(house: House) -> None:
        hangs, back = threading.Event(), threading.Event()

        class Hung(Registry):
            def find(self, wanted: str) -> Version:
                hangs.set()
                back.wait(PATIENCE_S)
                return super().find(wanted)

        await house.promote("fails")
        house.lineup.registry = Hung(house.registry.root)
        try:
            await house.ask_until(hangs.is_set)
            async with asyncio.timeout(PATIENCE_S / 2):
                await house.lineup.close(0.05)
        finally:
            back.set()

    live(tmp_path, scenario)
