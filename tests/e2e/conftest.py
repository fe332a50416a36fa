"""The console's service and browser, for the modules that drive it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.registry.registry import Registry
from tests.browser import Browser, browsing
from tests.conftest import SHIPPED, Process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Serve what ships, with a candidate that shadows every request."""
    home = tmp_path_factory.mktemp("console")
    root = Path(shutil.copytree(SHIPPED, home / "lvm", symlinks=True))
    registry = Registry(root)
    gmn = next(version for version in registry.versions() if version.name == "gmn")
    registry.point("candidate", gmn, why="to be looked at")
    started = Process(root, home / "log", LVM_SHADOW_SHARE="1", LVM_TRUTH_SHARE="1")
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Run a browser."""
    with browsing(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser, server: Process) -> Browser:
    """Return the console on a light desktop, with nothing chosen yet."""
    chromium.size(1280, 900)
    chromium.colours("light")
    chromium.open("about:blank")
    chromium.complaints.clear()
    chromium.open(f"{server.url}/")
    return chromium
