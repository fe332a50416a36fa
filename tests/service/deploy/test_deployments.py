"""A version promoted while serving is a canary: it stays, or the incumbent comes back and the registry says so."""

from __future__ import annotations

import asyncio
import fcntl
import threading
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from lvm.errors import Draining, ServiceError
from models.registry.registry import Registry, Version
from models.retrieval.retriever import Retriever, Search
from models.runtimes.priority import has_lowered_priority
from service.deploy.canary import MIN_COMPARISONS
from service.engines.engine import Engine
from service.engines.search import SearchAdapter
from tests.conftest import PATIENCE_S
from tests.fakes import FakeLoader, FakePredictor, add_version, card, contexts
from tests.service.deploy.harness import WINDOW_S, Harness, run


@pytest.mark.parametrize(("name", "why"), [("fails", "LVM_WATCH_ERRORS"), ("opposes", "LVM_WATCH_AGREEMENT")])
def test_rolls_back_a_version_out_of_bounds_and_records_why(tmp_path: Path, name: str, why: str) -> None:
    async def scenario(harness: Harness) -> None:
        bad = await harness.promote(name)
        await harness.ask_until(lambda: harness.count("rolled_back"))
        await harness.until(lambda: harness.registry.ledger()[-1].action == "rollback")
        move = harness.registry.ledger()[-1]
        assert (move.before, move.after) == (bad.id, harness.first.id)
        assert harness.registry.resolve("primary") == harness.first
        assert move.why.startswith("automatic: ")
        assert why in move.why
        assert (harness.primary.version, harness.primary.refused) == (harness.first.id, bad.id)
        assert why in str(harness.primary.reason)
        assert len(harness.loader.loaded) == 3, "the incumbent stayed warm"
        await asyncio.sleep(0.02)
        assert await harness.ask() <= {"amn", "gru"}
        assert harness.count("ok") == 1, "a rollback is no promotion"

    run(tmp_path, scenario)


def test_a_further_fallback_is_loaded_when_it_is_set_and_tried_out_when_it_moves(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        assert harness.deployments.engines.keys() == {"primary", "fallback"}
        harness.registry.point("fallback-2", add_version(harness.registry, "good"))
        await harness.until(lambda: "fallback-2" in harness.deployments.engines)
        assert harness.deployments.slots["fallback-2"].rollout is None, "nothing to compare it with"
        harness.registry.point("fallback-2", add_version(harness.registry, "good", "better"))
        await harness.until(lambda: harness.deployments.slots["fallback-2"].rollout)
        assert harness.count("ok", "fallback-2") == 1

    run(tmp_path, scenario)


def test_keeps_a_version_within_bounds_and_retires_its_incumbent(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        incumbent = harness.deployments.engines["primary"]
        good = await harness.promote("good")
        assert await harness.ask(MIN_COMPARISONS + 5) == {"good"}
        engine = harness.deployments.engines["primary"]
        assert isinstance(engine, Engine)
        assert engine.stats.latency_by_size()[1].batches >= MIN_COMPARISONS
        assert engine.on_answer, "it is compared"
        harness.later_s += WINDOW_S
        await harness.until(lambda: harness.deployments.slots["primary"].rollout is None)
        await harness.ask(5)
        with pytest.raises(Draining):
            await incumbent.run(contexts(), monotonic() + 9)
        assert harness.registry.resolve("primary") == good
        assert harness.primary.refused is None
        assert engine.on_answer is None

    run(tmp_path, scenario)


@pytest.mark.parametrize("settings", [{"watch_s": 0}, {"watch_errors": 1, "watch_agreement": -1}])
def test_rolls_nothing_back_if_the_settings_allow_anything(tmp_path: Path, settings: dict[str, float]) -> None:
    async def scenario(harness: Harness) -> None:
        bad = await harness.promote("opposes")
        assert await harness.ask(MIN_COMPARISONS + 5) == {"opposes"}
        await asyncio.sleep(0.02)
        assert harness.primary.version == bad.id

    run(tmp_path, scenario, **settings)


class OtherEncoder(FakeLoader):
    """Loads the net that opposes with the card of one for another encoder."""

    def load_predictor(self, version: Version) -> FakePredictor:
        made = super().load_predictor(version)
        made.card = card(made.name, encoder="another" if made.name == "opposes" else "fake")
        return made


def test_does_not_compare_nets_of_different_encoders(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        await harness.promote("opposes")
        assert await harness.ask(MIN_COMPARISONS + 5) == {"opposes"}
        await asyncio.sleep(0.02)
        assert harness.count("rolled_back") == 0

    run(tmp_path, scenario, loader=OtherEncoder)


def test_judges_a_second_promotion_by_the_last_version_that_passed(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        await harness.promote("good")
        await harness.promote("opposes")
        await harness.ask_until(lambda: harness.registry.resolve("primary") == harness.first)
        assert await harness.ask() == {"amn"}

    run(tmp_path, scenario)


def test_a_rollback_by_hand_serves_the_warm_incumbent(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        incumbent = harness.deployments.engines["primary"]
        for _ in range(2):  # a version that was taken back may be promoted again
            await harness.promote("good")
            harness.registry.rollback("primary")
            await harness.until(lambda: harness.deployments.engines["primary"] is incumbent)
        assert await harness.ask() == {"amn"}
        assert harness.count("rolled_back") == 0

    run(tmp_path, scenario)


def test_a_rollback_leaves_an_alias_that_has_moved_on(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        await harness.promote("opposes")
        elsewhere = add_version(harness.registry, "broken")
        harness.registry.point("primary", elsewhere)
        await harness.until(lambda: harness.count("refused"))
        await harness.ask_until(lambda: harness.count("rolled_back"))
        await harness.deployments.close(1)
        assert harness.registry.resolve("primary") == elsewhere
        assert harness.primary.version == harness.first.id
        assert harness.count("unrecorded") == 0

    run(tmp_path, scenario)


def test_serves_the_incumbent_if_the_registry_cannot_be_written(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        bad = await harness.promote("opposes")
        (harness.registry.root / ".lock").unlink()
        (harness.registry.root / ".lock").mkdir()
        await harness.ask_until(lambda: harness.count("unrecorded"))
        await asyncio.sleep(0.02)
        assert harness.registry.resolve("primary") == bad
        assert await harness.ask(3) == {"amn"}
        assert harness.primary.refused == bad.id

    run(tmp_path, scenario)


def test_waits_to_record_a_rollback_while_the_registry_is_locked(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        await harness.promote("opposes")
        with (harness.registry.root / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            await harness.ask_until(lambda: harness.count("rolled_back"))
            await asyncio.sleep(0.02)
        await harness.until(lambda: harness.registry.resolve("primary") == harness.first)

    run(tmp_path, scenario)


def test_rolls_back_a_corpus_that_fails(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        registry, deployments = harness.registry, harness.deployments
        first = add_version(registry, "corpus")
        registry.point("retriever", first)
        await harness.until(lambda: deployments.retriever_engine)
        incumbent = deployments.retriever_engine
        registry.point("retriever", add_version(registry, "corpus", "second"))
        await harness.until(lambda: deployments.retriever_engine is not incumbent)
        bad = [Search(np.zeros(3, np.float32), 1)]  # of another length than the corpus: its search raises
        for _ in range(5):
            with pytest.raises(ServiceError):
                await deployments.require_retriever_engine().run(bad, monotonic() + 9)
        await harness.until(lambda: deployments.retriever_engine is incumbent)
        await harness.until(lambda: registry.resolve("retriever") == first)

    run(tmp_path, scenario)


def test_connects_to_an_index_store_at_full_priority(tmp_path: Path) -> None:
    """The threads of the client answer callers, and inherit the priority of the one that connects."""

    async def scenario(harness: Harness) -> None:
        connected: list[bool] = []

        def connect(retriever: Retriever) -> SearchAdapter:
            connected.append(has_lowered_priority())
            return SearchAdapter(retriever)

        harness.loader.search_model = connect
        harness.registry.point("retriever", add_version(harness.registry, "corpus"))
        await harness.until(lambda: harness.deployments.retriever_engine)
        assert connected == [False]

    run(tmp_path, scenario)


def test_closes_without_waiting_for_a_registry_that_hangs(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        hangs, back = threading.Event(), threading.Event()

        class Hung(Registry):
            def find(self, wanted: str) -> Version:
                hangs.set()
                back.wait(PATIENCE_S)
                return super().find(wanted)

        await harness.promote("fails")
        harness.deployments.registry = Hung(harness.registry.root)
        try:
            await harness.ask_until(hangs.is_set)
            async with asyncio.timeout(PATIENCE_S / 2):
                await harness.deployments.close(0.05)
        finally:
            back.set()

    run(tmp_path, scenario)
