"""The watcher follows the aliases; whatever happens to the registry, what serves stays."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import structlog

from models.registry.alias import Alias
from models.registry.registry import Registry, Version
from service.deploy.watcher import RETRY_S
from tests.conftest import PATIENCE_S
from tests.fakes import FakeLoader, FakePredictor, add_version
from tests.scraping import scrape
from tests.service.deploy.harness import Harness, run


class BusyAtFirst(FakeLoader):
    """Cannot load the net `good` the first time."""

    failures = 0

    def load_predictor(self, version: Version) -> FakePredictor:
        if version.name == "good" and not self.failures:
            self.failures += 1
            raise OSError(24, "Too many open files")
        return super().load_predictor(version)


def test_retries_a_refused_version_after_a_while(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        good = add_version(harness.registry, "good")
        harness.registry.point("primary", good)
        await harness.until(lambda: harness.count("refused"))
        await asyncio.sleep(0.03)
        assert harness.count("refused") == 1, "not at every poll"
        assert harness.primary.refused == good.id
        harness.later_s += RETRY_S
        await harness.until(lambda: harness.primary.version == good.id)
        assert harness.primary.refused is None

    run(tmp_path, scenario, loader=BusyAtFirst)


def test_lets_a_candidate_go_whose_alias_is_removed_and_loads_it_if_it_is_set_again(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        for _ in range(2):
            harness.registry.point("candidate", add_version(harness.registry, "good"))
            await harness.until(lambda: harness.deployments.engine(Alias.CANDIDATE))
            (harness.registry.root / "candidate").unlink()
            await harness.until(lambda: "candidate" not in harness.deployments.slots)

    run(tmp_path, scenario)


def test_forgets_a_refused_version_whose_alias_is_removed(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        for _ in range(2):
            harness.registry.point("fallback-2", add_version(harness.registry, "unknown"))
            await harness.until(lambda: "fallback-2" in harness.deployments.slots)
            assert harness.deployments.slots["fallback-2"].deployed.refused
            (harness.registry.root / "fallback-2").unlink()
            await harness.until(lambda: "fallback-2" not in harness.deployments.slots)
        assert await harness.ask() == {"amn"}

    run(tmp_path, scenario)


class Share(Registry):
    """A registry on a share: `trouble` happens whenever an alias is read."""

    @staticmethod
    def trouble() -> None:
        """Nothing, at first."""

    def resolve(self, alias: str) -> Version:
        self.trouble()
        return super().resolve(alias)


def stale() -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


def test_counts_every_poll_of_a_share_that_is_away_and_recovers(tmp_path: Path) -> None:
    """By the counts, an alert tells one failed poll from a registry that is away."""

    async def scenario(harness: Harness) -> None:
        share = harness.deployments.registry = Share(harness.registry.root)
        for spell in (1, 2):
            share.trouble = stale  # type: ignore[method-assign]
            before = harness.count("failed", "retriever")
            await harness.until(lambda before=before: harness.count("failed", "retriever") >= before + 3)  # type: ignore[misc]
            assert harness.watcher.failing == {"primary", "fallback", "candidate", "retriever"}
            assert "fallback-2" not in scrape(harness.metrics)[0].decode(), "it was never set"
            assert await harness.ask() <= {"amn", "good"}
            share.trouble = Share.trouble  # type: ignore[method-assign]
            await harness.promote("good" if spell == 1 else "amn")
            await harness.until(lambda: not harness.watcher.failing)

    run(tmp_path, scenario)


def test_reports_a_further_fallback_that_is_not_a_link(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        (harness.registry.root / "fallback-2").write_text("models/good/1")
        await harness.until(lambda: harness.count("failed", "fallback-2"))

    run(tmp_path, scenario)


def test_keeps_serving_if_an_alias_is_removed_and_counts_every_poll_but_logs_one(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        (harness.registry.root / "primary").unlink()
        await harness.until(lambda: harness.count("failed") >= 3)
        assert await harness.ask() == {"amn"}

    with structlog.testing.capture_logs() as lines:
        run(tmp_path, scenario)
    assert [line["alias"] for line in lines if line["event"] == "look at alias failed"] == ["primary"]


def test_answers_requests_while_the_share_hangs(tmp_path: Path) -> None:
    async def scenario(harness: Harness) -> None:
        share, back, hangs = Share(harness.registry.root), threading.Event(), threading.Event()
        share.trouble = lambda: hangs.set() or back.wait(PATIENCE_S) or None  # type: ignore[func-returns-value,method-assign]
        harness.deployments.registry = share
        try:
            await harness.until(hangs.is_set)
            assert await harness.ask(5) == {"amn"}
        finally:
            back.set()
        await harness.promote("good")

    run(tmp_path, scenario)
