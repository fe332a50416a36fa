"""The budget of a request: every part is named after code that exists, and the parts add up."""

import asyncio
import sys
from pathlib import Path
from types import FrameType

import pytest

from bench import budget
from bench.options import ROOT, BenchOptions
from models.registry.registry import Registry

DIM = 16


def test_parts_add_up_and_answers_are_sent(tiny_registry: Registry, tmp_path: Path) -> None:
    rows = budget.measure(BenchOptions(0.05, 1, DIM, tmp_path), tiny_registry)
    assert [(row["wire"], row["connections"]) for row in rows] == [cell[:2] for cell in budget.CELLS]
    for row in rows:
        assert sum(row["parts"].values()) == pytest.approx(row["total"])
        assert row["parts"]["net"] > 0
        assert row["bare"] > 0


def test_every_place_exists() -> None:
    for place in budget.PLACES:
        file, _, function = place.partition(":")
        (path,) = (path for path in (ROOT / "service" / file, ROOT / file) if path.exists())
        assert not function or f"def {function}(" in path.read_text()


def test_a_function_belongs_to_its_part_before_its_file() -> None:
    def frame_of(file: str, name: str) -> FrameType | None:
        space: dict[str, object] = {"_getframe": sys._getframe}
        exec(
            compile(f"def {name}(): return _getframe()\nframe = {name}()", str(ROOT / "service" / file), "exec"), space
        )
        frame = space["frame"]
        assert isinstance(frame, FrameType)
        return frame

    assert budget.part_of(frame_of("http/gateway.py", "_end")) == "count"
    assert budget.part_of(frame_of("http/gateway.py", "another")) == "route"
    assert budget.part_of(frame_of("overload/limiter.py", "observe")) == "admit"
    assert budget.part_of(None) == budget.REST


def test_sends_the_next_requests_when_all_are_answered() -> None:
    class Echo(asyncio.Protocol):
        transport: budget.Memory

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, budget.Memory)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            asyncio.get_running_loop().call_soon(self.transport.write, data)

    async def drive() -> list[bytes]:
        driver = budget.Driver(Echo, 1, 2, [b"a", b"b", b"c"])
        assert await driver.run(3) > 0
        return driver.written

    assert asyncio.run(drive()) == [b"c", b"a"]
