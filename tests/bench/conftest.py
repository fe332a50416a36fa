"""Servers on real sockets: the peers themselves, and a fake service."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from time import sleep
from typing import Any

import pytest
import torch
import uvicorn

from bench.servers import RunningServer
from bench.untrained import registry_of
from models.nets import build
from models.registry.registry import Registry
from service.processes.sockets import bind
from tests.fake_service import FakeService, fake_services

DIM = 16


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeService]]:
    """Start fake services."""
    with fake_services() as start:
        yield start


@pytest.fixture
def peer() -> Iterator[Callable[..., RunningServer]]:
    """Serve an ASGI application as the peers do, in a thread."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def serve(app: Any, name: str, octets: str = "") -> RunningServer:
        listener = bind("127.0.0.1", 0)
        config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            sleep(0.005)
        return RunningServer(name, f"http://127.0.0.1:{listener.getsockname()[1]}", 0, 0.0, octets)

    yield serve
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
        for listener in server.servers:
            listener.close()


@pytest.fixture(scope="session")
def tiny_registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with an untrained AMN as primary, D = 16."""
    return registry_of(tmp_path_factory.mktemp("registry"), DIM, ("amn",))


@pytest.fixture
def tiny_net() -> torch.nn.Module:
    """An AMN without zero weights, D = 16."""
    torch.manual_seed(0)
    net = build("amn", {"dim": DIM, "key_dim": 8, "hidden_dim": 16})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()
