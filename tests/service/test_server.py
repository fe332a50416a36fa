"""The process: what every server runs under, alone or beside others."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from service.app import create_app
from service.server import SWITCH_S, Server, config_of, run
from service.settings import Settings
from tests.fakes import FakeLoaders, mean_of, registry_of


class Unstarted(Server):
    """A server that only looks at the interpreter it would run in."""

    interval = 0.0

    def run(self, sockets: Any = None) -> None:
        self.interval = sys.getswitchinterval()


def test_a_net_in_a_thread_never_waits_long_for_the_interpreter(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Whoever starts the server, a worker too: Python's own interval would starve the net of a busy process."""
    before = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(before))
    settings = Settings(registry=registry_of(tmp_path, primary="amn").root)
    app = create_app(settings, FakeLoaders(amn=mean_of))
    server = Unstarted(config_of(app, settings), app, settings)
    with socket.socket() as listener:
        assert run(server, app, listener) == 1
    assert server.interval == pytest.approx(SWITCH_S)
